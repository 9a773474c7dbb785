"""A pool of threads. The threads of a call run the same kernel, which takes ranges from an atomic counter until none is left.

The caller's thread computes too, so a pool of n threads has n - 1 workers, and a call makes progress even if no worker wakes. A
worker that starts late finds no range left and reads no array. Results do not depend on which thread takes a range: each range
leaves a partial sum of its own, and the partial sums are added in the order of the ranges.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

# Called while waiting for the last range. On Linux with Python 3.11, sleep(0) takes 75 us, because the kernel rounds it up to the
# timer slack, and sched_yield takes 0.7 us: BCE value+gradient of 100,352 elements went from 98 us to 82.
yield_cpu: Callable[[], object] = os.sched_yield if hasattr(os, "sched_yield") else functools.partial(time.sleep, 0)

# Returns the CPU that the calling thread runs on. In a virtual machine, Linux often wakes a worker on the caller's CPU although
# another CPU is idle (a halted virtual CPU looks as if the host had preempted it), and the two threads then take turns: 400,000
# elements of BCE took 225 us in such processes and 140 us in others. So a worker that wakes on the caller's CPU moves to another,
# and does not come back.
get_cpu: Callable[[], int] | None = getattr(ctypes.PyDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None

Job = tuple[Callable[..., None], Any, int, Any]


class Pool:
    """Worker threads that wait for jobs. They start when first needed and end with the process."""

    def __init__(self) -> None:
        self.forget_workers()

    def forget_workers(self) -> None:
        """Reset the pool to have no workers. A forked child needs this, because threads do not survive a fork."""
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._workers = 0
        self._starting = threading.Lock()

    def run(self, kernel: Callable[..., None], frame: Any, ranges: int, threads: int, references: list[Any]) -> None:
        """Call `kernel(frame)` on the caller's thread and on `threads - 1` workers; return when all ranges are finished.

        `frame[1]` counts finished ranges. `references` holds the objects whose memory the frame points to. Jobs hold it too, so that
        the memory outlives a caller that is interrupted. It is cleared at the end, so that no worker drops the last reference to an
        array: freeing a PyTorch tensor releases the GIL, and a thread that acquires it again while Python exits ends the process.
        """
        helpers = threads - 1
        if helpers > self._workers:
            self._start(helpers)
        cpu = get_cpu() if get_cpu else -1
        for _ in range(min(helpers, self._workers)):
            self._jobs.put((kernel, frame, cpu, references))
        kernel(frame)
        while frame[1] < ranges:  # at most as long as one range takes, which a worker is finishing
            yield_cpu()
        references.clear()

    def _start(self, count: int) -> None:
        """Start workers until there are `count`."""
        with self._starting, contextlib.suppress(RuntimeError):  # the system allows no more threads: fewer workers help
            while self._workers < count:
                threading.Thread(target=self._work, args=(self._jobs,), name="fastloss", daemon=True).start()
                self._workers += 1

    @staticmethod
    def _work(jobs: SimpleQueue[Job]) -> None:
        """Take jobs and call their kernels until the process ends."""
        affinity = Affinity()
        while True:
            kernel, frame, cpu, _references = jobs.get()
            if get_cpu and get_cpu() == cpu:
                affinity.leave(cpu)
            kernel(frame)
            del frame, _references  # a worker that waits for the next job must not keep arrays alive


class Affinity:
    """The set of CPUs that a worker may run on, without the CPU of the caller."""

    def __init__(self) -> None:
        self.given: set[int] = set()  # CPUs that the thread may run on, before `leave` removes one
        self.last_set: set[int] = set()  # CPUs that `leave` has set last

    def leave(self, cpu: int) -> None:
        """Move the calling thread away from a CPU, unless it may run on no other."""
        current = os.sched_getaffinity(0)
        if current != self.last_set:  # other code has set the affinity since
            self.given = current
        if others := self.given - {cpu}:
            with contextlib.suppress(OSError):  # if the system does not permit it, the thread stays
                os.sched_setaffinity(0, others)
                self.last_set = others
