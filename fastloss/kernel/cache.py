"""The cache of machine code on disk: a file for each kernel, written whole or not at all."""

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
SHARED = ("ops.py", "formula.py", "core/*.py", "kernel/*.py")  # the sources that decide the machine code of every machine


@cache
def cache_folder() -> Path:
    """Locate the cache: FASTLOSS_CACHE_DIR, or `fastloss` in the user's cache folder."""
    if given := os.environ.get("FASTLOSS_CACHE_DIR"):
        return Path(given).expanduser()
    if given := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(given) / "fastloss"
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastloss"
    except RuntimeError:  # no home directory: nothing is stored
        return Path(os.devnull) / "fastloss"


def fingerprint(machine: str, *parts: Any) -> str:
    """Summarise the version of the package, its sources that decide a machine's code, and other parts of a kernel's key."""
    digest = hashlib.sha256(repr((__version__, parts)).encode())
    for path in sources(machine):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def sources(machine: str) -> Iterator[Path]:
    """List the files of the package that decide the machine code of "cpu" or "cuda"."""
    for pattern in (*SHARED, f"{machine}/*.py", f"{machine}/*.cuh"):
        yield from sorted(PACKAGE.glob(pattern))


def read(path: Path) -> bytes | None:
    """Return the code in a file, or None if there is no file or it is not whole."""
    try:
        digest, code = (content := path.read_bytes())[:32], content[32:]
    except OSError:
        return None
    return code if hashlib.sha256(code).digest() == digest else None


def write(path: Path, code: bytes) -> None:
    """Write code to a file. If the folder cannot be written, the next process compiles again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            file.write_bytes(hashlib.sha256(code).digest() + code)
            file.replace(path)  # in one step, also if several processes write
