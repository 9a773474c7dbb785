"""What kernels need of a device beside the arrays: a workspace a stream, and a record of bad elements on the host."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import cupy

STREAMS = 64  # whose workspaces are kept; freed memory goes to later work on its own stream, so one in use may be dropped
GROUPS = 1024  # groups that can have several ranges, and so a counter each
SUMS = 6  # that a range leaves at most: Dice's four, and a bad element's place and value
PARTIALS = 8 * SUMS * 2 * GROUPS  # bytes; see launch.py for the number of ranges
SLOTS = 4096  # records a page: while a graph is captured there is perhaps no other to be had
PER_THREAD = 2  # the address of the default stream where each thread has its own


_slots = itertools.count()


@functools.cache
def page(number: int) -> Any:
    """Return memory of the host that a device can write to."""
    return cupy.cuda.alloc_pinned_memory(24 * SLOTS)


class Record(NamedTuple):
    """A bad element."""

    launch: int  # the launch's number
    key: int  # where it is; see Launch.bad_element
    found: float  # what it is


class Slot:
    """Where a kernel writes a bad element: memory of the host, at which the host can look without waiting."""

    def __init__(self) -> None:
        number = next(_slots)
        self.page = page(number // SLOTS)
        self.address = self.page.ptr + 24 * (number % SLOTS)
        self.launch = ctypes.c_int64.from_address(self.address)
        self.rest = (ctypes.c_double * 2).from_address(self.address + 8)
        self.launch.value = 0

    def take(self) -> Record | None:
        """Return what was recorded, and forget it."""
        if not self.launch.value:
            return None
        record = Record(self.launch.value, int(self.rest[0]), self.rest[1])
        self.launch.value = 0
        return record


class Workspace:
    """Memory that the launches of a stream share, one after the other: counters that are 0 between them, and partial sums."""

    def __init__(self, device: int, stream: Any, is_captured: bool = False) -> None:
        self.device, self.stream, self.is_captured = device, stream, is_captured
        self.kept: Any = None  # what a captured launch needs when it runs again, and the caller does not know of
        self.slot = Slot()
        self.finished, self.is_recorded = cupy.cuda.alloc(4 * GROUPS), cupy.cuda.alloc(4)
        self.partials = cupy.cuda.alloc(PARTIALS)
        self.finished.memset_async(0, 4 * GROUPS)
        self.is_recorded.memset_async(0, 4)

    def take_record(self) -> Record | None:
        """Return a bad element, if one was recorded, and forget it."""
        if (record := self.slot.take()) is not None:
            with cupy.cuda.Device(self.device), self.stream:
                self.is_recorded.memset_async(0, 4)
        return record


_lock = threading.Lock()
_workspaces: OrderedDict[tuple[int, int, int], Workspace] = OrderedDict()
_captured: list[Workspace] = []  # of graphs, which may be launched as long as the process lives, on any stream
_dropped: list[Slot] = []  # of workspaces that are not kept


def is_capturing(stream: Any) -> bool:
    """Whether launches on a stream are recorded into a graph."""
    return not cupy.cuda.runtime.is_hip and bool(stream.is_capturing())


def find_workspace(device: int) -> Workspace:
    """Return the workspace of the current stream; of a launch that is captured into a graph, one of its own."""
    stream = cupy.cuda.get_current_stream()
    if is_capturing(stream):
        _captured.append(Workspace(device, cupy.cuda.Stream.null, is_captured=True))
        return _captured[-1]
    key = device, stream.ptr, threading.get_ident() if stream.ptr == PER_THREAD else 0
    if (found := _workspaces.get(key)) is None:
        with _lock:
            found = _workspaces.setdefault(key, Workspace(device, stream))
            while len(_workspaces) > STREAMS:
                _dropped.append(_workspaces.popitem(last=False)[1].slot)
    return found


def take_record() -> Record | None:
    """Return a bad element that a launch has recorded, if there is one."""
    if is_capturing(cupy.cuda.get_current_stream()):
        return None
    with _lock:
        known = [*_workspaces.values(), *_captured]
    found = (record for workspace in known if (record := workspace.take_record()) is not None)
    return next(found, None) or next((record for slot in _dropped if (record := slot.take()) is not None), None)


@functools.cache
def processors(device: int) -> int:
    """Return how many processors a device has."""
    return int(cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount, device))


def current_device() -> int:
    """Return the current device, or raise the error that says what is missing."""
    try:
        return int(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"no GPU can be used: {error}") from error
