"""PyTorch's loss functions, with its signatures, results and types of error. Further options of fastloss are passed by name.

Where `fastloss` and PyTorch differ, these functions follow PyTorch: `mse_loss` and `l1_loss` divide a weighted mean by the sum of
the weights, regression losses broadcast a target with a warning, `binary_cross_entropy` checks every element, and arguments that
PyTorch's kernels refuse raise a `RuntimeError`. Input and target have gradients, weights have none. If the dtypes of the operands
differ, the value has the dtype of the input.

Small batches of regression losses with reduction "none" are left to PyTorch's kernels, which take less time; see `is_left_to_torch`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

import fastloss
from fastloss.core.checks import REDUCTIONS, caller_level, check_reduction, check_shapes, to_float

NONE = _reduction.get_enum("none")
# bytes of the input below which PyTorch takes less time with reduction "none"; its L1 loss is two operators
LEFT_BELOW = {"mse_loss": 8 << 20, "smooth_l1_loss": 8 << 20, "huber_loss": 8 << 20, "l1_loss": 1 << 20}


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", pos_weight: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.binary_cross_entropy_with_logits` with `fastloss.binary_cross_entropy_with_logits`.

    Further options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`, `label_smoothing`, `validate`. See `fastloss.Loss`.
    """
    check_shapes("input", input.shape, "target", target.shape)
    reduction = resolve_reduction(reduction, size_average, reduce)
    return compute(fastloss.binary_cross_entropy_with_logits, input, target, weight, reduction, pos_weight=pos_weight, **options)


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean", **options: Any
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.binary_cross_entropy` with `fastloss.binary_cross_entropy`.

    Elements outside [0, 1] raise a `RuntimeError`.

    Further options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`, `validate`. See `fastloss.Loss`.
    """
    check_shapes("input", input.shape, "target", target.shape)
    reduction = resolve_reduction(reduction, size_average, reduce)
    return compute(fastloss.binary_cross_entropy, input, target, weight, reduction, **{"validate": True, **options})


def mse_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.mse_loss` with `fastloss.mse_loss`.

    Further options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`. See `fastloss.Loss`.
    """
    return compute_weighted_mean("mse_loss", input, target, weight, resolve_reduction(reduction, size_average, reduce), options)


