"""`Scalar`: a variable in CUDA code. Calling a formula with `Scalar` arguments appends the formula's lines of code.

Rounding does not depend on the compiler: `fma` is called explicitly, contraction is off, and division and square root round as
IEEE 754 prescribes. Results of different devices may differ only in the last bit, and only where a formula takes a sigmoid, a tanh or
a quotient, which start from the device's estimate of a reciprocal.
"""

from __future__ import annotations

from math import inf, isnan
from typing import Any

import numpy as np

from fastloss.core.dtypes import BY_CODE
from fastloss.kernel import elementary
from fastloss.ops import Symbol, horner

TYPES = {code: t.cuda for code, t in BY_CODE.items()}  # elements.cuh has functions that convert the 16-bit types
FLOATS, INTS = {"float": 32, "double": 64}, {"int": 32, "long long": 64}
TYPE_CODES = {"float": "f4", "double": "f8"}
CONVERSIONS = {"f2": "from_half", "B2": "from_bfloat16"}


class Scalar(Symbol):
    """A variable in CUDA code, and the list of lines to which its operations append code."""

    scales_by_powers = False  # no instruction multiplies by a power of two and rounds a subnormal result once
    has_exp2 = True
    evaluate = staticmethod(horner)  # a polynomial: other threads compute while one waits, and an instruction holds one constant

    def __init__(self, lines: list[str], name: str, type: str, number_type: str | None = None) -> None:
        self.lines, self.name, self.type = lines, name, type
        self.number_type = number_type or type  # of plain numbers in operations with this variable; for a bool, its operands' type
        self.bounds = (-inf, inf)  # as far as they are known; exp and log1p need fewer operations for some bounds
        self.log_term: tuple[Scalar, Scalar] | None = None  # (x, e) if this is x + log1p(e), for sums that accumulate products

    @property
    def bits(self) -> int:
        """Number of bits of the type."""
        return (FLOATS | INTS)[self.type]

    def write(self, type: str, expression: str, number_type: str | None = None) -> Scalar:
        """Append a line that assigns an expression to a new variable, and return the variable."""
        name = f"x{len(self.lines)}"
        self.lines.append(f"const {type} {name} = {expression};")
        return Scalar(self.lines, name, type, number_type)

    def within(self, low: float, high: float) -> Scalar:
        """Set the known bounds and return this variable."""
        self.bounds = low, high
        return self

    def splat(self, number: float) -> Scalar:
        """Return a literal of a number, in the type of plain numbers in operations with this variable."""
        return Scalar(self.lines, literal(number, self.number_type), self.number_type)

    def at_least(self, low: float) -> Scalar:
        """Return the larger of the variable and a number; NaN if it is NaN."""
        return self.apply("maximum", self, low)

    def match(self, other: Any) -> Scalar:
        """Return another operand as a `Scalar`; a number becomes a literal."""
        return other if isinstance(other, Scalar) else self.splat(other)

    def as_int(self) -> Scalar:
        """Reinterpret the bits as an integer."""
        return self.write(of_width(INTS, self.bits), f"as_int({self.name})")

    def as_float(self) -> Scalar:
        """Reinterpret the bits of an integer as a floating-point number."""
        return self.write(of_width(FLOATS, self.bits), f"as_float({self.name})")

    def to_float(self) -> Scalar:
        """Convert an integer to a floating-point number of the same width."""
        return self.write(type := of_width(FLOATS, self.bits), f"({type}){self.name}")

    def convert(self, code: str, to: str) -> Scalar:
        """Convert a number stored with type code `code` to the type `to`, rounded once to nearest even."""
        if code == to:
            return self
        if to in CONVERSIONS:
            return self.write(TYPES[to], f"{CONVERSIONS[to].replace('from', 'to')}({self.name})")
        converted = {"b1": "{0} != 0", **{name: f"{function}({{0}})" for name, function in CONVERSIONS.items()}}.get(code, "{0}")
        return self.write(TYPES[to], f"({TYPES[to]})({converted.format(self.name)})")

    def reciprocal_estimate(self) -> Scalar:
        """Return 1 / x for 1 <= x <= 2, to at least 14 bits; in float32 by an instruction of the device."""
        return self.write("float", f"reciprocal_estimate({self.name})") if self.bits == 32 else self.splat(1.0) / self

    def short_quotient(self, y: Scalar) -> Scalar:
        """Return x / y for 1 <= y <= 2, to at least 22 bits."""
        return self * y.reciprocal_estimate()

    def exp2_estimate(self) -> Scalar:
        """Return 2**x for x <= 0 in float32, to at least 22 bits, by an instruction of the device."""
        return self.write("float", f"exp2_estimate({self.name})")

    def apply(self, op: str, *args: Any) -> Scalar:
        """Append the lines of `op` and return the result."""
        if op == "polynomial":
            return elementary.polynomial(*args)
        first = next(a for a in args if isinstance(a, Scalar))
        if op == "where":
            return first.choose(*args[1:])
        operands = [first.match(a) for a in args]
        if op in elementary.FUNCTIONS:
            return elementary.FUNCTIONS[op](*operands)
        expression = EXPRESSIONS[op].format(*(x.name for x in operands))
        if op in COMPARISONS:
            return first.write("bool", expression, first.type)
        low, high = first.bounds
        bounds = {"abs": (0.0, inf), "neg": (-high, -low)}.get(op, (-inf, inf))
        return first.write(first.type, expression, first.number_type).within(*bounds)

    def choose(self, x: Any, y: Any) -> Scalar:
        """Return x if this condition is true, otherwise y."""
        kind = next((a for a in (x, y) if isinstance(a, Scalar)), self)
        x, y = kind.match(x), kind.match(y)
        return self.write(x.type, f"{self.name} ? {x.name} : {y.name}", x.number_type)


def of_width(types: dict[str, int], bits: int) -> str:
    """Return the type that has a number of bits."""
    return next(type for type, width in types.items() if width == bits)


def literal(number: float, type: str) -> str:
    """Write a number as a literal that is exact to the last bit."""
    if type not in FLOATS:
        return f"({type}){int(number)}"
    if isnan(number) or number in (inf, -inf):  # without headers, CUDA has no names for them
        bits = np.array(number, TYPE_CODES[type]).view(f"u{FLOATS[type] // 8}")
        return f"as_float(({of_width(INTS, FLOATS[type])}){hex(int(bits))})"
    return f"({type}){float(number).hex()}"


COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
EXPRESSIONS = {
    "neg": "-{0}", "abs": "fabs({0})", "sqrt": "sqrt({0})", "fma": "fma({0}, {1}, {2})", "copysign": "copysign({0}, {1})",
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "quotient": "quotient({0}, {1})",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "eq": "{0} == {1}", "ne": "{0} != {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "not": "!{0}", "shl": "shift_left({0}, {1})", "shr": "{0} >> {1}",
    "minimum": "minimum({0}, {1})", "maximum": "maximum({0}, {1})",
}  # fmt: skip
