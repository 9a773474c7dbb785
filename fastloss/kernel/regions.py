"""The arithmetic of losses of regions, such as Dice, at an entry with several classes. It goes on where `entry.py` ends, with its letters.

The last three functions serve every loss of classes, with regions or without.

Losses of regions take two passes. In the first, the formula is applied to p and 1 - p of each class, for sums that have a number for
each class. In the second, a formula gives the derivatives of the loss by p: h <= 0 for the entry's class t, and d[c] >= 0 for another
class c, from which the same number may be subtracted everywhere. With A, the sum of d p over the other classes, the gradient is

    p (h (1 - p) - A)           for the entry's class
    p (d - A - p[t] h)          for the others

If p is close to 1 for a wrong class, d - A would cancel: there it is d (1 - p) minus the sum over the classes besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, NamedTuple

from fastloss.core.plan import Spec
from fastloss.kernel import entry
from fastloss.kernel.element import multiply
from fastloss.kernel.entry import Sums, add_exactly, distance, exp_of_difference
from fastloss.ops import log1p, where

Symbol = Any
Load = Callable[[str], Any]  # returns an operand at a class, None if it is not there


class RegionSums(NamedTuple):
    """Sums over the classes of an entry besides those of `entry.py`, for the second pass. All begin at 0."""

    pull: Symbol  # of e d over the classes that are neither the entry's nor have e = 1
    pull_low: Symbol  # of its rounding errors (Kahan)
    top: Symbol  # of d over the classes that are not the entry's and have e = 1
    top_low: Symbol  # of its rounding errors


def has_regions(spec: Spec) -> bool:
    """Whether a kernel makes a pass of a loss of regions of classes."""
    return spec.walk == "classes" and bool({"overlap", "own"} & set(spec.formula.names))


def has_slopes(spec: Spec) -> bool:
    """Whether it makes the second pass."""
    return has_regions(spec) and len(spec.outputs) > 0


def is_squared(spec: Spec) -> bool:
    """Whether d is given as its quotient by p."""
    return "others_by_p" in spec.formula.names


def slope_of_own(spec: Spec, p: Symbol, q: Symbol, load: Load) -> Symbol:
    """Return h, given p and 1 - p of the entry's class."""
    parameters = {name: load(name) if name.startswith("own") else p.splat(0.0) for name in spec.parameters}
    return p.match(spec.formula.quantities(p, q, parameters, {})["own"])


def slope_of_others(spec: Spec, e: Symbol, load: Load) -> Symbol:
    """Return d of a class, or d e / p if it is given as its quotient by p."""
    parameters = {name: e.splat(0.0) if name.startswith("own") else load(name) for name in spec.parameters}
    return e.match(spec.formula.quantities(e, e, parameters, {})["others_by_p" if is_squared(spec) else "others"])


def add_slope(spec: Spec, sums: RegionSums, e: Symbol, is_own: Symbol, load: Load) -> RegionSums:
    """Return the sums with the terms of a class added. `is_own` is the condition that the class is that of the entry."""
    is_top = e == 1.0
    term = where(is_own, 0.0, slope_of_others(spec, e, load) * e)
    pull = add_exactly(sums.pull, sums.pull_low, where(is_top, 0.0, term))
    return RegionSums(*pull, *add_exactly(sums.top, sums.top_low, where(is_top, term, 0.0)))


def entropy(others: Symbol, m: Symbol, z: Symbol, w: Symbol | None) -> Symbol:
    """Return the cross-entropy of an entry, given R, and the logit and the weight of its class."""
    return multiply(w, log1p(others.within(0.0, inf)) + distance(m, z))


def factors_of_slopes(
    spec: Spec, others: Symbol, tops: Symbol, sums: RegionSums, m: Symbol, z: Symbol, w: Symbol | None, factor: Symbol,
    entropy_rate: Symbol | None, load: Load
) -> tuple[Symbol, ...]:  # fmt: skip
    """Return the factors from which `slope_of_class` computes the gradient of an entry. `tops` is the number of classes with e = 1."""
    inverse, e = 1.0 / (others + 1.0), exp_of_difference(z, m)
    p, q = e * inverse, ((1.0 - e) + others) * inverse
    slope = slope_of_own(spec, p, q, load)
    by_p = inverse * inverse if is_squared(spec) else inverse
    pull, top, besides = (sums.pull + sums.pull_low) * by_p, (sums.top + sums.top_low) * by_p, p * slope
    own_slope, rest = factor * (p * (slope * q - (pull + top))), -(factor * (pull + top + besides))
    largest = factor * (top * others - (pull + besides))  # of the class with e = 1, if there is one, and it is wrong
    if entropy_rate is not None:
        rate = multiply(w, factor * entropy_rate)
        own_slope, rest, largest = own_slope - rate * q, rest + rate, largest + rate
    return factor * by_p, own_slope, rest * inverse, largest * inverse, where(tops == 1.0, 1.0, 2.0)


