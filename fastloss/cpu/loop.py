"""The loop that every loss runs through on the CPU, written once.

Design: a) A `Spec` says everything that decides machine code: the formula, which arrays there are, their dtypes and how
they are stepped through, what is summed and what is stored. b) `build` writes the loop around it as a Numba function:
ranges, groups, rows, blocks. c) `emit_step` writes one step of it, a vector's width of elements, as LLVM code: load,
formula, weight, sums, store; the formula is called with `Vector` arguments and writes its own part. d) Reductions,
weights, masks and dtypes are parts of the spec, never branches of the loop.

Sums: float32 (or float64) within a block of a row, float64 across blocks, one partial sum of each a range. Which element meets
which lane depends on the arrays' layout alone, so that no partial sum depends on threads or addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

from fastloss.core.dtypes import BY_CODE
from fastloss.core.plan import Operand, Spec
from fastloss.cpu.abi import COUNTERS, LAYOUT_COUNTERS, LINE, PAST_BY_LATER_LINES, PAST_BY_LINES, PIECE, THROUGH, count_partials, frame_of
from fastloss.cpu.vector import HAS_AVX512, Vector, call, indices, mangle, scalar_type
from fastloss.kernel import element, elementary
from fastloss.ops import where

# A step is four registers of AVX-512 or eight of AVX2: with fewer, its chain of dependent instructions leaves the units idle
# (BCE value+gradient in the cache, ns an element, at 128, 256 and 512 bytes: AVX-512 0.50, 0.47, 0.51; AVX2, 64 to
# 256 bytes 0.71, 0.55, 0.50).
VECTOR_BYTES = 256
REGISTER_BYTES = 64 if HAS_AVX512 else 32
PREFETCH = 2048  # bytes, from a load to the lines it asks for
# Steps whose elements are summed in float32: a lane adds up 64 of them, a constant batch within 2e-7; it multiplies as many
# factors up to 2, whose product has to stay below 2**127.
BLOCK = 64 * REGISTER_BYTES // VECTOR_BYTES

I1, I64, DOUBLE = ir.IntType(1), ir.IntType(64), ir.DoubleType()
SPECS: dict[str, Spec] = {}  # by key: Numba hands its intrinsics literal strings, not objects


def lanes_of(spec: Spec) -> int:
    """Return how many elements a step works on."""
    return VECTOR_BYTES // BY_CODE[spec.compute].size


def sum_lanes_of(spec: Spec) -> int:
    """Return how many lanes a sum has."""
    return REGISTER_BYTES // BY_CODE[spec.compute].size


class Lanes(types.Type):
    """Numba's name for an LLVM vector that a loop carries in registers."""

    def __init__(self, element: str, count: int) -> None:
        self.llvm = ir.VectorType(scalar_type(element), count)
        super().__init__(f"Lanes({element} x {count})")


@register_default(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, lanes.llvm)


# --- one step, in LLVM -----------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """Where the elements of a row lie, as LLVM values."""

    addresses: list[ir.Value]  # each array's first element of the row
    inner_strides: list[ir.Value]  # along the inner axis of the row
    outer_strides: list[ir.Value]  # along the outer axis of the row
    inner_size: ir.Value


