"""`Plan`: the quantities that one pass over memory computes, and the order in which it visits the elements.

Making a plan reads no element. All errors that can be found without reading elements are raised here, before any output is
written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastloss.core.checks import ArrayInfo, check_arrays, check_broadcast
from fastloss.core.definition import operand_of
from fastloss.core.dtypes import BY_CODE, FRACTIONS, code_of
from fastloss.core.overlap import Distances, extent, overlap_distances, refuse_overlap, span_of
from fastloss.formula import Formula

Array = npt.NDArray[Any]
Axis = tuple[int, tuple[int, ...]]  # length, and each array's stride in bytes

MAX_RANGES = 256
SHORT_AXIS = 32  # elements; a shorter innermost axis is joined with the next axis to one row
SHORT_GROUP = 32  # elements; each lane of the CPU's vectors computes a group of its own if groups have no more
RANGE_STEP = 1024  # elements; a range is a multiple of this, except at the end of a group
LEAST_STEP = 64  # entries; the same for a range whose entries have many classes
# Estimated nanoseconds of one thread on the smallest range, and on the ranges that it takes at once. They must cost more than the atomic
# counter that they are taken from.
RANGE_WORK = 2000.0
# The same for groups with sums of their own, by the type of the arithmetic. Their ranges follow from their size alone, so that a group's
# sums do not depend on how many groups there are; and there may be many: BCE of 64x3x256x256 with a sum for each sample took 1.3 x the
# time of one sum with ranges of 3 us, 1.1 with 11 us, 1.03 with 23 us. In float64 long ranges lose digits: Dice of 65,536 equal
# elements was off by 2 ulp with ranges of 6 us, by 14 with 20 us.
GROUP_WORK = {"f4": 20000.0, "f8": 6000.0}
# Estimated nanoseconds of one thread on an element in float32: for loads, stores and sums, and for each simple operation. Ten
# losses with arrays in the cache took 0.11 to 1.1 ns on Zen 4, 0.8 to 1.3 times the estimate.
WORK_PER_ELEMENT, WORK_PER_OPERATION = 0.1, 0.006
CLASS_OPERATIONS = 40  # for each class of an entry
SUMS_BY_CLASS = ("overlap", "false_positives", "false_negatives", "truth")  # sums that a group has for each class, not one


class Operand(NamedTuple):
    """One array, described as far as its kernel depends on it."""

    name: str
    code: str  # of the element type, see core/dtypes.py
    access: str  # along a row: "contiguous", "constant" (stride 0), "strided" or "nested" (a stride for each of two axes)

    @property
    def size(self) -> int:
        """Size of an element in bytes."""
        return BY_CODE[self.code].size


@dataclass(frozen=True)
class Spec:
    """Everything that decides the machine code of a kernel."""

    formula: Formula = field(compare=False, repr=False)
    trace: str  # the formula's operations as text; empty if the kernel computes no quantity of the formula
    compute: str  # code of the type of the arithmetic, "f4" or "f8"
    operands: tuple[Operand, ...]  # arrays to read: input, target, weight, mask, grad_output, parameters given as arrays
    outputs: tuple[Operand, ...]  # arrays to write, named by quantities of the formula
    parameters: tuple[str, ...]  # names of the formula's parameters that the caller passed
    numbers: tuple[str, ...]  # names of the options given as numbers: parameters, "target_scale", "ignore_index"
    summed: tuple[str, ...]  # quantities of the formula, and "count", the number of elements that are not excluded
    checked: tuple[str, ...]  # operands whose elements outside [0, 1] are counted
    walk: str  # what each lane of a vector computes one after another: "" for one element alone, "group" or "classes"; see `Plan`

    @property
    def arrays(self) -> tuple[Operand, ...]:
        """All arrays, in the order of their addresses."""
        return self.operands + self.outputs

    @property
    def codes(self) -> dict[str, str]:
        """Code of each operand's element type, by name."""
        return {op.name: op.code for op in self.operands}

    @property
    def sums_by_class(self) -> tuple[str, ...]:
        """The sums of which a group has one for each class."""
        return tuple(name for name in self.summed if name in SUMS_BY_CLASS) if self.walk == "classes" else ()

    @property
    def sums_by_entry(self) -> tuple[str, ...]:
        """The sums of which a group has one."""
        return tuple(name for name in self.summed if name not in self.sums_by_class)

    @property
    def excludes(self) -> bool:
        """Whether a mask or an ignored target value excludes elements."""
        return "ignore_index" in self.numbers or any(op.name == "mask" for op in self.operands)

    @property
    def stores_halves(self) -> bool:
        """Whether the input and every output have 16 bits, so that a result shows three or four digits."""
        sizes = {op.size for op in self.arrays if op.name == "input" or op in self.outputs}
        return self.compute == "f4" and sizes == {2}

    @property
    def multiplied(self) -> tuple[str, ...]:
        """Sums whose logarithms a kernel accumulates as products. With a weight on each logarithm there are none."""
        if any(op.name == "weight" for op in self.operands):
            return ()
        return tuple(name for name in self.summed if name in self.formula.logarithms(self.parameters))

    @property
    def has_probabilities(self) -> bool:
        """Whether entries with several classes have a probability of each class as targets, not the index of one."""
        return self.walk == "classes" and self.codes["target"] in FRACTIONS

    @property
    def key(self) -> str:
        """Text that is different for specs with different machine code."""
        return repr(self)