def l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    weight: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.l1_loss` with `fastloss.l1_loss`.

    Further options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`. See `fastloss.Loss`.
    """
    return compute_weighted_mean("l1_loss", input, target, weight, resolve_reduction(reduction, size_average, reduce), options)


def smooth_l1_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
    beta: float = 1.0, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.smooth_l1_loss` with `fastloss.smooth_l1_loss`.

    Further options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`. See `fastloss.Loss`.
    """
    return compute_regression("smooth_l1_loss", input, target, None, resolve_reduction(reduction, size_average, reduce), options, beta=beta)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """Compute `torch.nn.functional.huber_loss` with `fastloss.huber_loss`.

    Further options: `inplace_grad`, `mask`, `ignore_index`, `target_scale`. See `fastloss.Loss`.
    """
    return compute_regression("huber_loss", input, target, weight, resolve_reduction(reduction), options, delta=delta)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none", **options: Any
) -> Tensor:
    """Compute `torchvision.ops.sigmoid_focal_loss` with `fastloss.sigmoid_focal_loss`.

    Further options: `inplace_grad`, `weight`, `mask`, `ignore_index`, `target_scale`, `validate`. See `fastloss.Loss`.
    """
    check_shapes("input", inputs.shape, "target", targets.shape)
    weight = options.pop("weight", None)
    return compute(fastloss.sigmoid_focal_loss, inputs, targets, weight, resolve_reduction(reduction), alpha=alpha, gamma=gamma, **options)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.cross_entropy` with `fastloss.cross_entropy`. Probabilities that require a gradient are left to PyTorch.

    Further options: `inplace_grad`, `mask`, `pixel_weight`. See `fastloss.cross_entropy`.
    """
    reduction = resolve_reduction(reduction, size_average, reduce)
    if isinstance(target, Tensor) and target.requires_grad and not options:
        return torch.nn.functional.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    smoothing = {"label_smoothing": label_smoothing} if label_smoothing else {}
    return compute(fastloss.cross_entropy, input, target, weight, reduction, ignore_index=ignore_index, **smoothing, **options)


def linear_binary_cross_entropy_with_logits(
    input: Tensor, linear_weight: Tensor, target: Any, *, linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: str = "mean", pos_weight: Tensor | float | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `binary_cross_entropy_with_logits` of a linear layer with `fastloss.linear`, so that the logits never exist as a whole.

    `input` has the shape (N, K, ...), `linear_weight` (P, K), `linear_bias` (P,) and `target` (N, P, ...); a target (N, P) may be sparse.

    Further options: `mask`, `ignore_index`, `target_scale`, `label_smoothing`, `validate`. See `fastloss.Loss`.
    """
    made = fastloss.linear(fastloss.binary_cross_entropy_with_logits)
    return made(input, linear_weight, target, linear_bias, weight, reduction, pos_weight=pos_weight, **options)


def linear_sigmoid_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Any, *, linear_bias: Tensor | None = None, alpha: float = 0.25, gamma: float = 2,
    reduction: str = "mean", **options: Any
) -> Tensor:  # fmt: skip
    """Compute `sigmoid_focal_loss` of a linear layer with `fastloss.linear`; see `linear_binary_cross_entropy_with_logits`.

    Further options: `weight`, `mask`, `ignore_index`, `target_scale`, `validate`. See `fastloss.Loss`.
    """
    weight, made = options.pop("weight", None), fastloss.linear(fastloss.sigmoid_focal_loss)
    return made(input, linear_weight, target, linear_bias, weight, reduction, alpha=alpha, gamma=gamma, **options)


def linear_mse_loss(
    input: Tensor, linear_weight: Tensor, target: Any, *, linear_bias: Tensor | None = None, reduction: str = "mean",
    weight: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `mse_loss` of a linear layer with `fastloss.linear`; see `linear_binary_cross_entropy_with_logits`.

    As in `mse_loss`, a weighted mean is divided by the sum of the weights, which have the shape of the target.

    Further options: `mask`, `ignore_index`, `target_scale`. See `fastloss.Loss`.
    """
    made, total = fastloss.linear(fastloss.mse_loss), None
    if weight is not None:
        check_shapes("target", target.shape, "weight", weight.shape)
        if reduction == "mean":
            refuse_excluding(options, "mse_loss")
            reduction, total = "sum", weight.sum()
    value: Tensor = made(input, linear_weight, target, linear_bias, weight, reduction, **options)
    return value if total is None else value / total


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, weight: Tensor | None = None,
    reduction: str = "mean", ignore_index: int | None = None, label_smoothing: float = 0.0, **options: Any
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.linear_cross_entropy` with `fastloss.linear`; see `linear_binary_cross_entropy_with_logits`.

    `target` has the shape (N, ...) of class indices, or (N, P, ...) of probabilities.

    Further options: `mask`, `pixel_weight`. See `fastloss.cross_entropy`.
    """
    made, ignored = fastloss.linear(fastloss.cross_entropy), -100 if ignore_index is None else ignore_index
    return made(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index=ignored, label_smoothing=label_smoothing, **options
    )


def given(name: str, number: Any, default: float) -> dict[str, float]:
    """Return a number as an option of fastloss. The default is left out, which saves microseconds; in compiled code it may change."""
    if type(number) is float and not torch.compiler.is_compiling() and number == default:
        return {}
    return {name: to_float(name, number)}


def compute(loss: Any, input: Tensor, target: Tensor, weight: Any, reduction: str, **options: Any) -> Tensor:
    """Call a loss, and turn its ValueError into the RuntimeError that PyTorch's kernels raise."""
    try:
        return loss(input, target, weight, reduction, **options)
    except ValueError as error:
        raise RuntimeError(str(error)) from error
    except TypeError as error:
        if isinstance(input, Tensor) and (input.layout is not torch.strided or not (input.is_floating_point() or input.is_complex())):
            raise NotImplementedError(
                f"input has dtype {input.dtype} and layout {input.layout}; accepted: a floating-point dtype and layout torch.strided"
            ) from error
        raise


