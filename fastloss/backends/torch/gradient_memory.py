"""A cache of memory for large gradients, so that a training step reuses the memory that the step before has freed.

A training step frees its gradient, and the next one allocates a gradient of the same size. The system has to find and clear the
pages of new memory: for 50 MB this takes 7 ms in a process that does little else, and more than 50 ms in a training step, whose
memory is fragmented. Freed gradients therefore stay mapped, and MADV_FREE allows the system to reclaim their pages.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import numpy as np

from fastloss.core.plan import Array

LARGE = 8 << 20  # bytes; malloc itself reuses smaller blocks
MOST_FREE = 2  # blocks that are free and stay mapped
_free: list[mmap.mmap] = []


def empty_like(array: Array) -> Array:
    """Allocate an array as `numpy.empty_like` does. A large array takes its memory from the cache."""
    made: Array = np.empty_like(array)
    if made.nbytes < LARGE or not hasattr(mmap, "MADV_FREE"):
        return made
    memory = acquire(made.nbytes)
    made = np.ndarray(made.shape, made.dtype, memory, strides=made.strides)  # replaces an array whose pages were never touched
    weakref.finalize(made, release, memory).atexit = False
    return made


def acquire(size: int) -> mmap.mmap:
    """Return a block of memory of exactly this size, from the cache or newly mapped."""
    for memory in _free[::-1]:
        if len(memory) == size:
            with contextlib.suppress(ValueError):  # another thread has taken it
                _free.remove(memory)
                return memory
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # private, so that a forked child writes to its own copy
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel has no huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def release(memory: mmap.mmap) -> None:
    """Return a block to the cache. The system may reclaim its pages until it is used again."""
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_FREE)
    _free.append(memory)
    del _free[:-MOST_FREE]


def empty_cache() -> None:
    """Return the memory of freed gradients to the system at once."""
    _free.clear()
