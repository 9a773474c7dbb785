"""The cache of machine code on disk. Each kernel is one file, which is written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fastloss.version import __version__

PACKAGE = Path(__file__).parents[1]
SHARED = ("ops.py", "formula.py", "core/*.py", "kernel/*.py")  # sources that decide the code of kernels on every machine


@cache
def cache_folder() -> Path:
    """Return the folder of the cache: FASTLOSS_CACHE_DIR, or `fastloss` in the user's cache folder."""
    if given := os.environ.get("FASTLOSS_CACHE_DIR"):
        return Path(given).expanduser()
    if given := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(given) / "fastloss"
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastloss"
    except RuntimeError:  # no home directory: nothing is stored
        return Path(os.devnull) / "fastloss"


def fingerprint(machine: str, *parts: Any) -> str:
    """Hash the version of the package, the sources that decide the code for a machine, and `parts`."""
    digest = hashlib.sha256(repr((__version__, parts)).encode())
    for path in sources(machine):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def sources(machine: str) -> Iterator[Path]:
    """List the source files that decide the code for a machine, "cpu" or "cuda"."""
    for pattern in (*SHARED, f"{machine}/*.py", f"{machine}/*.cuh"):
        yield from sorted(PACKAGE.glob(pattern))


def read(path: Path) -> bytes | None:
    """Return the code stored in a file, or None if the file is missing or damaged."""
    try:
        digest, code = (content := path.read_bytes())[:32], content[32:]
    except OSError:
        return None
    return code if hashlib.sha256(code).digest() == digest else None


def write(path: Path, code: bytes) -> None:
    """Store code in a file. If the folder is not writable, nothing is stored and the next process compiles again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            file.write_bytes(hashlib.sha256(code).digest() + code)
            file.replace(path)  # atomic, so several processes may write the same file
