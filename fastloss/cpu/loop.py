"""The CPU's loop over ranges, rows and blocks of elements, which is the same for every loss.

Design: a) A `Spec` holds everything that decides machine code: the formula, the arrays with their dtypes and kinds of access,
the sums and the outputs. b) `build` compiles the loop with Numba. The loop depends on numbers of arrays and sums alone, its `Shape`,
so many specs share one. c) The loop calls STEP for a vector's width of elements, and FOLD after a block of them; both are
LLVM code of the spec, see `step.py`. The loop does not branch on reductions, weights, masks and dtypes.

Sums are accumulated in the type of the arithmetic within a block of a row, and in float64 across blocks. Each range leaves one
partial sum for each sum. The lane that adds an element depends on the arrays' layout alone, so partial sums depend neither on
the number of threads nor on addresses.

Where each lane computes a group (`Spec.walk`), a block is a step's width of groups. The loop calls STEP for one element of each
after another, and leaves the partial sums of each lane.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic, register_jitable

from fastloss.core.plan import Spec
from fastloss.cpu.abi import FIELDS, LAYOUT_FIELDS, count_partials, frame_of
from fastloss.cpu.step import BLOCK, DOUBLE, FOLD, I64, STEP, count_sums, first_lanes, lane_ids, lanes_of, spread, sum_lanes_of
from fastloss.cpu.vector import Vector, call, gather, scalar_type
from fastloss.kernel import element


class Shape(NamedTuple):
    """Everything about a spec that its loop depends on."""

    compute: str  # code of the type of the arithmetic
    lanes: int  # elements of a step
    sum_lanes: int  # of each sum
    by_lane: bool  # see `Spec`
    arrays: int
    numbers: int  # options given as numbers
    sums: int  # of a block
    totals: int  # of a range, or of a lane

    @property
    def block(self) -> int:
        """Number of entries of a row that are computed between two calls of FOLD."""
        return self.lanes if self.by_lane else BLOCK * self.lanes


def shape_of(spec: Spec) -> Shape:
    """Return the shape of the loop of a spec."""
    lanes = lanes_of(spec), sum_lanes_of(spec), spec.walk == "group"
    return Shape(spec.compute, *lanes, len(spec.arrays), len(spec.numbers), count_sums(spec), count_partials(spec))


class Lanes(types.Type):
    """Numba's type for an LLVM vector, which the loop carries in registers."""

    def __init__(self, vector: ir.VectorType) -> None:
        self.llvm = vector
        super().__init__(f"Lanes({vector})")


@register_default(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, lanes.llvm)


# --- intrinsics that the loop calls ------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def read(typingctx: Any, count: Any, pointer: Any, offset: Any) -> Any:
    """Read `pointer[offset:offset + count]` into a tuple, whose values LLVM need not load again after a store to an array."""
    result = types.UniTuple(pointer.dtype, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.gep(args[1], [args[2]])
        return context.make_tuple(builder, result, [builder.load(builder.gep(first, [I64(k)])) for k in range(result.count)])

    return result(count, pointer, types.int64), codegen


@intrinsic
def advance(typingctx: Any, addresses: Any, strides: Any, index: Any) -> Any:
    """Advance each address by `index` times its stride."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs = zip(cgutils.unpack_tuple(builder, args[0]), cgutils.unpack_tuple(builder, args[1]), strict=True)
        return context.make_tuple(builder, addresses, [builder.add(a, builder.mul(s, args[2])) for a, s in pairs])

    return addresses(addresses, strides, index), codegen


@intrinsic
def fetch_add(typingctx: Any, pointer: Any, offset: Any, number: Any) -> Any:
    """Add a number to `pointer[offset]` atomically and return its previous value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "seq_cst")

    return types.int64(pointer, types.int64, types.int64), codegen


@intrinsic
def zeros(typingctx: Any, result: Any) -> Any:
    """Return sums of a type, set to 0."""
    made = result.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, made, [ir.Constant(item.llvm, None) for item in made])

    return made(result), codegen


@intrinsic
def compute_step(
    typingctx: Any, addresses: Any, inner_strides: Any, outer_strides: Any, inner_size: Any, start: Any, stop: Any, numbers: Any,
    scale: Any, mode: Any, prefetches: Any, sums: Any
) -> Any:  # fmt: skip
    """Compute one step, a vector's width of elements from `start` on, and return the new sums of the block."""
    arguments = addresses, inner_strides, outer_strides, inner_size, start, stop, numbers, scale, mode, prefetches, sums
    return sums(*arguments), calling(STEP)


