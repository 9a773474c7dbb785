"""The cache of machine code on disk: a folder in which each kernel is one file, and each loop that kernels share.

Code from the cache is executed, so it is read only from a folder and files that belong to the user or to root, and that nobody else
may write. A file holds a hash of its name and its code; the name is a hash of everything that decides the code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastloss.core.checks import caller_level
from fastloss.version import __version__

try:
    import fcntl
except ImportError:  # Windows: processes that start at once may compile the same kernel
    fcntl = None  # type: ignore[assignment]

PACKAGE = Path(__file__).parents[1]
SHARED = ("ops.py", "formula.py", "core/*.py", "kernel/*.py")  # sources that decide the code of kernels on every machine
MOST_BYTES = 256 << 20  # of all kernels; a kernel takes 5 to 30 KB
PATIENCE = 60.0  # seconds to wait for another process that compiles the same kernel
ABANDONED = 3600.0  # seconds after which an unfinished file is deleted
HASH_BYTES = 32
NAME = re.compile("[0-9a-f]{64}")
UNFINISHED, LOCK = ".new", ".lock"  # ends of the names of other files
READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
CREATE = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def cache_folder() -> Path | None:
    """Return the folder of the cache: FASTLOSS_CACHE_DIR, or `fastloss` in the user's cache folder. None if there is no home folder."""
    try:
        if given := os.environ.get("FASTLOSS_CACHE_DIR"):
            return Path(given).expanduser()
        given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
        if given and Path(given).is_absolute():  # the XDG specification ignores relative paths
            return Path(given) / "fastloss"
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastloss"
    except RuntimeError:  # the home folder is unknown
        return None


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


def find_fault(status: os.stat_result) -> str:
    """Return why a file or folder may have been written by somebody else, or "" if only the user and root may write it."""
    if os.name != "posix":
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (uid {status.st_uid})"
    others = stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    return f"may be written by other users (mode {stat.S_IMODE(status.st_mode):o})" if others else ""


class Entry(NamedTuple):
    """A file of the cache."""

    name: str
    size: int
    used: float  # when it was written or last read, in seconds since the epoch


class Folder(NamedTuple):
    """An open folder: the path before the names of its files, or "" and a descriptor, which still names it if the path changes."""

    prefix: str
    descriptor: int | None

    def open(self, name: str, flags: int) -> int:
        """Open a file, which only the user may read and write if it is created."""
        return os.open(self.prefix + name, flags, 0o600, dir_fd=self.descriptor)

    def rename(self, old: str, new: str) -> None:
        """Rename a file, over another if there is one."""
        os.replace(self.prefix + old, self.prefix + new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)


