"""The oracle: the losses from the textbook, in 60 digits (mpmath) or in extended precision. It imports nothing of fastloss.

Every function returns value, slope, curvature, and for each the magnitude whose last digit the promise is measured in:
the quantity itself, or the larger of two terms where it is their difference and passes through 0.
"""

from __future__ import annotations

from types import SimpleNamespace

import mpmath
import numpy as np

mpmath.mp.dps = 60


def _mp_exp(x):
    return mpmath.exp(x) if x < 1e6 else mpmath.inf


MP = SimpleNamespace(
    exp=_mp_exp,
    log=lambda x: mpmath.log(x) if x > 0 else -mpmath.inf,
    log1p=lambda x: mpmath.log1p(x) if -1 < x != mpmath.inf else x if x > 0 else -mpmath.inf,
    maximum=max,
    number=mpmath.mpf,
    power=mpmath.power,
    sinh=mpmath.sinh,
    tanh=mpmath.tanh,
    cosh=mpmath.cosh,
    where=lambda condition, x, y: x if condition else y,
)
LONG = SimpleNamespace(
    exp=np.exp,
    log=np.log,
    log1p=np.log1p,
    maximum=np.maximum,
    number=np.longdouble,
    power=np.power,
    sinh=np.sinh,
    tanh=np.tanh,
    cosh=np.cosh,
    where=np.where,
)


def _sides(z, t, m):
    """Return p, 1 - p, -log p and -log(1 - p), none of them by subtraction."""
    up, down = m.exp(-z), m.exp(z)
    return 1 / (1 + up), 1 / (1 + down), softplus(-z, m), softplus(z, m)


def softplus(x, m):
    """Return log(1 + exp(x)), by x + log(1 + exp(-x)) where exp(x) would overflow."""
    if m is MP:
        return m.log1p(m.exp(x)) if x < 1000 else x + m.exp(-x)
    return np.where(x < 1000, m.log1p(m.exp(np.minimum(x, 1000))), x)


def binary_cross_entropy_with_logits(z, t, m, pos_weight=1, label_smoothing=0):
    t = t * (1 - label_smoothing) + m.number(label_smoothing) / 2
    p, q, cost1, cost0 = _sides(z, t, m)
    on, off = pos_weight * t, 1 - t
    value = product(on, cost1, m) + product(off, cost0, m)
    slope = off * p - on * q
    curvature = (on + off) * p * q
    wrong, rest = (off, q) if m is MP and z > 0 else (on, p) if m is MP else (np.where(z > 0, off, on), np.minimum(p, q))
    return (value, value), (slope, m.maximum(wrong, (on + off) * rest)), (curvature, curvature)


def product(a, b, m):
    """Return a b, with 0 times infinity equal to 0."""
    if m is MP:
        return m.number(0) if a == 0 else a * b
    with np.errstate(invalid="ignore"):
        return np.where(a == 0, 0 * np.where(np.isnan(b), b, 0), a * b)


def mse_loss(z, t, m):
    d = z - t
    return (d * d, d * d), (2 * d, abs(2 * d)), (2 + 0 * z, 2 + 0 * z)


def binary_cross_entropy(p, t, m):
    value = t * -m.maximum(m.log(p), m.number(-100)) + (1 - t) * -m.maximum(m.log1p(-p), m.number(-100))
    least = m.number(10) ** -12
    slope = (p - t) / m.maximum(p * (1 - p), least)
    curvature = t / m.maximum(p, least) ** 2 + (1 - t) / m.maximum(1 - p, least) ** 2
    return (value, value), (slope, slope), (curvature, curvature)


def sigmoid_focal_loss(z, t, m, alpha=0.25, gamma=2):
    p, q, cost1, cost0 = _sides(z, t, m)
    cost = product(t, cost1, m) + product(1 - t, cost0, m)
    missed = t * q + (1 - t) * p
    factor = (alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1) * m.power(missed, m.number(gamma))
    rate = (1 - 2 * t) * p * q / missed
    on, off, pull = t * q, (1 - t) * p, gamma * rate * cost
    bends = p * q, 2 * gamma * rate * (off - on), pull * (q - p), (gamma - 1) * rate * pull
    sizes = p * q, 2 * gamma * rate * m.maximum(on, off), pull, (gamma - 1) * rate * pull
    slope, most = factor * (off - on + pull), factor * m.maximum(m.maximum(on, off), abs(pull))
    return (factor * cost, factor * cost), (slope, most), (factor * sum(bends), factor * sum(map(abs, sizes)))


