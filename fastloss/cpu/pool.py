"""The threads: they all call one compiled kernel, which hands out ranges by an atomic counter until none is left.

The caller works too, so a pool of n threads has n - 1 workers, and a call makes progress even if no worker ever wakes. A
worker that comes late finds no range left and touches no array. Which thread takes a range does not matter: each range
leaves its own partial sum, and they are added in their own order.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# To wait for the last range. In Python 3.11 sleep(0) takes 75 us on Linux, which rounds it up to its timers' slack, and
# sched_yield 0.7: BCE value+gradient of 100,352 elements went from 98 us to 82.
give_way: Callable[[], object] = os.sched_yield if hasattr(os, "sched_yield") else functools.partial(time.sleep, 0)

# The CPU that a thread runs on. In a virtual machine Linux often wakes a worker on the caller's own CPU although another is
# idle (a halted one looks as if the host had taken it away), and then the two take turns: 400,000 elements of BCE took 225 us
# in such processes and 140 in others. So a worker that finds itself there goes elsewhere, and stays away.
get_cpu: Callable[[], int] | None = getattr(ctypes.PyDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None

Job = tuple[Callable[..., None], Any, Any, int, Any]


class Pool:
    """Workers that wait for jobs; they start when first needed and end with the process."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.forget_workers()

    def forget_workers(self) -> None:
        """Begin anew without workers, as a forked child must: threads do not survive the fork."""
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._workers = 0
        self._starting = threading.Lock()

    def run(self, kernel: Callable[..., None], frame: Any, layout: Any, ranges: int, keep: list[Any]) -> None:
        """Call `kernel(frame, layout)` on the caller's thread and on helpers; return when every range is finished.

        `frame[1]` counts finished ranges. `keep` is what the frame points to; jobs hold it, so that memory outlives a caller
        who is interrupted. It is emptied at the end: a worker may not be the last to let go of an array, because what frees
        PyTorch's gives up the GIL in the middle, and a thread that asks for it back while Python exits ends the process.
        """
        helpers = min(self.threads, ranges) - 1
        if helpers > self._workers:
            self._start(helpers)
        cpu = get_cpu() if get_cpu else -1
        for _ in range(min(helpers, self._workers)):
            self._jobs.put((kernel, frame, layout, cpu, keep))
        kernel(frame, layout)
        while frame[1] < ranges:  # at most the length of one range: others are finishing theirs
            give_way()
        keep.clear()

    def _start(self, count: int) -> None:
        with self._starting, contextlib.suppress(RuntimeError):  # no more threads to be had: fewer help
            while self._workers < count:
                threading.Thread(target=self._serve, args=(self._jobs,), name="fastloss", daemon=True).start()
                self._workers += 1

    @staticmethod
    def _serve(jobs: SimpleQueue[Job]) -> None:
        place = Place()
        while True:
            kernel, frame, layout, cpu, _keep = jobs.get()
            if get_cpu and get_cpu() == cpu:
                place.leave(cpu)
            kernel(frame, layout)
            del frame, _keep  # arrays are not held while waiting for the next job


class Place:
    """The CPUs that a worker may run on: those that its thread was given, but for the caller's."""

    def __init__(self) -> None:
        self.given: set[int] = set()
        self.left: set[int] = set()

    def leave(self, cpu: int) -> None:
        """Move the calling thread off a CPU; it stays if it was given no other."""
        allowed = os.sched_getaffinity(0)
        if allowed != self.left:  # someone else has set them since
            self.given = allowed
        if others := self.given - {cpu}:
            with contextlib.suppress(OSError):  # not permitted: it stays too
                os.sched_setaffinity(0, others)
                self.left = others


def _default_threads() -> int:
    """Return FASTLOSS_NUM_THREADS, or the number of CPUs this process may use."""
    given = os.environ.get("FASTLOSS_NUM_THREADS")
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"the environment variable FASTLOSS_NUM_THREADS is {given!r}; accepted: a whole number from 1 on")
    return int(given)


POOL = Pool(_default_threads())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.forget_workers)


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, the caller's own included; 1 computes on the calling thread alone.

    Results do not depend on it. Raises `TypeError` if n is not a whole number, `ValueError` if it is below 1.
    """
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"the number of threads must be an int, not {n!r}")
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"the number of threads is {n}; accepted: 1 or more")
    POOL.threads = n


def get_num_threads() -> int:
    """Return how many threads a call may use: FASTLOSS_NUM_THREADS, or by default the CPUs this process may run on."""
    return POOL.threads