@intrinsic
def fold(typingctx: Any, totals: Any, sums: Any) -> Any:
    """Add the sums of a block to the totals of the range, in float64."""
    return totals(totals, sums), calling(FOLD)


def calling(name: str) -> Any:
    """Return the `codegen` of a call of a function of `step.py` or `classes.py`. Each item of a tuple is an argument of its own."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result, flat = signature.return_type, [x for arg in args for x in items(builder, arg)]
        returned = [] if result == types.void else [item.llvm for item in result]
        function_type = ir.FunctionType(ir.LiteralStructType(returned), [x.type for x in flat])
        packed = builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), flat)
        if not returned:
            return context.get_dummy_value()
        return context.make_tuple(builder, result, [builder.extract_value(packed, k) for k in range(len(returned))])

    return codegen


def items(builder: Any, value: Any) -> list[Any]:
    """Return the items of a tuple, or the value itself."""
    return cgutils.unpack_tuple(builder, value) if isinstance(value.type, (ir.ArrayType, ir.LiteralStructType)) else [value]


@intrinsic
def float64_pointer(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Return `pointer + index` as a pointer to float64."""
    result = types.CPointer(types.float64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.gep(args[0], [args[1]]), DOUBLE.as_pointer())

    return result(pointer, index), codegen


@intrinsic
def pointer_at(typingctx: Any, element: Any, address: Any) -> Any:
    """Return an address as a pointer to elements of a type."""
    result = types.CPointer(element.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(result))

    return result(element, address), codegen


@intrinsic
def advance_along(typingctx: Any, addresses: Any, layout: Any, axis: Any, index: Any) -> Any:
    """Advance each address by `index` times its stride along the axis given from `layout[axis]` on: its length, then the strides."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        advanced = []
        for k, address in enumerate(cgutils.unpack_tuple(builder, args[0]), 1):
            stride = builder.load(builder.gep(args[1], [builder.add(args[2], I64(k))]))
            advanced.append(builder.add(address, builder.mul(stride, args[3])))
        return context.make_tuple(builder, addresses, advanced)

    return addresses(addresses, layout, axis, index), codegen


@register_jitable(inline="always")
def locate(base: Any, layout: Any, axis: Any, axes: Any, place: Any) -> Any:
    """Return the addresses of the first entry of a row, given its place in the axes outside the rows, and these from `layout[axis]` on."""
    here = base
    for further in range(axes - 1, -1, -1):  # innermost first
        rest = place // layout[axis] if further else 0
        here = advance_along(here, layout, axis, place - rest * layout[axis])
        place = rest
        axis += 1 + len(base)
    return here


# --- the scale of a block, and what becomes of sums: of a row's elements, and of groups that each lane computes ---------


@intrinsic
def read_scale(typingctx: Any, lanes: Any, scales: Any, stride: Any, part: Any, entry: Any, count: Any) -> Any:
    """Read the scale of a part, for all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.gep(args[1], [builder.mul(args[3], args[2])]))

    return types.float64(lanes, scales, stride, part, entry, count), codegen


@intrinsic
def read_scales(typingctx: Any, lanes: Any, scales: Any, stride: Any, part: Any, entry: Any, count: Any) -> Any:
    """Read the scales of `count` entries from `entry` on, one for each lane, with 0 in the other lanes."""
    result = lanes.instance_type

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, (_, scales, stride, _, entry, count) = result.llvm, args
        size = builder.mul(stride, I64(8))
        first = builder.add(builder.ptrtoint(scales, I64), builder.mul(entry, size))
        address = builder.add(
            spread(builder, first, vector.count), builder.mul(lane_ids(vector.count), spread(builder, size, vector.count))
        )
        pointers = builder.inttoptr(address, ir.VectorType(DOUBLE.as_pointer(), vector.count))
        return gather(builder, vector, pointers, 8, first_lanes(builder, count, vector.count))

    return result(lanes, scales, stride, part, entry, count), codegen


@intrinsic
def keep_sums(typingctx: Any, partials: Any, entry: Any, count: Any, distance: Any, totals: Any) -> Any:
    """Return the totals after a block unchanged."""
    return totals(partials, entry, count, distance, totals), lambda context, builder, signature, args: args[-1]