def l1_loss(z, t, m):
    d = z - t
    return (abs(d), abs(d)), (m.where(d > 0, 1, m.where(d < 0, -1, 0 * d)), 1 + 0 * d), (0 * d, 1 + 0 * d)


def smooth_l1_loss(z, t, m, beta=1):
    if beta == 0:
        return l1_loss(z, t, m)
    return tuple((quantity / beta, magnitude / beta) for quantity, magnitude in huber_loss(z, t, m, beta))


def huber_loss(z, t, m, delta=1):
    d = z - t
    near = abs(d) <= delta
    value = m.where(near, d * d / 2, delta * (abs(d) - m.number(delta) / 2))
    slope = m.where(near, d, m.where(d > 0, delta, -delta))
    at_the_kink = abs(abs(d) - delta) < 1e-6 * delta  # where either of two curvatures is right
    return (value, value), (slope, slope), (m.where(near, 1 + 0 * d, 0 * d), m.where(at_the_kink, m.number("inf"), 1 + 0 * d))


def log_cosh_loss(z, t, m):
    d = abs(z - t)
    value = m.where(d < 1, m.log1p(2 * m.sinh(d / 2) ** 2), d + m.log1p(m.exp(-2 * d)) - m.log(m.number(2)))
    slope, curvature = m.tanh(z - t), 1 / m.cosh(m.where(d < 5000, d, 5000)) ** 2
    return (value, value), (slope, slope), (curvature, curvature)


def charbonnier_loss(z, t, m, eps=1e-3):
    d, eps = z - t, m.number(eps)
    value = m.power(d * d + eps * eps, m.number(0.5))
    return (value, value), (d / value, d / value), (eps * eps / value**3, eps * eps / value**3)


def mse_with_logits_loss(z, t, m):
    p, q, _, _ = _sides(z, t, m)
    d = (1 - t) * p - t * q
    most = m.maximum((1 - t) * p, t * q)
    pull = 1 - 2 * p if m is MP else q - p
    return (d * d, most * most), (2 * d * p * q, 2 * most * p * q), (2 * p * q * (p * q + d * pull), 2 * p * q * (p * q + most))


def binary_entropy(t, m, pos_weight=1):
    def minus_x_log_x(x, log_x):
        if m is MP:
            return m.number(0) if x == 0 else -x * log_x()
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(x == 0, 0, -x * log_x())

    positive, negative = pos_weight * t, 1 - t
    p, q = positive / (positive + negative), negative / (positive + negative)
    log_p, log_q = m.where(q < 0.1, m.log1p(-q), m.log(p)), m.where(p < 0.1, m.log1p(-p), m.log(q))
    return minus_x_log_x(positive, lambda: log_p) + minus_x_log_x(negative, lambda: log_q)


# The following losses subtract a number near 1 from 1, or cancel to second order. With 400 digits, 1 + exp(-700) keeps digits of both.
_ENOUGH = 400
_numbers = np.frompyfunc(lambda x: mpmath.mpf(float(x)), 1, 1)
_exp = np.frompyfunc(_mp_exp, 1, 1)
_most = np.frompyfunc(max, 2, 1)
ARRAYS = SimpleNamespace(exp=_exp, log1p=np.frompyfunc(MP.log1p, 1, 1), maximum=_most, number=_numbers)  # arrays of numbers of 60 digits


def _round(x):
    """Round an array of mpmath numbers to extended precision, as the sum of a leading and a trailing float64."""

    def parts(number):
        head = float(number)
        return np.longdouble(head) + (np.longdouble(float(number - head)) if np.isfinite(head) else 0)

    return np.array([parts(number) for number in np.ravel(x)], np.longdouble).reshape(np.shape(x))


