"""A block of the CPU's loop over classes, in LLVM code: entries of a row, such as pixels, each with several classes.

The arithmetic of an entry is that of `kernel/entry.py`, with its letters.

The loop (`class_loop.py`) calls four functions for each block. LOAD copies the logits to scratch memory and finds the maxima, one class
after another, so that memory is read once, and in long rows. COMPUTE walks along the classes in that memory, a vector's width of entries
after another: it computes e and R, and evaluates the formula, which takes -log p and 1 - p of the entry's class and returns the value
and its derivative by -log p. SUM adds up sums that have a number for each class. WRITE computes the gradient. Both go one class after
another again. Where the classes of an entry lie side by side in memory, LOAD and WRITE go in its order, by tiles (`tiles.py`). Losses of
regions, such as Dice, take two passes; see `kernel/regions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from fastloss.core.dtypes import BY_CODE
from fastloss.core.plan import Operand, Spec
from fastloss.cpu.abi import count_partials
from fastloss.cpu.step import DOUBLE, I64, Row, StepEmitter, Values, define, differs_from, lanes_of, spread, spread_number
from fastloss.cpu.tiles import classes_of, load_tile, store_tile
from fastloss.cpu.vector import Vector, call, gather, scalar_type
from fastloss.kernel import element, regions
from fastloss.kernel.entry import HUGE, Sums, exp_of_difference, limited, writes_curvature
from fastloss.kernel.regions import RegionSums
from fastloss.ops import where

LOAD, COMPUTE, SUM, WRITE = "fastloss_load", "fastloss_compute", "fastloss_sum", "fastloss_write"  # names of the functions
# rows of scratch memory after those of the classes: the largest logit, the index of the entry's class, and factors of the gradient
MAXIMUM, CLASS, FACTOR, SLOPE, SHARE, TOP, LIMIT = range(7)
PROBABILITY = 7  # the first of as many rows as there are classes
NO_CLASS = -1.0  # the index of entries that do not count


class Block(NamedTuple):
    """Where the entries of a block lie, as LLVM values."""

    row: Row  # at the first class
    class_strides: Values  # of each array along the axis of classes
    first: ir.Value  # the first entry in the row
    last: ir.Value  # the end of the block in the row
    scratch: ir.Value  # address of the thread's scratch memory
    length: ir.Value  # of its rows
    classes: ir.Value  # number of classes

    def has_adjacent_classes(self, builder: ir.IRBuilder, k: int, array: Operand) -> ir.Value:
        """Return whether the classes of an entry lie side by side in array k."""
        return builder.icmp_signed("==", self.class_strides[k], I64(array.size))


class Entries(NamedTuple):
    """Entries of one step, before their classes are walked along."""

    m: Vector  # the largest logit
    target: Vector  # the index of the class, NO_CLASS if the entry does not count
    logit: Vector  # of that class
    bad: Vector  # 1 if the index is that of no class


class Step:
    """A vector's width of entries of a block, at one class."""

    def __init__(self, spec: Spec, builder: ir.IRBuilder, block: Block, first: ir.Value, index: ir.Value) -> None:
        self.spec, self.builder, self.block, self.first, self.index = spec, builder, block, first, index
        strides = zip(block.row.addresses, block.class_strides, strict=True)
        addresses = [builder.add(address, builder.mul(stride, index)) for address, stride in strides]
        self.memory = StepEmitter(
            spec, builder, block.row._replace(addresses=addresses), first, builder.sub(block.last, first), prefetches=I64(0)
        )
        self.vector = ir.VectorType(scalar_type(spec.compute), lanes_of(spec))
        self.size = BY_CODE[spec.compute].size
        self.names = {op.name: k for k, op in enumerate(spec.operands)}

    def pointer(self, row: ir.Value) -> ir.Value:
        """Return the pointer to the entries in a row of the scratch memory."""
        builder, block = self.builder, self.block
        position = builder.add(builder.mul(row, block.length), builder.sub(self.first, block.first))
        address = builder.add(block.scratch, builder.mul(position, I64(self.size)))
        return builder.inttoptr(address, self.vector.as_pointer())

    def lane_pointers(self) -> ir.Value:
        """Return a pointer for each lane to its logit of the first class in the scratch memory."""
        builder, lanes = self.builder, self.vector.count
        first = spread(builder, builder.ptrtoint(self.pointer(I64(0)), I64), lanes)
        sizes = ir.Constant(ir.VectorType(I64, lanes), [lane * self.size for lane in range(lanes)])
        return builder.inttoptr(builder.add(first, sizes), ir.VectorType(self.vector.element.as_pointer(), lanes))

    def row_of(self, name: int | None) -> ir.Value:
        """Return the index of a row of scratch memory: the row of the class's logits, the one of its probabilities, or another one."""
        if name is None:
            return self.index
        row = self.builder.add(self.block.classes, I64(name))
        return self.builder.add(row, self.index) if name == PROBABILITY else row

    def read(self, name: int | None = None) -> Vector:
        """Read from a row of scratch memory."""
        return Vector(self.builder, self.builder.load(self.pointer(self.row_of(name)), align=self.size))

    def keep(self, x: Vector, name: int | None = None) -> None:
        """Write to a row of scratch memory."""
        self.builder.store(x.value, self.pointer(self.row_of(name)), align=self.size)

    def constant(self, number: float) -> Vector:
        """Return a number in every lane."""
        return Vector(self.builder, ir.Constant(self.vector, [number] * self.vector.count))

    def whole(self, number: ir.Value) -> Vector:
        """Return a whole number in every lane, in the type of the arithmetic."""
        return spread_number(self.builder, self.builder.sitofp(number, DOUBLE), self.spec)

    def convert(self, raw: Vector, name: str) -> Vector:
        """Convert an operand to the type of the arithmetic."""
        return self.memory.convert(raw, self.spec.codes[name], self.spec.compute)

    def load(self, name: str) -> Vector | None:
        """Load an operand in the type of the arithmetic; None if it is not there."""
        return self.convert(self.memory.load_all((name,))[name], name) if name in self.names else None

    def load_classes(self, name: str, count: int) -> list[Vector]:
        """Load an operand at the step's class, or at the classes of a tile, whose first is the step's, in the type of the arithmetic."""
        k = self.names[name]
        if count == 1:
            raw = [self.memory.load_all((name,))[name]]
        else:
            pointers = self.memory.pointers(k, classes_of(self.spec.operands[k]))
            raw = [Vector(self.builder, x) for x in load_tile(self.builder, pointers, count)]
        return [self.convert(x, name) for x in raw]

    def store(self, name: str, classes: list[Vector], mode: ir.Value) -> None:
        """Store to an output at the step's class, or at the classes of a tile, whose first is the step's."""
        for k, output in enumerate(self.spec.outputs, len(self.spec.operands)):
            if output.name == name:
                raw = [self.memory.convert(x, self.spec.compute, output.code).value for x in classes]
                if len(raw) == 1:
                    self.memory.store(k, output, raw[0], mode)
                else:
                    store_tile(self.builder, self.memory.pointers(k, classes_of(output)), raw)

    def gather(self, code: str, firsts: ir.Value, stride: ir.Value, index: Vector) -> Vector:
        """Load the element `index * stride` bytes after the pointer of each lane, or 0 if the index is negative."""
        builder, lanes = self.builder, self.vector.count
        wide, vector = ir.VectorType(I64, lanes), ir.VectorType(scalar_type(code), lanes)
        whole = builder.fptosi(index.value, wide)
        address = builder.add(builder.ptrtoint(firsts, wide), builder.mul(whole, spread(builder, stride, lanes)))
        pointers = builder.inttoptr(address, ir.VectorType(vector.element.as_pointer(), lanes))
        mask = builder.icmp_signed(">=", whole, ir.Constant(wide, None))
        return Vector(builder, gather(builder, vector, pointers, BY_CODE[code].size, mask))

    def prefetch_next_block(self) -> None:
        """Prefetch the logits that the next block will load: memory would be idle while the classes are walked along.

        Where the classes of an entry lie side by side, each class prefetches its share of the memory of all.
        """
        k, builder, block = self.names["input"], self.builder, self.block
        operand = self.spec.operands[k]
        if operand.access == "contiguous":
            first, stride = builder.ptrtoint(self.memory.first_pointer(k, operand), I64), I64(operand.size)
        elif operand.access == "strided":
            address, stride, of_all = block.row.addresses[k], block.row.inner_strides[k], I64(operand.size * self.vector.count)
            share = builder.select(block.has_adjacent_classes(builder, k, operand), of_all, block.class_strides[k])
            first = builder.add(builder.add(address, builder.mul(self.first, stride)), builder.mul(self.index, share))
        else:
            return
        pointer = builder.inttoptr(builder.add(first, builder.mul(block.length, stride)), ir.IntType(8).as_pointer())
        call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *[ir.IntType(32)(n) for n in (0, 2, 1)])  # to read, L2, data


