"""What is true: the losses from the textbook, in 60 digits (mpmath) or in extended precision. Imports nothing of fastloss.

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


MP = SimpleNamespace(exp=_mp_exp, log1p=lambda x: mpmath.log1p(x) if x != mpmath.inf else x, maximum=max, number=mpmath.mpf, log=mpmath.log)
LONG = SimpleNamespace(exp=np.exp, log1p=np.log1p, maximum=np.maximum, number=np.longdouble, log=np.log)


def _sides(z, t, m):
    """Return p, 1 - p, -log p and -log(1 - p), none of them by subtraction."""
    up, down = m.exp(-z), m.exp(z)
    return 1 / (1 + up), 1 / (1 + down), softplus(-z, m), softplus(z, m)


def softplus(x, m):
    """log(1 + exp(x)), which is x + log(1 + exp(-x)) where exp(x) is too large to hold."""
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
    """a b, where 0 times infinity is 0: nothing weighted, nothing paid."""
    if m is MP:
        return m.number(0) if a == 0 else a * b
    with np.errstate(invalid="ignore"):
        return np.where(a == 0, 0 * np.where(np.isnan(b), b, 0), a * b)


def mse_loss(z, t, m):
    d = z - t
    return (d * d, d * d), (2 * d, abs(2 * d)), (2 + 0 * z, 2 + 0 * z)


def mse_with_logits_loss(z, t, m):
    p, q, _, _ = _sides(z, t, m)
    d = (1 - t) * p - t * q
    most = m.maximum((1 - t) * p, t * q)
    pull = 1 - 2 * p if m is MP else q - p
    return (d * d, most * most), (2 * d * p * q, 2 * most * p * q), (2 * p * q * (p * q + d * pull), 2 * p * q * (p * q + most))


def binary_entropy(t, m):
    def minus_x_log_x(x, log_x):
        if m is MP:
            return m.number(0) if x == 0 else -x * log_x()
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(x == 0, 0, -x * log_x())

    return minus_x_log_x(t, lambda: m.log(t)) + minus_x_log_x(1 - t, lambda: m.log1p(-t))
