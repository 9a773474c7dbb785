"""The autograd function of a loss. It computes on the memory of tensors and saves what the backward pass needs.

Fake tensors, as under torch.compile, and second derivatives go through the operators of `operators.py`, which take longer to call.
`slope` and `target_slope` are the gradients with respect to the first operand and to the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import is_grad_enabled
from torch.autograd.graph import increment_version

from fastloss.backends.torch import operators
from fastloss.backends.torch.bound_loss import VALUE, BoundLoss
from fastloss.backends.torch.memory_views import is_on_gpu, to_array
from fastloss.backends.torch.operators import append_axes
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.checks import WRITTEN

has_storage: Callable[[Any], bool] = torch._C._has_storage
# the gradients to compute, by whether the first operand and the second require one
NONES = (None,) * 64  # the gradients of tensors that are options
WANTED = {(True, False): ("slope",), (False, True): ("target_slope",), (True, True): ("slope", "target_slope"), (False, False): ()}


class LossFunction(torch.autograd.Function):
    """The value of a loss, with gradients that are computed in the forward pass where possible, and else in the backward pass.

    Of the time for forward and backward of 1,024 elements, a function in Python that computes nothing takes more than half.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[BoundLoss, Mapping[str, Any], bool], *tensors: Any) -> Any:
        """Compute the value and, where `BoundLoss.has_early_slopes` allows it, the gradients in the same pass over memory."""
        bound, settings, inplace_grad = call
        needs = ctx.needs_input_grad
        wanted = WANTED[needs[1:3]]
        if inplace_grad and needs[1]:
            return LossFunction.forward_in_place(ctx, bound, settings, wanted, tensors)
        if not bound.has_early_slopes:
            ctx.call = bound, settings, wanted, 0, 1.0, False
            ctx.save_for_backward(*tensors)
            return bound.value(tensors, settings)
        unit = 1.0 if bound.saves_operands else bound.unit(tensors)
        value, slopes = bound.value_and_slopes(wanted, tensors, settings, unit)
        ctx.call = bound, settings, wanted, len(wanted), unit, False
        if bound.saves_operands:
            ctx.save_for_backward(*slopes, *tensors)
        else:
            ctx.save_for_backward(*slopes)
            ctx.operands, ctx.versions = tensors, [version_of(x) for x in tensors]
        return value

    @staticmethod
    def forward_in_place(ctx: Any, bound: BoundLoss, settings: Mapping[str, Any], wanted: tuple[str, ...], tensors: Sequence[Any]) -> Any:
        """Compute the value, and let the gradient overwrite the input: now or, where it is computed later, in the backward pass."""
        early = bound.has_early_slopes and bound.saves_operands
        ctx.call = bound, settings, wanted, int(early), 1.0, True
        if not early:
            ctx.save_for_backward(*tensors)
            return bound.value(tensors, settings)
        try:
            value, _ = bound.compute(VALUE, wanted, tensors, settings, out=to_array(tensors[0]))
        except ValueError as error:
            if str(error).endswith(WRITTEN):
                increment_version(tensors[0])
            raise
        increment_version(tensors[0])
        # saved under the input's version counter, so that autograd raises if the gradient is overwritten before the backward pass
        ctx.save_for_backward(tensors[0].detach(), None, *tensors[1:])
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the gradients, multiplied by the upstream gradient."""
        _, _, wanted, early, unit, _ = ctx.call
        saved = ctx.saved_tensors  # read once, because under checkpointing each read recomputes the tensors
        if is_grad_enabled():  # the gradient will be differentiated again (`create_graph=True`)
            grads = differentiable_slopes(ctx, upstream, saved[early:])
        elif not early:
            grads = late_slopes(ctx, upstream, saved)
        elif has_storage(upstream):
            grads = (
                [times_upstream(slope, upstream, unit) for slope in saved[:early]]
                if early > 1
                else [times_upstream(saved[0], upstream, unit)]
            )
        else:  # a batch of upstream gradients (`is_grads_batched=True`)
            grads = [slope * append_axes(upstream / unit, slope) for slope in saved[:early]]
        return by_argument(ctx, wanted, grads)


def by_argument(ctx: Any, wanted: tuple[str, ...], grads: Sequence[Any]) -> tuple[Any, ...]:
    """Return a gradient or None for each argument of `forward`: the call, the two operands, and the options."""
    by_first = grads[0] if "slope" in wanted else None
    by_second = grads[-1] if "target_slope" in wanted else None
    return None, by_first, by_second, *NONES[: len(ctx.needs_input_grad) - 3]


def differentiable_slopes(ctx: Any, upstream: Any, tensors: Sequence[Any]) -> list[Any]:
    """Compute gradients by an operator that autograd can differentiate."""
    bound, settings, wanted, _, _, overwrites = ctx.call
    if overwrites:
        raise RuntimeError("inplace_grad=True has overwritten the input, which second derivatives need; pass inplace_grad=False")
    if not bound.saves_operands:
        tensors = ctx.operands
        if ctx.versions != [version_of(x) for x in tensors]:
            raise RuntimeError("an operand has been modified in place since the loss was computed, and create_graph=True computes it again")
    return operators.derivatives(bound, settings, wanted, upstream, tensors)


def late_slopes(ctx: Any, upstream: Any, tensors: Sequence[Any]) -> list[Any]:
    """Compute gradients in the backward pass."""
    bound, settings, wanted, _, _, overwrites = ctx.call
    if not has_storage(upstream):  # a batch of upstream gradients
        if bound.has_axes_of_its_own:
            raise NotImplementedError(
                f"{bound.loss.__name__} with reduction 'none' accepts no batch of upstream gradients (is_grads_batched=True); "
                "pass them one by one"
            )
        slopes = bound.slopes(wanted, tensors, settings, None)
        return [slope * append_axes(upstream, slope) for slope in slopes]
    if not overwrites:
        return bound.slopes(wanted, tensors, settings, upstream)
    grads = bound.compute((), wanted, tensors, settings, grad_output=upstream, out=to_array(tensors[0]))[1]
    increment_version(tensors[0])
    return grads


def version_of(tensor: Any) -> int:
    """Return how often a tensor has been modified in place; 0 for a tensor of inference mode, which does not count it."""
    return 0 if tensor.is_inference() else int(tensor._version)


@functools.cache
def function_of(loss: AbstractLoss) -> Callable[..., Any]:
    """Return a function that applies the autograd function of a loss, which has the loss's name in graphs, profiles and errors."""
    name = "".join(part.capitalize() for part in loss.__name__.split("_"))
    function = type(name, (LossFunction,), {})
    # `Function.apply` without its check for torch.func's transforms, which `has_memory` has already made: this saves 2 us
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return apply


def times_upstream(slope: Any, upstream: Any, unit: float) -> Any:
    """Multiply a saved gradient by the upstream gradient, one number or one for each sample, and divide it by `unit`.

    Unless the backward pass may run again, the saved gradient is multiplied in place and returned, because allocating a second
    array of its size takes longer than computing the loss.
    """
    is_retained = is_graph_retained()
    if is_on_gpu(slope):
        if is_retained or upstream.dim():
            return slope * append_axes(upstream.to(slope.dtype), slope)
        from fastloss.backends.torch import gpu

        return gpu.scale(slope, upstream)
    if upstream.dim():
        factor = append_axes(upstream.to(slope.dtype), slope)
    else:
        factor = upstream.item() / unit
        if factor == 1.0:
            return slope.clone() if is_retained else slope
    return slope * factor if is_retained else slope.mul_(factor)


# whether the graph of the current backward pass is retained (`retain_graph=True`), so that the pass may run again
is_graph_retained: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
