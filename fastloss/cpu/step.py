"""One step of the CPU's loop, in LLVM code: a vector's width of elements of a row.

A step loads the elements, evaluates the formula, multiplies by weight and scale, stores the results and adds to the sums. The formula is
called with `Vector` arguments and emits its own instructions. Reductions, weights, masks and dtypes are fields of the spec. The
loop (`loop.py`) calls the functions that `emit_functions` writes, and LLVM inlines them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from llvmlite import ir

from fastloss.core.dtypes import BY_CODE
from fastloss.core.plan import Operand, Spec
from fastloss.cpu.abi import CACHED, LINE, NONTEMPORAL_LINES, NONTEMPORAL_SHIFTED_LINES, PIECE, count_partials
from fastloss.cpu.vector import HAS_AVX512, Vector, call, gather, indices, mangle, scalar_type
from fastloss.kernel import element, elementary
from fastloss.ops import where

STEP, FOLD = "fastloss_step", "fastloss_fold"  # names of the functions

# A step is four registers of AVX-512 or eight of AVX2. With fewer, the CPU waits for dependent instructions (BCE value+gradient
# with arrays in the cache, in ns an element, at 128, 256 and 512 bytes: AVX-512 0.50, 0.47, 0.51; at 64 to 256 bytes: AVX2 0.71,
# 0.55, 0.50).
VECTOR_BYTES = 256
CLASS_BYTES = 64  # the same for entries with several classes
REGISTER_BYTES = 64 if HAS_AVX512 else 32  # the same if each lane computes a group, and so each sum is as long as the step
PREFETCH = 2048  # bytes from a load to the cache lines that it prefetches
# Number of steps whose elements are summed in float32: a lane adds 64 elements, with an error of 2e-7 for a constant batch. It
# also multiplies 64 factors of at most 2, whose product must stay below 2**127.
BLOCK = 64 * REGISTER_BYTES // VECTOR_BYTES

I1, I64, DOUBLE = ir.IntType(1), ir.IntType(64), ir.DoubleType()
Values = list[ir.Value]


def lanes_of(spec: Spec) -> int:
    """Return the number of elements in a step."""
    return {"": VECTOR_BYTES, "group": REGISTER_BYTES, "classes": CLASS_BYTES}[spec.walk] // BY_CODE[spec.compute].size


def sum_lanes_of(spec: Spec) -> int:
    """Return the number of lanes of a sum: those of one register of the arithmetic, or a lane for each group of a step."""
    return lanes_of(spec) if spec.walk == "group" else REGISTER_BYTES // BY_CODE[spec.compute].size


def count_sums(spec: Spec) -> int:
    """Return the number of sums of a block: a total for each sum, a product for each in `spec.multiplied`, and the bad elements."""
    return len(spec.summed) + len(spec.multiplied) + 1


class Row(NamedTuple):
    """The addresses and strides of the elements of a row, as LLVM values."""

    addresses: list[ir.Value]  # of each array's first element in the row
    inner_strides: list[ir.Value]  # of each array along the row's inner axis
    outer_strides: list[ir.Value]  # of each array along the row's outer axis
    inner_size: ir.Value  # length of the inner axis


class StepEmitter:
    """Emits the loads and stores of one step: the elements of a row from `start` on, of which `left` remain."""

    def __init__(self, spec: Spec, builder: ir.IRBuilder, row: Row, start: ir.Value, left: ir.Value, prefetches: ir.Value) -> None:
        self.spec, self.builder, self.row, self.start, self.left, self.prefetches = spec, builder, row, start, left, prefetches
        self.lanes = lanes_of(spec)
        self.ids = lane_ids(self.lanes)
        self.all = ir.Constant(ir.VectorType(I1, self.lanes), [1] * self.lanes)
        self.is_full = builder.icmp_signed(">=", left, I64(self.lanes))

    def row_mask(self) -> ir.Value:
        """Return the mask of the lanes that lie before the end of the row."""
        return first_lanes(self.builder, self.left, self.lanes)

    def branch_on_full(self, full_step: Callable[[], list[ir.Value]], end_of_row: Callable[[], list[ir.Value]]) -> list[ir.Value]:
        """Emit a branch that computes the same values in two ways: for a full step, and for a step past the end of a row.

        The branch is predicted, so its cost is negligible compared with masking every step. The formula is emitted once, outside
        the branch, to save compile time.
        """
        builder = self.builder
        with builder.if_else(self.is_full) as (full, tail):
            with full:
                a, a_block = full_step(), builder.block
            with tail:
                b, b_block = end_of_row(), builder.block
        joined = [builder.phi(x.type) for x in a]
        for phi, x, y in zip(joined, a, b, strict=True):
            phi.add_incoming(x, a_block)
            phi.add_incoming(y, b_block)
        return joined

    def load_all(self, names: Container[str] | None = None) -> dict[str, Vector]:
        """Load a vector of each operand, or of those among them that are named."""
        operands = [(k, op) for k, op in enumerate(self.spec.operands) if names is None or op.name in names]

        def load_full() -> list[ir.Value]:
            with self.builder.if_then(self.builder.icmp_signed("!=", self.prefetches, I64(0))):
                for k, op in operands:
                    if op.access == "contiguous":
                        self.prefetch(self.first_pointer(k, op), self.lanes * op.size)
            return [self.load(k, op, None) for k, op in operands]

        vectors = self.branch_on_full(load_full, lambda: [self.load(k, op, self.row_mask()) for k, op in operands])
        return {op.name: Vector(self.builder, vector) for (_, op), vector in zip(operands, vectors, strict=True)}

    def zero_past_row(self, vectors: list[Vector]) -> list[Vector]:
        """Return the vectors with 0 in the lanes past the end of the row."""

        def masked() -> list[ir.Value]:
            mask = self.row_mask()
            return [self.builder.select(mask, v.value, ir.Constant(v.type, None)) for v in vectors]

        return [Vector(self.builder, v) for v in self.branch_on_full(lambda: [v.value for v in vectors], masked)]

    def first_pointer(self, k: int, operand: Operand) -> ir.Value:
        """Return the pointer to the step's first element of array k, which is contiguous."""
        address = self.builder.add(self.row.addresses[k], self.builder.mul(self.start, I64(operand.size)))
        return self.builder.inttoptr(address, scalar_type(operand.code).as_pointer())

    def lane_pointers(self, k: int, element: ir.Type) -> ir.Value:
        """Return a vector with a pointer for each lane, for array k, which is not contiguous."""
        builder, row = self.builder, self.row
        stride = spread(builder, row.inner_strides[k], self.lanes)
        if self.spec.arrays[k].access == "nested":
            outer, index = self.nested_indices()
            offset = builder.add(builder.mul(outer, spread(builder, row.outer_strides[k], self.lanes)), builder.mul(index, stride))
        else:
            offset = builder.mul(builder.add(spread(builder, self.start, self.lanes), self.ids), stride)
        address = builder.add(spread(builder, row.addresses[k], self.lanes), offset)
        return builder.inttoptr(address, ir.VectorType(element.as_pointer(), self.lanes))

    def nested_indices(self) -> tuple[ir.Value, ir.Value]:
        """Return each lane's index along the outer axis and along the inner axis of the row.

        Only the first lane takes an integer division. The other lanes are at most a step and a short axis further on, so their
        quotients are small enough for a division in float32 to be right.
        """
        builder, inner_size = self.builder, self.row.inner_size
        first = builder.sdiv(self.start, inner_size)
        rest = builder.sub(self.start, builder.mul(first, inner_size))
        index = builder.add(spread(builder, rest, self.lanes), self.ids)
        floats = ir.VectorType(ir.FloatType(), self.lanes)
        middle = builder.fadd(builder.sitofp(index, floats), ir.Constant(floats, [0.5] * self.lanes))
        size = spread(builder, inner_size, self.lanes)
        further = builder.fptosi(builder.fdiv(middle, builder.sitofp(size, floats)), index.type)
        return builder.add(spread(builder, first, self.lanes), further), builder.sub(index, builder.mul(further, size))

    def load(self, k: int, operand: Operand, mask: ir.Value | None) -> ir.Value:
        """Load one vector of operand k. Lanes outside `mask` are not read; None loads all lanes."""
        builder, element = self.builder, scalar_type(operand.code)
        vector, align = ir.VectorType(element, self.lanes), ir.Constant(ir.IntType(32), operand.size)
        zero = ir.Constant(vector, None)
        if operand.access == "constant":
            pointer = builder.inttoptr(self.row.addresses[k], element.as_pointer())
            return spread(builder, builder.load(pointer), self.lanes)
        if operand.access == "strided" and mask is None:
            return self.load_each(k, vector)
        if operand.access != "contiguous":
            return gather(builder, vector, self.lane_pointers(k, element), operand.size, mask or self.all)
        pointer = self.first_pointer(k, operand)
        vector_pointer = builder.bitcast(pointer, vector.as_pointer())
        if mask is not None:
            return call(builder, f"llvm.masked.load.{mangle(vector)}.p0", vector, vector_pointer, align, mask, zero)
        return builder.load(vector_pointer, align=align.constant)

    def load_each(self, k: int, vector: ir.VectorType) -> ir.Value:
        """Load the lanes of array k one by one, at a constant stride.

        A gather takes the address of each lane out of a vector first, unless the CPU has instructions for it: on AVX2, a sum for each of
        40,960 samples of 32 elements took 1.6 times as long with gathers (MSE).
        """
        found: ir.Value = ir.Constant(vector, ir.Undefined)
        for lane, pointer in enumerate(self.pointers(k, vector.element)):
            found = self.builder.insert_element(found, self.builder.load(pointer), ir.IntType(32)(lane))
        return found

    def pointers(self, k: int, item: ir.Type) -> list[ir.Value]:
        """Return a pointer to an item for each lane, for array k, which has a constant stride."""
        builder, stride, found = self.builder, self.row.inner_strides[k], []
        address = builder.add(self.row.addresses[k], builder.mul(self.start, stride))
        for _ in range(self.lanes):
            found.append(builder.inttoptr(address, item.as_pointer()))
            address = builder.add(address, stride)
        return found

    def prefetch(self, pointer: ir.Value, size: int) -> None:
        """Prefetch the cache lines that a later step will load.

        The formula between two loads is so long that out-of-order execution does not reach the next load: without prefetching,
        the value of BCE took 1.48 times as long as a dot product, and with it 1.05 times. With arrays in the second or third cache,
        MSE took 1.15 times as long with it, so small batches go without.
        """
        builder, flags = self.builder, [ir.IntType(32)(n) for n in (0, 3, 1)]  # for reading, high locality, data
        bytes_pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        for line in range(0, size, LINE):
            ahead = builder.gep(bytes_pointer, [I64(PREFETCH + line)])
            call(builder, "llvm.prefetch.p0", ir.VoidType(), ahead, *flags)

    def store(self, k: int, operand: Operand, vector: ir.Value, mode: ir.Value) -> None:
        """Store one vector to array k: at the end of a row by a masked store, otherwise in the frame's store mode."""
        builder, element = self.builder, scalar_type(operand.code)
        align = ir.Constant(ir.IntType(32), operand.size)
        void = ir.VoidType()
        if operand.access != "contiguous":
            name = f"llvm.masked.scatter.{mangle(vector.type)}.v{self.lanes}p0"
            call(builder, name, void, vector, self.lane_pointers(k, element), align, self.row_mask())
            return
        pointer = builder.bitcast(self.first_pointer(k, operand), vector.type.as_pointer())
        with builder.if_else(self.is_full) as (full, tail):
            with full, builder.if_else(builder.icmp_signed("==", mode, I64(CACHED))) as (cached, nontemporal):
                with cached:
                    builder.store(vector, pointer, align=align.constant)
                with nontemporal:
                    self.store_nontemporal(vector, pointer, mode, operand.size * self.lanes)
            with tail:
                call(builder, f"llvm.masked.store.{mangle(vector.type)}.p0", void, vector, pointer, align, self.row_mask())

    def store_nontemporal(self, vector: ir.Value, pointer: ir.Value, mode: ir.Value, size: int) -> None:
        """Store past the caches, in as few stores as the alignment allows.

        The CPU combines stores of 16 bytes to cache lines, but each takes a shuffle: with stores of whole lines MSE went from 1.17
        to 0.98 times the time of the triad, and BCE from 1.89 to 1.74.
        """
        builder = self.builder
        words = builder.bitcast(vector, ir.VectorType(ir.IntType(32), size // 4))
        words_at = builder.bitcast(pointer, ir.IntType(32).as_pointer())
        head = LINE - PIECE
        by_pieces = pieces(0, size)
        by_lines, by_shifted_lines = by_pieces, by_pieces
        if size % LINE == 0:
            by_lines, by_shifted_lines = lines(0, size), [*pieces(0, head), *lines(head, size - PIECE), (size - PIECE, PIECE)]
        with builder.if_else(builder.icmp_signed("==", mode, I64(NONTEMPORAL_SHIFTED_LINES))) as (is_shifted, other):
            with is_shifted:
                self.store_parts(words, words_at, by_shifted_lines)
            with other, builder.if_else(builder.icmp_signed("==", mode, I64(NONTEMPORAL_LINES))) as (is_line, is_piece):
                with is_line:
                    self.store_parts(words, words_at, by_lines)
                with is_piece:
                    self.store_parts(words, words_at, by_pieces)

    def store_parts(self, words: ir.Value, pointer: ir.Value, parts: list[tuple[int, int]]) -> None:
        """Store parts of a vector past the caches. A part is given by its first byte and its size, and is aligned to its size."""
        builder = self.builder
        for first, size in parts:
            part = builder.shuffle_vector(words, words, indices(first // 4, size // 4))
            at = builder.bitcast(builder.gep(pointer, [I64(first // 4)]), part.type.as_pointer())
            builder.store(part, at, align=size).set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))

    def convert(self, raw: Vector, code: str, to: str) -> Vector:
        """Convert lanes stored with type code `code` to the type `to`, rounded once to nearest."""
        if code == "b1":  # in NumPy any byte but 0 means True
            raw = raw != 0
        return raw if code == to else raw.convert(code, to)


def pieces(first: int, stop: int) -> list[tuple[int, int]]:
    """Divide the bytes from `first` to `stop` into parts of 16 bytes."""
    return [(at, PIECE) for at in range(first, stop, PIECE)]


def lines(first: int, stop: int) -> list[tuple[int, int]]:
    """Divide the bytes from `first` to `stop` into parts of a cache line."""
    return [(at, LINE) for at in range(first, stop, LINE)]


def spread(builder: ir.IRBuilder, scalar: ir.Value, count: int) -> ir.Value:
    """Return a vector with the scalar in every lane."""
    vector = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), count), None))


def lane_ids(lanes: int) -> ir.Constant:
    """Return the index of each lane."""
    return ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))


