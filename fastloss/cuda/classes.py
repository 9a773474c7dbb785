"""Generate the functions of a kernel of entries with several classes, such as pixels, which `classes.cuh` calls.

Each of them loads, stores, or computes a straight line of the arithmetic in `kernel/entry.py` and `kernel/regions.py`. Arrays that have
an axis of classes are read and written through the address of an entry's first class; of the others, an entry has one element, as in
other kernels.
"""

from __future__ import annotations

from fastloss.core.plan import Operand, Spec
from fastloss.cuda.scalar import TYPES, Scalar
from fastloss.cuda.text import function, move, structure
from fastloss.kernel import entry, regions
from fastloss.kernel.element import multiply

DERIVATIVES = ("slope", "curvature")  # a kernel writes one of them
SUMS, GIVEN = "ClassSums& found", "const Class& loaded, const Arguments& a, const Numbers& number"
IS_OWN = "const bool is_own"  # whether the loaded class is that of the entry


def class_functions(spec: Spec) -> list[str]:
    """Write the types and the functions of a spec's entries and classes."""
    with_logits = [limiting(spec), adding(spec)] if spec.trace else []
    with_terms = [adding_terms(spec)] if spec.sums_by_class else []
    with_derivative = [differentiating(spec)] if writes_derivative(spec) else []
    loads_and_stores = [entry_types(spec), storage(spec), class_storage(spec), storing(spec)]
    return [*loads_and_stores, finding(spec), *with_logits, evaluating(spec), *with_terms, *with_derivative]


def writes_derivative(spec: Spec) -> bool:
    """Whether a kernel writes a gradient, or second derivatives."""
    return any(op.name in DERIVATIVES for op in spec.outputs)


def has_class_axis(spec: Spec, operand: Operand) -> bool:
    """Whether an array has an element for each class."""
    if regions.has_regions(spec) and operand.name in spec.formula.defaults:
        return True
    return operand.name in ("input", "weight", *DERIVATIVES) or (operand.name == "target" and spec.has_probabilities)


def storage(spec: Spec) -> str:
    """Write the types of an entry and of what is the same in all entries of a row, and the functions that load them."""
    arrays = list(enumerate(spec.arrays))
    walked = [k for k, op in arrays if has_class_axis(spec, op) or op in spec.outputs]
    packed = [(k, op) for k, op in arrays if k not in walked and op.access != "constant"]
    constants = [(k, op) for k, op in arrays if k not in walked and op.access == "constant"]
    place = "const Arguments& a, const Position& pos"
    found = (f"pack.at{k} = entry_address<{int(spec.arrays[k].access == 'nested')}>(a, pos, {k});" for k in walked)
    return "\n".join(
        [
            structure("Pack", [*(f"{TYPES[op.code]} x{k}[PACK]" for k, op in packed), *(f"char* at{k}" for k in walked), "Entry entry"]),
            structure("Constants", (f"{TYPES[op.code]} x{k}" for k, op in constants)),
            function(f"void load(Pack& pack, {place})", [*(move("load", "pack", k, op) for k, op in packed), *found]),
            function(f"void load_constants(Constants& constant, {place})", (move("load", "constant", k, op) for k, op in constants)),
            function(f"void store(const Pack& pack, {place})", ()),
        ]
    )


def entry_types(spec: Spec) -> str:
    """Write the types of an entry's sums over its classes, of factors from which more is computed, and of what is known of an entry."""
    sums = ("rest", "low", "ties", *regions.RegionSums._fields) if regions.has_slopes(spec) else entry.Sums._fields
    return "\n".join(
        [
            structure("ClassSums", (f"compute_t {name}" for name in sums)),
            structure("Factors", [f"compute_t x[{regions.count_factors(spec)}]"]),
            structure("Entry", ["long long own = -1", "compute_t m", "Factors factors"]),  # its class, or -1 if it does not count
        ]
    )


def class_storage(spec: Spec) -> str:
    """Write the type of a class, and the function that loads one."""
    walked = [(k, op) for k, op in enumerate(spec.operands) if has_class_axis(spec, op)]
    lines = [f"loaded.x{k} = *(const {TYPES[op.code]}*)(pack.at{k} + (long long)index * a.classes.strides[{k}]);" for k, op in walked]
    return "\n".join(
        [
            structure("Class", (f"{TYPES[op.code]} x{k}" for k, op in walked)),
            function("void load_class(Class& loaded, const Arguments& a, const Pack& pack, const index_t index)", lines),
        ]
    )