@dataclass(frozen=True)
class Plan:
    """One pass over memory: the kernel's spec, and sizes and strides, which the kernel takes as arguments.

    Neighbouring lanes of a vector compute neighbouring entries of a row. An entry is an element; or a short group, whose elements the
    lane computes one after another (`spec.walk` is "group"); or an entry that has several classes ("classes"). The axes that lanes walk
    along are the innermost of those outside the rows. Groups of entries, which have sums of their own, are cut into ranges; short
    groups are cut as if they were the entries of one group.
    """

    spec: Spec
    group_axes: int  # number of leading axes whose entries are groups, each with sums of its own
    groups: int
    group_size: int  # entries
    walked: int  # number of elements or classes that a lane computes for each entry
    range_size: int
    row_size: int
    inner_size: int  # length of a row's inner axis; the row's size if the row is a single axis
    inner_strides: tuple[int, ...]  # of each array along a row's inner axis, in bytes
    outer_strides: tuple[int, ...]  # of each array along a row's outer axis, in bytes
    axes: tuple[Axis, ...]  # axes outside the rows, innermost first
    starts: tuple[int, ...]  # bytes from each array's address to the first element visited; not 0 if a negative stride is reversed
    overlaps: tuple[Distances, ...]  # address differences at which an output may overlap an operand

    @property
    def cut(self) -> tuple[int, int]:
        """Number of parts that are cut into ranges, and their size: the groups, or all short groups as one."""
        return (1, self.groups) if self.spec.walk == "group" else (self.groups, self.group_size)

    @property
    def ranges_per_part(self) -> int:
        """Number of ranges that a part is cut into."""
        return -(-self.cut[1] // self.range_size)

    @property
    def ranges(self) -> int:
        """Number of ranges."""
        return self.cut[0] * self.ranges_per_part

    @property
    def partials(self) -> int:
        """Number of partial sums of each quantity: one for each range, or for each group that a lane computes."""
        return self.groups if self.spec.walk == "group" else self.ranges

    @property
    def ranges_at_once(self) -> int:
        """Number of ranges that a thread takes at once, so that they cost more than the counter that they are taken from."""
        return max(1, min(int(RANGE_WORK * self.ranges / self.work), self.ranges // MAX_RANGES))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.cut) * self.walked

    @property
    def work(self) -> float:
        """Estimated nanoseconds that one thread takes, if the arrays are in its caches."""
        return self.size * estimate_work(self.spec)

    def check_overlap(self, arrays: Sequence[Any], addresses: Sequence[int]) -> None:
        """Raise ValueError if an output shares memory with an array to read, unless it overwrites its own operand element for element."""
        for k, output, low, high in self.overlaps:
            if low < addresses[k] - addresses[output] < high:
                out, array = (span_of(arrays[j], addresses[j]) for j in (output, k))
                own = operand_of(self.spec.arrays[output].name)
                refuse_overlap("out", out, self.spec.arrays[k].name, array, own, f"out={own}")


class Request(NamedTuple):
    """The request for one pass: everything that its plan depends on, in hashable form."""

    formula: Formula
    shape: tuple[int, ...]
    group_axes: int
    summed: tuple[str, ...]
    checked: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    numbers: tuple[str, ...]
    classes: bool  # see `Definition`
    operands: tuple[str, ...]  # names of the arrays to read
    layouts: tuple[tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]], ...]  # dtype, shape and strides of the operands and the outputs

    @property
    def arrays(self) -> list[ArrayInfo]:
        """Name, dtype, shape and strides of each array."""
        return [(name, *layout) for name, layout in zip(self.operands + self.outputs, self.layouts, strict=True)]


def make_plan(request: Request, in_lanes: bool = False) -> Plan:
    """Order the axes, merge axes that are contiguous in every array, and cut the elements into ranges.

    `in_lanes` is whether the machine can compute short groups in a lane each.
    """
    check_arrays(request.arrays, request.shape, request.outputs, "target_scale" in request.numbers, request.classes)
    shape, group_axes = request.shape, request.group_axes
    strides = [broadcast_strides(name, of, by, shape) for name, _, of, by in request.arrays]
    sizes = [dtype.itemsize for _, dtype, _, _ in request.arrays]
    axes: list[Axis] = list(zip(shape, zip(*strides, strict=True), strict=True))
    axes, classes = (axes[:-1], axes[-1:]) if request.classes else (axes, [])
    axes, starts = order_axes(axes, len(strides), group_axes)
    groups, group_size = (math.prod(length for length, _ in part) for part in (axes[:group_axes], axes[group_axes:]))
    by_group = in_lanes and group_axes > 0 and 0 < group_size <= SHORT_GROUP and not classes
    entries, along = (axes[:group_axes], merge_axes(axes[group_axes:])) if by_group else (axes, classes)
    rest, outer, inner = split_rows(merge_axes(entries), sizes)
    accesses = [classify_access(inner[0], *by) for by in zip(inner[1], outer[1], sizes, strict=True)]
    spec = make_spec(request, "classes" if request.classes else "group" if by_group else "", accesses)
    walked = math.prod(length for length, _ in along)
    work = estimate_work(spec) * max(1, walked)
    extents = [extent(shape, by, size) for by, size in zip(strides, sizes, strict=True)]
    return Plan(
        spec=spec,
        group_axes=group_axes,
        groups=groups,
        group_size=group_size,
        walked=walked,
        range_size=(
            choose_range_size(groups, RANGE_WORK / work)
            if by_group
            else choose_range_size(group_size, (GROUP_WORK[spec.compute] if group_axes else RANGE_WORK) / work, walked)
        ),
        row_size=inner[0] * outer[0],
        inner_size=inner[0],
        inner_strides=inner[1],
        outer_strides=outer[1],
        axes=tuple([*rest, *along][::-1]),
        starts=starts,
        overlaps=overlap_distances(extents, len(request.operands)),
    )


def make_spec(request: Request, walk: str, accesses: list[str]) -> Spec:
    """Make the kernel's spec, given what each lane walks along, and how each array is accessed along a row."""
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
        walk=walk,
    )