class BlockEmitter:
    """Emits the functions of a block."""

    def __init__(self, spec: Spec, builder: ir.IRBuilder, block: Block, numbers: dict[str, ir.Value]) -> None:
        self.spec, self.builder, self.block, self.numbers = spec, builder, block, numbers
        self.has_logits = spec.trace != ""
        self.has_gradient = any(op.name != "value" for op in spec.outputs)

    def step(self, first: ir.Value, index: ir.Value) -> Step:
        """Return the step from an entry on, at a class."""
        return Step(self.spec, self.builder, self.block, first, index)

    @contextmanager
    def steps(self) -> Iterator[ir.Value]:
        """Emit a loop over the first entries of the steps of the block."""
        with cgutils.for_range_slice(self.builder, self.block.first, self.block.last, I64(lanes_of(self.spec)), I64) as (first, _):
            yield first

    @contextmanager
    def steps_by_class(self) -> Iterator[Step]:
        """Emit a loop over the classes and, inside, over the steps of the block."""
        with cgutils.for_range(self.builder, self.block.classes, intp=I64) as classes, self.steps() as first:
            yield self.step(first, classes.index)

    @contextmanager
    def tiles(self, width: int) -> Iterator[list[Step]]:
        """Emit a loop over the steps of the block and, inside, over tiles of classes. The last ones of both overlap those before them."""
        builder, block, lanes = self.builder, self.block, lanes_of(self.spec)
        with self.steps() as first, cgutils.for_range_slice(builder, I64(0), block.classes, I64(width), I64) as (index, _):
            first = call(builder, "llvm.smin.i64", I64, first, builder.sub(block.last, I64(lanes)))
            index = call(builder, "llvm.smin.i64", I64, index, builder.sub(block.classes, I64(width)))
            yield [self.step(first, builder.add(index, I64(k))) for k in range(width)]

    def for_classes(self, name: str, emit: Callable[[list[Step]], None]) -> None:
        """Emit code for every class of every step, given the steps at the classes of a tile of an array, or the step at one class."""

        def for_each() -> None:
            with self.steps_by_class() as step:
                emit([step])

        k, array = next((k, array) for k, array in enumerate(self.spec.arrays) if array.name == name)
        if array.access != "strided":
            for_each()
            return
        with self.builder.if_else(self.fills_tile(k, array)) as (tiled, other):
            with tiled, self.tiles(classes_of(array).count) as steps:
                emit(steps)
            with other:
                for_each()

    def fills_tile(self, k: int, array: Operand) -> ir.Value:
        """Return whether the classes of an entry lie side by side in array k, and the block has the classes and entries of a tile."""
        builder, block = self.builder, self.block
        has_classes = builder.icmp_signed(">=", block.classes, I64(classes_of(array).count))
        has_entries = builder.icmp_signed(">=", builder.sub(block.last, block.first), I64(lanes_of(self.spec)))
        return builder.and_(block.has_adjacent_classes(builder, k, array), builder.and_(has_classes, has_entries))

    def number(self, name: str) -> Vector:
        """Return an option in every lane."""
        return spread_number(self.builder, self.numbers[name], self.spec)

    @property
    def options(self) -> dict[str, Vector]:
        """The options that are numbers, in every lane."""
        return {name: self.number(name) for name in self.spec.numbers}

    def emit_load(self) -> None:
        """Copy the logits to the scratch memory, and find the maxima."""
        if not self.has_logits:
            return
        self.for_classes("input", self.load_logits)
        if self.spec.has_probabilities:
            self.for_classes("target", self.load_probabilities)

    def load_logits(self, steps: list[Step]) -> None:
        """Copy the logits of neighbouring classes, and find the maxima of them and the classes before."""
        first = steps[0]
        logits = [limited(z) for z in first.load_classes("input", len(steps))]
        for step, z in zip(steps, logits, strict=True):
            step.keep(z)
        # selecting the first class here also keeps LLVM from making this a masked store, which takes much longer
        is_first, m = self.builder.icmp_signed("==", first.index, I64(0)), first.constant(-HUGE[logits[0].bits])
        m = m.like(self.builder.select(is_first, m.value, first.read(MAXIMUM).value))
        for z in logits:
            m = where(z > m, z, m)
        first.keep(m, MAXIMUM)

    def load_probabilities(self, steps: list[Step]) -> None:
        """Copy the probabilities of neighbouring classes."""
        for step, y in zip(steps, steps[0].load_classes("target", len(steps)), strict=True):
            step.keep(y, PROBABILITY)

    def emit_compute(self, scale: ir.Value, mode: ir.Value, totals: list[Vector]) -> list[Vector]:
        """Compute the values of the entries, and the factors of their gradients; return the new sums of the range."""
        places = [cgutils.alloca_once_value(self.builder, x.value) for x in totals]
        with self.steps() as first:
            step = self.step(first, I64(0))
            entries = self.find_entries(step)
            terms = self.terms(step, entries, scale)
            if "value" in terms:
                step.store("value", [terms["value"]], mode)
            added = [terms[name] for name in self.spec.sums_by_entry] + [entries.bad]
            for place, x in zip(places, added, strict=True):
                wide = x.value if self.spec.compute == "f8" else self.builder.fpext(x.value, ir.VectorType(DOUBLE, x.type.count))
                self.builder.store(self.builder.fadd(self.builder.load(place), wide), place)
        return [Vector(self.builder, self.builder.load(place)) for place in places]

    def find_entries(self, step: Step) -> Entries:
        """Find out about each entry what does not depend on its other classes."""
        has_indices = not self.spec.has_probabilities
        raw = step.memory.load_all(("target", "mask") if has_indices else ("mask",))
        target = step.convert(raw["target"], "target") if has_indices else step.constant(0.0)
        counted = Vector(self.builder, step.memory.row_mask(), step.vector)
        if "mask" in raw:
            counted = counted & (raw["mask"] != 0)
        if "ignore_index" in self.numbers:
            counted = counted & differs_from(step.memory, raw["target"], target, self.numbers["ignore_index"])
        is_class = (target >= 0.0) & (target < step.whole(self.block.classes))
        index, bad = (
            where(counted & is_class, target, NO_CLASS),
            where(counted & ~is_class, step.constant(float("target" in self.spec.checked)), 0.0),
        )
        if not self.has_logits:
            return Entries(index, index, index, bad)
        logit = step.gather(self.spec.compute, step.lane_pointers(), self.builder.mul(self.block.length, I64(step.size)), index)
        return Entries(step.read(MAXIMUM), index, logit, bad)

    def terms(self, step: Step, entries: Entries, scale: ir.Value) -> dict[str, Vector]:
        """Return the terms of the sums: "count", by which a mean divides, and "value"."""
        counted = entries.target != NO_CLASS
        w = None if self.spec.has_probabilities else self.of_class(step, "weight", entries.target)
        found = {"count": step.constant(1.0) if w is None else w}
        if self.has_logits:
            own = step.load("pixel_weight")
            factor = element.multiply(element.multiply(own, step.load("grad_output")), spread_number(self.builder, scale, self.spec))
            found["entropy" if regions.has_regions(self.spec) else "value"] = element.multiply(own, self.evaluate(step, entries, w, factor))
        return {name: where(counted, x, 0.0) for name, x in found.items()}

    def of_class(self, step: Step, name: str, index: Vector) -> Vector | None:
        """Return an operand at the class of each entry, or 0 for entries that do not count; None if it is not there."""
        if name not in step.names:
            return None
        k = step.names[name]
        code = self.spec.operands[k].code
        return step.convert(step.gather(code, step.memory.lane_pointers(k, scalar_type(code)), self.block.class_strides[k], index), name)

    def walk(self, first: ir.Value, entries: Entries) -> tuple[Sums, RegionSums]:
        """Walk along the classes of the entries of a step: keep e in the scratch memory, and add it up.

        The rounding errors of the sum are added up too (Kahan): with 1,000 classes the gradient was off by 34 ulp without.
        """
        builder, m, own = self.builder, entries.m, len(Sums._fields)
        zero = ir.Constant(m.type, None)
        places = [cgutils.alloca_once_value(builder, zero) for _ in (*Sums._fields, *RegionSums._fields)]
        for place in places:
            builder.store(zero, place)

        def loaded() -> tuple[Sums, RegionSums]:
            found = [m.like(builder.load(place)) for place in places]
            return Sums(*found[:own]), RegionSums(*found[own:])

        with cgutils.for_range(builder, self.block.classes, intp=I64) as classes:
            step, old = self.step(first, classes.index), loaded()
            step.prefetch_next_block()
            for place, x in zip(places, self.add_class(step, *old, entries), strict=True):
                builder.store(x.value, place)
        return loaded()

    def add_class(self, step: Step, sums: Sums, of_regions: RegionSums, entries: Entries) -> list[Vector]:
        """Keep e of the step's class in the scratch memory, and return the sums with its terms."""
        m, z = entries.m, step.read()
        e = exp_of_difference(z, m)
        if self.has_gradient or self.spec.sums_by_class:
            step.keep(e)
        y, is_own = self.probability(step), entries.target == step.whole(step.index)
        classes = step.whole(self.block.classes)
        added = regions.add_class(self.spec, sums, of_regions, e, z, m, is_own, y, self.options, classes, step.load)
        return [x for found in added for x in found]

    def probability(self, step: Step) -> Vector | None:
        """Return the probability of the step's class; None if there are indices."""
        return step.read(PROBABILITY) if self.spec.has_probabilities else None

    def evaluate(self, step: Step, entries: Entries, w: Vector | None, factor: Vector) -> Vector:
        """Return the value of each entry, and keep the factors of its gradient, or of the terms of its classes."""
        sums, of_regions = self.walk(step.first, entries)
        value, factors = regions.evaluate(
            self.spec, sums, of_regions, entries.m, entries.logit, w, factor, self.options, step.whole(self.block.classes), step.load,
            lambda name: self.of_class(step, name, entries.target),
        )  # fmt: skip
        self.keep_factors(step, entries.target, *factors)
        return factor.match(value)

    def keep_factors(self, step: Step, *factors: Vector) -> None:
        """Keep the rows from CLASS on of the scratch memory, from which SUM computes sums and WRITE the gradient."""
        if self.has_gradient or self.spec.sums_by_class:
            for name, x in zip((CLASS, FACTOR, SLOPE, SHARE, TOP, LIMIT), factors, strict=False):
                step.keep(x, name)

    def emit_sum(self, sums: ir.Value) -> None:
        """Add the block's sums of each class to those of the range."""
        names = self.spec.sums_by_class
        if not names:
            return
        builder = self.builder
        with cgutils.for_range(builder, self.block.classes, intp=I64) as classes:
            zero = ir.Constant(ir.VectorType(scalar_type(self.spec.compute), lanes_of(self.spec)), None)
            places = [cgutils.alloca_once_value(builder, zero) for _ in names]
            for place in places:
                builder.store(zero, place)
            with self.steps() as first:
                terms = self.terms_of_class(self.step(first, classes.index))
                for place, name in zip(places, names, strict=True):
                    builder.store((terms[name].like(builder.load(place)) + terms[name]).value, place)
            for k, place in enumerate(places):
                lanes = Vector(builder, builder.load(place)).convert(self.spec.compute, "f8")
                while lanes.type.count > 1:
                    lanes = element.accumulate(*lanes.halves(), as_factors=False)
                at = builder.gep(sums, [builder.add(builder.mul(classes.index, I64(len(names))), I64(k))])
                added = builder.extract_element(lanes.value, ir.IntType(32)(0))
                builder.store(builder.fadd(builder.load(at), added), at)

    def terms_of_class(self, step: Step) -> dict[str, Vector]:
        """Return the terms that the step's class adds to the sums that have a number for each class."""
        target, e, rows = step.read(CLASS), step.read(), (FACTOR, SLOPE, *([SHARE] if "pixel_weight" in step.names else []))
        factors = tuple(step.read(name) for name in rows)
        return regions.terms_of_class(self.spec, factors, e, target == step.whole(step.index), target != NO_CLASS)

    def emit_write(self, mode: ir.Value) -> None:
        """Compute and store the gradient."""
        if not self.has_gradient:
            return
        output = "curvature" if writes_curvature(self.spec) else "slope"
        self.for_classes(output, lambda steps: steps[0].store(output, [self.derivative(step) for step in steps], mode))

    def derivative(self, step: Step) -> Vector:
        """Return the gradient by the logits of the step's class, or the curvature."""
        target, e = step.read(CLASS), step.read()
        is_own = target == step.whole(step.index)
        factors = tuple(step.read(name) for name in (FACTOR, SLOPE, SHARE, TOP, LIMIT)[: regions.count_factors(self.spec)])
        y, classes = self.probability(step), step.whole(self.block.classes)
        slope = regions.derivative_of_class(self.spec, factors, e, is_own, y, self.options, classes, step.load)
        return where(target == NO_CLASS, 0.0, slope) if self.spec.excludes else slope