def storing(spec: Spec) -> str:
    """Write the functions that store the value of an entry and the derivative by the logit of a class, where there are such outputs."""
    value, derivative = list[str](), list[str]()
    for k, op in enumerate(spec.outputs, len(spec.operands)):
        lines = derivative if op.name in DERIVATIVES else value
        place = f"(pack.at{k} + (long long)index * a.classes.strides[{k}])" if op.name in DERIVATIVES else f"pack.at{k}"
        stored = Scalar(lines, "x", TYPES[spec.compute]).convert(spec.compute, op.code)
        lines.append(f"*({TYPES[op.code]}*){place} = {stored.name};")
    return "\n".join(
        [
            function("void store_value(const Pack& pack, const compute_t x)", value),
            function("void store_derivative(const Arguments& a, const Pack& pack, const index_t index, const compute_t x)", derivative),
        ]
    )


class Entry:
    """The symbols of an entry, or of one of its classes, in a generated function."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.lines, self.type = spec, list[str](), TYPES[spec.compute]
        self.number = {name: self.symbol(f"number.n{k}") for k, name in enumerate(spec.numbers)}
        self.names = {op.name: k for k, op in enumerate(spec.operands)}

    def symbol(self, name: str) -> Scalar:
        """Return the symbol of a variable in the type of the arithmetic."""
        return Scalar(self.lines, name, self.type)

    def raw(self, name: str) -> Scalar | None:
        """Return an operand as stored, of the entry or of the loaded class; None if it is not there."""
        if name not in self.names:
            return None
        operand, k = self.spec.operands[self.names[name]], self.names[name]
        constant = "constant" if operand.access == "constant" else "pack"
        place = f"loaded.x{k}" if has_class_axis(self.spec, operand) else f"{constant}.x{k}" + "[j]" * (constant == "pack")
        return Scalar(self.lines, place, TYPES[operand.code])

    def load(self, name: str) -> Scalar | None:
        """Return an operand in the type of the arithmetic; None if it is not there."""
        raw = self.raw(name)
        return None if raw is None else raw.convert(self.spec.codes[name], self.spec.compute)

    def logit(self) -> Scalar:
        """Return the logit of the loaded class."""
        return self.symbol("").write(self.type, "logit(loaded)")

    @property
    def classes(self) -> Scalar:
        """The number of classes."""
        return self.symbol("(compute_t)a.classes.length")

    @property
    def probability(self) -> Scalar | None:
        """The probability of the loaded class; None if there are indices."""
        return self.load("target") if self.spec.has_probabilities else None

    @property
    def is_own(self) -> Scalar:
        """The condition that the loaded class is that of the entry."""
        return Scalar(self.lines, "is_own", "bool", self.type)

    def region_sums(self) -> regions.RegionSums:
        """Return the sums over the classes that losses of regions need besides."""
        return regions.RegionSums(*(self.symbol(f"found.{name}") for name in regions.RegionSums._fields))

    def sums(self) -> entry.Sums:
        """Return the sums over the classes."""
        return entry.Sums(*(self.symbol(f"found.{name}") for name in entry.Sums._fields))


def finding(spec: Spec) -> str:
    """Write the function that returns the class of an entry, or -1 if the entry does not count; see NO_CLASS in `cpu/classes.py`."""
    at = Entry(spec)
    counted = Scalar(at.lines, "is_inside", "bool", at.type)
    if (mask := at.raw("mask")) is not None:
        counted = counted & (mask != 0)
    index = Scalar(at.lines, "0", "long long")
    if not spec.has_probabilities:
        target = at.raw("target")
        assert target is not None
        if "ignore_index" in spec.numbers:
            counted = counted & (target != Scalar(at.lines, "number.ignored", target.type))
        index = target.write("long long", f"{target.name} != 0" if spec.codes["target"] == "b1" else f"(long long){target.name}")
        is_class = (index >= 0) & (index < Scalar(at.lines, "a.classes.length", "long long"))
        if "target" in spec.checked:
            bad = counted & ~is_class
            at.lines.append(f"if ({bad.name} && MEMBER == 0) record_bad(a, (double)linear, (double){target.name});")
        counted = counted & is_class
    at.lines.append(f"return {counted.name} ? {index.name} : -1;")
    head = "const Pack& pack, const Constants& constant, const int j, const bool is_inside, const index_t linear"
    return function(f"long long find_class({head}, const Arguments& a, const Numbers& number)", at.lines)


def limiting(spec: Spec) -> str:
    """Write the function that returns the logit of a class."""
    at = Entry(spec)
    z = at.load("input")
    assert z is not None
    limited = entry.limited(z)
    return function("compute_t logit(const Class& loaded)", [*at.lines, f"return {limited.name};"])


def adding(spec: Spec) -> str:
    """Write the function that adds a class to the sums."""
    at = Entry(spec)
    before, z, m = (at.sums(), at.region_sums()), at.logit(), at.symbol("m")
    e = entry.exp_of_difference(z, m)
    after = regions.add_class(spec, *before, e, z, m, at.is_own, at.probability, at.number, at.classes, at.load)
    changed = [pair for old, new in zip(before, after, strict=True) for pair in zip(old, new, strict=True)]
    at.lines += [f"{old.name} = {new.name};" for old, new in changed if new is not old]
    return function(f"void add_class({SUMS}, const compute_t m, {GIVEN}, {IS_OWN})", at.lines)


def evaluating(spec: Spec) -> str:
    """Write the function that computes the value of an entry, adds it to the sums, and returns the factors of the derivatives."""
    at = Entry(spec)
    w = None if spec.has_probabilities else at.load("weight")
    found = {"count": at.symbol("(compute_t)1") if w is None else w}
    at.lines.append("Factors factors = {};")
    if spec.trace:
        share, z, m = at.load("pixel_weight"), at.logit(), at.symbol("m")
        factor = multiply(multiply(share, at.load("grad_output")), at.symbol("number.scale"))
        sums = at.sums(), at.region_sums()
        value, factors = regions.evaluate(spec, *sums, m, z, w, factor, at.number, at.classes, at.load, at.load)
        found |= dict.fromkeys(("value", "entropy"), multiply(share, value))
        at.lines += [f"factors.x[{k}] = {x.name};" for k, x in enumerate(factors)]
        at.lines.append(f"if (MEMBER == 0) store_value(pack, {found['value'].name});")
    at.lines += [f"if (MEMBER == 0) sums.total[{k}] += {found[name].name};" for k, name in enumerate(spec.sums_by_entry)]
    at.lines.append("return factors;")
    entry_ = "const Pack& pack, const Constants& constant, const int j, Sums& sums"
    return function(f"Factors evaluate(const {SUMS}, const compute_t m, {GIVEN}, {entry_})", at.lines)


def adding_terms(spec: Spec) -> str:
    """Write the function that adds the terms of a class of an entry to the sums that have a number for each class."""
    at = Entry(spec)
    factors = tuple(at.symbol(f"entry.factors.x[{k}]") for k in range(3 if "pixel_weight" in at.names else 2))
    e = entry.exp_of_difference(at.logit(), at.symbol("entry.m"))
    terms = regions.terms_of_class(spec, factors, e, at.is_own, is_counted=Scalar(at.lines, "true", "bool", at.type))
    at.lines += [f"terms.x[{k}] += {terms[name].name};" for k, name in enumerate(spec.sums_by_class)]
    return function(f"void add_terms(ClassTerms& terms, const Entry& entry, const Class& loaded, {IS_OWN})", at.lines)


def differentiating(spec: Spec) -> str:
    """Write the function that returns the derivative by the logit of a class."""
    at = Entry(spec)
    e = entry.exp_of_difference(at.logit(), at.symbol("m"))
    factors = tuple(at.symbol(f"factors.x[{k}]") for k in range(regions.count_factors(spec)))
    derivative = regions.derivative_of_class(spec, factors, e, at.is_own, at.probability, at.number, at.classes, at.load)
    head = f"compute_t derivative_of_class(const compute_t m, const Factors& factors, {GIVEN}, {IS_OWN})"
    return function(head, [*at.lines, f"return {derivative.name};"])
