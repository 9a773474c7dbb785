"""Losses between a target `t` in [0, 1] and a probability, which most of them compute as the sigmoid of a logit `z`.

With e = exp(-|z|) and s = e / (1 + e) = sigmoid(-|z|), let

    wrong = 1 - t  if z > 0  else  t

be the probability that the target gives to the class that the logit makes the less likely one. Then

    sigmoid(z) - t = sign(z) (wrong - s)

The right side never forms 1 - s where s is tiny, so the slope keeps its relative accuracy in both tails, where p - t loses it.
"""

from __future__ import annotations

from math import inf, nan
from typing import Any

from fastloss.loss import TargetLoss, elementwise_loss
from fastloss.losses.table import row
from fastloss.ops import abs, add_log1p, exp, fma, log, log1p, maximum, minimum, pow, quotient, sigmoid, where

__all__ = [
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "binary_entropy", "mse_with_logits_loss", "sigmoid_focal_loss",
]  # fmt: skip

_BOUNDS = {"pos_weight": (0.0, inf), "label_smoothing": (0.0, 1.0)}


def tail(z: Any) -> tuple[Any, Any]:
    """Return e = exp(-|z|), and s = e / (1 + e) = sigmoid(-|z|), the smaller of the two probabilities."""
    return exp(-abs(z)), sigmoid(-abs(z))


def variance(s: Any) -> Any:
    """Return the variance of a Bernoulli distribution, p (1 - p) = s - s**2, rounded once."""
    return fma(-s, s, s)


def probability_missed(s: Any, wrong: Any) -> Any:
    """Return t (1 - p) + (1 - t) p, as a sum of positive terms; 1 - (t p + (1 - t)(1 - p)) would cancel."""
    return fma(wrong, 1.0 - s, (1.0 - wrong) * s)


def _smooth(t: Any, label_smoothing: Any) -> Any:
    """Mix the target with 1/2. Without smoothing, return the target unrounded."""
    return t if label_smoothing is None else t + label_smoothing * (0.5 - t)


def times(magnitude: Any, wrong: Any) -> Any:
    """Return |z| wrong, which is 0 at wrong = 0, even at |z| = inf."""
    return where(wrong == 0.0, 0.0, magnitude * wrong)


def _minus_x_log_x(x: Any, log_x: Any) -> Any:
    """Return -x log x, which is 0 at x = 0."""
    return where(x == 0.0, 0.0, -x * log_x)


@row("BCE", "targets in [0, 1]: classes, masks, the pixels of images", ulp={"value": (2, 3), "slope": 1.5, "curvature": 2})
@elementwise_loss(probabilities=("target",), bounds=_BOUNDS)
def binary_cross_entropy_with_logits(z: Any, t: Any, pos_weight: Any = None, label_smoothing: Any = None) -> Any:
    """Binary cross-entropy between targets in [0, 1] and the sigmoid of the input.

    With p = sigmoid(input), per element:

        value     = -(t log p + (1 - t) log(1 - p))
        slope     = p - t
        curvature = p (1 - p)

    The computed form (see the docstring of `fastloss.losses.logistic`) is accurate to 2 float32 ulp at every logit, subnormal
    results included. The form of most libraries, `max(z, 0) - z t + log1p(exp(-|z|))`, loses the value by cancellation, and p - t
    loses the slope. At infinite logits the value is the limit, not inf - inf. On soft targets the minimum is not 0 but
    `binary_entropy(target)`, reached at p = t.

    Args:
        input: logits.
        target: probabilities.
        pos_weight: factor c of 0 or more on the positive part, -c t log p: a number, or an array that broadcasts.
        label_smoothing: a in [0, 1]; the target becomes t (1 - a) + a / 2.

    Source: Good, "Rational Decisions", 1952; on images in [0, 1], Kingma and Welling, "Auto-Encoding Variational Bayes", 2013.
    """
    t, share = _smooth(t, label_smoothing), 1.0 if label_smoothing is None else 1.0 - label_smoothing
    e, s = tail(z)
    if pos_weight is None:
        wrong = where(z > 0.0, 1.0 - t, t)
        value = add_log1p(times(abs(z), wrong), e)
        slope, curvature, target_slope, cross = wrong - s, variance(s), -z, -1.0
    else:
        positive, negative = pos_weight * t, 1.0 - t
        mass = positive + negative
        wrong = where(z > 0.0, negative, positive)
        value = times(abs(z), wrong) + mass * log1p(e)
        slope, curvature = wrong - mass * s, mass * variance(s)
        target_slope = where(z > 0.0, -z, times(-z, pos_weight)) + (pos_weight - 1.0) * log1p(e)
        cross = where(z > 0.0, s - 1.0 - pos_weight * s, pos_weight * (s - 1.0) - s)
    return value, where(z > 0.0, slope, -slope), curvature, share * target_slope, share * cross, 0.0


