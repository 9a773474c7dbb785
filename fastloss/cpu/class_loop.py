"""The CPU's loop over entries that have several classes, such as pixels. It is the same for every loss of classes.

Ranges, rows and sums are those of `loop.py`, with rows of entries. A row is cut into blocks, whose classes fit the thread's scratch
memory. Each block goes through three functions of `classes.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastloss.core.plan import Spec
from fastloss.cpu.abi import FIELDS, LAYOUT_FIELDS, count_partials, frame_of
from fastloss.cpu.classes import COMPUTE, LOAD, SUM, WRITE
from fastloss.cpu.loop import Lanes, advance, calling, fetch_add, float64_pointer, locate, pointer_at, read, store_sums, zeros
from fastloss.cpu.step import DOUBLE, lanes_of


class Shape(NamedTuple):
    """Everything about a spec that its loop depends on."""

    lanes: int  # entries of a step
    arrays: int
    numbers: int  # options given as numbers
    totals: int  # of a range
    class_totals: int  # of a range and a class


def shape_of(spec: Spec) -> Shape:
    """Return the shape of the loop of a spec."""
    return Shape(lanes_of(spec), len(spec.arrays), len(spec.numbers), count_partials(spec), len(spec.sums_by_class))


def function_of(name: str) -> Any:
    """Return the intrinsic that calls a function of `classes.py` with the type of its result (None if there is none) and its arguments."""

    @intrinsic
    def invoke(typingctx: Any, result: Any, *args: Any) -> Any:
        returned = types.void if isinstance(result, types.NoneType) else result.instance_type
        emit = calling(name)

        def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return emit(context, builder, signature, cgutils.unpack_tuple(builder, given[1]))

        return returned(result, types.StarArgTuple.from_types(args)), codegen

    return invoke


load_logits, compute_entries, add_sums_of_classes, write_gradient = map(function_of, (LOAD, COMPUTE, SUM, WRITE))


@cache
def build(shape: Shape) -> str:
    """Compile a loop, and return its LLVM code. The function is called as that of `loop.py` is."""
    arrays, partial_count, class_totals = shape.arrays, shape.totals, shape.class_totals
    range_totals = types.UniTuple(Lanes(ir.VectorType(DOUBLE, shape.lanes)), shape.totals)
    addresses_at, numbers_at, _, partials_at = frame_of(arrays, shape.numbers)
    numbers = max(1, shape.numbers)  # Numba has no empty homogeneous tuples; without numbers, one unused field is read
    inner_at, outer_at, starts_at, classes_at = (LAYOUT_FIELDS + k * arrays for k in range(4))
    axes_at = classes_at + 1 + arrays  # of the axes after that of classes

    for name in (LOAD, COMPUTE, SUM, WRITE):
        llvm.add_symbol(name, 1)  # Numba loads the loop, but nothing calls it

    @cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")
    def kernel(frame: Any) -> None:
        _, _, layout_at, mode, scale_stride, scales_at, scratch = read(FIELDS, frame, 0)
        layout, scales = pointer_at(types.int64, layout_at), pointer_at(types.float64, scales_at)
        ranges, at_once, per_part, range_size, part_size, row_size, inner_size, classes, length, scratch_size, axes = read(
            LAYOUT_FIELDS, layout, 0
        )
        inner, outer, along = read(arrays, layout, inner_at), read(arrays, layout, outer_at), read(arrays, layout, classes_at + 1)
        base = advance(read(arrays, frame, addresses_at), read(arrays, layout, starts_at), 1)
        options = read(numbers, float64_pointer(frame, numbers_at), 0)
        partials = float64_pointer(frame, partials_at)
        scratch += scratch_size * fetch_add(frame, 1, 1)
        index = fetch_add(frame, 0, at_once)
        while index < ranges:
            part = index // per_part
            at = part * part_size + (index - part * per_part) * range_size
            stop = min(at + range_size, (part + 1) * part_size)
            scale = scales[part * scale_stride]
            totals = zeros(range_totals)
            by_class = float64_pointer(frame, partials_at + partial_count * ranges + class_totals * classes * index)
            while at < stop:
                row = at // row_size
                column = at - row * row_size
                end_of_row = min(row_size, column + stop - at)
                here = locate(base, layout, axes_at, axes - 1, row)
                for k in range(column, end_of_row, length):
                    last = min(k + length, end_of_row)
                    load_logits(None, here, inner, outer, along, inner_size, k, last, options, scratch, length, classes)
                    totals = compute_entries(
                        range_totals, here, inner, outer, along, inner_size, k, last, options, scratch, length, classes, scale, mode, totals
                    )
                    add_sums_of_classes(None, here, inner, outer, along, inner_size, k, last, options, scratch, length, classes, by_class)
                    write_gradient(None, here, inner, outer, along, inner_size, k, last, options, scratch, length, classes, mode)
                at += end_of_row - column
            store_sums(partials, partial_count * index, totals)
            index += 1
            if index % at_once == 0:
                index = fetch_add(frame, 0, at_once)

    return str(kernel.inspect_llvm())