class Cache:
    """A folder of machine code, by name. Without a folder, or if the folder is not safe, nothing is read or stored."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.faults: list[str] = []  # why code was not loaded: texts of warnings that have not been shown
        self.known: set[str] = set()  # the files and folders with faults

    def find_or_make(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return the code stored under a name, or make and store it. Of several processes, one makes it, and the others wait."""
        if (code := self.read(name)) is not None:
            return code
        with self.exclusive(name):
            if (code := self.read(name)) is None:
                code = make()
                self.write(name, code)
            return code

    def read(self, name: str) -> bytes | None:
        """Return the code stored under a name; None if it is missing, damaged, stored under another name, or not safe to execute."""
        with self.opened() as folder, contextlib.suppress(OSError):
            if folder is None:
                return None
            with open(folder.open(name, READ), "rb") as file:
                if fault := find_fault(os.fstat(file.fileno())):
                    self.add_fault(f"{self.folder}/{name}", fault)
                    return None
                content = file.read()
                if content[:HASH_BYTES] != digest(name, content[HASH_BYTES:]):
                    return None
                with contextlib.suppress(OSError):  # a folder of root's
                    os.utime(file.fileno() if os.utime in os.supports_fd else f"{self.folder}/{name}")
                return content[HASH_BYTES:]
        return None

    def write(self, name: str, code: bytes) -> None:
        """Store code under a name, atomically. If the folder is not writable, nothing is stored and the next process compiles again."""
        with self.opened(make=True) as folder, contextlib.suppress(OSError):
            if folder is None:
                return
            unfinished = f"{secrets.token_hex(8)}{UNFINISHED}"
            try:
                with open(folder.open(unfinished, CREATE | os.O_EXCL), "wb") as file:
                    file.write(digest(name, code) + code)
                folder.rename(unfinished, name)
            except OSError:
                self.remove(unfinished)
                raise
            self.shrink()

    @contextlib.contextmanager
    def opened(self, make: bool = False) -> Iterator[Folder | None]:
        """Open the folder, and check that it is safe; yield None if it is not, or does not exist."""
        descriptor = None
        try:
            if make and self.folder is not None:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder is not None and os.name == "posix":
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        try:
            if self.folder is None or descriptor is None:
                yield None if self.folder is None else Folder(f"{self.folder}/", None)
            elif fault := find_fault(os.fstat(descriptor)):
                self.add_fault(str(self.folder), fault)
                yield None
            else:
                yield Folder("", descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Wait until no other process makes the code of a name, or has made it. Where files cannot be locked, do not wait."""
        file = None
        with self.opened(make=True) as folder, contextlib.suppress(OSError):
            if folder is not None and fcntl is not None:
                file = open(folder.open(name + LOCK, CREATE), "wb")  # noqa: SIM115 (closed below)
        if file is None:
            yield
            return
        with file:
            locked = self.wait_for(name, file.fileno())
            try:
                yield
            finally:
                if locked:
                    self.remove(name + LOCK)

    def wait_for(self, name: str, descriptor: int) -> bool:
        """Lock a file, and return whether it is locked. Give up if the code is stored meanwhile, or after `PATIENCE` seconds."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
                if (Path(self.folder or "") / name).exists():
                    return False
            except OSError:  # a file system without locks
                return False
            else:
                return True
        return False

    def add_fault(self, path: str, fault: str) -> None:
        """Remember to warn of a file or folder, once."""
        if path not in self.known:
            self.known.add(path)
            self.faults.append(
                f"{path} {fault}, so no compiled kernels are loaded from there, because they would be executed; "
                "accepted: a folder and files of yours that no other user may write (chmod go-w), or another folder in FASTLOSS_CACHE_DIR"
            )

    def warn(self) -> None:
        """Show the warnings that have not been shown. They name the line of the user's call."""
        while self.faults:
            warnings.warn(self.faults.pop(), RuntimeWarning, stacklevel=caller_level())

    def entries(self) -> list[Entry]:
        """Return all kernels of the folder, the last used last."""
        found = []
        with contextlib.suppress(OSError), os.scandir(self.folder or os.devnull) as files:
            for file in files:
                with contextlib.suppress(OSError):  # another process has deleted it
                    if NAME.fullmatch(file.name):
                        found.append(Entry(file.name, file.stat().st_size, file.stat().st_mtime))
                    elif file.name.endswith((UNFINISHED, LOCK)) and file.stat().st_mtime < time.time() - ABANDONED:
                        self.remove(file.name)
        return sorted(found, key=lambda entry: entry.used)

    def shrink(self) -> None:
        """Delete the kernels that have not been used for longest, until all take less than `MOST_BYTES`."""
        entries = self.entries()
        size = sum(entry.size for entry in entries)
        for entry in entries:
            if size <= MOST_BYTES:
                return
            self.remove(entry.name)
            size -= entry.size

    def clear(self) -> int:
        """Delete all kernels, and return how many there were."""
        entries = self.entries()
        for entry in entries:
            self.remove(entry.name)
        return len(entries)

    def remove(self, name: str) -> None:
        """Delete a file of the folder, if it exists."""
        with contextlib.suppress(OSError):
            (Path(self.folder or "") / name).unlink()


def digest(name: str, code: bytes) -> bytes:
    """Hash the name and the code of a kernel, so that one kernel's file is refused under the name of another."""
    return hashlib.sha256(name.encode() + b"\0" + code).digest()


@cache
def kernel_cache() -> Cache:
    """Return the cache of this process."""
    return Cache(cache_folder())
