"""From the caller's arrays and options to one checked `Plan`: what is computed, and how memory is walked.

Nothing here reads an element. Whatever can be refused without looking at one is refused here, before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastloss.formula import Formula

Array = npt.NDArray[Any]
Axis = tuple[int, tuple[int, ...]]  # length, and each array's stride
Near = tuple[int, int, int, int]  # an operand, an output, and between which distances of their addresses they overlap

REDUCTIONS = ("mean", "sum", "none", "batchmean", "sample_mean", "sample_sum")
INPUT_TYPES = ("float16", "bfloat16", "float32", "float64")
TARGET_TYPES = (*INPUT_TYPES, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))

ONE_RANGE = 65536  # elements up to which one thread is as fast: waking another costs about 15 us
MOST_RANGES = 256
SHORT_RUN = 32  # elements that are better gathered with their neighbours than loaded alone
LEAST_RANGE = 4096  # elements; a range is a thread's turn, so its start has to be cheap beside it


class Operand(NamedTuple):
    """One array as a kernel sees it."""

    name: str
    code: str  # NumPy's: f4, f8, u1, i8, b1 ..., and B2 for bfloat16
    access: str  # along a row: "contiguous", "constant" (one element for the whole row), "strided" or "nested" (two strides)


@dataclass(frozen=True)
class Spec:
    """Everything that decides the machine code."""

    formula: Formula = field(compare=False, repr=False)
    trace: str  # the formula, operation by operation
    compute: str  # the type of the arithmetic, "f4" or "f8"
    operands: tuple[Operand, ...]  # what is read: input, target, weight, mask, grad_output, parameters given as arrays
    outputs: tuple[Operand, ...]  # what is written: quantities of the formula
    parameters: tuple[str, ...]  # of the formula, as far as they were given
    numbers: tuple[str, ...]  # options given as plain numbers: parameters, "target_scale", "ignore_index"
    summed: tuple[str, ...]  # quantities of the formula, and "count", the number of elements that are not excluded
    checked: tuple[str, ...]  # operands of which elements outside [0, 1] are counted

    @property
    def arrays(self) -> tuple[Operand, ...]:
        """All arrays, in the order of their addresses."""
        return self.operands + self.outputs

    @property
    def excludes(self) -> bool:
        """Whether a mask or an ignored target value takes elements out."""
        return "ignore_index" in self.numbers or any(op.name == "mask" for op in self.operands)

    @property
    def multiplied(self) -> tuple[str, ...]:
        """Which sums collect logarithms in a product; a weight on each logarithm forbids it."""
        if any(op.name == "weight" for op in self.operands):
            return ()
        return tuple(name for name in self.summed if name in self.formula.logarithms(self.parameters))

    @property
    def key(self) -> str:
        """A text that is equal where the machine code may be."""
        return repr(self)


@dataclass(frozen=True)
class Plan:
    """One pass over memory: the kernel's spec, and the walk of which it only learns at run time."""

    spec: Spec
    kept: int  # how many leading axes have sums of their own for each entry
    groups: int  # how many entries these have: each is a group of elements that are summed
    group_size: int
    range_size: int
    row_size: int
    run_size: int  # after which the elements of a row go on by `turn_strides`; a row without turns is one run
    row_strides: tuple[int, ...]  # one an array, in bytes
    turn_strides: tuple[int, ...]
    axes: tuple[Axis, ...]  # outside the rows, innermost first: length and strides
    starts: tuple[int, ...]  # bytes from an array's address to the first element visited; not 0 where an axis is walked backwards
    near: tuple[Near, ...]  # for each output and operand: distances at which their memory meets

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


class Request(NamedTuple):
    """What a caller asks of one pass, hashable, so that its plan is made once."""

    formula: Formula
    shape: tuple[int, ...]
    kept: int
    summed: tuple[str, ...]
    checked: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    numbers: tuple[str, ...]
    operands: tuple[str, ...]  # names of the arrays that are read
    layouts: tuple[tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]], ...]  # dtype, shape, strides of these and the outputs

    @property
    def arrays(self) -> list[tuple[str, np.dtype[Any], tuple[int, ...], tuple[int, ...]]]:
        """Name, dtype, shape and strides of every array."""
        return [(name, *layout) for name, layout in zip(self.operands + self.outputs, self.layouts, strict=True)]


