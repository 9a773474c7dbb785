"""Tolerances and error measures of all tests."""

from __future__ import annotations

import numpy as np
from ml_dtypes import bfloat16, finfo

from fastloss.losses.table import LOSSES

QUANTITIES = ("value", "slope", "curvature")

# The largest error, in units in the last place of the magnitude that the oracle names. A pair is for targets 0 and 1, and for other
# targets. The bounds of the losses are in their table; here are those of single options and dtypes, and of the elementary functions.
ULP = {
    (row.name, quantity): limit if isinstance(limit, tuple) or "targets" not in row.arrays else (limit, limit)
    for row in LOSSES.values()
    for quantity, limit in row.ulp.items()
} | {
    ("binary_cross_entropy_with_logits, pos_weight", "value"): (4, 4),
    ("binary_cross_entropy_with_logits, pos_weight", "slope"): (3, 3),
    ("binary_cross_entropy_with_logits, pos_weight", "curvature"): (4, 4),
    # Label smoothing subtracts two terms at the class's own logit; the error is that of the larger one.
    ("cross_entropy, label_smoothing", "value"): 8,
    ("cross_entropy, label_smoothing", "slope"): 4.5,
    ("cross_entropy, label_smoothing", "curvature"): 7,
    # Dice: the value relative to itself, because no term is negative; the slope to
    # p (1 - p) max(1 - value, 2 t) / size, because 1 - value - 2 t passes through 0. float32 sums in blocks, then in float64:
    # its bounds hold for any size. float64 adds its own roundings: in groups of 2**20, 10 ulp.
    ("dice_with_logits_loss, float32", "value"): 2,
    ("dice_with_logits_loss, float32", "slope"): 4,
    ("dice_with_logits_loss, float64", "value"): 4,
    ("dice_with_logits_loss, float64", "slope"): 8,
    ("exp", "value"): 1,
    ("log", "value"): 1,
    ("log1p", "value"): 1.6,
    ("expm1", "value"): 1.5,
    ("sigmoid", "value"): 1.5,
    ("pow", "value"): 1,
    ("tanh", "value"): 2.5,
    ("quotient", "value"): 0.51,
}
# Where input and results have 16 bits: the error of a result beyond half a unit in its last place, in units of the magnitude, and that
# of a sum, relative to the sum of the magnitudes.
HALF, HALF_SUM = 0.01, 1e-6
POWER_SUM = 4e-6  # of the focal loss and the sigmoid's squared error, whose exponents multiply the error of a probability
# What label smoothing may round off a target from 0 to 1.
SMOOTHED = {np.dtype(x): np.finfo(x).eps for x in (np.float32, np.float64)}
# A product of factors, each rounded: half an ulp for the last rounding, up to one for those before it.
PRODUCT = {"scale": 1.5, "weight and scale": 2.5, "weight": 0.5}
# Products of matrices, relative to the largest number.
MATRICES = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}
# Sums, relative to the sum of the magnitudes. float32 is summed in blocks of 16 per lane, and these sums in float64.
SUM = {np.dtype(np.float32): 3e-7, np.dtype(np.float64): 4e-15}
# For results computed from a sigmoid of logits up to 15, which has lost as much of 1 - p.
PROBABILITY = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}
DIFFERENCE = 1e-6  # error of a numerical derivative in float64, relative to the largest
NUMPY = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-15}  # error of the reference, relative to the largest
# Difference from a peer (PyTorch, scikit-learn) that computes in the same dtype: the peer errs by a few ulp of the largest number.
# In 16 bits, the peer also rounds intermediate results: two units.
PEER = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 4e-15, np.dtype(np.float16): 2e-3, np.dtype(bfloat16): 1.6e-2}
PEER_ULP = 16  # difference of an element from a peer in float64: the focal loss's slope may err by 15, and the peer errs too


def ulp_error(got, want, magnitude, dtype):
    """Return |got - want| in units in the last place, in `dtype`, of the magnitude.

    The error of equal infinities, and of two NaNs, is 0. Otherwise, the error of an infinity or NaN is infinite.
    """
    got, want, magnitude = (np.asarray(x, np.longdouble) for x in (got, want, magnitude))
    largest = np.longdouble(np.finfo(dtype).max)
    with np.errstate(all="ignore"):
        unit = np.spacing(np.minimum(np.abs(magnitude), largest).astype(dtype)).astype(np.longdouble)
        stored = np.where(np.abs(want) > largest, np.copysign(np.inf, want), want)  # numbers beyond the largest round to infinity
        error = np.abs(got - stored) / unit
    same = (got == stored) | (np.isnan(got) & np.isnan(want))
    return np.where(same, 0, np.where(np.isfinite(got) & np.isfinite(stored), error, np.inf))


