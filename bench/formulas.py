"""The losses as other libraries are given them, written as textbooks have them, without care for accuracy.

`FORMULAS` holds values for libraries with autograd: `xp` is a namespace of a library's functions (abs, bce, exp, log, log1p, sigmoid,
softplus, sqrt, where; and, of classes along the second axis, cross_entropy of every entry, softmax and one_hot). `NAIVE` holds NumPy
functions that return functions computing the value and the derivatives of every element, which share intermediate results. `TEXTS`
holds values and derivatives as text for numexpr.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np

from bench.cases import Case


def huber(xp: Any, z: Any, t: Any) -> Any:
    """Compute the Huber loss with delta = 1."""
    d = z - t
    return xp.where(xp.abs(d) < 1, 0.5 * d * d, xp.abs(d) - 0.5)


def log_cosh(xp: Any, z: Any, t: Any) -> Any:
    """Compute the log-cosh loss in a form that does not overflow."""
    d = z - t
    return d + xp.softplus(-2 * d) - log(2)


def charbonnier(xp: Any, z: Any, t: Any) -> Any:
    """Compute the Charbonnier loss with eps = 1e-3."""
    return xp.sqrt((z - t) ** 2 + 1e-6)


def focal(xp: Any, z: Any, t: Any) -> Any:
    """Compute the focal loss with alpha = 1/4 and gamma = 2."""
    p = xp.sigmoid(z)
    hit = p * t + (1 - p) * (1 - t)
    return (0.25 * t + 0.75 * (1 - t)) * (1 - hit) ** 2 * xp.bce(z, t)


def gaussian_kl(xp: Any, mu: Any, logvar: Any) -> Any:
    """Compute the divergence of Gaussians from the standard normal distribution."""
    return 0.5 * (mu * mu + xp.exp(logvar) - 1 - logvar)


def dice(xp: Any, z: Any, t: Any) -> Any:
    """Compute the mean of the Dice losses of all samples and channels."""
    p = xp.sigmoid(z)
    axes = tuple(range(2, z.ndim))
    return (1 - (2 * (p * t).sum(axes) + 1) / (p.sum(axes) + t.sum(axes) + 1)).mean()


def focal_of_classes(xp: Any, z: Any, t: Any) -> Any:
    """Compute the focal cross-entropy with gamma = 2."""
    cost = xp.cross_entropy(z, t)
    return (1 - xp.exp(-cost)) ** 2 * cost


def dice_of_classes(xp: Any, z: Any, t: Any) -> Any:
    """Compute the mean of the Dice losses of all samples and classes."""
    p, is_class = xp.softmax(z, 1), xp.one_hot(t, z.shape[1])
    axes = tuple(range(2, z.ndim))
    return (1 - (2 * (p * is_class).sum(axes) + 1) / (p.sum(axes) + is_class.sum(axes) + 1)).mean()


def vae(xp: Any, z: Any, t: Any, mu: Any, logvar: Any) -> Any:
    """Compute the objective of a variational autoencoder, a mean over the batch."""
    return (xp.bce(z, t).sum() + gaussian_kl(xp, mu, logvar).sum()) / len(z)


FORMULAS: dict[str, Any] = {
    "binary_cross_entropy_with_logits": lambda xp, z, t: xp.bce(z, t),
    "binary_cross_entropy": lambda xp, p, t: -(t * xp.log(p) + (1 - t) * xp.log1p(-p)),
    "mse_loss": lambda xp, z, t: (z - t) ** 2,
    "l1_loss": lambda xp, z, t: xp.abs(z - t),
    "smooth_l1_loss": huber,
    "huber_loss": huber,
    "log_cosh_loss": log_cosh,
    "charbonnier_loss": charbonnier,
    "mse_with_logits_loss": lambda xp, z, t: (xp.sigmoid(z) - t) ** 2,
    "sigmoid_focal_loss": focal,
    "gaussian_kl_loss": gaussian_kl,
    "dice_with_logits_loss": dice,
    "dice_bce_with_logits_loss": lambda xp, z, t: dice(xp, z, t) + xp.bce(z, t).mean(),
    "vae_loss": vae,
    "cross_entropy": lambda xp, z, t: xp.cross_entropy(z, t),
    "focal_cross_entropy_loss": focal_of_classes,
    "dice_softmax_loss": dice_of_classes,
    "dice_cross_entropy_loss": lambda xp, z, t: dice_of_classes(xp, z, t) + xp.cross_entropy(z, t).mean(),
}


def reduced(case: Case, values: Any) -> Any:
    """Compute the mean or the sum of values, as the reduction of the case says. A single number is returned unchanged."""
    return values.sum() if case.reduction == "sum" else values.mean()


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


def _charbonnier(z: Any, t: Any) -> Calls:
    d = z - t
    value = np.sqrt(d * d + d.dtype.type(1e-6))
    return lambda: value, lambda: d / value


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


def _softmax(z: Any, t: Any) -> tuple[Any, Any, Any]:
    e, classes = np.exp(z), np.arange(z.shape[1]).reshape(-1, *(1 for _ in z.shape[2:]))
    p, is_class = e / e.sum(axis=1, keepdims=True), classes == t[:, np.newaxis]
    return p, is_class, np.where(is_class, p, 0).sum(axis=1, keepdims=True)


def _cross_entropy(z: Any, t: Any) -> Calls:
    p, is_class, hit = _softmax(z, t)
    return lambda: -np.log(hit), lambda: p - is_class


def _focal_cross_entropy(z: Any, t: Any) -> Calls:
    p, is_class, hit = _softmax(z, t)
    missed, cost = 1 - hit, -np.log(hit)
    return lambda: missed**2 * cost, lambda: missed * (missed + 2 * hit * cost) * (p - is_class)


NAIVE: dict[str, Callable[..., Calls]] = {
    "binary_cross_entropy_with_logits": _bce,
    "binary_cross_entropy": _bce_on_probabilities,
    "mse_loss": _mse,
    "l1_loss": _l1,
    "smooth_l1_loss": _huber,  # equals the Huber loss, because beta and delta are 1
    "huber_loss": _huber,
    "log_cosh_loss": _log_cosh,
    "charbonnier_loss": _charbonnier,
    "mse_with_logits_loss": _mse_with_logits,
    "sigmoid_focal_loss": _focal,
    "gaussian_kl_loss": _gaussian_kl,
    "cross_entropy": _cross_entropy,
    "focal_cross_entropy_loss": _focal_cross_entropy,
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
