"""A cache of memory for gradients, so that a training step reuses the memory that the step before has freed.

A training step frees its gradient, and the next one allocates a gradient of the same size. The system has to find and clear the
pages of new memory: for 50 MB this takes 5 ms in a process that does little else, and more than 50 ms in a training step, whose
memory is fragmented. Freed gradients therefore stay mapped, up to `MOST_FREE` blocks and `MOST_BYTES` bytes, but always the last
two. MADV_FREE allows the system to reclaim their pages when memory is short.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import numpy as np

from fastloss.core.plan import Array

# Bytes. Below, malloc mostly reuses memory: a training step with gradients of 0.4 to 8 MB took 5 to 15 % longer with this cache,
# because then gradients and other arrays do not take turns in the same places, which the CPU's caches hold.
SMALLEST = 8 << 20
MOST_FREE, MOST_BYTES = 8, 256 << 20
CAN_FREE = hasattr(mmap, "MADV_FREE")

_free: list[mmap.mmap] = []  # the last freed block is the last
_lent: dict[int, tuple[weakref.ref[Array], mmap.mmap]] = {}  # references to arrays, which views of them keep alive, by identity


def empty_like(array: Array) -> Array:
    """Allocate an array as `numpy.empty_like` does. A large array takes its memory from the cache."""
    made: Array = np.empty_like(array)
    return empty(made.shape, made.dtype, made.strides) if is_cached(made.nbytes) else made  # the pages of `made` were never touched


def is_cached(size: int) -> bool:
    """Whether memory of so many bytes comes from the cache."""
    return size >= SMALLEST and CAN_FREE


def empty(shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...]) -> Array:
    """Allocate an array without gaps in its memory, from the cache. It returns there with the last view of it."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    memory = acquire(size)
    made: Array = np.ndarray(shape, dtype, memory, 0, strides)
    reference = weakref.ref(made, release)
    _lent[id(reference)] = reference, memory
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


def release(reference: weakref.ref[Array]) -> None:
    """Return the block of an array that is no longer used to the cache, and drop the blocks that were freed first."""
    _, memory = _lent.pop(id(reference))
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_FREE)
    _free.append(memory)
    while len(_free) > MOST_FREE or (len(_free) > 2 and sum(map(len, _free)) > MOST_BYTES):
        del _free[0]


def empty_cache() -> None:
    """Return the memory of freed gradients to the system at once.

    Gradients of 8 MiB and more keep their memory when they are freed, for the gradients of the next training step: at most 8 of them
    and 256 MiB, but always the last two. The system may take it back when memory is short.
    """
    _free.clear()
