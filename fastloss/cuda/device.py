"""What kernels need of a device beside the arrays: a workspace of a few KB a stream, and where bad elements are recorded."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import cupy

STREAMS = 64  # whose workspaces are kept; freed memory goes to later work on its own stream, so one in use may be dropped
GROUPS = 1024  # groups that can have several ranges, and so a counter each
PROCESSORS = 16  # CUDA's number of the attribute


class Record(NamedTuple):
    """A bad element."""

    launch: int  # the launch's number
    key: int  # where it is; see Launch.index_of
    found: float  # what it is


class Workspace:
    """Memory that the launches of a stream share, one after the other."""

    def __init__(self, is_captured: bool = False) -> None:
        self.is_captured, self.kept = is_captured, None  # what a graph needs when it is launched again
        self.finished, self.is_recorded = cupy.cuda.alloc(4 * GROUPS), cupy.cuda.alloc(4)
        self.finished.memset_async(0, 4 * GROUPS)
        self.is_recorded.memset_async(0, 4)
        self.partials, self.size = None, 0
        self.pinned: Any = None

    def reserve(self, size: int) -> int:
        """Return where so many bytes of partial sums have room."""
        if size > self.size:
            self.partials, self.size = cupy.cuda.alloc(size), size
        return int(self.partials.ptr) if self.partials is not None else 0

    def record_at(self) -> int:
        """Return where a bad element is recorded: in the host's memory, at which the host can look without waiting."""
        if self.pinned is None:
            pinned = cupy.cuda.alloc_pinned_memory(24)
            self.launch = ctypes.c_int64.from_address(pinned.ptr)
            self.rest = (ctypes.c_double * 2).from_address(pinned.ptr + 8)
            self.launch.value, self.pinned = 0, pinned
        return int(self.pinned.ptr)

    def take_record(self) -> Record | None:
        """Return a bad element, if one was recorded, and forget it."""
        if self.pinned is None or not self.launch.value:
            return None
        record = Record(self.launch.value, int(self.rest[0]), self.rest[1])
        self.launch.value = 0
        self.is_recorded.memset_async(0, 4)
        return record


_lock = threading.Lock()
_workspaces: OrderedDict[tuple[int, int], Workspace] = OrderedDict()
_captured: list[Workspace] = []  # of graphs, which may be launched as long as the process lives, on any stream


def workspace(device: int) -> Workspace:
    """Return the workspace of the current stream; of a launch that is captured into a graph, one of its own."""
    stream = cupy.cuda.get_current_stream()
    if not cupy.cuda.runtime.is_hip and stream.is_capturing():
        _captured.append(Workspace(is_captured=True))
        return _captured[-1]
    key = device, stream.ptr
    if (found := _workspaces.get(key)) is None:
        with _lock:
            found = _workspaces.setdefault(key, Workspace())
            while len(_workspaces) > STREAMS:
                _workspaces.popitem(last=False)
    return found


def take_record() -> Record | None:
    """Return a bad element that a launch has recorded, if there is one."""
    with _lock:
        known = [*_workspaces.values(), *_captured]
    return next((record for workspace in known if (record := workspace.take_record()) is not None), None)


@functools.cache
def processors(device: int) -> int:
    """Return how many processors a device has."""
    return int(cupy.cuda.runtime.deviceGetAttribute(PROCESSORS, device))


def current() -> int:
    """Return the current device, or raise the error that says what is missing."""
    try:
        return int(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"no GPU can be used: {error}") from error
