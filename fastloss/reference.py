"""Reference implementations of the losses in plain NumPy, in stable formulas that share nothing with the kernels.

The functions return a value and a slope, which is the derivative by the input, for each element or for a mean. Every operation
makes a temporary array of the input's dtype: pass float64 to check accuracy, and float32 to compare speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def sigmoid(z: Array) -> Array:
    """Return 1 / (1 + exp(-z)), computed without overflow."""
    e = np.exp(-np.abs(z))
    p: Array = np.where(z > 0, 1, e) / (1 + e)
    return p


def binary_cross_entropy_with_logits(z: Array, t: Array, pos_weight: Any = None, label_smoothing: Any = None) -> tuple[Array, Array]:
    """Return the value and the slope of binary cross-entropy with logits for every element."""
    if label_smoothing is not None:
        t = t + label_smoothing * (0.5 - t)
    e = np.exp(-np.abs(z))
    p = np.where(z > 0, 1, e) / (1 + e)
    if pos_weight is None:
        return np.maximum(z, 0) - z * t + np.log1p(e), p - t
    mass = 1 + (pos_weight - 1) * t
    return (1 - t) * z + mass * (np.log1p(e) + np.maximum(-z, 0)), mass * p - pos_weight * t


def mse_loss(z: Array, t: Array) -> tuple[Array, Array]:
    """Return the value and the slope of the squared error for every element."""
    d = z - t
    return d * d, 2 * d


def mse_with_logits_loss(z: Array, t: Array) -> tuple[Array, Array]:
    """Return the value and the slope of the squared error of the sigmoid of logits for every element."""
    e = np.exp(-np.abs(z))
    p, q = np.where(z > 0, 1, e) / (1 + e), np.where(z > 0, e, 1) / (1 + e)
    d = p - t
    return d * d, 2 * d * p * q


def binary_cross_entropy(p: Array, t: Array) -> tuple[Array, Array]:
    """Return the value and the slope of binary cross-entropy for every element, clamped as in PyTorch."""
    with np.errstate(divide="ignore"):
        value = t * np.minimum(-np.log(p), 100) + (1 - t) * np.minimum(-np.log1p(-p), 100)
    return value, (p - t) / np.maximum(p * (1 - p), 1e-12)


def sigmoid_focal_loss(z: Array, t: Array, alpha: float = 0.25, gamma: float = 2.0) -> tuple[Array, Array]:
    """Return the value and the slope of the focal loss with logits for every element."""
    e = np.exp(-np.abs(z))
    p, q = np.where(z > 0, 1, e) / (1 + e), np.where(z > 0, e, 1) / (1 + e)
    cross_entropy = np.maximum(z, 0) - z * t + np.log1p(e)
    missed = t * q + (1 - t) * p
    factor = (alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1) * missed**gamma
    return factor * cross_entropy, factor * (p - t + gamma * cross_entropy * (1 - 2 * t) * p * q / missed)


def l1_loss(z: Array, t: Array) -> tuple[Array, Array]:
    """Return the value and the slope of the absolute error for every element."""
    d = z - t
    return np.abs(d), np.sign(d)


def smooth_l1_loss(z: Array, t: Array, beta: float = 1.0) -> tuple[Array, Array]:
    """Return the value and the slope of the smooth L1 loss for every element."""
    value, slope = huber_loss(z, t, beta)
    return value / beta, slope / beta


def huber_loss(z: Array, t: Array, delta: float = 1.0) -> tuple[Array, Array]:
    """Return the value and the slope of the Huber loss for every element."""
    d = z - t
    size = np.abs(d)
    return np.where(size <= delta, d * d / 2, delta * (size - delta / 2)), np.clip(d, -delta, delta)


def log_cosh_loss(z: Array, t: Array) -> tuple[Array, Array]:
    """Return the value and the slope of log(cosh(z - t)) for every element."""
    d = z - t
    return np.logaddexp(d, -d) - np.log(z.dtype.type(2)), np.tanh(d)


def charbonnier_loss(z: Array, t: Array, eps: float = 1e-3) -> tuple[Array, Array]:
    """Return the value and the slope of sqrt((z - t)**2 + eps**2) for every element."""
    d = z - t
    value = np.hypot(d, z.dtype.type(eps))
    return value, d / value


def binary_entropy(t: Array) -> Array:
    """Return the binary entropy of every target."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(t > 0, t * np.log(t), 0) - np.where(t < 1, (1 - t) * np.log1p(-t), 0)


def value_and_grad(loss: Callable[..., tuple[Array, Array]], z: Array, t: Array, **parameters: Any) -> tuple[Any, Array]:
    """Return the mean of a loss over all elements, or over all entries with several classes, and the gradient of the mean."""
    value, slope = loss(z, t, **parameters)
    return value.mean(dtype=np.float64), slope / value.size


