"""The losses as textbook formulas, in NumPy and as text for numexpr, without care for accuracy.

Each function returns functions that compute the value and the derivatives of every element, and which share intermediate results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Calls = tuple[Callable[[], Any], ...]


def _bce(z: Any, t: Any) -> Calls:
    p = 1 / (1 + np.exp(-z))
    return lambda: -(t * np.log(p) + (1 - t) * np.log(1 - p)), lambda: p - t


def _bce_on_probabilities(p: Any, t: Any) -> Calls:
    return lambda: -(t * np.log(p) + (1 - t) * np.log(1 - p)), lambda: (p - t) / (p * (1 - p))


def _mse(z: Any, t: Any) -> Calls:
    d = z - t
    return lambda: d * d, lambda: 2 * d


def _l1(z: Any, t: Any) -> Calls:
    d = z - t
    return lambda: np.abs(d), lambda: np.sign(d)


def _huber(z: Any, t: Any) -> Calls:
    d = z - t
    return lambda: np.where(np.abs(d) < 1, d * d / 2, np.abs(d) - 0.5), lambda: np.clip(d, -1, 1)


def _log_cosh(z: Any, t: Any) -> Calls:
    d = z - t
    return lambda: np.log(np.cosh(d)), lambda: np.tanh(d)


def _mse_with_logits(z: Any, t: Any) -> Calls:
    p = 1 / (1 + np.exp(-z))
    return lambda: (p - t) ** 2, lambda: 2 * (p - t) * p * (1 - p)


def _focal(z: Any, t: Any) -> Calls:
    p = 1 / (1 + np.exp(-z))
    entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    missed = 1 - (p * t + (1 - p) * (1 - t))
    factor = (0.25 * t + 0.75 * (1 - t)) * missed
    return lambda: factor * missed * entropy, lambda: factor * (missed * (p - t) + 2 * entropy * (1 - 2 * t) * p * (1 - p))


def _gaussian_kl(mu: Any, logvar: Any) -> Calls:
    variance = np.exp(logvar)
    return lambda: 0.5 * (mu * mu + variance - 1 - logvar), lambda: mu, lambda: 0.5 * (variance - 1)


FORMULAS: dict[str, Callable[..., Calls]] = {
    "binary_cross_entropy_with_logits": _bce,
    "binary_cross_entropy": _bce_on_probabilities,
    "mse_loss": _mse,
    "l1_loss": _l1,
    "smooth_l1_loss": _huber,  # equals the Huber loss, because beta and delta are 1
    "huber_loss": _huber,
    "log_cosh_loss": _log_cosh,
    "mse_with_logits_loss": _mse_with_logits,
    "sigmoid_focal_loss": _focal,
    "gaussian_kl_loss": _gaussian_kl,
}

# with whole numbers numexpr stays in float32; 0.5 would make it compute in float64
_HUBER = ("where(abs(z - t) < 1, (z - t)**2, 2 * abs(z - t) - 1) / 2", "where(abs(z - t) < 1, z - t, where(z > t, 1, -1))")
TEXTS: dict[str, tuple[str, str]] = {
    "binary_cross_entropy_with_logits": ("where(z > 0, z, 0) - z * t + log1p(exp(-abs(z)))", "1 / (1 + exp(-z)) - t"),
    "binary_cross_entropy": ("-(t * log(z) + (1 - t) * log1p(-z))", "(z - t) / (z * (1 - z))"),
    "mse_loss": ("(z - t)**2", "2 * (z - t)"),
    "l1_loss": ("abs(z - t)", "where(z > t, 1, where(z < t, -1, 0))"),
    "smooth_l1_loss": _HUBER,
    "huber_loss": _HUBER,
    "log_cosh_loss": ("log(cosh(z - t))", "tanh(z - t)"),
    "mse_with_logits_loss": ("(1 / (1 + exp(-z)) - t)**2", "2 * (1 / (1 + exp(-z)) - t) / ((1 + exp(-z)) * (1 + exp(z)))"),
}
