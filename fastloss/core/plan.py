"""From checked arrays to one `Plan`: what a pass computes, and how it walks through memory.

Nothing here reads an element. Whatever can be refused without reading one is refused here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastloss.core.checks import ArrayInfo, check_arrays
from fastloss.core.definition import operand_of
from fastloss.core.dtypes import BY_CODE, code_of
from fastloss.core.overlap import Distances, extent, overlap_distances, refuse_overlap, span_of
from fastloss.formula import Formula

Array = npt.NDArray[Any]
Axis = tuple[int, tuple[int, ...]]  # length, and each array's stride in bytes

ONE_RANGE = 65536  # elements up to which one thread is as fast: waking another costs about 15 us
MOST_RANGES = 256
SHORT_AXIS = 32  # elements; a shorter innermost axis is gathered together with the next one instead of being loaded alone
LEAST_RANGE = 4096  # elements; a thread takes one range at a time, and the start of a range must cost little compared with it


class Operand(NamedTuple):
    """One array as a kernel sees it."""

    name: str
    code: str  # of its element type, see core/dtypes.py
    access: str  # along a row: "contiguous", "constant" (one element for the whole row), "strided" or "nested" (two strides)

    @property
    def size(self) -> int:
        """The size of an element in bytes."""
        return BY_CODE[self.code].size


@dataclass(frozen=True)
class Spec:
    """Everything that decides the machine code."""

    formula: Formula = field(compare=False, repr=False)
    trace: str  # the formula, operation by operation
    compute: str  # the type of the arithmetic, "f4" or "f8"
    operands: tuple[Operand, ...]  # read: input, target, weight, mask, grad_output, parameters given as arrays
    outputs: tuple[Operand, ...]  # written: quantities of the formula
    parameters: tuple[str, ...]  # of the formula, those that were given
    numbers: tuple[str, ...]  # options given as numbers: parameters, "target_scale", "ignore_index"
    summed: tuple[str, ...]  # quantities of the formula, and "count", the number of elements that are not excluded
    checked: tuple[str, ...]  # operands whose elements outside [0, 1] are counted

    @property
    def arrays(self) -> tuple[Operand, ...]:
        """All arrays, in the order of their addresses."""
        return self.operands + self.outputs

    @property
    def excludes(self) -> bool:
        """Whether a mask or an ignored target value excludes elements."""
        return "ignore_index" in self.numbers or any(op.name == "mask" for op in self.operands)

    @property
    def multiplied(self) -> tuple[str, ...]:
        """The sums whose logarithms are collected as a product. A weight on each logarithm rules that out."""
        if any(op.name == "weight" for op in self.operands):
            return ()
        return tuple(name for name in self.summed if name in self.formula.logarithms(self.parameters))

    @property
    def key(self) -> str:
        """A text that differs between specs with different machine code."""
        return repr(self)


@dataclass(frozen=True)
class Plan:
    """One pass over memory: the kernel's spec, and the walk, which the kernel is given when it is called."""

    spec: Spec
    group_axes: int  # how many leading axes are kept: each of their entries is a group, with sums of its own
    groups: int
    group_size: int
    range_size: int
    row_size: int
    inner_size: int  # of a row's inner axis; a row of one axis has no more
    inner_strides: tuple[int, ...]  # along the inner axis of a row, one for each array, in bytes
    outer_strides: tuple[int, ...]  # along the outer axis of a row
    axes: tuple[Axis, ...]  # outside the rows, innermost first
    starts: tuple[int, ...]  # bytes from an array's address to the first element visited; not 0 where an axis is walked backwards
    overlaps: tuple[Distances, ...]  # at which an output may overlap an operand

    @property
    def ranges_per_group(self) -> int:
        """How many ranges a group is cut into."""
        return -(-self.group_size // self.range_size)

    @property
    def ranges(self) -> int:
        """How many ranges there are; each leaves its own partial sums."""
        return self.groups * self.ranges_per_group

    @property
    def size(self) -> int:
        """How many elements are visited."""
        return self.groups * self.group_size

    def check_overlap(self, arrays: Sequence[Any], addresses: Sequence[int]) -> None:
        """Refuse an output that shares memory with an array that is read, unless it is its own operand, element for element."""
        for k, output, low, high in self.overlaps:
            if low < addresses[k] - addresses[output] < high:
                out, array = (span_of(arrays[j], addresses[j]) for j in (output, k))
                own = operand_of(self.spec.arrays[output].name)
                refuse_overlap("out", out, self.spec.arrays[k].name, array, own, f"out={own}")


class Request(NamedTuple):
    """What one pass is asked for. It is hashable, so that its plan is made once."""

    formula: Formula
    shape: tuple[int, ...]
    group_axes: int
    summed: tuple[str, ...]
    checked: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    numbers: tuple[str, ...]
    operands: tuple[str, ...]  # names of the arrays that are read
    layouts: tuple[tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]], ...]  # dtype, shape, strides of these and the outputs

    @property
    def arrays(self) -> list[ArrayInfo]:
        """Name, dtype, shape and strides of every array."""
        return [(name, *layout) for name, layout in zip(self.operands + self.outputs, self.layouts, strict=True)]