def first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """Return the mask of the first `count` lanes."""
    return builder.icmp_signed("<", lane_ids(lanes), spread(builder, count, lanes))


def emit_step(step: StepEmitter, numbers: dict[str, ir.Value], scale: ir.Value, mode: ir.Value, sums: list[Vector]) -> list[Vector]:
    """Emit one step: loads, formula, stores and sums. Return the new sums of the block; see `count_sums`."""
    spec, builder = step.spec, step.builder
    raw = step.load_all()
    number = {name: spread_number(builder, value, spec) for name, value in numbers.items()}
    all_lanes = Vector(builder, step.all, ir.VectorType(scalar_type(spec.compute), step.lanes))
    loaded, counted = element.load(
        spec, raw, number, all_lanes, lambda x, code: step.convert(x, code, spec.compute),
        lambda stored, converted: differs_from(step, stored, converted, numbers["ignore_index"]),
    )  # fmt: skip
    found = element.quantities(spec, loaded, number)
    scales = scale_of(builder, scale, spec)
    for k, (output, result) in enumerate(element.results_to_store(spec, found, loaded, scales, counted), len(spec.operands)):
        step.store(k, output, step.convert(result, spec.compute, output.code).value, mode)
    values, factors = element.summands(spec, found, loaded.get("weight"), counted)
    bad = counted.splat(0.0)
    for name in spec.checked:
        bad = bad + where(element.is_bad(loaded[name], counted), 1.0, 0.0)
    added = [counted.match(v) for v in (*values, *factors, bad)]
    return [
        accumulate_lanes(old, new, as_factors=len(values) <= k < len(sums) - 1)
        for k, (old, new) in enumerate(zip(sums, step.zero_past_row(added), strict=True))
    ]