def dice_with_logits_loss(z, t, weight=1, smooth=1, per_channel=True, per_sample=True, alpha=0.5, beta=0.5, smooth_denominator=None):
    """Return 1 - (2 sum(p t) + smooth) / (2 sum(p t) + missed + smooth) of each region, and the slopes of their sum.

    missed is 2 alpha sum(p (1 - t)) + 2 beta sum((1 - p) t).
    """
    outer = 2 if per_channel else 1
    axes = (() if per_sample else (0,)) + tuple(range(outer if per_channel or per_sample else 1, z.ndim))
    with mpmath.workdps(_ENOUGH):
        w = _numbers(np.broadcast_to(weight, z.shape))
        z, t = _numbers(z), _numbers(t)
        p, q = 1 / (1 + _exp(-z)), 1 / (1 + _exp(z))
        false_positive, false_negative = 2 * mpmath.mpf(alpha), 2 * mpmath.mpf(beta)
        smooth, more = mpmath.mpf(smooth), mpmath.mpf(smooth if smooth_denominator is None else smooth_denominator)
        overlap = np.sum(2 * w * p * t, axis=axes, keepdims=True)
        missed = np.sum(w * (false_positive * p * (1 - t) + false_negative * q * t), axis=axes, keepdims=True)
        size = overlap + missed + more
        value, score, magnitude = 1 - (overlap + smooth) / size, (overlap + smooth) / size, _most(missed, abs(more - smooth)) / size
        rate = w * p * q / size
        pull, push = false_positive * score * (1 - t), (false_negative * score + 2 * value) * t
        slope, most = rate * (pull - push), rate * _most(score, _most(pull, push))
        value, magnitude = (np.squeeze(x, axis=axes) for x in (value, magnitude))
        return (_round(value), _round(magnitude)), (_round(slope), _round(most))


def gaussian_kl_loss(mu, logvar):
    """Return value, slopes and curvatures of (mu**2 + exp(logvar) - 1 - logvar) / 2. Each is its own magnitude."""
    with mpmath.workdps(_ENOUGH):
        mu, logvar = _numbers(mu), _numbers(logvar)
        variance = _exp(logvar)
        value = np.where(logvar == mpmath.inf, logvar, (mu * mu + variance - 1 - logvar) / 2)
        quantities = value, mu, (variance - 1) / 2, np.ones(mu.shape), variance / 2
        return tuple(_round(x) for x in quantities)


def cross_entropy(z, t, m, weight=None, label_smoothing=0):
    """Return the value of each entry of logits (N, C, ...) or (C,), and the slopes and curvatures by the logits."""
    p, q, surprise, is_class = _of_classes(z, t, m)
    axis, smoothing = _class_axis(z), m.number(label_smoothing)
    share = (1 - smoothing) * is_class + smoothing / z.shape[axis]
    if weight is not None:
        share = share * _along_classes(m.number(weight), z)
    total = share.sum(axis, keepdims=True)
    others, value, curvature = total - share, (share * surprise).sum(axis), total * p * q
    return (value, value), (others * p - share * q, m.maximum(others * p, share * q)), (curvature, curvature)


def focal_cross_entropy_loss(z, t, m, gamma=2, weight=None):
    p, q, surprise, is_class = _of_classes(z, t, m)
    axis = _class_axis(z)
    share = is_class if weight is None else is_class * _along_classes(m.number(weight), z)
    hit, missed, cost, w = (np.where(is_class, x, 0).sum(axis, keepdims=True) for x in (p, q, surprise, share))
    rate = w * (missed**gamma + gamma * missed ** (gamma - 1) * hit * cost)
    value, slope = (w * missed**gamma * cost).sum(axis), rate * np.where(is_class, -q, p)
    return (value, value), (slope, abs(slope))


def _of_classes(z, t, m):
    """Return p, 1 - p and -log p of every class, and whether the class is that of its entry."""
    axis = _class_axis(z)
    return *softmax(z, axis, m), _along_classes(np.arange(z.shape[axis]), z) == np.expand_dims(t, axis)


def softmax(z, axis, m):
    """Return p, 1 - p and -log p of every class, none of them by subtraction."""
    z = m.number(z)
    below = z.max(axis, keepdims=True) - z
    e, is_largest = m.exp(-below), np.zeros(z.shape, bool)
    np.put_along_axis(is_largest, z.argmax(axis, keepdims=True), True, axis)
    rest = np.where(is_largest, 0, e).sum(axis, keepdims=True)
    return e / (1 + rest), (1 - e + rest) / (1 + rest), m.log1p(rest) + below


def _class_axis(z):
    return min(1, z.ndim - 1)


def _along_classes(x, z):
    """Return numbers of the classes in a shape that broadcasts against logits."""
    return np.reshape(x, [-1 if axis == _class_axis(z) else 1 for axis in range(z.ndim)])
