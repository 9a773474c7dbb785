"""`Exact`: sums of float64 numbers without any rounding, so that they do not depend on the order of additions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import numpy as np

from fastloss.core.plan import Array

UNITS = 1 << 1074  # the smallest float64 is 2**-1074, and every other one a multiple of it
HUGE = 2.0**900  # larger numbers are added one by one, because the sum of many may be infinite in float64


class Exact(NamedTuple):
    """One or several sums: of the finite numbers, without rounding, and of infinities and NaN as float64 adds them."""

    units: tuple[int, ...]  # the sums of the finite numbers, in multiples of 2**-1074
    special: tuple[float, ...]  # the sums of the others

    @classmethod
    def over_first_axis(cls, *parts: Array | int) -> Self:
        """Add up arrays along their first axes; the other axes become one. A whole number is a sum already."""
        whole = sum(x for x in parts if isinstance(x, int)) * UNITS
        arrays = [x.reshape(len(x), math.prod(x.shape[1:])) for x in parts if not isinstance(x, int)]
        if not arrays:
            return cls((whole,), (0.0,))
        columns = np.concatenate(arrays, dtype=np.float64).T
        largest = float(np.abs(columns).max(initial=0.0))
        if math.isfinite(largest):
            return cls(tuple([whole + add_up(column, largest) for column in columns]), (0.0,) * len(columns))
        finite = np.isfinite(columns)
        with np.errstate(invalid="ignore"):
            special = np.where(finite, 0.0, columns).sum(axis=1)
        rest = np.where(finite, columns, 0.0)
        return cls(tuple([whole + add_up(column, float(np.abs(column).max())) for column in rest]), tuple(map(float, special)))

    def plus(self, other: Exact) -> Exact:
        """Return the sums of both."""
        units = tuple(a + b for a, b in zip(self.units, other.units, strict=True))
        return Exact(units, tuple(a + b for a, b in zip(self.special, other.special, strict=True)))

    def rounded(self) -> Any:
        """Return the sums, each rounded once to float64."""
        return np.array([to_float(n) + special for n, special in zip(self.units, self.special, strict=True)])


def add_up(x: Array, largest: float) -> int:
    """Return the exact sum of finite numbers, in multiples of 2**-1074, given a bound of their magnitudes.

    In each turn, the leading bits of every number are rounded off to the same multiple of a power of two, of which they are so few that
    float64 adds them without rounding (Rump, Ogita and Oishi, "Accurate Floating-Point Summation", 2008). The rest of each number is at
    most half a unit in the last place of that power.
    """
    if largest > HUGE:
        return sum(map(to_units, x.tolist()))
    bits = (x.size + 2).bit_length()
    total, pivot = 0, math.ldexp(1.0, math.frexp(largest)[1] + bits)
    leading, rest = np.empty_like(x), x.copy()
    while True:
        np.add(rest, pivot, out=leading)
        leading -= pivot
        total += to_units(float(np.add.reduce(leading)))
        rest -= leading
        if not np.logical_or.reduce(rest):
            return total
        pivot *= 2.0 ** (bits - 52)


def to_units(x: float) -> int:
    """Return a finite number in multiples of 2**-1074."""
    numerator, denominator = x.as_integer_ratio()
    return numerator * (UNITS // denominator)


def to_float(units: int) -> float:
    """Return the float64 number that is next to a multiple of 2**-1074."""
    try:
        return units / UNITS
    except OverflowError:
        return math.inf if units > 0 else -math.inf
