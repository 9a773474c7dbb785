"""Losses of the difference between an input `z` and a target `t`."""

from __future__ import annotations

from math import factorial, inf
from typing import Any

from fastloss.core.checks import LARGEST, SMALLEST
from fastloss.loss import elementwise_loss
from fastloss.losses.logistic import variance
from fastloss.losses.table import row
from fastloss.ops import abs, add_log1p, copysign, exp, fma, polynomial, sigmoid, sqrt, tanh, where

__all__ = ["charbonnier_loss", "huber_loss", "l1_loss", "log_cosh_loss", "mse_loss", "smooth_l1_loss"]

_LOG_2 = 0.6931471805599453
# cosh d - 1 - d**2/2 = d**4 (1/4! + d**2/6! + ...), to the last digit of float64 for |d| <= 1
_COSH_TERMS = tuple(1.0 / factorial(2 * k) for k in range(2, 11))


def _sign(d: Any) -> Any:
    """Return 1, -1, or d itself where d is 0 or NaN."""
    return where(d > 0.0, 1.0, where(d < 0.0, -1.0, d))


def _of_difference(value: Any, slope: Any, curvature: Any) -> Any:
    """Return all six quantities of a loss of d = z - t, given those by the input: each derivative by the target changes the sign."""
    return value, slope, curvature, -slope, -curvature, curvature


def _lost(z: Any, t: Any, d: Any) -> Any:
    """Return the rounding error of d = z - t, which is (z - t) - d exactly (Knuth's two-sum)."""
    t_read = z - d
    return (z - (d + t_read)) + (t_read - t)


@row("MSE", "large errors should count most; you want the mean", input="any", ulp={"value": 2, "slope": 0.5, "curvature": 0})
@elementwise_loss
def mse_loss(z: Any, t: Any) -> Any:
    """Squared error between input and target.

    Per element:

        value     = (input - target)**2
        slope     = 2 (input - target)
        curvature = 2

    Args:
        input: predictions.
        target: true values.

    Source: Legendre, "Nouvelles méthodes pour la détermination des orbites des comètes", 1805.
    """
    d = z - t
    return _of_difference(d * d, 2.0 * d, 2.0)


@row(
    "L1",
    "outliers should count in proportion to their size; you want the median",
    input="any",
    ulp={"value": 0.5, "slope": 0, "curvature": 0},
)
@elementwise_loss
def l1_loss(z: Any, t: Any) -> Any:
    """Absolute error between input and target.

    With d = input - target, per element:

        value     = |d|
        slope     = sign(d), which is 0 at d = 0
        curvature = 0

    Args:
        input: predictions.
        target: true values.

    Source: Laplace, "Mémoire sur la probabilité des causes par les évènements", 1774.
    """
    d = z - t
    return _of_difference(abs(d), _sign(d), 0.0)


@row(
    "smooth L1", "like `l1_loss`, without the jump of the gradient at the target: bounding boxes", input="any",
    ulp={"value": (2.5, 3), "slope": (1.5, 1.5), "curvature": 0.5}, settings=({}, {"beta": 0.375}, {"beta": 0}),
)  # fmt: skip
@elementwise_loss(bounds={"beta": (0.0, inf)})
def smooth_l1_loss(z: Any, t: Any, beta: Any = 1.0) -> Any:
    """Absolute error that becomes a parabola where it is below `beta`.

    With d = input - target, per element:

        value     = d**2 / (2 beta)  if |d| < beta  else  |d| - beta / 2
        slope     = d / beta         if |d| < beta  else  sign(d)
        curvature = 1 / beta         if |d| < beta  else  0

    This is `huber_loss` divided by its `delta`, and at beta = 0 it is `l1_loss`. For large errors the slope stays 1.

    Args:
        input: predictions.
        target: true values.
        beta: error at which the parabola ends, in the units of the input: a number of 0 or more, or an array that broadcasts.

    Source: Girshick, "Fast R-CNN", 2015.
    """
    d = z - t
    size, ratio = abs(d), d / beta
    near = size < beta
    value = where(near, 0.5 * d * ratio, size - 0.5 * beta)
    return _of_difference(value, where(near, ratio, _sign(d)), where(near, 1.0 / beta, 0.0))