# --- functions that the loop calls -------------------------------------------------------------------------------------


def emit_functions(spec: Spec) -> str:
    """Return the LLVM code of LOAD, COMPUTE, SUM and WRITE."""
    module, arrays, one = ir.Module(), [I64] * len(spec.arrays), [I64]
    totals = [ir.VectorType(DOUBLE, lanes_of(spec))] * count_partials(spec)
    shared = [arrays, arrays, arrays, arrays, one, one, one, [DOUBLE] * max(1, len(spec.numbers)), one, one, one]

    def function(name: str, own: list[Sequence[ir.Type]], results: list[ir.Type], emit: Callable[..., list[Vector] | None]) -> None:
        def build(builder: ir.IRBuilder, addresses: Values, inner_strides: Values, outer_strides: Values, class_strides: Values,
                  inner_size: Values, first: Values, last: Values, numbers: Values, scratch: Values, length: Values, classes: Values,
                  *rest: Values) -> list[Vector]:  # fmt: skip
            row = Row(addresses, inner_strides, outer_strides, inner_size[0])
            block = Block(row, class_strides, first[0], last[0], scratch[0], length[0], classes[0])
            return emit(BlockEmitter(spec, builder, block, dict(zip(spec.numbers, numbers, strict=False))), *rest) or []

        define(module, name, [*shared, *map(list, own)], results, build)

    function(LOAD, [], [], lambda block: block.emit_load())
    function(
        COMPUTE, [[DOUBLE], one, totals], totals,
        lambda block, scale, mode, sums: block.emit_compute(scale[0], mode[0], [Vector(block.builder, x) for x in sums]),
    )  # fmt: skip
    function(SUM, [[DOUBLE.as_pointer()]], [], lambda block, sums: block.emit_sum(sums[0]))
    function(WRITE, [one], [], lambda block, mode: block.emit_write(mode[0]))
    return str(module)
