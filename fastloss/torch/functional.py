"""The losses that PyTorch has, with its signatures, results and kinds of error; further options of fastloss go by name.

Where PyTorch and fastloss differ, these do as PyTorch does: `mse_loss` and `l1_loss` divide a weighted mean by the sum of
the weights, losses of a difference broadcast a target with a warning, `binary_cross_entropy` looks at every element, and
what PyTorch's kernels refuse is a `RuntimeError`. The slope by the target is there too; that by a weight is not. Of
operands with different dtypes the value has the input's.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

import fastloss
from fastloss.core.checks import REDUCTIONS, caller_level, check_reduction, check_shapes, to_float


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", pos_weight: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.binary_cross_entropy_with_logits`, by `fastloss.binary_cross_entropy_with_logits`.

    Options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`, `label_smoothing`, `validate`; see `fastloss.Loss`.
    """
    check_shapes("input", input.shape, "target", target.shape)
    reduction = chosen(reduction, size_average, reduce)
    return compute(fastloss.binary_cross_entropy_with_logits, input, target, weight, reduction, pos_weight=pos_weight, **options)


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", **options: Any
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.binary_cross_entropy`, by `fastloss.binary_cross_entropy`; elements outside [0, 1] are an error.

    Options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`, `validate`; see `fastloss.Loss`.
    """
    check_shapes("input", input.shape, "target", target.shape)
    reduction = chosen(reduction, size_average, reduce)
    return compute(fastloss.binary_cross_entropy, input, target, weight, reduction, **{"validate": True, **options})


def mse_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.mse_loss`, by `fastloss.mse_loss`.

    Options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`; see `fastloss.Loss`.
    """
    return over_weights(fastloss.mse_loss, input, target, weight, chosen(reduction, size_average, reduce), options)


def l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.l1_loss`, by `fastloss.l1_loss`.

    Options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`; see `fastloss.Loss`.
    """
    return over_weights(fastloss.l1_loss, input, target, weight, chosen(reduction, size_average, reduce), options)


def smooth_l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    beta: float = 1.0, **options: Any
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.smooth_l1_loss`, by `fastloss.smooth_l1_loss`.

    Options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`; see `fastloss.Loss`.
    """
    return compute(
        fastloss.smooth_l1_loss,
        *broadcast(input, target),
        None,
        chosen(reduction, size_average, reduce),
        beta=to_float("beta", beta),
        **options,
    )


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """`torch.nn.functional.huber_loss`, by `fastloss.huber_loss`.

    Options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`; see `fastloss.Loss`.
    """
    check_weight(input, weight)
    return compute(fastloss.huber_loss, *broadcast(input, target), weight, chosen(reduction), delta=to_float("delta", delta), **options)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none", **options: Any
) -> Tensor:
    """`torchvision.ops.sigmoid_focal_loss`, by `fastloss.sigmoid_focal_loss`.

    Options: `inplace_grad`, `weight`, `mask`, `ignore_index`, `target_scale`, `validate`; see `fastloss.Loss`.
    """
    check_shapes("input", inputs.shape, "target", targets.shape)
    weight = options.pop("weight", None)
    return compute(fastloss.sigmoid_focal_loss, inputs, targets, weight, chosen(reduction), alpha=alpha, gamma=gamma, **options)


def compute(loss: Any, input: Tensor, target: Tensor, weight: Any, reduction: str, **options: Any) -> Tensor:
    """Call a loss; what it refuses is refused as PyTorch's kernels do, by a RuntimeError."""
    if isinstance(input, Tensor) and (input.layout is not torch.strided or not (input.is_floating_point() or input.is_complex())):
        raise NotImplementedError(
            f"input has dtype {input.dtype} and layout {input.layout}; accepted: floating-point numbers, torch.strided"
        )
    try:
        return loss(input, target, weight, reduction, **options)
    except ValueError as error:
        raise RuntimeError(str(error)) from error


def over_weights(loss: Any, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, options: dict[str, Any]) -> Tensor:
    """Call a loss whose weighted mean is divided by the sum of the weights."""
    check_weight(input, weight)
    z, t = broadcast(input, target)
    if weight is None or reduction != "mean":
        return compute(loss, z, t, weight, reduction, **options)
    if excluding := {name for name in ("mask", "ignore_index") if options.get(name) is not None}:
        raise TypeError(f"a mean divided by the sum of the weights takes no {', '.join(sorted(excluding))}; use fastloss.{loss.__name__}")
    return compute(loss, z, t, weight, "sum", **options) / weight.sum()


def chosen(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> str:
    """Return the reduction, also where it is given as PyTorch 0.4 had it."""
    if size_average is not None or reduce is not None:
        return str(_reduction.legacy_get_string(size_average, reduce))
    check_reduction(reduction, REDUCTIONS)
    return reduction


def check_weight(input: Tensor, weight: Tensor | None) -> None:
    """Refuse a weight that PyTorch refuses with a ValueError."""
    if weight is not None:
        check_shapes("input", input.shape, "weight", weight.shape)


def broadcast(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one shape; with a warning, as PyTorch does, because it is rarely meant."""
    if input.shape == target.shape:
        return input, target
    if torch.compiler.is_compiling():  # where PyTorch does not warn either
        return torch.broadcast_tensors(input, target)
    warnings.warn(
        f"input has shape {tuple(input.shape)} and target {tuple(target.shape)}; they are broadcast, which is rarely what is meant: "
        "give them the same shape",
        stacklevel=caller_level(),
    )
    expanded: tuple[Tensor, Tensor] = torch.broadcast_tensors(input, target)
    return expanded
