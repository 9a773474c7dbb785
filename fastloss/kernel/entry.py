"""The arithmetic of an entry with several classes, such as a pixel, between its loads and its stores.

With the logits z of an entry, and m = max(z):

    e = exp(z - m),  R = the sum of e over all classes but one of those where z = m
    p = e / (1 + R),  1 - p = ((1 - e) + R) / (1 + R),  -log p = log(1 + R) + (m - z)

No term is negative, so nothing cancels: where the logits are saturated, 1 - p and -log p keep their digits.

With class weights w, label smoothing a, and a probability y of each class (1 for the entry's class, if there are indices), the value is the
sum over the classes of u (-log p), u = w ((1 - a) y + a / C), the gradient (U - u) p - u (1 - p), where U is the sum of u,
and the second derivative U p (1 - p).

The functions take symbols, as those of `element.py` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, nan
from typing import Any, NamedTuple

from fastloss.core.plan import Spec
from fastloss.kernel import elementary
from fastloss.kernel.element import multiply
from fastloss.ops import log1p, where

HUGE = {32: 2.0**126, 64: 2.0**1022}  # logits of at least this size count as infinite; differences of smaller ones are finite

Symbol = Any


class Sums(NamedTuple):
    """Sums over the classes of an entry, all of which begin at 0."""

    rest: Symbol  # of e, without the classes where z = m
    low: Symbol  # of its rounding errors (Kahan)
    ties: Symbol  # number of the classes where z = m
    weights: Symbol  # of w, or of u if there are probabilities; not used if neither these nor label smoothing need it
    spread: Symbol  # of the same times m - z


def limited(z: Symbol) -> Symbol:
    """Return a logit in place of which the arithmetic takes: infinite ones become finite."""
    huge = HUGE[z.bits]
    return where(z < -huge, -huge, where(z > huge, huge, z))


def exp_of_difference(z: Symbol, m: Symbol) -> Symbol:
    """Return exp(z - m) for z <= m. The rounding error of z - m (Dekker) counts: it would change the result by |z - m| / 2 ulp."""
    d = z - m
    large, small = where(z < -m, z, -m), where(z < -m, -m, z)
    return elementary.exp_of_sum(d.within(-inf, 0.0), small - (d - large))


def distance(m: Symbol, z: Symbol) -> Symbol:
    """Return m - z, which is 0 for the largest logit, and infinite between others and an infinite one."""
    huge = HUGE[z.bits]
    return where(z == m, 0.0, where((m == huge) | (z == -huge), inf, m - z))


def share_of_class(y: Symbol, w: Symbol | None, number: Mapping[str, Symbol], classes: Symbol) -> Symbol:
    """Return u of a class with a probability y and, if there are class weights, a weight w."""
    smoothing = number.get("label_smoothing")
    if smoothing is not None:
        y = (1.0 - smoothing) * y + smoothing / classes
    return multiply(w, y)


def add_exactly(total: Symbol, low: Symbol, x: Symbol) -> tuple[Symbol, Symbol]:
    """Add a number to a total, and the rounding error to those before (Kahan); return both. No number is negative."""
    added = total + x
    return added, low + (x - (added - total))


def add_class(
    spec: Spec, sums: Sums, e: Symbol, is_max: Symbol, z: Symbol, m: Symbol, y: Symbol | None, w: Symbol | None,
    number: Mapping[str, Symbol], classes: Symbol
) -> Sums:  # fmt: skip
    """Return the sums with the terms of a class added. `is_max` is the condition that z = m; e = 1 may take its place."""
    rest, low = add_exactly(sums.rest, sums.low, where(is_max, 0.0, e))
    sums = sums._replace(rest=rest, low=low, ties=sums.ties + where(is_max, z.splat(1.0), 0.0))
    if not (spec.has_probabilities or "label_smoothing" in number):
        return sums
    u = share_of_class(y, w, number, classes) if spec.has_probabilities else w
    far = distance(m, z)
    spread = far if u is None else where(u == 0.0, 0.0, u * far)
    return sums._replace(weights=sums.weights + (1.0 if u is None else u), spread=sums.spread + spread)


def sum_of_others(sums: Sums, m: Symbol) -> Symbol:
    """Return R; NaN where several logits are infinite, which have no limit."""
    is_undefined = (abs(m) == HUGE[m.bits]) & (sums.ties != 1.0)
    return where(is_undefined, nan, (sums.rest + sums.low) + (sums.ties - 1.0))


def evaluate(
    spec: Spec, others: Symbol, weights: Symbol, spread: Symbol, m: Symbol, z: Symbol, w: Symbol | None, factor: Symbol,
    number: Mapping[str, Symbol], classes: Symbol
) -> tuple[Symbol, tuple[Symbol, ...]]:  # fmt: skip
    """Return the value of an entry, and the factors from which `derivative_of_class` computes what is written for each class.

    `others` is R, `weights` and `spread` are other sums over the classes, `z` and `w` are the logit and the weight of the entry's class,
    and `factor` multiplies the derivatives.
    """
    log_norm, inverse = log1p(others.within(0.0, inf)), 1.0 / (others + 1.0)
    smoothing = number.get("label_smoothing")
    each, own = (0.0, w) if smoothing is None else (smoothing / classes, multiply(w, 1.0 - smoothing))
    if writes_curvature(spec):
        total = weights if spec.has_probabilities else own if smoothing is None else own + each * weights
        return factor.splat(0.0), (multiply(total, factor) * (inverse * inverse), others)
    if spec.has_probabilities:
        return weights * log_norm + spread, (factor * inverse, others, weights)
    below, e = distance(m, z), exp_of_difference(z, m)
    missed = (1.0 - e) + others
    if smoothing is None:
        found = spec.formula.quantities(log_norm + below, missed * inverse, {name: number[name] for name in spec.parameters}, {})
        rate = multiply(w, factor * found["slope"]) * inverse
        return multiply(w, factor.match(found["value"])), (rate, -(missed * rate))
    total = own + each * weights
    slope = each * (weights - (1.0 if w is None else w)) * (e * inverse) - (own + multiply(w, each)) * (missed * inverse)
    value = total * log_norm + (where(own == 0.0, 0.0, own * below) + each * spread)
    return value, (factor * total * inverse, factor * slope, factor * each)


def writes_curvature(spec: Spec) -> bool:
    """Whether a kernel writes second derivatives."""
    return any(op.name == "curvature" for op in spec.outputs)


def derivative_of_class(
    spec: Spec, factors: tuple[Symbol, ...], e: Symbol, is_own: Symbol, y: Symbol | None, w: Symbol | None, number: Mapping[str, Symbol],
    classes: Symbol
) -> Symbol:  # fmt: skip
    """Return the gradient by the logit of a class, or the second derivative if the kernel writes that.

    `is_own` is the condition that the class is that of the entry.
    """
    if writes_curvature(spec):
        return factors[0] * e * ((1.0 - e) + factors[1])
    if spec.has_probabilities:
        u, (rate, others, weights) = share_of_class(y, w, number, classes), factors
        return rate * ((weights - u) * e - u * ((1.0 - e) + others))
    slope = e * factors[0]
    if "label_smoothing" in number:
        slope = slope - multiply(w, factors[2])
    return where(is_own, factors[1], slope)