def accumulate_lanes(old: Vector, new: Vector, as_factors: bool) -> Vector:
    """Add the halves of the new lanes until they fill one register, then add the register to a sum; multiply if they are factors.

    A sum takes one register instead of as many as a step has, which leaves registers to the formula: with arrays in the cache,
    BCE value+gradient went from 0.92 ns an element to 0.47.
    """
    while new.type.count > old.type.count:
        new = element.accumulate(*new.halves(), as_factors)
    return element.accumulate(old, new, as_factors)


def spread_number(builder: ir.IRBuilder, value: ir.Value, spec: Spec) -> Vector:
    """Convert a float64 number to the type of the arithmetic and return a vector with it in every lane."""
    if spec.compute == "f4":
        value = builder.fptrunc(value, ir.FloatType())
    return Vector(builder, spread(builder, value, lanes_of(spec)))


def scale_of(builder: ir.IRBuilder, scale: ir.Value, spec: Spec) -> Vector:
    """Convert the scale of a step to the type of the arithmetic: a number, or with `walk` "group" a vector with one for each lane."""
    if spec.walk != "group":
        return spread_number(builder, scale, spec)
    wanted = ir.VectorType(scalar_type(spec.compute), lanes_of(spec))
    return Vector(builder, scale if spec.compute == "f8" else builder.fptrunc(scale, wanted))


