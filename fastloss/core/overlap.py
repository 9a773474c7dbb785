"""The rule for shared memory: an output may overwrite its own operand, element for element. Any other overlap is an error.

Arrays are compared by address, so the rule is the same on every machine, and no element is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

# an operand's position, an output's, and the open interval of the operand's address minus the output's in which they may overlap
Distances = tuple[int, int, int, int]


class Span(NamedTuple):
    """The memory of an array."""

    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def span_of(array: Any, address: int) -> Span:
    """Describe the memory of any framework's array, given its address."""
    return Span(address, array.dtype, array.shape, array.strides)


def refuse_overlap(output: str, out: Span, name: str, array: Span, own: str, accepted: str) -> None:
    """Raise ValueError if an output shares memory with an array, unless it overwrites its own operand element for element."""
    if not (name == own and are_same_elements(out, array)) and share_memory(out, array):
        others = f", or {accepted} itself" if accepted else ""
        raise ValueError(f"{output} shares memory with {name}; accepted: memory of its own{others}")


def check_buffers(buffers: Sequence[Span], reads: Mapping[str, Span], own: tuple[str, ...] = ()) -> None:
    """Raise ValueError if outputs share memory with each other, or with an array that is read and is not their own operand.

    `own` names the operand that each output may overwrite; without it, no output may overwrite one.
    """
    accepted = f"out=({', '.join(own)})" if own else ""
    for k, buffer in enumerate(buffers):
        for name, array in [*reads.items(), *((f"out[{j}]", buffers[j]) for j in range(k))]:
            refuse_overlap(f"out[{k}]", buffer, name, array, own[k] if own else "", accepted)


def are_same_elements(out: Span, array: Span) -> bool:
    """Whether two arrays have the same elements at the same addresses, in the same order."""
    strides = [(a, b) for a, b, length in zip(array.strides, out.strides, out.shape, strict=False) if length > 1]
    return out.address == array.address and array.dtype == out.dtype and array.shape == out.shape and all(a == b for a, b in strides)


def share_memory(a: Span, b: Span) -> bool:
    """Whether two arrays have a byte in common. True also if the exact answer would take too long to compute."""
    try:
        return np.shares_memory(_array_at(a), _array_at(b), max_work=1 << 16)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _array_at(span: Span) -> np.ndarray[Any, Any]:
    """Make a NumPy array that describes a span of memory. The memory may be a GPU's, so its elements must not be read."""
    interface = {"data": (span.address, False), "shape": span.shape, "strides": span.strides, "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__={**interface, "typestr": f"|V{span.dtype.itemsize}"}))


def overlap_distances(extents: list[tuple[int, int]], reads: int) -> tuple[Distances, ...]:
    """List the address differences at which each output may overlap each of the first `reads` arrays, which are read.

    `extents` holds the first byte and the end of each array's memory, relative to the array's address.
    """
    outputs = enumerate(extents[reads:], reads)
    return tuple((k, j, begin - last, end - first) for j, (begin, end) in outputs for k, (first, last) in enumerate(extents[:reads]))


def extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return the first byte and the end of an array's memory, relative to its address."""
    reaches = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    return sum(r for r in reaches if r < 0), sum(r for r in reaches if r > 0) + itemsize