@row(
    "BCE on probabilities", "only probabilities are available, no logits", input="probabilities", arrays=("probabilities", "targets"),
    ulp={"value": (1, 3), "slope": (2, 3), "curvature": 4},
)  # fmt: skip
@elementwise_loss(probabilities=("input", "target"))
def binary_cross_entropy(z: Any, t: Any) -> Any:
    """Binary cross-entropy between targets and probabilities; prefer `binary_cross_entropy_with_logits`.

    With p = input, per element, as in PyTorch:

        value     = -(t max(log p, -100) + (1 - t) max(log(1 - p), -100))
        slope     = (p - t) / max(p (1 - p), 1e-12)
        curvature = t / max(p, 1e-12)**2 + (1 - t) / max(1 - p, 1e-12)**2

    A probability close to 1 has already lost the digits of 1 - p, and the loss cannot recover them: above a logit of 17 a float32
    sigmoid is 1. The clamps keep the value finite there, but the slope is then no longer the derivative of the value. A loss of
    the logits has neither problem.

    Args:
        input: probabilities. Outside [0, 1] value and slope are NaN.
        target: probabilities.

    Source: Good, "Rational Decisions", 1952; the clamps: PyTorch 1.2, 2019.
    """
    rest = 1.0 - z
    value = t * minimum(-log(z), 100.0) + (1.0 - t) * minimum(-log1p(-z), 100.0)
    least, least_rest = maximum(z, 1e-12), maximum(rest, 1e-12)
    curvature = t / (least * least) + (1.0 - t) / (least_rest * least_rest)
    spread = z * rest
    spread = where(spread < 0.0, nan, maximum(spread, 1e-12))
    return value, quotient(z - t, spread), curvature, minimum(-log(z), 100.0) - minimum(-log1p(-z), 100.0), -1.0 / spread, 0.0


@row(
    "focal", "most elements are easy and would outweigh the few hard ones: detection",
    ulp={"value": (8, 10), "slope": (12, 15), "curvature": 30},
    settings=({}, {"alpha": -1, "gamma": 0.5}, {"alpha": 0.75, "gamma": 3.25}), module="SigmoidFocalLoss",
)  # fmt: skip
@elementwise_loss(probabilities=("target",), bounds={"alpha": (-inf, 1.0), "gamma": (0.0, inf)}, reduction="none")
def sigmoid_focal_loss(z: Any, t: Any, alpha: Any = 0.25, gamma: Any = 2.0) -> Any:
    """Binary cross-entropy that counts an element less, the better it is classified. Its default reduction is "none".

    With p = sigmoid(input), c = binary cross-entropy, m = t (1 - p) + (1 - t) p (the probability missed), and
    a = alpha t + (1 - alpha)(1 - t), or 1 if alpha is negative, per element:

        value     = a m**gamma c
        slope     = a m**gamma ((p - t) + gamma r c)                           with r = m' / m = (1 - 2 t) p (1 - p) / m
        curvature = a m**gamma (p (1 - p) + gamma r (2 (p - t) + (1 - 2 p) c) + gamma (gamma - 1) r**2 c)

    Torchvision computes m as 1 - (t p + (1 - t)(1 - p)), which rounds 1e-9 to 0. Here m is a sum of positive terms and keeps its
    digits in both tails. With gamma = 0 and a negative alpha this is `binary_cross_entropy_with_logits`.

    Args:
        input: logits.
        target: probabilities, usually 0 or 1.
        alpha: weight of the positive class, up to 1, or negative for no weight: a number, or an array that broadcasts.
        gamma: how strongly well classified elements are discounted, 0 or more: a number, or an array that broadcasts.

    Source: Lin, Goyal, Girshick, He and Dollár, "Focal Loss for Dense Object Detection", 2017.
    """
    e, s = tail(z)
    positive = z > 0.0
    wrong = where(positive, 1.0 - t, t)
    error, opposite = where(positive, wrong - s, -(wrong - s)), where(positive, s + s - 1.0, 1.0 - (s + s))  # p - t, 1 - 2 p
    cross_entropy, spread = times(abs(z), wrong) + log1p(e), variance(s)
    missed = probability_missed(s, wrong)
    rate = quotient(spread, missed) * fma(-2.0, t, 1.0)
    pull = where(rate == 0.0, 0.0, rate * cross_entropy)  # at infinite logits the cross-entropy is inf, and the rate 0
    share, power = where(alpha >= 0.0, fma(alpha, t, (1.0 - alpha) * (1.0 - t)), 1.0), pow(missed, gamma)
    discount = share * power
    bend = 2.0 * rate * error + opposite * pull + (gamma - 1.0) * rate * pull
    # by the target: m changes by 1 - 2 p, the cross-entropy by -z, the share of the class by 2 alpha - 1
    turn, tilt = where(missed == 0.0, 0.0, opposite / missed), where(alpha >= 0.0, 2.0 * alpha - 1.0, 0.0)
    lift = gamma * turn * cross_entropy - z
    target_slope = power * (tilt * cross_entropy + where(share == 0.0, 0.0, share * lift))
    turned = turn * error - (2.0 * quotient(spread, missed) + turn * rate) * cross_entropy
    cross = gamma * rate * target_slope + power * (tilt * error + share * (gamma * turned - 1.0))
    target_bend = tilt * (lift - z) - share * gamma * turn * (turn * cross_entropy + z)
    return (
        where(discount == 0.0, 0.0, discount * cross_entropy), discount * (error + gamma * pull), discount * (spread + gamma * bend),
        target_slope, cross, gamma * turn * target_slope + power * target_bend,
    )  # fmt: skip