def differs_from(step: StepEmitter, stored: Vector, converted: Vector, value: ir.Value) -> Vector:
    """Return the mask of targets that differ from a number: integers are compared as stored, other targets as converted."""
    code = step.spec.codes["target"]
    if code[0] in "iu":
        value = (step.builder.fptosi if code[0] == "i" else step.builder.fptoui)(value, scalar_type(code))
        return stored != Vector(step.builder, spread(step.builder, value, step.lanes))
    return converted != spread_number(step.builder, value, step.spec)


def emit_fold(spec: Spec, totals: list[Vector], sums: list[Vector]) -> list[Vector]:
    """Emit the addition of the sums of a block to the totals of a range, in float64. Return the new totals."""

    def widen(x: Vector) -> Vector:
        return x if spec.compute == "f8" else x.like(x.builder.fpext(x.value, totals[0].type))

    count = len(spec.summed)
    new = [old + widen(value) for old, value in zip(totals, [*sums[:count], sums[-1]], strict=True)]
    for name, product in zip(spec.multiplied, sums[count:-1], strict=True):
        k = spec.summed.index(name)
        new[k] = new[k] + widen(elementary.log1p_of_product(product))
    return new


# --- functions that the loop calls -------------------------------------------------------------------------------------


def emit_functions(spec: Spec) -> str:
    """Return the LLVM code of STEP, which computes a step and returns the new sums of the block, and of FOLD; see `emit_fold`."""
    module, arrays = ir.Module(), [I64] * len(spec.arrays)
    sums = [ir.VectorType(scalar_type(spec.compute), sum_lanes_of(spec))] * count_sums(spec)
    totals = [ir.VectorType(DOUBLE, sum_lanes_of(spec))] * count_partials(spec)
    scale_type = ir.VectorType(DOUBLE, lanes_of(spec)) if spec.walk == "group" else DOUBLE
    numbers = [DOUBLE] * max(1, len(spec.numbers))

    def step(builder: ir.IRBuilder, addresses: Values, inner_strides: Values, outer_strides: Values, inner_size: Values, start: Values,
             stop: Values, numbers: Values, scale: Values, mode: Values, prefetches: Values, sums: Values) -> list[Vector]:  # fmt: skip
        row = Row(addresses, inner_strides, outer_strides, inner_size[0])
        emitter = StepEmitter(spec, builder, row, start[0], builder.sub(stop[0], start[0]), prefetches[0])
        named = dict(zip(spec.numbers, numbers, strict=False))
        return emit_step(emitter, named, scale[0], mode[0], [Vector(builder, v) for v in sums])

    def fold(builder: ir.IRBuilder, totals: Values, sums: Values) -> list[Vector]:
        return emit_fold(spec, [Vector(builder, v) for v in totals], [Vector(builder, v) for v in sums])

    one = [I64]
    define(module, STEP, [arrays, arrays, arrays, one, one, one, numbers, [scale_type], one, one, sums], sums, step)
    define(module, FOLD, [totals, sums], totals, fold)
    return str(module)


def define(
    module: ir.Module, name: str, arguments: Sequence[list[ir.Type]], results: list[ir.Type], emit: Callable[..., list[Vector]]
) -> None:
    """Define a function that LLVM inlines. `emit` gets the groups of arguments, and returns the results."""
    result = ir.LiteralStructType(results)
    function = ir.Function(module, ir.FunctionType(result, [x for group in arguments for x in group]), name)
    function.attributes.add("alwaysinline")
    builder, values = ir.IRBuilder(function.append_basic_block()), iter(function.args)
    packed: ir.Value = ir.Constant(result, ir.Undefined)
    for k, vector in enumerate(emit(builder, *([next(values) for _ in group] for group in arguments))):
        packed = builder.insert_value(packed, vector.value, k)
    builder.ret(packed)
