"""The threads that compute a call: the team of PyTorch's OpenMP runtime where that is loaded, otherwise a pool of our own.

Results do not depend on the threads: each range leaves a partial sum of its own, and partial sums are added in the order of the
ranges.
"""

from __future__ import annotations

import operator
import os
import sys
from time import perf_counter
from typing import Any

from fastloss.cpu.cpus import count_cpus
from fastloss.cpu.team import Team, find_team
from fastloss.kernel.builds import built

CHOICES = ("pool", "openmp")
# Estimated nanoseconds of work for a further thread. With less, two threads that were awake took longer than one.
POOL_WORK, TEAM_WORK = 12_000.0, 6_000.0
# To wake a worker of the pool takes the caller 20 us. Work for which that pays; and seconds since the last call, within which a
# further call is likely, for which the worker will then be awake.
WAKE_WORK, SOON = 80_000.0, 1e-3


class Threads:
    """How many threads a call may use, and which."""

    def __init__(self) -> None:
        self.count = default_count()
        self.pool: Any = None  # is made when first needed, because it needs llvmlite
        self.last_call = 0.0  # when the pool was last asked to compute
        self.team: Team | None = None
        self.searches = default_choice() != "pool"  # whether to look for a team in the next call

    def run(self, kernel: Any, frame: Any, most: int, work: float) -> None:
        """Call `kernel(frame)` on as many threads as the work is worth, at most `most`, the caller's among them, and wait for all."""
        if self.searches and "torch" in sys.modules:
            self.search()
        team = self.team
        count = min(self.count, most, 1 + int(work / (POOL_WORK if team is None else TEAM_WORK)))
        if team is not None:
            count = min(count, team.limit())
        if count == 1:
            kernel(frame)
        elif team is not None:
            team.run(kernel, frame, count)
        else:
            last, self.last_call = self.last_call, perf_counter()
            if work < WAKE_WORK and self.last_call - last > SOON:
                kernel(frame)
            else:
                if self.pool is None:
                    self.pool = built("pool", import_pool)()
                self.pool.run(kernel, frame, count)

    def search(self) -> None:
        """Look for PyTorch's team once PyTorch is imported."""
        if hasattr(sys.modules["torch"], "get_num_threads"):  # not while PyTorch is still being imported
            self.team, self.searches = find_team(), False

    def after_fork(self) -> None:
        """Forget threads that do not survive a fork. An OpenMP runtime that has been used before does not work in the child."""
        self.pool = None
        self.team, self.searches = None, False


def import_pool() -> Any:
    """Return the class of pools."""
    from fastloss.cpu.pool import Pool

    return Pool


def default_count() -> int:
    """Return FASTLOSS_NUM_THREADS if it is set, otherwise the number of CPUs that this process may use; see `cpus.py`."""
    given = os.environ.get("FASTLOSS_NUM_THREADS")
    if given is None:
        return count_cpus()
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"the environment variable FASTLOSS_NUM_THREADS is {given!r}; accepted: an integer of 1 or more")
    return int(given)


def default_choice() -> str | None:
    """Return FASTLOSS_THREADS if it is set: "pool" or "openmp"."""
    given = os.environ.get("FASTLOSS_THREADS") or None
    if given not in (None, *CHOICES):
        raise ValueError(f"the environment variable FASTLOSS_THREADS is {given!r}; accepted: {', '.join(CHOICES)}")
    return given


THREADS = Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=THREADS.after_fork)


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, including the caller's; 1 computes on the caller's thread alone.

    Where PyTorch is loaded, a call uses no more threads than PyTorch is set to use either. Results do not depend on the number of
    threads. Raises `TypeError` if n is not an integer, `ValueError` if it is below 1.
    """
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"the number of threads must be an int, not {n!r}")
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"the number of threads is {n}; accepted: 1 or more")
    THREADS.count = n


def get_num_threads() -> int:
    """Return how many threads a call may use. The default is FASTLOSS_NUM_THREADS, or the number of CPUs this process may use."""
    return THREADS.count