@row(
    "sigmoid + MSE", "the squared error of a sigmoid is the measure that counts, and outputs do not saturate",
    ulp={"value": (3, 4), "slope": 4, "curvature": 4.5}, module="MSEWithLogitsLoss",
)  # fmt: skip
@elementwise_loss
def mse_with_logits_loss(z: Any, t: Any) -> Any:
    """Squared error between the sigmoid of the input and the target.

    With p = sigmoid(input), per element:

        value     = (p - t)**2
        slope     = 2 (p - t) p (1 - p)
        curvature = 2 p (1 - p) (p (1 - p) + (p - t) (1 - 2 p))

    p (1 - p) is computed as s (1 - s) with s = sigmoid(-|z|), which is accurate in both tails. The factor vanishes where the
    output is saturated, however large the error is; the slope of `binary_cross_entropy_with_logits` does not.

    Args:
        input: logits.
        target: probabilities.

    Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors", 1986.
    """
    _, s = tail(z)
    miss = where(z > 0.0, 1.0 - t, t) - s
    spread = variance(s)
    slope = 2.0 * miss * spread
    curvature = 2.0 * spread * fma(-miss, 1.0 - 2.0 * s, spread)
    return miss * miss, where(z > 0.0, slope, -slope), curvature, where(z > 0.0, -2.0 * miss, 2.0 * miss), -2.0 * spread, 2.0


@row(
    "entropy", "the lowest cross-entropy that soft targets allow", input="none", arrays=("targets",), gradients=(),
    is_elementwise=False, ulp={"value": 3},
)  # fmt: skip
@TargetLoss
@elementwise_loss(probabilities=("target",), bounds=_BOUNDS)
def binary_entropy(z: Any, t: Any, pos_weight: Any = None, label_smoothing: Any = None) -> Any:
    """Entropy of the targets: the smallest binary cross-entropy that any input reaches, at sigmoid(input) = target.

    Per element:

        value = -(t log t + (1 - t) log(1 - t))

    It is 0 at t = 0 and t = 1, and it has no gradient. `binary_cross_entropy_with_logits` under the same options minus this
    entropy is the Kullback-Leibler divergence, which is 0 only at p = t. With `pos_weight` c it is the minimum of the weighted
    loss, reached at p = c t / (c t + 1 - t).

    Args:
        target: probabilities.
        pos_weight: factor c of 0 or more on the positive part of the cross-entropy: a number, or an array that broadcasts.
        label_smoothing: a in [0, 1]; the target becomes t (1 - a) + a / 2.

    Source: Shannon, "A Mathematical Theory of Communication", 1948.
    """
    t = _smooth(t, label_smoothing)
    if pos_weight is None:
        return _minus_x_log_x(t, log(t)) + _minus_x_log_x(1.0 - t, log1p(-t)), 0.0
    positive, negative = pos_weight * t, 1.0 - t
    p, q = positive / (positive + negative), negative / (positive + negative)
    # the logarithm of the larger share is computed from the smaller one, because the larger one rounds to 1
    log_p, log_q = where(q < 0.5, log1p(-q), log(p)), where(p < 0.5, log1p(-p), log(q))
    return _minus_x_log_x(positive, log_p) + _minus_x_log_x(negative, log_q), 0.0
