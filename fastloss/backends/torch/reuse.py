"""The memory of large gradients: what the last step gave back is there for the next.

A training step frees its gradient and asks for one of the same size again. New memory comes in pages that the system has to
find and clear: 7 ms for 50 MB where a process does little else, and more than 50 in a training step, whose memory is in pieces.
So a gradient's memory is kept when it is freed, and the system is told that it may have it back (MADV_FREE).
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import numpy as np

from fastloss.core.plan import Array

LARGE = 8 << 20  # bytes; below, malloc keeps memory itself
KEPT = 2  # at most so many pieces
_free: list[mmap.mmap] = []


def empty_like(array: Array) -> Array:
    """Return an array as `numpy.empty_like` does, a large one on memory that was used before."""
    made: Array = np.empty_like(array)
    if made.nbytes < LARGE or not hasattr(mmap, "MADV_FREE"):
        return made
    memory = take(made.nbytes)
    made = np.ndarray(made.shape, made.dtype, memory, strides=made.strides)  # in the place of one that was never touched
    weakref.finalize(made, give_back, memory).atexit = False
    return made


def take(size: int) -> mmap.mmap:
    """Return a piece of memory of a size: one that is free, or a new one."""
    for memory in _free[::-1]:
        if len(memory) == size:
            with contextlib.suppress(ValueError):  # another thread took it
                _free.remove(memory)
                return memory
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked child writes to its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def give_back(memory: mmap.mmap) -> None:
    """Keep memory for the next gradient, and let the system take its pages if it needs them before."""
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_FREE)
    _free.append(memory)
    del _free[:-KEPT]


def empty_cache() -> None:
    """Give what is kept back to the system at once."""
    _free.clear()
