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
    per_channel: bool = True, per_sample: bool = True, dice_weight: float = 1.0, bce_weight: float = 0.0, validate: bool = False,
    **settings: Any
) -> Any:  # fmt: skip
    """Compute the weighted sum of Dice loss and BCE, both with the same reduction."""
    counted = torch.ones_like(z, dtype=torch.bool) if mask is None else mask.expand(z.shape)
    counted = counted if ignore_index is None else counted & (t != ignore_index)
    t = t.to(z.dtype) * target_scale if not t.is_floating_point() else t
    p, one = torch.sigmoid(z), torch.ones_like(z) if weight is None else weight.expand(z.shape)

    def sum_groups(x: Any, over_batch: bool) -> Any:
        axes = list(range(2 if per_channel else 1 if per_sample else 0, z.dim())) + [0] * (per_channel and over_batch)
        return torch.where(counted, x, 0.0).sum(axes) if axes else torch.where(counted, x, 0.0)

    parts = [sum_groups(one * x, not per_sample) for x in (p * t, (1 - t) * p, t * (1 - p))]
    is_present = (sum_groups(torch.ones_like(z), not per_sample) > 0).to(z.dtype)
    value = dice_weight * reduced(region_loss(*parts, **settings), is_present, reduction, len(z))
    if bce_weight:
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction="none")
        sums = sum_groups(one * entropy, False), sum_groups(torch.ones_like(z), False)
        value = value + bce_weight * reduced(*sums, reduction, len(z))
    return value


def region_loss(
    overlap: Any, false_positives: Any, false_negatives: Any, smooth: float = 1.0, smooth_denominator: float | None = None,
    alpha: float = 0.5, beta: float = 0.5
) -> Any:  # fmt: skip
    """Return the loss of each region, given its sums."""
    missed, more = 2 * alpha * false_positives + 2 * beta * false_negatives, smooth if smooth_denominator is None else smooth_denominator
    return (missed + (more - smooth)) / (missed + 2 * overlap + more)


def reduced(x: Any, count: Any, reduction: str, samples: int) -> Any:
    """Reduce an array of values, whose mean divides by the sum of `count`."""
    if reduction == "none":
        return x
    x, count = (y.reshape(len(y), -1).sum(1) if reduction.startswith("sample") else y.sum() for y in (x, count))
    return x / count if reduction.endswith("mean") and reduction != "batchmean" else x / samples if reduction == "batchmean" else x


def dice_of_classes(
    z: Any, t: Any, reduction: str, weight: Any = None, mask: Any = None, ignore_index: float = -100, pixel_weight: Any = None,
    per_channel: bool = True, per_sample: bool = True, background: bool = True, squared: bool = False, zero_absent: bool = False,
    dice_weight: float = 1.0, ce_weight: float = 0.0, **settings: Any
) -> Any:  # fmt: skip
    """Compute the weighted sum of the Dice loss of class indices and cross-entropy, both with the same reduction."""
    counted = t != ignore_index if mask is None else (t != ignore_index) & mask
    p, index = torch.softmax(z, 1), torch.where(counted, t, 0).long()
    own = torch.nn.functional.one_hot(index, z.shape[1]).movedim(-1, 1).to(z.dtype)
    one = counted.to(z.dtype) if pixel_weight is None else torch.where(counted, pixel_weight, 0.0).to(z.dtype)

    def regions(x: Any) -> Any:
        x = x.reshape(*z.shape[:2], -1).sum(2)
        x = x if per_channel else x[:, 0 if background else 1 :].sum(1)
        return x if per_sample else x.sum(0)

    power = 2 if squared else 1
    parts = [regions(one.unsqueeze(1) * x) for x in (p * own, (1 - own) * p**power, own * (1 - p) ** power)]
    loss, truth = region_loss(*parts, **settings), regions(counted.unsqueeze(1) * own)
    is_present = regions(counted.unsqueeze(1).expand(z.shape)) > 0
    if per_channel and not background:
        is_present = is_present & (torch.arange(z.shape[1], device=z.device) > 0)
    loss = torch.where(is_present & (truth > 0) if zero_absent else is_present, loss if weight is None else loss * weight, 0.0)
    value = dice_weight * reduced(loss, is_present.to(z.dtype), reduction, len(z))
    if ce_weight:
        value = value + ce_weight * of_classes(lambda p, options: 1.0)(z, t, reduction, weight, mask, ignore_index, pixel_weight)
    return value


def of_classes(power: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return a loss of class indices, given the factor of -log p as a function of p and the options."""

    def compute(
        z: Any, t: Any, reduction: str, weight: Any = None, mask: Any = None, ignore_index: float = -100, pixel_weight: Any = None,
        label_smoothing: float = 0.0, **options: Any
    ) -> Any:  # fmt: skip
        axis = class_axis(z.dim())
        log_p, classes = torch.log_softmax(z, axis), z.shape[axis]
        w = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
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
        return reduced(value, count, reduction, len(z))

    return compute


FORMULAS: dict[str, Callable[..., Any]] = {
    "cross_entropy": of_classes(lambda p, options: 1.0),
    "focal_cross_entropy_loss": of_classes(lambda p, options: (1 - p) ** options.get("gamma", 2.0)),
    "dice_with_logits_loss": dice_bce,
    "dice_bce_with_logits_loss": dice_bce,
    "dice_softmax_loss": dice_of_classes,
    "dice_cross_entropy_loss": dice_of_classes,
}  # by the loss's key
