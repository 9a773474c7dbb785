"""The memory that kernels need besides the arrays: a workspace for each stream, and records of bad elements on the host."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import cupy

from fastloss.cuda.source import GROUPS

STREAMS = 64  # number of workspaces stored; freed memory is reused on its own stream only, so a workspace in use may be dropped
SUMS = 4  # largest number of partial sums of a range: those of Dice
PARTIALS = 8 * SUMS * 2 * GROUPS  # bytes; see launch.py for the number of ranges
FLAG = 12 * GROUPS + 8  # position in bytes of `Counters.is_recorded` in elements.cuh
COUNTERS = FLAG + 8  # bytes
CAPTURED = 64  # launches that can be captured without a node of the graph that sets their counters to 0
SLOTS = 4096  # records on a page; while a graph is captured, allocating another page may fail
PER_THREAD = 2  # the handle of the default stream if each thread has a default stream of its own


_slots = itertools.count()


@functools.cache
def page(number: int) -> Any:
    """Allocate a page of host memory to which a device can write."""
    return cupy.cuda.alloc_pinned_memory(24 * SLOTS)


class Record(NamedTuple):
    """The record of an element outside [0, 1]."""

    launch: int  # number of the launch that found it
    key: int  # its operand and its position; see Launch.bad_element
    found: float  # its value


class Slot:
    """Host memory to which a kernel writes the record of a bad element, and which the host can read without waiting."""

    def __init__(self) -> None:
        number = next(_slots)
        self.page = page(number // SLOTS)
        self.address = self.page.ptr + 24 * (number % SLOTS)
        self.launch = ctypes.c_int64.from_address(self.address)
        self.rest = (ctypes.c_double * 2).from_address(self.address + 8)
        self.launch.value = 0

    def take(self) -> Record | None:
        """Return and clear the record; None if there is none."""
        if not self.launch.value:
            return None
        record = Record(self.launch.value, int(self.rest[0]), self.rest[1])
        self.launch.value = 0
        return record


class Workspace:
    """Device memory for the partial sums of a stream's launches, and for counters, which are 0 before and after each launch."""

    def __init__(self, device: int, stream: Any, counters: Any) -> None:
        self.device, self.stream, self.counters = device, stream, counters
        self.slot = Slot()
        self.partials = cupy.cuda.alloc(PARTIALS)

    def take_record(self) -> Record | None:
        """Return and clear the record of a bad element; None if there is none."""
        if (record := self.slot.take()) is not None:
            with cupy.cuda.Device(self.device), self.stream:
                (self.counters + FLAG).memset_async(0, 4)
        return record


def make_counters(count: int) -> list[Any]:
    """Allocate counters for several workspaces, and set them to 0 on the current stream."""
    memory = cupy.cuda.alloc(count * COUNTERS)
    memory.memset_async(0, count * COUNTERS)
    return [memory + k * COUNTERS for k in range(count)]


_lock = threading.Lock()
_spare: dict[int, list[Any]] = {}  # by device: counters for launches that are captured
_workspaces: OrderedDict[tuple[int, int, int], Workspace] = OrderedDict()
_captured: list[Workspace] = []  # of graphs, which may run at any time until the process ends, on any stream
_dropped: list[Slot] = []  # of workspaces that are no longer stored


def is_capturing(stream: Any) -> bool:
    """Whether launches on a stream are captured into a graph."""
    return bool(stream.is_capturing())


def find_workspace(device: int) -> Workspace:
    """Return the workspace of the current stream. A launch that is captured into a graph gets a new workspace."""
    stream = cupy.cuda.get_current_stream()
    if is_capturing(stream):
        spare = _spare.get(device) or make_counters(1)
        _captured.append(Workspace(device, cupy.cuda.Stream.null, spare.pop()))
        return _captured[-1]
    key = device, stream.ptr, threading.get_ident() if stream.ptr == PER_THREAD else 0
    if (found := _workspaces.get(key)) is None:
        with _lock:
            spare = _spare.setdefault(device, [])
            if len(spare) < CAPTURED:
                spare += make_counters(CAPTURED)
                stream.synchronize()  # once for many launches: graphs may run on any stream
            found = _workspaces.setdefault(key, Workspace(device, stream, make_counters(1)[0]))
            while len(_workspaces) > STREAMS:
                _dropped.append(_workspaces.popitem(last=False)[1].slot)
    return found


def take_record() -> Record | None:
    """Return and clear the record of a bad element in any workspace; None if there is none, or during a capture."""
    if is_capturing(cupy.cuda.get_current_stream()):
        return None
    with _lock:
        known = [*_workspaces.values(), *_captured]
    found = (record for workspace in known if (record := workspace.take_record()) is not None)
    return next(found, None) or next((record for slot in _dropped if (record := slot.take()) is not None), None)


@functools.cache
def count_multiprocessors(device: int) -> int:
    """Return the number of multiprocessors of a device."""
    return int(cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount, device))


def current_device() -> int:
    """Return the number of the current device; raise RuntimeError if there is none."""
    try:
        return int(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"no GPU can be used: {error}; {versions()}") from error


def versions() -> str:
    """Say which versions of CUDA were found, and what to install if they do not fit."""
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    found = f"the driver is of CUDA {dotted(driver)}" if driver else "there is no driver"
    fits = not driver or driver // 1000 >= runtime // 1000
    remedy = "" if fits else f"; accepted: a newer driver, or pip install 'fastloss[cuda{driver // 1000}]'"
    return f"{found}, and CuPy is for CUDA {dotted(runtime)}{remedy}"


def dotted(number: int) -> str:
    """Format CUDA's version number: 13010 as 13.1."""
    return f"{number // 1000}.{number % 1000 // 10}"
