"""Where machine code is kept for the next process, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path


@cache
def cache_folder() -> Path:
    """Return where machine code is kept: FASTLOSS_CACHE_DIR, or `fastloss` in the user's cache folder."""
    if given := os.environ.get("FASTLOSS_CACHE_DIR"):
        return Path(given).expanduser()
    if given := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(given) / "fastloss"
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastloss"
    except RuntimeError:  # no home: nothing is kept
        return Path(os.devnull) / "fastloss"


def read(path: Path) -> bytes | None:
    """Return the code that was written, or None where there is none or it was cut off."""
    try:
        digest, code = (content := path.read_bytes())[:32], content[32:]
    except OSError:
        return None
    return code if hashlib.sha256(code).digest() == digest else None


def write(path: Path, code: bytes) -> None:
    """Keep the code for the next process; a folder that cannot be written only costs the next compilation."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            file.write_bytes(hashlib.sha256(code).digest() + code)
            file.replace(path)  # whole or not at all, also with several processes at it
