"""The vocabulary that formulas are written in.

A formula is a branch-free function of one element. Called with NumPy arrays, it computes with NumPy, so its values can be
inspected. Called with a `Symbol` for each argument, it passes every operator and every function below to `Symbol.apply`, which
has three implementations: `formula.py` records the operation, `cpu/vector.py` emits LLVM code, and `cuda/scalar.py` writes
CUDA code.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NoReturn

import numpy as np

__all__ = [
    "FormulaError", "Symbol", "abs", "add_log1p", "copysign", "exp", "expm1", "fma", "log", "log1p", "maximum", "minimum",
    "polynomial", "pow", "quotient", "sigmoid", "sqrt", "tanh", "where",
]  # fmt: skip


class FormulaError(TypeError):
    """Raised if a loss's formula cannot be compiled. The message names the line and suggests an alternative."""


class Symbol:
    """One element of an array, represented by the operations applied to it instead of by a value."""

    def apply(self, op: str, *args: Any) -> Any:
        """Return the symbol of `op(*args)`; at least one of `args` is a symbol of the same class."""
        raise NotImplementedError

    def __neg__(self) -> Any:
        return self.apply("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self.apply("abs", self)

    def __add__(self, other: Any) -> Any:
        return self.apply("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return self.apply("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return self.apply("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.apply("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return self.apply("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.apply("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self.apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self.apply("div", other, self)

    def __pow__(self, exponent: Any) -> Any:
        if isinstance(exponent, Symbol) or not (float(exponent).is_integer() and 1 <= exponent <= 16):
            raise FormulaError(f"** accepts integer exponents from 1 to 16, not {exponent!r}; use ops.sqrt, or ops.pow(x, y) for x >= 0")
        exponent = int(exponent)
        half = self ** (exponent // 2) if exponent > 1 else 1.0
        return half * half * self if exponent % 2 else half * half

    def __lt__(self, other: Any) -> Any:
        return self.apply("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return self.apply("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return self.apply("gt", self, other)

    def __ge__(self, other: Any) -> Any:
        return self.apply("ge", self, other)

    def __eq__(self, other: object) -> Any:
        return self.apply("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return self.apply("ne", self, other)

    def __and__(self, other: Any) -> Any:
        return self.apply("and", self, other)

    def __or__(self, other: Any) -> Any:
        return self.apply("or", self, other)

    def __invert__(self) -> Any:
        return self.apply("not", self)

    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise FormulaError("a formula cannot branch on an element (if, and, or, not, min, max); use ops.where, minimum, maximum, &, | or ~")

    def __float__(self) -> NoReturn:
        raise FormulaError(f"a formula cannot convert an element to a number (float, int, math.*); use {VOCABULARY} from fastloss.ops")

    __int__ = __index__ = __complex__ = __round__ = __float__

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise FormulaError(f"a formula cannot convert an element to an array; use {VOCABULARY} from fastloss.ops")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        if ufunc in _OPERATORS and not kwargs and all(isinstance(arg, (Symbol, np.number)) for arg in args):
            return self.apply(_OPERATORS[ufunc], *args)  # an operator whose left operand is a NumPy number
        raise FormulaError(f"numpy.{ufunc.__name__} is not in the vocabulary of formulas; use {VOCABULARY} from fastloss.ops, or operators")

    def __array_function__(self, function: Any, *args: Any) -> NoReturn:
        raise FormulaError(f"numpy.{function.__name__} is not in the vocabulary of formulas; use {VOCABULARY} from fastloss.ops")


def _apply(op: str, numpy_function: Any, *args: Any) -> Any:
    """Apply `op` if an argument is a symbol, otherwise call the NumPy function."""
    for arg in args:
        if isinstance(arg, Symbol):
            return arg.apply(op, *args)
    result = numpy_function(*args)
    return float(result) if isinstance(result, np.floating) else result


def abs(x: Any) -> Any:
    """Return |x|."""
    return _apply("abs", np.abs, x)


def exp(x: Any) -> Any:
    """Return e**x."""
    return _apply("exp", np.exp, x)


def expm1(x: Any) -> Any:
    """Return e**x - 1, accurate to the last digits for small x."""
    return _apply("expm1", np.expm1, x)


def log(x: Any) -> Any:
    """Return the natural logarithm of x."""
    return _apply("log", np.log, x)


def log1p(x: Any) -> Any:
    """Return log(1 + x), accurate to the last digits for small x."""
    return _apply("log1p", np.log1p, x)


def pow(x: Any, y: Any) -> Any:
    """Return x**y for x >= 0, accurate to the last digits also where the result is large or tiny."""
    if isinstance(x, Symbol) and not isinstance(y, Symbol) and float(y).is_integer() and 1 <= y <= 16:
        return x**y
    return _apply("pow", np.power, x, y)


def polynomial(x: Any, terms: Sequence[float], reach: float = inf) -> Any:
    """Return terms[0] + terms[1] x + terms[2] x**2 + ... for |x| <= reach.

    Terms that are too small to change the result for |x| <= reach are left out when the formula is compiled, so the terms for
    float64 also serve float32.
    """
    return _apply("polynomial", lambda x, reach, *terms: estrin(x, terms), x, reach, *terms)


def estrin(x: Any, terms: Sequence[Any]) -> Any:
    """Evaluate a polynomial by Estrin's scheme, whose chain of dependent operations is short."""
    parts: list[Any] = list(terms)
    while len(parts) > 1:
        pairs = [fma(high, x, low) for low, high in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
        x = x * x
    return parts[0]


def horner(x: Any, terms: Sequence[Any]) -> Any:
    """Evaluate a polynomial by Horner's scheme, which has the fewest operations, and one constant in each."""
    result = terms[-1]
    for term in reversed(terms[:-1]):
        result = fma(result, x, term)
    return result


def quotient(x: Any, y: Any) -> Any:
    """Return x / y for 0 <= y <= 2**60 and |x| <= 2**60, and 0 where both are 0. On a GPU it takes half the time of a division.

    The quotient must be finite. Where y is 0 and x is not, it is not determined.
    """
    return _apply("quotient", lambda x, y: np.where(y == 0, 0, x / np.where(y == 0, 1, y)), x, y)


def sigmoid(x: Any) -> Any:
    """Return the logistic function, 1 / (1 + e**-x), accurate to the last digits also where it is tiny."""
    return _apply("sigmoid", lambda x: np.where(x > 0, 1.0, np.exp(-np.abs(x))) / (1.0 + np.exp(-np.abs(x))), x)


def sqrt(x: Any) -> Any:
    """Return the square root of x."""
    return _apply("sqrt", np.sqrt, x)


def fma(x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z, rounded once where the CPU has an instruction for it (x86-64 since 2013, all 64-bit ARM)."""
    return _apply("fma", lambda x, y, z: x * y + z, x, y, z)


def copysign(x: Any, y: Any) -> Any:
    """Return |x| with the sign of y."""
    return _apply("copysign", np.copysign, x, y)


def minimum(x: Any, y: Any) -> Any:
    """Return the smaller of x and y; NaN if x or y is NaN."""
    return _apply("minimum", np.minimum, x, y)


def maximum(x: Any, y: Any) -> Any:
    """Return the larger of x and y; NaN if x or y is NaN."""
    return _apply("maximum", np.maximum, x, y)


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent of x, accurate to the last digits also where x is tiny."""
    return _apply("tanh", np.tanh, x)


def where(condition: Any, x: Any, y: Any) -> Any:
    """Return x where the condition is true, and y elsewhere."""
    if isinstance(condition, bool):  # a comparison of plain numbers, such as a parameter's default
        return x if condition else y
    return _apply("where", np.where, condition, x, y)


def add_log1p(x: Any, e: Any) -> Any:
    """Return x + log1p(e) for 0 <= e <= 1, whose logarithms a sum over many elements may replace by the logarithm of a product.

    sum log1p(e_i) = log(prod (1 + e_i)) takes one multiply-add for each element instead of a logarithm. Each factor is at most
    2, so the product over a block of elements stays finite. In compiled formulas the result is wrong for e outside [0, 1].
    """
    return _apply("add_log1p", lambda x, e: x + np.log1p(e), x, e)


VOCABULARY = ", ".join(name for name in __all__ if name[0].islower())
_OPERATORS = {np.add: "add", np.subtract: "sub", np.multiply: "mul", np.true_divide: "div", np.less: "lt", np.less_equal: "le"}
_OPERATORS |= {np.greater: "gt", np.greater_equal: "ge", np.equal: "eq", np.not_equal: "ne"}
