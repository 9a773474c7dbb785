"""A scalar while CUDA text is being written: calling a formula with `Scalar` arguments appends its lines.

Nothing in the text depends on the compiler's mood: `fma` is asked for by name, contraction is off, division and square root round
as IEEE 754 says. Only where a sigmoid starts from the device's estimate of a reciprocal may devices differ, in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isnan
from typing import Any

import numpy as np

from fastloss.core.dtypes import BY_CODE
from fastloss.kernel import elementary
from fastloss.ops import Symbol

TYPES = {code: t.cuda for code, t in BY_CODE.items()}  # functions of elements.cuh convert the 16-bit types
FLOATS, INTS = {"float": 32, "double": 64}, {"int": 32, "long long": 64}
TYPE_CODES = {"float": "f4", "double": "f8"}
CONVERSIONS = {"f2": "from_half", "B2": "from_bfloat16"}


class Scalar(Symbol):
    """A variable of the text, and the lines that lead to it."""

    scales_by_powers = False  # no instruction multiplies by a power of two and rounds a subnormal result once

    def __init__(self, lines: list[str], name: str, type: str, numbers: str | None = None) -> None:
        self.lines, self.name, self.type = lines, name, type
        self.numbers = numbers or type  # the type plain numbers take beside this variable: a comparison's operands'
        self.bounds = (-inf, inf)
        self.log_term: tuple[Scalar, Scalar] | None = None  # (x, e) of x + log1p(e), for sums that collect the logarithms

    @property
    def bits(self) -> int:
        """The width."""
        return (FLOATS | INTS)[self.type]

    def write(self, type: str, expression: str, numbers: str | None = None) -> Scalar:
        """Append a line that computes an expression."""
        name = f"x{len(self.lines)}"
        self.lines.append(f"const {type} {name} = {expression};")
        return Scalar(self.lines, name, type, numbers)

    def within(self, low: float, high: float) -> Scalar:
        """Note the bounds."""
        self.bounds = low, high
        return self

    def splat(self, number: float) -> Scalar:
        """Return a number in the type that numbers take here."""
        return Scalar(self.lines, literal(number, self.numbers), self.numbers)

    def match(self, other: Any) -> Scalar:
        """Return the other operand as one of this kind."""
        return other if isinstance(other, Scalar) else self.splat(other)

    def as_int(self) -> Scalar:
        """Return the bits as an integer."""
        return self.write(of_width(INTS, self.bits), f"as_int({self.name})")

    def as_float(self) -> Scalar:
        """Return an integer's bits as a floating-point number."""
        return self.write(of_width(FLOATS, self.bits), f"as_float({self.name})")

    def to_float(self) -> Scalar:
        """Return an integer converted to a floating-point number of the same width."""
        return self.write(type := of_width(FLOATS, self.bits), f"({type}){self.name}")

    def convert(self, code: str, to: str) -> Scalar:
        """Return what is stored as NumPy type `code` as the type `to`, rounded once to nearest even."""
        if code == to:
            return self
        if to in CONVERSIONS:
            return self.write(TYPES[to], f"{CONVERSIONS[to].replace('from', 'to')}({self.name})")
        converted = {"b1": "{0} != 0", **{name: f"{function}({{0}})" for name, function in CONVERSIONS.items()}}.get(code, "{0}")
        return self.write(TYPES[to], f"({TYPES[to]})({converted.format(self.name)})")

    def reciprocal_estimate(self) -> Scalar:
        """Return 1 / x for 1 <= x <= 2, right to 14 bits at least, in float32 by the device's own instruction."""
        return self.write("float", f"reciprocal_estimate({self.name})") if self.bits == 32 else self.splat(1.0) / self

    def apply(self, op: str, *args: Any) -> Scalar:
        """Append the lines for `op`."""
        if op == "polynomial":
            return elementary.polynomial(*args)
        first = next(a for a in args if isinstance(a, Scalar))
        if op == "where":
            return first.choose(*args[1:])
        operands = [first.match(a) for a in args]
        if op in FUNCTIONS:
            return FUNCTIONS[op](*operands)
        expression = EXPRESSIONS[op].format(*(x.name for x in operands))
        if op in COMPARISONS:
            return first.write("bool", expression, first.type)
        low, high = first.bounds
        bounds = {"abs": (0.0, inf), "neg": (-high, -low)}.get(op, (-inf, inf))
        return first.write(first.type, expression, first.numbers).within(*bounds)

    def choose(self, x: Any, y: Any) -> Scalar:
        """Return x where this condition holds, else y."""
        kind = next((a for a in (x, y) if isinstance(a, Scalar)), self)
        x, y = kind.match(x), kind.match(y)
        return self.write(x.type, f"{self.name} ? {x.name} : {y.name}", x.numbers)


def of_width(types: dict[str, int], bits: int) -> str:
    """Return the type that has so many bits."""
    return next(type for type, width in types.items() if width == bits)


def literal(number: float, type: str) -> str:
    """Return a number as it stands in the text, to the last bit."""
    if type not in FLOATS:
        return f"({type}){int(number)}"
    if isnan(number) or number in (inf, -inf):  # NVRTC has no names for them
        bits = np.array(number, TYPE_CODES[type]).view(f"u{FLOATS[type] // 8}")
        return f"as_float(({of_width(INTS, FLOATS[type])}){hex(int(bits))})"
    return f"({type}){float(number).hex()}"


def add_log1p(x: Scalar, e: Scalar) -> Scalar:
    """Return x + log1p(e), and remember both."""
    result = x + elementary.log1p(Scalar(e.lines, e.name, e.type).within(0.0, 1.0))  # a copy: elsewhere, e may be anything
    result.log_term = (x, e)  # the compiler drops the logarithm where a sum reads the term instead
    return result


COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
EXPRESSIONS = {
    "neg": "-{0}", "abs": "fabs({0})", "sqrt": "sqrt({0})", "fma": "fma({0}, {1}, {2})", "copysign": "copysign({0}, {1})",
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "eq": "{0} == {1}", "ne": "{0} != {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "not": "!{0}", "shl": "shift_left({0}, {1})", "shr": "{0} >> {1}",
    "minimum": "minimum({0}, {1})", "maximum": "maximum({0}, {1})",
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Scalar]] = {
    "exp": elementary.exp, "expm1": elementary.expm1, "log": elementary.log, "log1p": elementary.log1p, "pow": elementary.pow,
    "sigmoid": elementary.sigmoid, "tanh": elementary.tanh, "add_log1p": add_log1p,
}  # fmt: skip
