"""The Dice losses and those of classes written with PyTorch's operations, which are used only for second derivatives.

The Hessian of these losses is not diagonal: an element affects the gradient of all others of its region, or of its entry. Ordinary
training does not need second derivatives, so PyTorch's autograd computes them, which allocates temporaries and is less accurate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastloss.core.definition import class_axis


def second_derivatives(
    formula: Callable[..., Any],
    reduction: str,
    options: dict[str, Any],
    wanted: Sequence[str],
    grads: Sequence[Any],
    first: Any,
    second: Any,
    upstream: Any,
) -> Sequence[Any]:
    """Return vector-Jacobian products of the gradients, with respect to both operands and to the upstream gradient.

    `grads` holds the vectors: the upstream gradients of the gradients that `wanted` names.
    """
    with torch.enable_grad():
        z, t, u = (x.detach().requires_grad_(x.is_floating_point()) for x in (first, second, upstream))
        value = formula(z, t, reduction, **options)
        slopes = torch.autograd.grad(value, [t if name == "target_slope" else z for name in wanted], u, create_graph=True)
        by = [x for x in (z, t, u) if x.requires_grad]
        found = iter(torch.autograd.grad(slopes, by, grads, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in (z, t, u)]


def dice_bce(
    z: Any, t: Any, reduction: str, weight: Any = None, mask: Any = None, ignore_index: float | None = None, target_scale: float = 1.0,
    smooth: float = 1.0, per_channel: bool = True, per_sample: bool = True, dice_weight: float = 1.0, bce_weight: float = 0.0,
    validate: bool = False,
) -> Any:  # fmt: skip
    """Compute the weighted sum of Dice loss and BCE, both with the same reduction."""
    counted = torch.ones_like(z, dtype=torch.bool) if mask is None else mask.expand(z.shape)
    counted = counted if ignore_index is None else counted & (t != ignore_index)
    t = t.to(z.dtype) * target_scale if not t.is_floating_point() else t
    p, one = torch.sigmoid(z), torch.ones_like(z) if weight is None else weight.expand(z.shape)

    def sum_groups(x: Any, over_batch: bool) -> Any:
        axes = list(range(2 if per_channel else 1 if per_sample else 0, z.dim())) + [0] * (per_channel and over_batch)
        return torch.where(counted, x, 0.0).sum(axes) if axes else torch.where(counted, x, 0.0)

    def reduced(x: Any, count: Any) -> Any:
        if reduction == "none":
            return x
        x, count = (y.reshape(len(z), -1).sum(1) if reduction.startswith("sample") else y.sum() for y in (x, count))
        return x / count if reduction.endswith("_mean") or reduction == "mean" else x / len(z) if reduction == "batchmean" else x

    missed = sum_groups(one * (t * (1 - p) + (1 - t) * p), not per_sample)
    loss = missed / (missed + 2 * sum_groups(one * p * t, not per_sample) + smooth)
    value = dice_weight * reduced(loss, (sum_groups(torch.ones_like(z), not per_sample) > 0).to(z.dtype))
    if bce_weight:
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none")
        value = value + bce_weight * reduced(sum_groups(one * entropy, False), sum_groups(torch.ones_like(z), False))
    return value


def of_classes(power: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return a loss of class indices, given the factor of -log p as a function of p and the options."""

    def compute(
        z: Any, t: Any, reduction: str, weight: Any = None, mask: Any = None, ignore_index: float = -100, pixel_weight: Any = None,
        label_smoothing: float = 0.0, **options: Any
    ) -> Any:  # fmt: skip
        axis = class_axis(z.dim())
        log_p, classes = torch.log_softmax(z, axis), z.shape[axis]
        w = torch.ones(classes, dtype=z.dtype) if weight is None else weight.to(z.dtype)
        weighted = log_p * w.reshape(-1, *[1] * (z.dim() - 1 - axis))
        if t.is_floating_point():  # probabilities
            value, count = -(t * weighted).sum(axis), torch.ones_like(log_p.select(axis, 0))
            counted = count > 0
        else:
            counted = t != ignore_index
            index = torch.where(counted, t, 0).long()
            own, count = log_p.gather(axis, index.unsqueeze(axis)).squeeze(axis), w[index]
            value = -count * own * power(own.exp(), options)
        counted = counted if mask is None else counted & mask
        if label_smoothing:
            value = (1 - label_smoothing) * value - label_smoothing / classes * weighted.sum(axis)
        value = torch.where(counted, value if pixel_weight is None else pixel_weight * value, 0.0)
        count = torch.where(counted, count, 0.0)
        if reduction == "none":
            return value
        if reduction.startswith("sample"):
            value, count = (x.flatten(1).sum(1) if x.dim() > 1 else x for x in (value, count))
        else:
            value, count = value.sum(), count.sum()
        divisors = {"mean": count, "sample_mean": count, "batchmean": len(z)}
        return value / divisors.get(reduction, 1)

    return compute


FORMULAS = {
    "cross_entropy": of_classes(lambda p, options: 1.0),
    "focal_cross_entropy_loss": of_classes(lambda p, options: (1 - p) ** options.get("gamma", 2.0)),
    "dice_with_logits_loss": dice_bce,
    "dice_bce_with_logits_loss": dice_bce,
}  # by the loss's key