def half_unit(x, dtype):
    """Return a unit in the last place of numbers in a 16-bit type, also beyond its largest number."""
    info = finfo(dtype)
    magnitude = np.minimum(np.abs(np.asarray(x, np.longdouble)), np.finfo(np.float32).max)
    _, exponent = np.frexp(np.maximum(magnitude, np.longdouble(float(info.smallest_normal))))
    return np.ldexp(np.longdouble(1), exponent - 1 - info.nmant)


def half_error(got, want, magnitude):
    """Return the error of a 16-bit number beyond half its own ulp, in ulp of the magnitude."""
    want = np.asarray(want, np.longdouble)
    half_ulp = half_unit(want, got.dtype) / 2
    overflowed = np.abs(want) + half_ulp >= np.ldexp(np.longdouble(1), finfo(got.dtype).maxexp)
    with np.errstate(all="ignore"):
        error = np.maximum(np.abs(got.astype(np.longdouble) - want) - half_ulp, 0) / half_unit(magnitude, got.dtype)
    return np.where(overflowed, np.where(np.isinf(got.astype(np.float64)), 0, np.inf), error)


def assert_ulp(got, want, magnitude, limit, dtype, *at):
    """Assert that every error is within the limit, and report the worst error with its arguments."""
    error = ulp_error(got, want, magnitude, dtype)
    worst = np.unravel_index(np.argmax(error), error.shape)
    shown = [np.broadcast_to(x, error.shape)[worst] for x in at]
    assert error[worst] <= limit, (
        f"{error[worst]:.2f} ulp, allowed {limit}, at {shown}: got {np.asarray(got)[worst]!r}, want {np.asarray(want)[worst]!r}"
    )


def assert_close(got, want, tolerance):
    """Assert that the largest difference is within the tolerance, relative to the largest magnitude wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    scale = np.max(np.abs(want), initial=0) or 1.0
    assert np.max(np.abs(got - want), initial=0) <= tolerance * scale


def assert_rounded(got, want):
    """Assert that numbers of 16 bits are other numbers rounded, except for an error of a millionth of the largest."""
    with np.errstate(over="ignore"):
        low, high = (np.asarray(want + sign * HALF_SUM * np.max(np.abs(want), initial=0)).astype(got.dtype) for sign in (-1, 1))
    assert got.shape == want.shape
    assert np.all(((low <= got) & (got <= high)) | (np.isnan(got) & np.isnan(want)))


def assert_tensor(got, want):
    """Assert that a tensor has the type, dtype, shape and device of PyTorch's, and is close to it."""
    assert (type(got), got.dtype, got.shape, got.device) == (type(want), want.dtype, want.shape, want.device)
    tolerance = PEER[np.dtype(str(want.dtype).removeprefix("torch."))]
    assert_close(*(x.detach().double().numpy() for x in (got, want)), tolerance)


def assert_same(got, want):
    """Assert that the numbers and arrays of two sequences are identical."""
    for pair in zip(got, want, strict=True):
        # NumPy takes NaNs of bfloat16 for different
        a, b = (x.astype(np.float32) if getattr(x, "dtype", None) == bfloat16 else x for x in pair)
        np.testing.assert_array_equal(a, b)


def flat(*results):
    """Flatten results, some of which are tuples, into one list of numbers and arrays."""
    return [x for result in results for x in (result if isinstance(result, tuple) else (result,))]


def compute(loss, *arrays, **options):
    """Return value, gradients and curvatures of every element, without a reduction."""
    return flat(
        loss(*arrays, reduction="none", **options),
        loss.grad(*arrays, reduction="sum", **options),
        loss.curvature(*arrays, reduction="sum", **options),
    )


# Difference of the losses of a few training steps from those with a peer's loss. Optimisers divide gradients by their size, which
# magnifies the rounding errors of small gradients.
TRAINING = 1e-3

# Relative error of a Dice loss of more than 2**31 equal elements.
MANY_EQUAL = 1e-9

# Relative errors of the benchmarks' rows in the Euclidean norm, including naive formulas.
ROW = {"float32": 1e-6, "float64": 1e-12, "float16": 1e-3, "bfloat16": 4e-3, "uint8 targets": 1e-6}