@intrinsic
def store_lanes(typingctx: Any, partials: Any, entry: Any, count: Any, distance: Any, totals: Any) -> Any:
    """Write the first `count` lanes of each sum to `partials[entry:]`, the next sum `distance` numbers further on; return zeros."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.gep(args[0], [args[1]])
        for vector in cgutils.unpack_tuple(builder, args[4]):
            lanes = vector.type.count
            at, mask = builder.bitcast(pointer, vector.type.as_pointer()), first_lanes(builder, args[2], lanes)
            call(builder, f"llvm.masked.store.v{lanes}f64.p0", ir.VoidType(), vector, at, ir.IntType(32)(8), mask)
            pointer = builder.gep(pointer, [args[3]])
        return ir.Constant(args[4].type, None)

    return totals(partials, entry, count, distance, totals), codegen


@intrinsic
def drop_sums(typingctx: Any, pointer: Any, offset: Any, totals: Any) -> Any:
    """Write nothing, because each block has stored its sums."""
    return types.void(pointer, offset, totals), lambda context, builder, signature, args: context.get_dummy_value()


@intrinsic
def store_sums(typingctx: Any, pointer: Any, offset: Any, totals: Any) -> Any:
    """Add the lanes of each sum of the range, half to half, and write the results to `pointer[offset:]`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.gep(args[0], [args[1]])
        for k, vector in enumerate(cgutils.unpack_tuple(builder, args[2])):
            lanes = Vector(builder, vector)
            while lanes.type.count > 1:
                lanes = element.accumulate(*lanes.halves(), as_factors=False)
            builder.store(builder.extract_element(lanes.value, ir.IntType(32)(0)), builder.gep(first, [I64(k)]))
        return context.get_dummy_value()

    return types.void(pointer, offset, totals), codegen


ROW_BY_ROW = read_scale, keep_sums, store_sums
LANE_BY_LANE = read_scales, store_lanes, drop_sums


@cache
def build(shape: Shape) -> str:
    """Compile a loop, and return its LLVM code.

    Each thread calls the function with the same argument, the frame of the call; see `abi.py`.
    A thread takes its next ranges from an atomic counter, whose increment also makes the non-temporal stores of the ranges before
    visible to other threads.
    """
    arrays, partial_count, lanes, block = shape.arrays, shape.totals, shape.lanes, shape.block
    block_sums = types.UniTuple(Lanes(ir.VectorType(scalar_type(shape.compute), shape.sum_lanes)), shape.sums)
    lane_scales = Lanes(ir.VectorType(DOUBLE, shape.sum_lanes))
    range_totals = types.UniTuple(lane_scales, shape.totals)
    scale_of, end_block, end_range = LANE_BY_LANE if shape.by_lane else ROW_BY_ROW
    addresses_at, numbers_at, _, partials_at = frame_of(arrays, shape.numbers)
    numbers = max(1, shape.numbers)  # Numba has no empty homogeneous tuples; without numbers, one unused field is read
    inner_at, outer_at, starts_at, axes_at = (LAYOUT_FIELDS + k * arrays for k in range(4))

    for name in (STEP, FOLD):
        llvm.add_symbol(name, 1)  # Numba loads the loop, but nothing calls it

    @cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")
    def kernel(frame: Any) -> None:
        _, _, layout_at, mode, scale_stride, scales_at, _ = read(FIELDS, frame, 0)
        layout, scales = pointer_at(types.int64, layout_at), pointer_at(types.float64, scales_at)
        ranges, at_once, per_part, range_size, part_size, row_size, inner_size, walked, _, prefetches, axes = read(LAYOUT_FIELDS, layout, 0)
        inner_strides, outer_strides = read(arrays, layout, inner_at), read(arrays, layout, outer_at)
        base = advance(read(arrays, frame, addresses_at), read(arrays, layout, starts_at), 1)
        options = read(numbers, float64_pointer(frame, numbers_at), 0)
        partials = float64_pointer(frame, partials_at)
        index = fetch_add(frame, 0, at_once)
        end = index + at_once
        while index < ranges:
            part = index // per_part
            at = part * part_size + (index - part * per_part) * range_size
            stop = min(at + range_size, (part + 1) * part_size)
            totals = zeros(range_totals)
            while at < stop:
                row = at // row_size
                column = at - row * row_size
                end_of_row = min(row_size, column + stop - at)
                for first in range(column, end_of_row, block):
                    last = min(first + block, end_of_row)
                    entry, count = at + first - column, last - first
                    scale = scale_of(lane_scales, scales, scale_stride, part, entry, count)
                    sums = zeros(block_sums)
                    for k in range(walked):
                        here = locate(base, layout, axes_at, axes, row * walked + k)
                        for start in range(first, last, lanes):
                            sums = compute_step(
                                here, inner_strides, outer_strides, inner_size, start, last, options, scale, mode, prefetches, sums
                            )
                    totals = end_block(partials, entry, count, part_size, fold(totals, sums))
                at += end_of_row - column
            end_range(partials, partial_count * index, totals)
            index += 1
            if index == end:
                index = fetch_add(frame, 0, at_once)
                end = index + at_once

    return str(kernel.inspect_llvm())
