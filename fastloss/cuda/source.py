"""Generate the text of the kernel of a `Variant`.

Design: a) A `Variant` holds everything that decides the text: a `Spec`, as on the CPU, and fields that only a GPU needs. b) The text
consists of constants, then `elements.cuh` with the types, loads and stores, then the functions generated here, then `loop.cuh`
with the loop. c) The generated code for one element has no loops: the formula is called with `Scalar` arguments and
appends its own lines (`scalar.py`), and `kernel/element.py`, which the CPU shares, computes results and sums from its quantities.
d) A kernel of entries with several classes has the same loop around it: an entry takes the place of an element, and `classes.cuh`, with the
functions that `classes.py` generates, that of the function which computes an element.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastloss.core.dtypes import BY_CODE
from fastloss.core.plan import Operand, Spec
from fastloss.cuda.classes import class_functions, writes_derivative
from fastloss.cuda.scalar import TYPES, Scalar, literal
from fastloss.cuda.text import function, move, structure
from fastloss.kernel import element, elementary
from fastloss.kernel.entry import HUGE
from fastloss.kernel.regions import has_regions

WORD = 16  # bytes of the widest load or store
THREADS = 256  # in a block
GROUPS = 1024  # largest number of groups with several ranges; each has counters
AHEAD = 8  # classes of an entry that a thread loads before it computes
ENTRIES = 4  # entries of a thread whose terms are added up before those of a block's threads, for sums that have a number for each class
SUMMED = 64  # elements that a thread sums in the type of the arithmetic before it adds the sum in float64; see BLOCK in cpu/step.py


@dataclass(frozen=True)
class Variant:
    """Everything that decides the text of a kernel."""

    spec: Spec
    axes: int  # number of axes outside the rows
    is_wide: bool  # whether indices of elements need 64 bits
    is_ragged: bool  # whether some packs have fewer elements than the others
    is_local: bool  # whether each range lies in one segment
    widths: tuple[int, ...]  # bytes of each array that are loaded or stored at once along a row
    result: str = "f8"  # type code of the reduced value
    is_mean: bool = False  # whether the result is the first sum divided by the second, which is the count
    upstream: str = ""  # type code of the upstream gradient if it is an array; "" if it is a number on the host
    counts: bool = False  # whether sums and gradients are divided by the number of elements that are not excluded
    divides: bool = False  # whether they are divided by numbers on the device, one for each group
    team: int = 1  # number of threads that compute an entry with several classes together: 1, or all of a block

    @property
    def pack(self) -> int:
        """Number of elements of a row that a thread loads together."""
        return pack_of(self.spec)

    @property
    def packs(self) -> int:
        """Number of packs that a thread loads before it computes."""
        return packs_of(self.spec)

    @property
    def name(self) -> str:
        """Name of the kernel, which profilers show."""
        return "fastloss_" + re.sub(r"\W+", "_", self.spec.formula.function.__name__, flags=re.ASCII).strip("_")


def pack_of(spec: Spec) -> int:
    """Return how many elements of a row a thread loads together: one word of the widest array among the input and the outputs.

    Entries with several classes are loaded one by one.
    """
    if spec.walk == "classes":
        return 1
    sizes = [op.size for op in spec.arrays if op.name == "input" or op in spec.outputs]
    return WORD // max(sizes, default=2)


def packs_of(spec: Spec) -> int:
    """Return how many packs a thread loads before it computes, or how many entries it computes before their classes are added up."""
    if spec.walk == "classes":
        return ENTRIES if spec.sums_by_class else 1
    pack = pack_of(spec)
    return 1 if pack == 1 else 4 if pack <= 4 else 2


@cache
def part(name: str) -> str:
    """Read a file whose text is part of every kernel."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def source(variant: Variant) -> str:
    """Generate the text of a kernel."""
    spec = variant.spec
    if spec.walk == "classes":
        own = [numbers(spec), *class_functions(spec), part("classes.cuh"), folding(spec), scaling(variant)]
    else:
        own = [storage(spec), numbers(spec), element_function(spec), *[counting(spec)] * variant.counts, folding(spec), scaling(variant)]
    return "\n".join([constants(variant), part("elements.cuh"), *own, part("loop.cuh")])


