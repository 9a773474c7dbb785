"""Compiled comparisons of float32 and float16 results with float64, whose own rounding errors are a billionth of theirs."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

LARGEST = float(np.finfo(np.float32).max)
RESULTS = 3  # value, slope and curvature
COLUMNS = 3  # of a table of the largest errors: the error, and the input and the target at which it occurs


@njit(error_model="numpy")
def unit_of(magnitude):
    """Return a float32 unit in the last place of a number that is not negative."""
    _, exponent = math.frexp(max(min(magnitude, LARGEST), 2.0**-149))
    return math.ldexp(1.0, max(exponent - 24, -149))


@njit(error_model="numpy")
def unit_of_half(x):
    """Return a float16 unit in the last place."""
    _, exponent = math.frexp(x)
    return math.ldexp(1.0, max(exponent - 11, -24))


@njit(error_model="numpy")
def note(worst, k, got, want, magnitude, z, t, stored_as_half):
    """Enter the error of a result into row k of the table of the largest errors, if it is larger than that there.

    It is measured in ulp of the magnitude. For results stored as float16, it is the error beyond half an ulp of their own.
    """
    if got == want or (math.isnan(got) and math.isnan(want)):
        return
    error = abs(got - want)
    if error <= (abs(want) * 2.0**-12 if stored_as_half else worst[k, 0] * magnitude * 2.0**-24):  # units are at least as large
        return
    overflow = 65520.0 if stored_as_half else LARGEST * (1 + 2.0**-25)  # from which on numbers are stored as infinity
    if math.isinf(got) and got * want > 0 and abs(want) > overflow / 2:
        error = max(overflow - abs(want), 0.0)
    elif stored_as_half:
        error = max(error - unit_of_half(min(abs(want), 65504.0)) / 2, 0.0)
    unit = unit_of_half(magnitude) if stored_as_half else unit_of(magnitude)
    error = error / unit if error < math.inf else math.inf
    if error > worst[k, 0]:
        worst[k, 0], worst[k, 1], worst[k, 2] = error, z, t


@njit(error_model="numpy")
def compare_cross_entropy(z, t, results, worst, stored_as_half):
    """Compare binary cross-entropies of logits with float64: for each logit the results of all targets."""
    for i in range(z.size):
        x = z[i]
        e = math.exp(-abs(x))
        log_term, s = math.log1p(e), e / (1.0 + e)
        for j in range(t.size):
            wrong = 1.0 - t[j] if x > 0 else t[j]
            at_target = abs(x) * wrong if wrong != 0.0 or math.isnan(x) else 0.0
            slope = wrong - s if x > 0 else s - wrong
            note(worst, 0, results[0, j, i], at_target + log_term, abs(at_target) + log_term, x, t[j], stored_as_half)
            note(worst, 1, results[1, j, i], slope, max(abs(wrong), s), x, t[j], stored_as_half)
            note(worst, 2, results[2, j, i], s / (1.0 + e), s / (1.0 + e), x, t[j], stored_as_half)


@njit(error_model="numpy")
def compare(z, t, k, got, want, magnitude, worst):
    """Compare results with those of an oracle in float64, for one target."""
    for i in range(z.size):
        note(worst, k, got[i], want[i], magnitude[i], z[i], t, False)