def order_axes(axes: list[Axis], arrays: int, group_axes: int) -> tuple[list[Axis], tuple[int, ...]]:
    """Sort the axes from the longest stride to the shortest, and reverse those along which the first array's stride is negative.

    The first `group_axes` axes stay as they are, because each of their entries has a result of its own. Also return the offset in
    bytes of each array's first visited element.
    """
    starts = [0] * arrays
    forward = axes[:group_axes]
    for length, by in axes[group_axes:]:
        if by[0] < 0:
            starts = [start + stride * (length - 1) for start, stride in zip(starts, by, strict=True)]
        forward.append((length, tuple(-stride for stride in by) if by[0] < 0 else by))
    return forward[:group_axes] + sorted(forward[group_axes:], key=lambda axis: [-abs(stride) for stride in axis[1]]), tuple(starts)


def broadcast_strides(name: str, shape: tuple[int, ...], strides: tuple[int, ...], to: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of an array broadcast to the shape `to`: 0 along the axes that it lacks."""
    check_broadcast(name, shape, "input", to)
    along = (0 if have == 1 else stride for have, stride in zip(shape, strides, strict=True))
    return (0,) * (len(to) - len(shape)) + tuple(along)


def merge_axes(axes: list[Axis]) -> list[Axis]:
    """Merge neighbouring axes that form one evenly strided axis in every array, and drop axes of length 1."""
    merged: list[Axis] = []
    for length, by in axes:
        if length == 1:
            continue
        if merged and all(outer == inner * length for outer, inner in zip(merged[-1][1], by, strict=True)):
            length *= merged.pop()[0]
        merged.append((length, by))
    return merged


def split_rows(axes: list[Axis], sizes: list[int]) -> tuple[list[Axis], Axis, Axis]:
    """Split merged axes into the axes outside the rows, the outer axis of a row, and the inner axis of a row.

    The loop works on a vector of elements of one row at a time. A short inner axis, such as channels with a weight each, is
    therefore joined with the next axis to make a longer row.
    """
    inner = axes[-1] if axes else (1, tuple(sizes))
    if len(axes) > 1 and inner[0] < SHORT_AXIS:
        return axes[:-2], axes[-2], inner
    return axes[:-1], (1, tuple(inner[0] * stride for stride in inner[1])), inner


def classify_access(inner_size: int, stride: int, outer_stride: int, itemsize: int) -> str:
    """Return the kind of access of an array along a row; see `Operand.access`."""
    if outer_stride != stride * inner_size:
        return "nested"
    return {itemsize: "contiguous", 0: "constant"}.get(stride, "strided")


def estimate_work(spec: Spec) -> float:
    """Estimate the nanoseconds that one thread takes for an element."""
    has_classes = spec.walk == "classes"  # a pass that only counts has the same ranges, so that its sums of weights have the same bits
    operations = CLASS_OPERATIONS if has_classes else spec.formula.cost(spec.parameters) if spec.trace else 0
    return (WORK_PER_ELEMENT + WORK_PER_OPERATION * operations) * BY_CODE[spec.compute].size / 4


def choose_range_size(group_size: int, least: float, walked: int = 1) -> int:
    """Choose the number of entries in a range, by sizes and formula alone, so that sums do not depend on the number of threads."""
    step = max(LEAST_STEP, RANGE_STEP // max(1, walked) // LEAST_STEP * LEAST_STEP)
    return max(1, min(step * math.ceil(max(group_size / MAX_RANGES, least) / step), group_size))