class StepEmitter:
    """The addresses and numbers one step works with, and what it loads from them."""

    def __init__(self, spec: Spec, builder: ir.IRBuilder, walk: Walk, start: ir.Value, left: ir.Value) -> None:
        self.spec, self.builder, self.walk, self.start, self.left = spec, builder, walk, start, left
        self.lanes = lanes_of(spec)
        self.ids = ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes)))
        self.all = ir.Constant(ir.VectorType(I1, self.lanes), [1] * self.lanes)
        self.is_full = builder.icmp_signed(">=", left, I64(self.lanes))

    def within(self) -> ir.Value:
        """Return which lanes lie before the end of the row."""
        return self.builder.icmp_signed("<", self.ids, spread(self.builder, self.left, self.lanes))

    def either(self, fast: Callable[[], list[ir.Value]], slow: Callable[[], list[ir.Value]]) -> list[ir.Value]:
        """Write both ways to the same values: `fast` for a whole vector, `slow` for the end of a row.

        The branch is predicted, and costs nothing beside masking every step; writing the formula twice would cost compile
        time.
        """
        builder = self.builder
        with builder.if_else(self.is_full) as (full, tail):
            with full:
                a, a_block = fast(), builder.block
            with tail:
                b, b_block = slow(), builder.block
        joined = [builder.phi(x.type) for x in a]
        for phi, x, y in zip(joined, a, b, strict=True):
            phi.add_incoming(x, a_block)
            phi.add_incoming(y, b_block)
        return joined

    def load_all(self) -> dict[str, Vector]:
        """Load a vector of every operand."""
        operands = list(enumerate(self.spec.operands))
        vectors = self.either(
            lambda: [self.load(k, op, None) for k, op in operands], lambda: [self.load(k, op, self.within()) for k, op in operands]
        )
        return {op.name: Vector(self.builder, vector) for (_, op), vector in zip(operands, vectors, strict=True)}

    def only_within(self, vectors: list[Vector]) -> list[Vector]:
        """Return the vectors, with 0 in lanes past the end of the row."""

        def slow() -> list[ir.Value]:
            within = self.within()
            return [self.builder.select(within, v.value, ir.Constant(v.type, None)) for v in vectors]

        return [Vector(self.builder, v) for v in self.either(lambda: [v.value for v in vectors], slow)]

    def place(self, k: int, operand: Operand) -> ir.Value:
        """Return a pointer to the step's first element of contiguous operand k."""
        address = self.builder.add(self.walk.addresses[k], self.builder.mul(self.start, I64(operand.size)))
        return self.builder.inttoptr(address, scalar_type(operand.code).as_pointer())

    def lane_pointers(self, k: int, element: ir.Type) -> ir.Value:
        """Return a vector of pointers, one a lane, for an operand that is not contiguous."""
        builder, walk = self.builder, self.walk
        stride = spread(builder, walk.inner_strides[k], self.lanes)
        if self.spec.arrays[k].access == "nested":
            outer, index = self.nested_indices()
            offset = builder.add(builder.mul(outer, spread(builder, walk.outer_strides[k], self.lanes)), builder.mul(index, stride))
        else:
            offset = builder.mul(builder.add(spread(builder, self.start, self.lanes), self.ids), stride)
        address = builder.add(spread(builder, walk.addresses[k], self.lanes), offset)
        return builder.inttoptr(address, ir.VectorType(element.as_pointer(), self.lanes))

    def nested_indices(self) -> tuple[ir.Value, ir.Value]:
        """Return, for each lane, its index along the outer and along the inner axis of the row.

        Only the first lane needs an integer division; the others are at most a step and a short axis from it, where
        float32 tells the quotients apart.
        """
        builder, inner_size = self.builder, self.walk.inner_size
        first = builder.sdiv(self.start, inner_size)
        rest = builder.sub(self.start, builder.mul(first, inner_size))
        index = builder.add(spread(builder, rest, self.lanes), self.ids)
        floats = ir.VectorType(ir.FloatType(), self.lanes)
        middle = builder.fadd(builder.sitofp(index, floats), ir.Constant(floats, [0.5] * self.lanes))
        size = spread(builder, inner_size, self.lanes)
        further = builder.fptosi(builder.fdiv(middle, builder.sitofp(size, floats)), index.type)
        return builder.add(spread(builder, first, self.lanes), further), builder.sub(index, builder.mul(further, size))

    def load(self, k: int, operand: Operand, within: ir.Value | None) -> ir.Value:
        """Load one vector of operand k; lanes outside `within` are not read."""
        builder, element = self.builder, scalar_type(operand.code)
        vector, align = ir.VectorType(element, self.lanes), ir.Constant(ir.IntType(32), operand.size)
        zero = ir.Constant(vector, None)
        if operand.access == "constant":
            pointer = builder.inttoptr(self.walk.addresses[k], element.as_pointer())
            return spread(builder, builder.load(pointer), self.lanes)
        if operand.access != "contiguous":
            name = f"llvm.masked.gather.{mangle(vector)}.v{self.lanes}p0"
            return call(builder, name, vector, self.lane_pointers(k, element), align, within or self.all, zero)
        pointer = self.place(k, operand)
        vector_pointer = builder.bitcast(pointer, vector.as_pointer())
        if within is not None:
            return call(builder, f"llvm.masked.load.{mangle(vector)}.p0", vector, vector_pointer, align, within, zero)
        self.prefetch(pointer, self.lanes * operand.size)
        return builder.load(vector_pointer, align=align.constant)

    def prefetch(self, pointer: ir.Value, size: int) -> None:
        """Ask for the lines that a later step will load.

        The formula between two loads is too long for the CPU to look past: without this, the value of BCE took 1.48 times
        as long as a dot product, with it 1.05; in the cache it costs nothing that was seen.
        """
        builder, flags = self.builder, [ir.IntType(32)(n) for n in (0, 3, 1)]  # to read, to keep, data
        bytes_pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        for line in range(0, size, LINE):
            ahead = builder.gep(bytes_pointer, [I64(PREFETCH + line)])
            call(builder, "llvm.prefetch.p0", ir.VoidType(), ahead, *flags)

    def store(self, k: int, operand: Operand, vector: ir.Value, how: ir.Value) -> None:
        """Store one vector to operand k, as the frame says how, and only the lanes within the row at its end."""
        builder, element = self.builder, scalar_type(operand.code)
        align = ir.Constant(ir.IntType(32), operand.size)
        void = ir.VoidType()
        if operand.access != "contiguous":
            name = f"llvm.masked.scatter.{mangle(vector.type)}.v{self.lanes}p0"
            call(builder, name, void, vector, self.lane_pointers(k, element), align, self.within())
            return
        pointer = builder.bitcast(self.place(k, operand), vector.type.as_pointer())
        with builder.if_else(self.is_full) as (full, tail):
            with full, builder.if_else(builder.icmp_signed("==", how, I64(THROUGH))) as (through, past):
                with through:
                    builder.store(vector, pointer, align=align.constant)
                with past:
                    self.store_past(vector, pointer, how, operand.size * self.lanes)
            with tail:
                call(builder, f"llvm.masked.store.{mangle(vector.type)}.p0", void, vector, pointer, align, self.within())

    def store_past(self, vector: ir.Value, pointer: ir.Value, how: ir.Value, size: int) -> None:
        """Store past the caches, in as few stores as the alignment allows.

        Stores of 16 bytes are merged to lines on their way, but take a shuffle each: with whole lines MSE went from 1.17 to
        0.98 times the triad, and BCE from 1.89 to 1.74.
        """
        builder = self.builder
        words = builder.bitcast(vector, ir.VectorType(ir.IntType(32), size // 4))
        words_at = builder.bitcast(pointer, ir.IntType(32).as_pointer())
        head = LINE - PIECE
        by_pieces = pieces(0, size)
        by_lines, by_later_lines = by_pieces, by_pieces
        if size % LINE == 0:
            by_lines, by_later_lines = lines(0, size), [*pieces(0, head), *lines(head, size - PIECE), (size - PIECE, PIECE)]
        with builder.if_else(builder.icmp_signed("==", how, I64(PAST_BY_LATER_LINES))) as (is_later, other):
            with is_later:
                self.store_parts(words, words_at, by_later_lines)
            with other, builder.if_else(builder.icmp_signed("==", how, I64(PAST_BY_LINES))) as (is_line, is_piece):
                with is_line:
                    self.store_parts(words, words_at, by_lines)
                with is_piece:
                    self.store_parts(words, words_at, by_pieces)

    def store_parts(self, words: ir.Value, pointer: ir.Value, parts: list[tuple[int, int]]) -> None:
        """Store parts of a vector past the caches, each given by its first byte and its size, to which it is aligned."""
        builder = self.builder
        for first, size in parts:
            part = builder.shuffle_vector(words, words, indices(first // 4, size // 4))
            at = builder.bitcast(builder.gep(pointer, [I64(first // 4)]), part.type.as_pointer())
            builder.store(part, at, align=size).set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))

    def convert(self, raw: Vector, code: str, to: str) -> Vector:
        """Convert lanes stored as NumPy type `code` to the type `to`, rounding once to nearest."""
        if code == "b1":  # NumPy takes any byte but 0 for True
            raw = raw != 0
        return raw if code == to else raw.convert(code, to)


def pieces(first: int, stop: int) -> list[tuple[int, int]]:
    """Return the 16-byte parts of a stretch of bytes."""
    return [(at, PIECE) for at in range(first, stop, PIECE)]


def lines(first: int, stop: int) -> list[tuple[int, int]]:
    """Return the lines of a stretch of bytes."""
    return [(at, LINE) for at in range(first, stop, LINE)]


def spread(builder: ir.IRBuilder, scalar: ir.Value, count: int) -> ir.Value:
    """Return the scalar in every lane."""
    vector = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), count), None))


def emit_step(step: StepEmitter, numbers: dict[str, ir.Value], scale: ir.Value, how: ir.Value, sums: list[Vector]) -> list[Vector]:
    """Write one step: load, formula, sums, store. Returns the new sums; see `_sum_types`."""
    spec, builder = step.spec, step.builder
    raw = step.load_all()
    number = {name: spread_number(builder, value, spec) for name, value in numbers.items()}
    everywhere = Vector(builder, step.all, ir.VectorType(scalar_type(spec.compute), step.lanes))
    loaded, counted = element.load(
        spec, raw, number, everywhere, lambda x, code: step.convert(x, code, spec.compute),
        lambda stored, widened: is_not(step, stored, widened, numbers["ignore_index"]),
    )  # fmt: skip
    found = element.quantities(spec, loaded, number)
    scales = spread_number(builder, scale, spec)
    for k, (output, result) in enumerate(element.results_to_store(spec, found, loaded, scales, counted), len(spec.operands)):
        step.store(k, output, step.convert(result, spec.compute, output.code).value, how)
    values, factors = element.summands(spec, found, loaded.get("weight"), counted)
    bad = counted.splat(0.0)
    for name in spec.checked:
        bad = bad + where(element.is_bad(loaded[name], counted), 1.0, 0.0)
    added = [counted.match(v) for v in (*values, *factors, bad)]
    return [
        include(old, new, as_factors=len(values) <= k < len(sums) - 1)
        for k, (old, new) in enumerate(zip(sums, step.only_within(added), strict=True))
    ]


def include(old: Vector, new: Vector, as_factors: bool) -> Vector:
    """Add new lanes to a sum, or multiply a product by them, first among themselves until they fill one register.

    A sum of one register, and not of as many as a step has, leaves registers to the formula: in the cache, BCE value+gradient
    went from 0.92 ns an element to 0.47.
    """
    while new.type.count > old.type.count:
        new = element.accumulate(*new.halves(), as_factors)
    return element.accumulate(old, new, as_factors)


def spread_number(builder: ir.IRBuilder, value: ir.Value, spec: Spec) -> Vector:
    """Return a float64 option in every lane, in the type of the arithmetic."""
    if spec.compute == "f4":
        value = builder.fptrunc(value, ir.FloatType())
    return Vector(builder, spread(builder, value, lanes_of(spec)))


def is_not(step: StepEmitter, stored: Vector, widened: Vector, value: ir.Value) -> Vector:
    """Return where targets differ from a number: integers as they are stored, floating-point numbers as they are widened."""
    code = next(op.code for op in step.spec.operands if op.name == "target")
    if code[0] in "iub":
        value = (step.builder.fptosi if code[0] == "i" else step.builder.fptoui)(value, scalar_type(code))
        return stored != Vector(step.builder, spread(step.builder, value, step.lanes))
    return widened != spread_number(step.builder, value, step.spec)


# --- the intrinsics through which the Numba loop reaches them ----------------------------------------------------------


@intrinsic(prefer_literal=True)
def read(typingctx: Any, count: Any, pointer: Any, offset: Any) -> Any:
    """Read `pointer[offset:offset + count]` into a tuple, which no store to an array can be thought to change."""
    result = types.UniTuple(pointer.dtype, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.gep(args[1], [args[2]])
        return context.make_tuple(builder, result, [builder.load(builder.gep(first, [I64(k)])) for k in range(result.count)])

    return result(count, pointer, types.int64), codegen


@intrinsic
def advance(typingctx: Any, addresses: Any, strides: Any, index: Any) -> Any:
    """Move every address by `index` times its stride."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs = zip(cgutils.unpack_tuple(builder, args[0]), cgutils.unpack_tuple(builder, args[1]), strict=True)
        return context.make_tuple(builder, addresses, [builder.add(a, builder.mul(s, args[2])) for a, s in pairs])

    return addresses(addresses, strides, index), codegen


@intrinsic
def fetch_add(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Add 1 to `pointer[index]` in one atomic step and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), I64(1), "seq_cst")

    return types.int64(pointer, index), codegen


def _sum_types(spec: Spec) -> tuple[Any, Any]:
    """Return Numba's types of a block's sums, and of a range's.

    A block has a total for every sum, a product for those that collect logarithms in one, and last the number of bad elements;
    a range, in float64, a total for each sum and for the bad ones.
    """
    block = types.UniTuple(Lanes(spec.compute, sum_lanes_of(spec)), len(spec.summed) + len(spec.multiplied) + 1)
    total = types.UniTuple(Lanes("f8", sum_lanes_of(spec)), count_partials(spec))
    return block, total


@intrinsic(prefer_literal=True)
def zeros(typingctx: Any, key: Any, what: Any) -> Any:
    """Return empty sums: those of a block, or the float64 ones of a range."""
    result = _sum_types(SPECS[key.literal_value])[what.literal_value == "range"]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, [ir.Constant(result.dtype.llvm, None)] * result.count)

    return result(key, what), codegen


@intrinsic(prefer_literal=True)
def compute_step(
    typingctx: Any, key: Any, addresses: Any, inner_strides: Any, outer_strides: Any, inner_size: Any, start: Any, stop: Any,
    numbers: Any, scale: Any, how: Any, sums: Any
) -> Any:  # fmt: skip
    """Work on one vector's width of elements from `start` on; see `emit_step`."""
    spec = SPECS[key.literal_value]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        addresses_, inner_, outer_, numbers_, sums_ = (cgutils.unpack_tuple(builder, args[k]) for k in (1, 2, 3, 7, 10))
        inner_size_, start_, stop_, scale_, how_ = (args[k] for k in (4, 5, 6, 8, 9))
        named = dict(zip(spec.numbers, numbers_, strict=False))
        one = StepEmitter(spec, builder, Walk(addresses_, inner_, outer_, inner_size_), start_, builder.sub(stop_, start_))
        new_sums = emit_step(one, named, scale_, how_, [Vector(builder, v) for v in sums_])
        return context.make_tuple(builder, sums, [v.value for v in new_sums])

    return sums(key, addresses, inner_strides, outer_strides, inner_size, start, stop, numbers, scale, how, sums), codegen


@intrinsic(prefer_literal=True)
def fold(typingctx: Any, key: Any, totals: Any, sums: Any) -> Any:
    """Add a block's sums to those of the range, in float64."""
    spec = SPECS[key.literal_value]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = [Vector(builder, v) for v in cgutils.unpack_tuple(builder, args[2])]
        total = [Vector(builder, v) for v in cgutils.unpack_tuple(builder, args[1])]

        def widen(x: Vector) -> Vector:
            return x if spec.compute == "f8" else x.like(builder.fpext(x.value, totals.dtype.llvm))

        count = len(spec.summed)
        new = [old + widen(value) for old, value in zip(total, [*block[:count], block[-1]], strict=True)]
        for name, product in zip(spec.multiplied, block[count:-1], strict=True):
            k = spec.summed.index(name)
            new[k] = new[k] + widen(elementary.log1p_of_product(product))
        return context.make_tuple(builder, totals, [v.value for v in new])

    return totals(key, totals, sums), codegen


@intrinsic
def store_sums(typingctx: Any, pointer: Any, offset: Any, totals: Any) -> Any:
    """Add the lanes of each of the range's sums, half to half, and write them to `pointer[offset:]`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.gep(args[0], [args[1]])
        for k, vector in enumerate(cgutils.unpack_tuple(builder, args[2])):
            lanes = Vector(builder, vector)
            while lanes.type.count > 1:
                lanes = element.accumulate(*lanes.halves(), as_factors=False)
            builder.store(builder.extract_element(lanes.value, ir.IntType(32)(0)), builder.gep(first, [I64(k)]))
        return context.get_dummy_value()

    return types.void(pointer, offset, totals), codegen


@intrinsic
def doubles(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Return `pointer + index` as a pointer to float64."""
    result = types.CPointer(types.float64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.gep(args[0], [args[1]]), DOUBLE.as_pointer())

    return result(pointer, index), codegen


@intrinsic
def doubles_at(typingctx: Any, address: Any) -> Any:
    """Return an address as a pointer to float64."""
    result = types.CPointer(types.float64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], DOUBLE.as_pointer())

    return result(address), codegen


def build(key: str) -> Any:
    """Compile the loop for a spec.

    Every thread that helps calls the same function with the same two arguments, the frame of the call and the layout of its
    arrays; see `abi.py`. Ranges are handed out by an atomic counter; the counter of finished ranges is raised
    by an atomic operation too, which also makes stores past the caches visible.
    """
    spec = SPECS[key]
    lanes, arrays, partial_count = lanes_of(spec), len(spec.arrays), count_partials(spec)
    block = BLOCK * lanes
    addresses_at, numbers_at, scale_at, partials_at = frame_of(spec)
    numbers = max(1, scale_at - numbers_at)  # Numba has no empty tuples of one type; what is read instead is not used
    inner_at, outer_at, starts_at, axes_at = (LAYOUT_COUNTERS + k * arrays for k in range(4))

    @cfunc(types.void(types.CPointer(types.int64), types.CPointer(types.int64)), error_model="numpy")
    def kernel(frame: Any, layout: Any) -> None:
        _, _, how, scale_stride, scales = read(COUNTERS, frame, 0)
        ranges, per_group, range_size, group_size, row_size, inner_size, axes = read(LAYOUT_COUNTERS, layout, 0)
        inner_strides, outer_strides = read(arrays, layout, inner_at), read(arrays, layout, outer_at)
        base = advance(read(arrays, frame, addresses_at), read(arrays, layout, starts_at), 1)
        options = read(numbers, doubles(frame, numbers_at), 0)
        partials = doubles(frame, partials_at)
        index = fetch_add(frame, 0)
        while index < ranges:
            group = index // per_group
            at = group * group_size + (index - group * per_group) * range_size
            stop = min(at + range_size, (group + 1) * group_size)
            scale = doubles_at(scales)[group * scale_stride]
            totals = zeros(key, "range")
            while at < stop:
                row = at // row_size
                column = at - row * row_size
                count = min(row_size - column, stop - at)
                here = base
                axis = axes_at
                for _ in range(axes):  # innermost first
                    length = layout[axis]
                    here = advance(here, read(arrays, layout, axis + 1), row % length)
                    row //= length
                    axis += 1 + arrays
                for first in range(column, column + count, block):
                    sums = zeros(key, "block")
                    last = min(first + block, column + count)
                    for start in range(first, last, lanes):
                        sums = compute_step(key, here, inner_strides, outer_strides, inner_size, start, last, options, scale, how, sums)
                    totals = fold(key, totals, sums)
                at += count
            store_sums(partials, partial_count * index, totals)
            fetch_add(frame, 1)
            index = fetch_add(frame, 0)

    return kernel