def slope_of_class(spec: Spec, factors: tuple[Symbol, ...], e: Symbol, is_own: Symbol, load: Load) -> Symbol:
    """Return the gradient by the logit of a class."""
    by_p, own_slope, rest, largest, limit = factors
    slope = e * (slope_of_others(spec, e, load) * by_p + rest)
    return where(is_own, own_slope, where(e >= limit, largest, slope))


def factors_of_terms(others: Symbol, share: Symbol | None) -> tuple[Symbol, ...]:
    """Return the factors from which `terms_of_class` computes the terms of an entry: 1 / (1 + R), R, and its weight if it has one."""
    return 1.0 / (others + 1.0), others, *([] if share is None else [share])


def terms_of_class(spec: Spec, factors: tuple[Symbol, ...], e: Symbol, is_own: Symbol, is_counted: Symbol) -> dict[str, Symbol]:
    """Return the terms of the sums that have a number for each class."""
    inverse, others, *weights = factors
    share = weights[0] if weights else None
    found = spec.formula.quantities(e * inverse, ((1.0 - e) + others) * inverse, {}, {})
    overlap, false_positives, false_negatives = (multiply(share, found[name]) for name in ("overlap", "false_positives", "false_negatives"))
    return {
        "overlap": where(is_own, overlap, 0.0),
        "false_positives": where(is_own | ~is_counted, 0.0, false_positives),
        "false_negatives": where(is_own, false_negatives, 0.0),
        "truth": where(is_own, e.splat(1.0), 0.0),
    }


# --- every loss of classes ----------------------------------------------------------------------------------------------


def count_factors(spec: Spec) -> int:
    """Return the largest number of factors that `evaluate` returns."""
    return 5 if has_slopes(spec) else 3


def add_class(
    spec: Spec, sums: Sums, of_regions: RegionSums, e: Symbol, z: Symbol, m: Symbol, is_own: Symbol, y: Symbol | None,
    number: Mapping[str, Symbol], classes: Symbol, load: Load
) -> tuple[Sums, RegionSums]:  # fmt: skip
    """Return the sums over the classes with the terms of a class added."""
    is_top = e == 1.0 if has_slopes(spec) else z == m
    sums = entry.add_class(spec, sums, e, is_top, z, m, y, load("weight"), number, classes)
    return sums, add_slope(spec, of_regions, e, is_own, load) if has_slopes(spec) else of_regions


def evaluate(
    spec: Spec, sums: Sums, of_regions: RegionSums, m: Symbol, z: Symbol, w: Symbol | None, factor: Symbol,
    number: Mapping[str, Symbol], classes: Symbol, load: Load, load_own: Load
) -> tuple[Symbol, tuple[Symbol, ...]]:  # fmt: skip
    """Return the value of an entry without its weight, and the factors of its derivatives, or of the terms of its classes.

    `load` returns an operand of the entry, and `load_own` one at the entry's class.
    """
    others = entry.sum_of_others(sums, m)
    if not has_regions(spec):
        return entry.evaluate(spec, others, sums.weights, sums.spread, m, z, w, factor, number, classes)
    if has_slopes(spec):
        rate = load("entropy_rate")
        return entropy(others, m, z, w), factors_of_slopes(spec, others, sums.ties, of_regions, m, z, w, factor, rate, load_own)
    return entropy(others, m, z, w), factors_of_terms(others, load("pixel_weight"))


def derivative_of_class(
    spec: Spec, factors: tuple[Symbol, ...], e: Symbol, is_own: Symbol, y: Symbol | None, number: Mapping[str, Symbol], classes: Symbol,
    load: Load
) -> Symbol:  # fmt: skip
    """Return the gradient by the logit of a class, or the second derivative if the kernel writes that."""
    if has_slopes(spec):
        return slope_of_class(spec, factors, e, is_own, load)
    return entry.derivative_of_class(spec, factors, e, is_own, y, load("weight"), number, classes)
