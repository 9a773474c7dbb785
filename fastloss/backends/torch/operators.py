"""The operators `fastloss::loss` and `fastloss::derivatives`: what PyTorch's compilers see of the losses.

They are opaque to it, but for the shapes of what they return and for their derivatives. One pair serves every loss, also one
of the user's: the first argument is its key in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.backends.torch import double_backward
from fastloss.backends.torch.bound import Bound
from fastloss.backends.torch.memory_views import to_array, to_tensor
from fastloss.core.abstract_loss import LOSSES, AbstractLoss
from fastloss.core.checks import check_shapes, refuse_unknown
from fastloss.core.definition import operand_of

CALL = "str loss, str reduction, Tensor first, Tensor second, Tensor[] others, str[] names, float[] numbers"
FLAGS = ("validate", "per_channel", "per_sample")  # options that are no numbers
# what the gradient of a slope is, by the first operand and by the second
SECOND = {"slope": ("curvature", "cross_curvature"), "target_slope": ("cross_curvature", "target_curvature")}

LIBRARY = torch.library.Library("fastloss", "DEF")
# the memory that streams of a GPU keep does not belong to a graph, as `mode="reduce-overhead"` asks of all there is
TAGS = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch._C.Tag, name, None)) is not None]
LIBRARY.define(f"loss({CALL}, ScalarType dtype) -> Tensor", tags=TAGS)
LIBRARY.define(f"derivatives({CALL}, str[] wanted, Tensor? upstream) -> Tensor[]", tags=TAGS)


def arguments(bound: Bound, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Return a call as the operators take it."""
    first, second, *others = tensors
    names = [*bound.names, *bound.settings]
    return bound.loss.key, bound.reduction, first, second, others, names, [float(x) for x in bound.settings.values()]


def value(bound: Bound, tensors: Sequence[Any]) -> Any:
    """Return the value, differentiable."""
    return torch.ops.fastloss.loss(*arguments(bound, tensors), bound.dtype)


def derivatives(bound: Bound, wanted: Sequence[str], upstream: Any, tensors: Sequence[Any]) -> list[Any]:
    """Return slopes or curvatures; slopes are differentiable."""
    grads: list[Any] = torch.ops.fastloss.derivatives(*arguments(bound, tensors), list(wanted), upstream)
    return grads


def evaluate(
    bound: Bound, summed: Sequence[str], wanted: Sequence[str], tensors: Sequence[Any], special: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """Return the reduced value, if it is summed, and what is wanted, without autograd."""
    if "out" in special:
        raise NotImplementedError("out is not for compiled code, which plans its memory itself; leave it out")
    upstream = special.get("grad_output")
    tensors = [x.detach() for x in tensors]
    if upstream is not None and not isinstance(upstream, Tensor):
        upstream = torch.scalar_tensor(upstream, dtype=torch.float64, device=tensors[0].device)
    upstream = None if upstream is None else upstream.detach()
    slopes = [name for name in wanted if name != "value"]
    whole = value(bound, tensors) if summed or "value" in wanted else None
    computed = derivatives(bound, slopes, upstream, tensors)
    return (whole, computed) if summed else (None, [*computed, *([whole] if "value" in wanted else [])])


def bind(loss: str, reduction: str, others: Sequence[Any], names: Sequence[str], numbers: Sequence[float], dtype: torch.dtype) -> Bound:
    """Return the call that an operator's arguments are."""
    options = zip(names[len(others) :], numbers, strict=True)
    settings = {name: bool(x) if name in FLAGS else x for name, x in options}
    return Bound(LOSSES[loss], reduction, tuple(names[: len(others)]), settings, dtype)


@torch.library.impl(LIBRARY, "loss", "CUDA")
@torch.library.impl(LIBRARY, "loss", "CPU")
def _loss(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], dtype: torch.dtype
) -> Any:
    bound = bind(loss, reduction, others, names, numbers, dtype)
    computed = bound.value([first, second, *others])
    return as_declared(computed, first) if bound.loss.writes_value(reduction) else computed


@torch.library.register_fake("fastloss::loss", lib=LIBRARY)
def _(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], dtype: torch.dtype
) -> Any:
    known = bind(loss, reduction, others, names, numbers, dtype)
    check(known.loss, first, second, names)
    if known.loss.writes_value(reduction):
        return torch.empty_like(first)
    return first.new_empty(known.loss.value_shape(first.shape, reduction, known.settings), dtype=dtype)


@torch.library.impl(LIBRARY, "derivatives", "CUDA")
@torch.library.impl(LIBRARY, "derivatives", "CPU")
def _derivatives(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], wanted: list[str],
    upstream: Any
) -> list[Any]:  # fmt: skip
    bound = bind(loss, reduction, others, names, numbers, first.dtype)
    options = {} if upstream is None else {"grad_output": to_array(upstream)}
    computed = bound.compute((), tuple(wanted), [first, second, *others], **options)[1]
    return [as_declared(to_tensor(x), operand_like(name, first, second)) for name, x in zip(wanted, computed, strict=True)]