def compute_regression(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, options: dict[str, Any], **parameters: float
) -> Tensor:
    """Compute a regression loss, or leave it to PyTorch's kernel of the same name, whose slope at 0 is -1 if beta is 0."""
    if weight is not None:
        check_shapes("input", input.shape, "weight", weight.shape)
    z, t = broadcast_operands(input, target)
    is_plain = reduction == "none" and weight is None and not options and all(parameters.values())
    if is_plain and is_left_to_torch(z, t, LEFT_BELOW[name]):
        value: Tensor = getattr(torch._C._nn, name)(z, t, NONE, *parameters.values())
        return value
    for parameter, number in parameters.items():
        options.update(given(parameter, number, 1.0))  # PyTorch 2.6 does not compile `|=`
    return compute(getattr(fastloss, name), z, t, weight, reduction, **options)


def is_left_to_torch(input: Tensor, target: Tensor, below: int) -> bool:
    """Whether PyTorch takes less time to compute the value of every element of two operands.

    Each regression loss is one pass over memory there too, and the autograd function is not in Python. In 16 bits PyTorch rounds more
    than once, so fastloss computes them. A compiler fuses PyTorch's operators with their neighbours, so it gets those of any size.
    """
    dtype = input.dtype
    if not (input.is_cpu and target.is_cpu and dtype is target.dtype and (dtype is torch.float32 or dtype is torch.float64)):
        return False
    return torch.compiler.is_compiling() or input.numel() * input.element_size() < below


def compute_weighted_mean(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, options: dict[str, Any]
) -> Tensor:
    """Compute a regression loss, and divide a weighted mean by the sum of the weights, as PyTorch does."""
    if weight is None or reduction != "mean":
        return compute_regression(name, input, target, weight, reduction, options)
    refuse_excluding(options, name)
    total = weight.sum()
    if (group := options.get("process_group")) is not None:
        from fastloss.backends.torch.ranks import add_over_processes

        add_over_processes(total, group)
    return compute_regression(name, input, target, weight, "sum", options) / total


def refuse_excluding(options: dict[str, Any], name: str) -> None:
    """Raise TypeError for options that exclude elements from a mean that is divided by the sum of its weights."""
    if excluding := {option for option in ("mask", "ignore_index") if options.get(option) is not None}:
        raise TypeError(f"{' and '.join(sorted(excluding))} cannot be combined with a weighted mean here; use fastloss.{name}")


def resolve_reduction(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> str:
    """Return the reduction, also if it is given by the deprecated arguments `size_average` and `reduce`."""
    if size_average is None and reduce is None and (reduction == "mean" or reduction == "sum" or reduction == "none"):
        return reduction
    if size_average is not None or reduce is not None:
        return str(_reduction.legacy_get_string(size_average, reduce))
    check_reduction(reduction, REDUCTIONS)
    return reduction


def broadcast_operands(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast input and target to one shape. Warn if their shapes differ, as PyTorch does."""
    if input.shape == target.shape:
        return input, target
    if torch.compiler.is_compiling():  # PyTorch does not warn during compilation
        return torch.broadcast_tensors(input, target)
    warnings.warn(
        f"input has shape {tuple(input.shape)} and target {tuple(target.shape)}; they are broadcast against each other, which is often "
        "a mistake: give them the same shape",
        stacklevel=caller_level(),
    )
    expanded: tuple[Tensor, Tensor] = torch.broadcast_tensors(input, target)
    return expanded