def make_plan(request: Request) -> Plan:
    """Choose the order of the axes, merge those that memory does not tell apart, and cut the walk into ranges."""
    check(request)
    shape, kept = request.shape, request.kept
    strides = [broadcast_strides(name, of, by, shape) for name, _, of, by in request.arrays]
    sizes = [dtype.itemsize for _, dtype, _, _ in request.arrays]
    axes, starts = order(list(zip(shape, zip(*strides, strict=True), strict=True)), len(strides), kept)
    outer, turn, run = rows(merge(axes), sizes)
    groups = prod(shape[:kept])
    group_size = prod(shape[kept:])
    extents = [extent(shape, by, size) for by, size in zip(strides, sizes, strict=True)]
    return Plan(
        spec=make_spec(request, [access(run[0], *by) for by in zip(run[1], turn[1], sizes, strict=True)]),
        kept=kept,
        groups=groups,
        group_size=group_size,
        range_size=range_size(groups, group_size),
        row_size=run[0] * turn[0],
        run_size=run[0],
        row_strides=run[1],
        turn_strides=turn[1],
        axes=tuple(outer[::-1]),
        starts=starts,
        near=near(extents, len(request.operands)),
    )


def make_spec(request: Request, accesses: list[str]) -> Spec:
    """Return what the kernel is compiled for, given how each array is stepped through along a row."""
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


def code_of(dtype: np.dtype[Any]) -> str:
    """Name how an element is stored, as NumPy does, which calls bfloat16 two bytes of anything."""
    return "B2" if dtype.name == "bfloat16" else dtype.str[1:]


def order(axes: list[Axis], arrays: int, kept: int) -> tuple[list[Axis], tuple[int, ...]]:
    """Walk axes from the longest stride to the shortest, and forwards; return them and where each array then starts.

    The first `kept` axes keep their place and direction, since each of their entries has a result of its own.
    """
    starts = [0] * arrays
    forward = axes[:kept]
    for length, by in axes[kept:]:
        if by[0] < 0:
            starts = [start + stride * (length - 1) for start, stride in zip(starts, by, strict=True)]
        forward.append((length, tuple(-stride for stride in by) if by[0] < 0 else by))
    return forward[:kept] + sorted(forward[kept:], key=lambda axis: [-abs(stride) for stride in axis[1]]), tuple(starts)


def broadcast_strides(name: str, shape: tuple[int, ...], strides: tuple[int, ...], to: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides with which an array is read as if it had the shape `to`: 0 along the axes it lacks."""
    missing = len(to) - len(shape)
    if missing < 0 or any(have not in (1, want) for have, want in zip(shape, to[missing:], strict=True)):
        raise ValueError(f"{name} has shape {shape}, which does not broadcast to the input's shape {to}")
    along = (0 if have == 1 else stride for have, stride in zip(shape, strides, strict=True))
    return (0,) * missing + tuple(along)


def merge(axes: list[Axis]) -> list[Axis]:
    """Join neighbouring axes over which every array runs on evenly, and drop those of length 1."""
    merged: list[Axis] = []
    for length, by in axes:
        if length == 1:
            continue
        if merged and all(outer == inner * length for outer, inner in zip(merged[-1][1], by, strict=True)):
            length *= merged.pop()[0]
        merged.append((length, by))
    return merged


def rows(axes: list[Axis], sizes: list[int]) -> tuple[list[Axis], Axis, Axis]:
    """Split merged axes into those outside the rows, and the two that make a row: how it turns, and how it runs.

    A step takes a vector's width of one row, so that short runs, such as channels with a weight each, are joined to a row
    that turns from one to the next.
    """
    run = axes[-1] if axes else (1, tuple(sizes))
    if len(axes) > 1 and run[0] < SHORT_RUN:
        return axes[:-2], axes[-2], run
    return axes[:-1], (1, tuple(run[0] * stride for stride in run[1])), run


def access(run_size: int, stride: int, turn_stride: int, itemsize: int) -> str:
    """Name how an array is stepped through along a row."""
    if turn_stride != stride * run_size:
        return "nested"
    return {itemsize: "contiguous", 0: "constant"}.get(stride, "strided")


def range_size(groups: int, group_size: int) -> int:
    """Return how many elements a range has; it depends on the sizes alone, so that sums do not depend on threads."""
    if groups * group_size <= ONE_RANGE:
        return max(group_size, 1)
    even = -(-groups * group_size // MOST_RANGES)
    whole_blocks = -(-max(even, LEAST_RANGE) // LEAST_RANGE) * LEAST_RANGE
    return min(whole_blocks, group_size)


def extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Return where an array's memory begins and ends, in bytes from its address."""
    reaches = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    return sum(r for r in reaches if r < 0), sum(r for r in reaches if r > 0) + itemsize


def near(extents: list[tuple[int, int]], reads: int) -> tuple[Near, ...]:
    """Return, for each output and each array that is read, between which distances of their addresses they overlap."""
    outputs = enumerate(extents[reads:], reads)
    return tuple((k, j, begin - last, end - first) for j, (begin, end) in outputs for k, (first, last) in enumerate(extents[:reads]))


def check(request: Request) -> None:
    """Refuse what no plan can be made of."""
    shape = request.shape
    dtypes = {name: dtype for name, dtype, _, _ in request.arrays}
    for name, dtype, shape_of, strides in request.arrays:
        if name in request.outputs:
            check_output("out", shape_of, strides, dtype, shape, dtypes[belongs_to(name)])
        else:
            check_dtype(name, dtype)
        if name == "target" and shape_of != shape:
            raise ValueError(
                f"input has shape {shape} and target {shape_of}; they must be equal: a weight or a mask may broadcast, a target may not"
            )
    if "target_scale" in request.numbers and is_float(dtypes["target"]):
        raise ValueError(f"target_scale multiplies integer targets, and target is {dtypes['target']}: scale it yourself")


def check_shapes(name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> None:
    """Refuse two arrays of different shapes."""
    if shape != other_shape:
        raise ValueError(f"{name} has shape {tuple(shape)} and {other} {tuple(other_shape)}; they must be equal")


def check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    """Refuse dtypes that the kernels do not read."""
    accepted = {"input": INPUT_TYPES, "mu": INPUT_TYPES, "logvar": INPUT_TYPES, "mask": ("bool",)}.get(name, TARGET_TYPES)
    if dtype.name not in accepted:
        raise TypeError(f"{name} has dtype {dtype}; accepted: {', '.join(accepted)}")
    if not dtype.isnative:
        raise TypeError(f"{name} has the other byte order ({dtype.str}); convert it with .astype({dtype.name!r})")


def check_output(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], wanted: tuple[int, ...], wanted_dtype: np.dtype[Any]
) -> None:
    """Refuse a buffer that the result does not fit."""
    if shape != wanted or dtype != wanted_dtype:
        raise ValueError(f"{name} has shape {shape} and dtype {dtype}; the result has shape {wanted} and dtype {wanted_dtype}")
    reach = dtype.itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(strides, shape, strict=True) if length > 1):
        if stride < reach and 0 not in shape:
            raise ValueError(f"several elements of {name} share memory: it is a broadcast view or a sliding window")
        reach += stride * (length - 1)


