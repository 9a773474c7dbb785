"""The losses as users of autograd write them, for libraries that do not have them.

`xp` is a namespace of functions of a library: abs, bce, exp, log, log1p, sigmoid, softplus, where.
"""

from __future__ import annotations

from math import log
from typing import Any

from bench.cases import Case


def huber(xp: Any, z: Any, t: Any) -> Any:
    """Compute the Huber loss with delta = 1."""
    d = z - t
    return xp.where(xp.abs(d) < 1, 0.5 * d * d, xp.abs(d) - 0.5)


def log_cosh(xp: Any, z: Any, t: Any) -> Any:
    """Compute the log-cosh loss in a form that does not overflow."""
    d = z - t
    return d + xp.softplus(-2 * d) - log(2)


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
    "mse_with_logits_loss": lambda xp, z, t: (xp.sigmoid(z) - t) ** 2,
    "sigmoid_focal_loss": focal,
    "gaussian_kl_loss": gaussian_kl,
    "dice_with_logits_loss": dice,
    "dice_bce_with_logits_loss": lambda xp, z, t: dice(xp, z, t) + xp.bce(z, t).mean(),
    "vae_loss": vae,
}


def reduced(case: Case, values: Any) -> Any:
    """Compute the mean or the sum of values, as the reduction of the case says. A single number is returned unchanged."""
    return values.sum() if case.reduction == "sum" else values.mean()