def make_plan(request: Request) -> Plan:
    """Choose the order of the axes, merge axes that are contiguous in every array, and cut the walk into ranges."""
    check_arrays(request.arrays, request.shape, request.outputs, "target_scale" in request.numbers)
    shape, group_axes = request.shape, request.group_axes
    strides = [broadcast_strides(name, of, by, shape) for name, _, of, by in request.arrays]
    sizes = [dtype.itemsize for _, dtype, _, _ in request.arrays]
    axes, starts = order(list(zip(shape, zip(*strides, strict=True), strict=True)), len(strides), group_axes)
    rest, outer, inner = split_rows(merge(axes), sizes)
    groups = prod(shape[:group_axes])
    group_size = prod(shape[group_axes:])
    extents = [extent(shape, by, size) for by, size in zip(strides, sizes, strict=True)]
    return Plan(
        spec=make_spec(request, [access(inner[0], *by) for by in zip(inner[1], outer[1], sizes, strict=True)]),
        group_axes=group_axes,
        groups=groups,
        group_size=group_size,
        range_size=range_size(groups, group_size),
        row_size=inner[0] * outer[0],
        inner_size=inner[0],
        inner_strides=inner[1],
        outer_strides=outer[1],
        axes=tuple(rest[::-1]),
        starts=starts,
        overlaps=overlap_distances(extents, len(request.operands)),
    )


def make_spec(request: Request, accesses: list[str]) -> Spec:
    """Make the kernel's spec, given how each array is accessed along a row."""
    codes = [code_of(dtype) for _, dtype, _, _ in request.arrays]
    arrays = tuple(Operand(*x) for x in zip(request.operands + request.outputs, codes, accesses, strict=True))
    operands = arrays[: len(request.operands)]
    wide = any(op.code == "f8" for op in operands if op.name in ("input", "target"))
    computes = request.outputs or any(name != "count" for name in request.summed)
    return Spec(
        formula=request.formula,
        trace=request.formula.trace(request.parameters) if computes else "",
        compute="f8" if wide else "f4",
        operands=operands,
        outputs=arrays[len(operands) :],
        parameters=request.parameters,
        numbers=request.numbers,
        summed=request.summed,
        checked=request.checked,
    )


def order(axes: list[Axis], arrays: int, group_axes: int) -> tuple[list[Axis], tuple[int, ...]]:
    """Sort the axes from the longest stride to the shortest and walk each forwards; also return where each array then starts.

    The first `group_axes` axes keep their place and direction, since each of their entries has a result of its own.
    """
    starts = [0] * arrays
    forward = axes[:group_axes]
    for length, by in axes[group_axes:]:
        if by[0] < 0:
            starts = [start + stride * (length - 1) for start, stride in zip(starts, by, strict=True)]
        forward.append((length, tuple(-stride for stride in by) if by[0] < 0 else by))
    return forward[:group_axes] + sorted(forward[group_axes:], key=lambda axis: [-abs(stride) for stride in axis[1]]), tuple(starts)


def broadcast_strides(name: str, shape: tuple[int, ...], strides: tuple[int, ...], to: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides that read an array as if it had the shape `to`: 0 along the axes it lacks."""
    missing = len(to) - len(shape)
    if missing < 0 or any(have not in (1, want) for have, want in zip(shape, to[missing:], strict=True)):
        raise ValueError(f"{name} has shape {shape}, which does not broadcast to the input's shape {to}")
    along = (0 if have == 1 else stride for have, stride in zip(shape, strides, strict=True))
    return (0,) * missing + tuple(along)


def merge(axes: list[Axis]) -> list[Axis]:
    """Join neighbouring axes that are one evenly spaced axis in every array, and drop axes of length 1."""
    merged: list[Axis] = []
    for length, by in axes:
        if length == 1:
            continue
        if merged and all(outer == inner * length for outer, inner in zip(merged[-1][1], by, strict=True)):
            length *= merged.pop()[0]
        merged.append((length, by))
    return merged


def split_rows(axes: list[Axis], sizes: list[int]) -> tuple[list[Axis], Axis, Axis]:
    """Split merged axes into those outside the rows, and the outer and inner axis of a row.

    The loop takes a vector of elements of one row at a time, so a short inner axis, such as channels that have a weight each,
    is joined with the next axis to make a longer row.
    """
    inner = axes[-1] if axes else (1, tuple(sizes))
    if len(axes) > 1 and inner[0] < SHORT_AXIS:
        return axes[:-2], axes[-2], inner
    return axes[:-1], (1, tuple(inner[0] * stride for stride in inner[1])), inner


def access(inner_size: int, stride: int, outer_stride: int, itemsize: int) -> str:
    """Name how an array is accessed along a row."""
    if outer_stride != stride * inner_size:
        return "nested"
    return {itemsize: "contiguous", 0: "constant"}.get(stride, "strided")


def range_size(groups: int, group_size: int) -> int:
    """Choose how many elements a range has. It depends on the sizes alone, so that sums do not depend on threads."""
    if groups * group_size <= ONE_RANGE:
        return max(group_size, 1)
    even = -(-groups * group_size // MOST_RANGES)
    whole_blocks = -(-max(even, LEAST_RANGE) // LEAST_RANGE) * LEAST_RANGE
    return min(whole_blocks, group_size)