def constants(variant: Variant) -> str:
    """Define the constants that elements.cuh and loop.cuh use for the variant."""
    spec = variant.spec
    named = {
        "KERNEL": variant.name,
        "compute_t": TYPES[spec.compute],
        "index_t": "unsigned long long" if variant.is_wide else "unsigned int",
        "THREADS": THREADS,
        "GROUPS": GROUPS,
        "BOUNDS": bounds(variant),
        "PACK": variant.pack,
        "PACKS": variant.packs,
        "ROUNDS": max(1, SUMMED // (variant.pack * variant.packs)),
        "ARRAYS": len(spec.arrays),
        "AXES": variant.axes,
        "NUMBERS": len(spec.numbers),
        "SUMS": len(spec.sums_by_entry),
        "BY_CLASS": len(spec.sums_by_class),
        "FACTORS": len(spec.multiplied),
        "IS_RAGGED": int(variant.is_ragged),
        "IS_LOCAL": int(variant.is_local),
        "IS_MEAN": int(variant.is_mean),
        "COUNTS": int(variant.counts),
        "DIVIDES": int(variant.divides),
        "TEAM": variant.team,
        "CLASSES": int(spec.walk == "classes"),
    }
    if spec.walk == "classes":
        least = literal(-HUGE[8 * BY_CODE[spec.compute].size], TYPES[spec.compute])
        named |= {"AHEAD": AHEAD, "LEAST_LOGIT": least, "HAS_LOGITS": int(spec.trace != "")}
        named |= {"HAS_DERIVATIVE": int(writes_derivative(spec)), "HAS_REGIONS": int(has_regions(spec))}
    widths = "".join(f"#define WIDTH_{k} {width}\n" for k, width in enumerate(variant.widths))
    return "".join(f"#define {name} {value}\n" for name, value in named.items()) + widths


def bounds(variant: Variant) -> str:
    """Return the threads of a block, and how many blocks have to fit on a multiprocessor: as many as without spilling registers.

    Without that number, the compiler spills registers of some kernels on some devices, so that more blocks fit.
    """
    spec = variant.spec
    has_many = spec.compute == "f8" or len(spec.outputs) > 2 or len(spec.summed) > 2
    is_scattered = not variant.is_local or any(op.access in ("strided", "nested") for op in spec.arrays)
    is_heavy = has_many or is_scattered or (variant.axes > 0 and len(spec.summed) > 0)
    return f"{THREADS}, {1 if spec.checked else 2 if is_heavy else 3}"


def storage(spec: Spec) -> str:
    """Write the types of a pack and of what is the same in all packs of a row, and the functions that load and store them."""
    arrays, reads = list(enumerate(spec.arrays)), len(spec.operands)
    packed = [(k, op) for k, op in arrays if op.access != "constant"]
    constants = [(k, op) for k, op in arrays if op.access == "constant"]
    place = "const Arguments& a, const Position& pos"
    return "\n".join(
        [
            structure("Pack", (f"{TYPES[op.code]} x{k}[PACK]" for k, op in packed)),
            structure("Constants", (f"{TYPES[op.code]} x{k}" for k, op in constants)),
            function(f"void load(Pack& pack, {place})", (move("load", "pack", k, op) for k, op in packed if k < reads)),
            function(f"void load_constants(Constants& constant, {place})", (move("load", "constant", k, op) for k, op in constants)),
            function(f"void store(const Pack& pack, {place})", (move("store", "pack", k, op) for k, op in packed if k >= reads)),
        ]
    )


def element_function(spec: Spec) -> str:
    """Write the function that computes an element and adds it to the sums."""
    compute, lines = TYPES[spec.compute], list[str]()
    raw, number, loaded, counted = load(spec, lines)
    found = element.quantities(spec, loaded, number)
    scale = Scalar(lines, "number.scale", compute)
    for k, (output, result) in enumerate(element.results_to_store(spec, found, loaded, scale, counted), len(spec.operands)):
        lines.append(f"pack.x{k}[j] = {result.convert(spec.compute, output.code).name};")
    values, factors = element.summands(spec, found, loaded.get("weight"), counted)
    for sums, added, as_factors in (("total", values, False), ("factor", factors, True)):
        for k, x in enumerate(added):
            total = element.accumulate(Scalar(lines, f"sums.{sums}[{k}]", compute), counted.match(x), as_factors)
            lines.append(f"sums.{sums}[{k}] = {total.name};")
    for k, name in enumerate(spec.checked):
        bad = element.is_bad(loaded[name], counted)
        key, value = f"{len(spec.checked)}.0 * (double)linear + {k}.0", raw[name].convert(spec.codes[name], "f8").name
        lines.append(f"if ({bad.name}) record_bad(a, {key}, {value});")
    position = "const int j, const bool is_inside, const index_t linear"
    head = f"void compute(Pack& pack, const Constants& constant, {position}, const Arguments& a, const Numbers& number, Sums& sums)"
    return function(head, lines)


def counting(spec: Spec) -> str:
    """Write the function that returns whether an element counts."""
    lines = list[str]()
    *_, counted = load(spec, lines)
    head = "bool counts(const Pack& pack, const Constants& constant, const int j, const bool is_inside, const Numbers& number)"
    return function(head, [*lines, f"return {counted.name};"])


def load(spec: Spec, lines: list[str]) -> tuple[dict[str, Scalar], dict[str, Scalar], dict[str, Scalar], Scalar]:
    """Write the lines that read an element's operands.

    Returns the operands as stored, the options given as numbers, the operands converted, and the condition that the element counts.
    """
    compute = TYPES[spec.compute]
    raw = {op.name: declare(lines, op, k) for k, op in enumerate(spec.operands)}
    number = {name: Scalar(lines, f"number.n{k}", compute) for k, name in enumerate(spec.numbers)}
    is_inside = Scalar(lines, "is_inside", "bool", compute)

    def differs(stored: Scalar, converted: Scalar) -> Any:
        if spec.codes["target"][0] in "iu":  # compare integers as stored, other targets as converted
            return stored != Scalar(lines, "number.ignored", stored.type)
        return converted != number["ignore_index"]

    loaded, counted = element.load(spec, raw, number, is_inside, lambda x, code: x.convert(code, spec.compute), differs)
    return raw, number, loaded, counted


def declare(lines: list[str], operand: Operand, k: int) -> Scalar:
    """Write the line that declares an element of operand k. It is named by number, because parameters may have any name."""
    type, place = TYPES[operand.code], f"constant.x{k}" if operand.access == "constant" else f"pack.x{k}[j]"
    lines.append(f"const {type} v{k} = {place};  // {operand.name.encode('ascii', 'replace').decode()}")
    return Scalar(lines, f"v{k}", type)


def numbers(spec: Spec) -> str:
    """Write the type that holds the options given as numbers, and the function that reads them."""
    compute = TYPES[spec.compute]
    members = {"scale": (compute, "scale"), **{f"n{k}": (compute, f"a.numbers[{k}]") for k in range(len(spec.numbers))}}
    if "ignore_index" in spec.numbers:
        members["ignored"] = (TYPES[spec.codes["target"]], f"a.numbers[{spec.numbers.index('ignore_index')}]")
    text = structure("Numbers", (f"{type} {name}" for name, (type, _) in members.items()))
    lines = ["Numbers number;", *(f"number.{name} = ({type}){value};" for name, (type, value) in members.items()), "return number;"]
    return f"{text}\n" + function("Numbers read_numbers(const Arguments& a, const double scale)", lines)


def folding(spec: Spec) -> str:
    """Write the function that adds a thread's sums to its float64 totals."""
    lines = [f"totals.x[{k}] += (double)sums.total[{k}];" for k in range(len(spec.sums_by_entry))]
    for k, name in enumerate(spec.multiplied):
        logarithm = elementary.log1p_of_product(Scalar(lines, f"sums.factor[{k}]", TYPES[spec.compute]))
        lines.append(f"totals.x[{spec.summed.index(name)}] += (double){logarithm.name};")
    return function("void fold(Totals& totals, const Sums& sums)", lines)


def scaling(variant: Variant) -> str:
    """Write the functions that return the upstream gradient of a group, and that write a result."""
    lines: list[str] = []
    type = TYPES[variant.upstream or "f8"]
    upstream = Scalar(lines, f"*(const {type}*)(a.upstream + (long long)group * a.upstream_stride)", type)
    read = upstream.convert(variant.upstream or "f8", "f8")
    lines.append(f"return {read.name if variant.upstream else 'a.numerator'};")
    rounded: list[str] = []
    result = Scalar(rounded, "x", "double").convert("f8", variant.result)
    rounded.append(f"(({TYPES[variant.result]}*)a.results)[index] = {result.name};")
    return "\n".join(
        [
            function("double numerator(const Arguments& a, const index_t group)", lines),
            function("void write_result(const Arguments& a, const index_t index, const double x)", rounded),
        ]
    )