def cross_entropy(z: Array, t: Array, label_smoothing: float = 0.0) -> tuple[Array, Array]:
    """Return the value of cross-entropy for every entry of logits (N, C, ...) or (C,), and the slope for every logit."""
    p, surprise, is_class = _softmax(z, t)
    axis = _class_axis(z)
    cost = np.where(is_class, surprise, 0).sum(axis)
    if not label_smoothing:
        return cost, p - is_class
    share = z.dtype.type(1 - label_smoothing) * is_class + z.dtype.type(label_smoothing / z.shape[axis])
    return (1 - label_smoothing) * cost + label_smoothing * surprise.mean(axis), p - share


def focal_cross_entropy_loss(z: Array, t: Array, gamma: float = 2.0) -> tuple[Array, Array]:
    """Return the value of the focal cross-entropy for every entry of logits (N, C, ...) or (C,), and the slope for every logit."""
    p, surprise, is_class = _softmax(z, t)
    axis = _class_axis(z)
    hit, cost = (np.where(is_class, x, 0).sum(axis, keepdims=True) for x in (p, surprise))
    missed = np.where(is_class, 0, p).sum(axis, keepdims=True)
    factor = missed ** (gamma - 1)
    return np.squeeze(factor * missed * cost, axis), factor * (missed + gamma * hit * cost) * (p - is_class)


def _softmax(z: Array, t: Array) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Return p and -log p of every class, for the softmax p of the logits, and whether the class is that of its entry."""
    axis = _class_axis(z)
    below = z.max(axis, keepdims=True) - z
    p = np.exp(-below)
    total = p.sum(axis, keepdims=True)
    p /= total
    classes = np.arange(z.shape[axis]).reshape([-1 if k == axis else 1 for k in range(z.ndim)])
    return p, np.log(total) + below, classes == np.expand_dims(t, axis)


def _class_axis(z: Array) -> int:
    """Return the axis of classes of logits (N, C, ...) or (C,)."""
    return min(1, z.ndim - 1)


def gaussian_kl_loss(mu: Array, logvar: Array) -> tuple[Array, Array, Array]:
    """Return the value of the divergence from N(0, 1) and its slopes by mu and by logvar, for every element."""
    return (mu * mu + np.expm1(logvar) - logvar) / 2, mu, np.expm1(logvar) / 2


def dice_with_logits_loss(z: Array, t: Array, smooth: float = 1.0) -> tuple[Any, Array]:
    """Return the mean over samples and channels of the Dice loss, and the gradient of the mean."""
    axes = tuple(range(2, z.ndim))
    p = sigmoid(z)
    size = (p + t).sum(axes, keepdims=True) + smooth
    loss = (p * (1 - t) + t * (1 - p)).sum(axes, keepdims=True) / size
    return loss.mean(dtype=np.float64), p * (1 - p) * (1 - loss - 2 * t) / (size * loss.size)


def dice_bce_with_logits_loss(z: Array, t: Array, smooth: float = 1.0) -> tuple[Any, Array]:
    """Return the sum of the mean Dice loss and the mean binary cross-entropy, and the gradient of the sum."""
    parts = dice_with_logits_loss(z, t, smooth), value_and_grad(binary_cross_entropy_with_logits, z, t)
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def dice_softmax_loss(z: Array, t: Array, smooth: float = 1.0) -> tuple[Any, Array]:
    """Return the mean over samples and classes of the Dice loss of logits (N, C, ...), and the gradient of the mean."""
    axes = tuple(range(2, z.ndim))
    p, _, is_class = _softmax(z, t)
    size = (p + is_class).sum(axes, keepdims=True) + smooth
    loss = np.where(is_class, 1 - p, p).sum(axes, keepdims=True) / size
    by_p = np.where(is_class, -1 - loss, 1 - loss) / (size * loss.size)
    return loss.mean(dtype=np.float64), p * (by_p - (p * by_p).sum(1, keepdims=True))


def dice_cross_entropy_loss(z: Array, t: Array, smooth: float = 1.0) -> tuple[Any, Array]:
    """Return the sum of the mean Dice loss and the mean cross-entropy of logits (N, C, ...), and the gradient of the sum."""
    parts = dice_softmax_loss(z, t, smooth), value_and_grad(cross_entropy, z, t)
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def vae_loss(z: Array, t: Array, mu: Array, logvar: Array, beta: float = 1.0) -> tuple[Any, tuple[Array, Array, Array]]:
    """Return the objective of a variational autoencoder as a mean over the batch, and its gradients by z, mu and logvar."""
    value, slope = binary_cross_entropy_with_logits(z, t)
    divergence, by_mu, by_logvar = gaussian_kl_loss(mu, logvar)
    total = value.sum(dtype=np.float64) + beta * divergence.sum(dtype=np.float64)
    return total / len(z), (slope / len(z), by_mu * (beta / len(z)), by_logvar * (beta / len(z)))