@row(
    "Huber", "like `mse_loss`, with the gradient of outliers limited to `delta`", input="any",
    ulp={"value": 2, "slope": 0.5, "curvature": 0}, settings=({}, {"delta": 2.5}),
)  # fmt: skip
@elementwise_loss(bounds={"delta": (SMALLEST, inf)})
def huber_loss(z: Any, t: Any, delta: Any = 1.0) -> Any:
    """Squared error that continues as a straight line where the error exceeds `delta`.

    With d = input - target, per element:

        value     = d**2 / 2  if |d| <= delta  else  delta (|d| - delta / 2)
        slope     = d         if |d| <= delta  else  delta sign(d)
        curvature = 1         if |d| <= delta  else  0

    The slope is bounded: that of an outlier is no larger than that of an error of `delta`.

    Args:
        input: predictions.
        target: true values.
        delta: error at which the parabola ends, in the units of the input: a number above 0, or an array that broadcasts.

    Source: Huber, "Robust Estimation of a Location Parameter", 1964.
    """
    d = z - t
    size = abs(d)
    near = size <= delta
    value = where(near, 0.5 * d * d, delta * (size - 0.5 * delta))
    return _of_difference(value, where(near, d, delta * _sign(d)), where(near, 1.0, 0.0))


@row(
    "log-cosh", "like `huber_loss`, smooth everywhere and without a parameter", input="any",
    ulp={"value": 4, "slope": 3, "curvature": 3}, module="LogCoshLoss",
)  # fmt: skip
@elementwise_loss
def log_cosh_loss(z: Any, t: Any) -> Any:
    """Logarithm of the hyperbolic cosine of the error: a parabola that bends into a straight line.

    With d = input - target, per element:

        value     = log(cosh(d)) = |d| + log1p(exp(-2 |d|)) - log 2
        slope     = tanh(d)
        curvature = 1 - tanh(d)**2

    The value lies between |d| - log 2 and |d|. Below |d| = 1 the three terms nearly cancel and would lose every digit of
    d**2 / 2; there the value is computed as log1p(cosh(d) - 1), with cosh(d) - 1 from its series.

    Args:
        input: predictions.
        target: true values.

    Source: Green, "Iteratively Reweighted Least Squares for Maximum Likelihood Estimation, and some Robust and Resistant
        Alternatives", 1984.
    """
    d = z - t
    lost, size, minus_2d = _lost(z, t, d), abs(d), -abs(2.0 * d)
    square = d * d
    cosh_minus_1 = fma(square * square, polynomial(square, _COSH_TERMS, 1.0), 0.5 * square)
    near = size < 1.0
    value = add_log1p(where(near, 0.0, size - _LOG_2), where(near, cosh_minus_1, exp(minus_2d)))
    slope = tanh(d)
    # the curvature falls as exp(-2 |d|), so an error of d counts 2 |d| times; add the rounding error of the subtraction back
    curvature = 4.0 * variance(sigmoid(minus_2d))
    return _of_difference(value, slope, where(curvature == 0.0, 0.0, fma(-2.0 * slope * lost, curvature, curvature)))


@row(
    "Charbonnier", "like `l1_loss`, smooth at the target: image restoration and super-resolution", input="any",
    ulp={"value": 2.5, "slope": 4, "curvature": 10}, settings=({}, {"eps": 0.375}), module="CharbonnierLoss",
)  # fmt: skip
@elementwise_loss(bounds={"eps": (SMALLEST, LARGEST)})
def charbonnier_loss(z: Any, t: Any, eps: Any = 1e-3) -> Any:
    """Absolute error that is rounded off near the target: the hypotenuse of the error and `eps`.

    With d = input - target, per element:

        value     = sqrt(d**2 + eps**2)
        slope     = d / value
        curvature = eps**2 / value**3

    The value is at least `eps`, which is its minimum, at d = 0. It is computed from the ratio of |d| and `eps`, so no square
    overflows or vanishes: errors up to the largest float32, and every `eps` above 0, keep their digits.

    Args:
        input: predictions.
        target: true values.
        eps: error at which the parabola around the target bends into straight lines, in the units of the input: a number above 0, or
            an array that broadcasts.

    Source: Charbonnier, Blanc-Féraud, Aubert and Barlaud, "Two deterministic half-quadratic regularization algorithms for computed
    imaging", 1994; for images, Lai, Huang, Ahuja and Yang, "Deep Laplacian Pyramid Networks", 2017.
    """
    d = z - t
    size = abs(d)
    is_far = size > eps
    larger, smaller = where(is_far, size, eps), where(is_far, eps, size)
    ratio = smaller / larger
    square = fma(ratio, ratio, 1.0)
    root = sqrt(square)
    value = larger * root
    size_over_value, scaled_eps = where(is_far, 1.0, ratio) / root, where(is_far, ratio, 1.0)
    return _of_difference(value, copysign(size_over_value, d), scaled_eps * (scaled_eps / (square * value)))