def belongs_to(output: str) -> str:
    """Return the operand that an output has the dtype of, and may overwrite: with gradients to both, each its own."""
    return "target" if output.startswith("target_") else "input"


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is one of floating-point numbers, also where NumPy does not know it."""
    return dtype.name in INPUT_TYPES


def check_overlap(plan: Plan, arrays: list[Array], addresses: list[int]) -> None:
    """Refuse an output that shares memory with an array that is read, unless it is its own operand, element for element."""
    for operand, output, least, most in plan.near:
        if least < addresses[operand] - addresses[output] < most:
            refuse_overlap(plan, operand, output, arrays, addresses[operand] == addresses[output])


def refuse_overlap(plan: Plan, k: int, output: int, arrays: list[Array], same_start: bool) -> None:
    """Raise if memory that comes close is really shared, and not element for element with the output's own operand."""
    name, own = plan.spec.arrays[k].name, belongs_to(plan.spec.arrays[output].name)
    array, out = arrays[k], arrays[output]
    if not (name == own and same_start and same_walk(out, array)) and shares_memory(out, array):
        raise ValueError(f"out shares memory with {name}; only out={own}, the very same elements, is allowed")


def same_elements(out: Array, array: Array) -> bool:
    """Whether two arrays are the same elements, each at the same place."""
    return memory_of(out).ctypes.data == memory_of(array).ctypes.data and same_walk(out, array)


def same_walk(out: Array, array: Array) -> bool:
    """Whether two arrays that start at the same address are the same elements."""
    steps = [(a, b) for a, b, length in zip(array.strides, out.strides, out.shape, strict=False) if length > 1]
    return array.dtype == out.dtype and array.shape == out.shape and all(a == b for a, b in steps)


def shares_memory(out: Array, array: Array) -> bool:
    """Whether two arrays have a byte in common; where that takes long to find out, they are taken to."""
    try:
        return np.shares_memory(memory_of(out), memory_of(array), max_work=1 << 16)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def memory_of(array: Any) -> Array:
    """Return an array to ask NumPy where it lies: itself, or one at the address of a device's, which must not be read."""
    if isinstance(array, np.ndarray):
        return array
    where = {"data": (array.data.ptr, False), "shape": array.shape, "strides": array.strides}
    return np.asarray(SimpleNamespace(__array_interface__={**where, "typestr": f"|V{array.dtype.itemsize}", "version": 3}))