@torch.library.register_fake("fastloss::derivatives", lib=LIBRARY)
def _(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], wanted: list[str],
    upstream: Any
) -> list[Any]:  # fmt: skip
    check(LOSSES[loss], first, second, names)
    return [torch.empty_like(operand_like(name, first, second)) for name in wanted]


def check(loss: AbstractLoss, first: Any, second: Any, names: Sequence[str]) -> None:
    """Refuse while compiling what the kernels would refuse while running."""
    check_shapes(loss.operands[0], first.shape, loss.operands[1], second.shape)
    refuse_unknown(dict.fromkeys(names), loss.options)


def operand_like(output: str, first: Any, second: Any) -> Any:
    """Return the operand whose shape and dtype an output has."""
    return second if operand_of(output) == "target" else first


def as_declared(computed: Any, operand: Any) -> Any:
    """Return a tensor with the strides that the compiler was told: those that PyTorch gives to what is like an operand."""
    strides = torch.empty_like(operand, device="meta").stride()
    return computed if computed.stride() == strides else torch.empty_like(operand).copy_(computed)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep what the derivative needs: the tensors, and everything else."""
    loss, reduction, first, second, others, names, numbers, *rest = inputs
    ctx.call, ctx.rest = (loss, reduction, names, numbers), rest[:1]
    upstream = rest[1] if len(rest) > 1 else None
    ctx.save_for_backward(first, second, upstream, *others)


def differentiate_loss(ctx: Any, upstream: Any) -> tuple[Any, ...]:
    """Return the slopes by the operands."""
    first, second, _, *others = ctx.saved_tensors
    loss, reduction, names, numbers = ctx.call
    wanted = [name for name, needed in zip(SECOND, ctx.needs_input_grad[2:4], strict=True) if needed]
    if "target_slope" in wanted:
        LOSSES[loss].require("target_slope")
    computed = torch.ops.fastloss.derivatives(loss, reduction, first, second, others, names, numbers, wanted, upstream)
    slopes = dict(zip(wanted, computed, strict=True))
    return None, None, *map(slopes.get, SECOND), *nothing(others, names, numbers), None


def differentiate_slopes(ctx: Any, grads: list[Any]) -> tuple[Any, ...]:
    """Return the second derivatives by the operands and by what comes down the chain, each times the gradients of the slopes."""
    first, second, upstream, *others = ctx.saved_tensors
    (wanted,), (loss, reduction, names, numbers) = ctx.rest, ctx.call
    if not SECOND.keys() >= set(wanted):
        raise NotImplementedError("a loss has no third derivative")
    if (formula := double_backward.FORMULAS.get(loss)) is not None:
        known = bind(loss, reduction, others, names, numbers, first.dtype)
        settings = {**LOSSES[loss].settings, **known.settings, **dict(zip(known.names, others, strict=True))}
        by = double_backward.second_derivatives(formula, reduction, settings, wanted, grads, first, second, upstream)
    else:
        by = diagonal(ctx, wanted, grads, first, second, upstream, others)
    return None, None, by[0], by[1], *nothing(others, names, numbers, wanted), by[2]


def nothing(others: Sequence[Any], *lists: Sequence[Any]) -> list[Any]:
    """Return that there is no gradient towards arguments that are lists: a list for tensors, and for what PyTorch takes for some."""
    return [[None] * len(others), *(None if x else [] for x in lists)]


def diagonal(ctx: Any, wanted: list[str], grads: list[Any], first: Any, second: Any, upstream: Any, others: list[Any]) -> Sequence[Any]:
    """Do so for a sum over elements, whose second derivative is a diagonal."""
    loss, reduction, names, numbers = ctx.call

    def of(quantity: str, multiplied: Any) -> Any:
        LOSSES[loss].require(quantity)
        (computed,) = torch.ops.fastloss.derivatives(loss, reduction, first, second, others, names, numbers, [quantity], multiplied)
        return computed

    pairs = [(name, grad) for name, grad in zip(wanted, grads, strict=True) if grad is not None]
    by: list[Any] = [None, None, None]
    for k in range(2):
        if ctx.needs_input_grad[2 + k]:
            by[k] = sum(grad * of(SECOND[name][k], upstream) for name, grad in pairs)
    if ctx.needs_input_grad[8]:
        every = sum(grad * of(name, torch.ones_like(upstream)) for name, grad in pairs)
        by[2] = every if every.shape == upstream.shape else every.reshape(*upstream.shape, -1).sum(-1)
    return by


torch.library.register_autograd("fastloss::loss", differentiate_loss, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd("fastloss::derivatives", differentiate_slopes, setup_context=keep, lib=LIBRARY)
