"""The autograd functions. They compute on the memory of tensors and save the tensors that the backward pass needs.

`LossFunction` handles every call. `SmallInputFunction` handles small inputs without options, for which Python takes longer than
the kernel. Fake tensors, as under torch.compile, and second derivatives go through the operators of `operators.py`, which take
longer to call. `slope` and `target_slope` are the gradients with respect to the first operand and to the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from fastloss.backends.torch import operators
from fastloss.backends.torch.bound_loss import BoundLoss
from fastloss.backends.torch.memory_views import is_on_gpu, to_array, to_tensor
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments
from fastloss.core.plan import ONE_RANGE
from fastloss.cpu.call import HostCall, find_launch

FULL_PRECISION = (torch.float32, torch.float64)
# the gradients to compute, by whether the first operand and the second require one
WANTED = {(True, False): ("slope",), (False, True): ("target_slope",), (True, True): ("slope", "target_slope"), (False, False): ()}


class LossFunction(torch.autograd.Function):
    """The value of a loss, with gradients that are computed in the forward pass where possible, and else in the backward pass."""

    @staticmethod
    def forward(ctx: Any, bound: BoundLoss, inplace_grad: bool, *tensors: Any) -> Any:
        """Compute the value and, where `BoundLoss.has_early_slopes` allows it, the gradients in the same pass over memory."""
        needs = ctx.needs_input_grad
        wanted = WANTED[needs[2:4]]
        ctx.bound, ctx.wanted, ctx.early_slopes, ctx.inplace_grad = bound, wanted, len(wanted), inplace_grad and needs[2]
        if not bound.has_early_slopes(tensors[0], tensors[1]):
            ctx.early_slopes = 0
            ctx.save_for_backward(*tensors)
            return bound.value(tensors)
        if ctx.inplace_grad:
            value, slopes = bound.compute(("value",), wanted, tensors, out=to_array(tensors[0]))
            increment_version(tensors[0])
            # saved under the input's version counter, so that autograd raises if the gradient is overwritten before the backward pass
            ctx.save_for_backward(tensors[0].detach(), *map(to_tensor, slopes[1:]), None, *tensors[1:])
            return bound.as_value(value)
        value, slopes = bound.compute(("value",), wanted, tensors)
        ctx.save_for_backward(*map(to_tensor, slopes), *tensors)
        return bound.as_value(value)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the gradients, multiplied by the upstream gradient."""
        saved = ctx.saved_tensors  # read once, because under checkpointing each read recomputes the tensors
        slopes, tensors = saved[: ctx.early_slopes], saved[ctx.early_slopes :]
        grads, needs = LossFunction.gradients(ctx, upstream, slopes, tensors), ctx.needs_input_grad
        return None, None, grads[0] if needs[2] else None, grads[-1] if needs[3] else None, *(None,) * (len(tensors) - 2)

    @staticmethod
    def gradients(ctx: Any, upstream: Any, slopes: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
        """Return the gradients with respect to the operands that require one, multiplied by the upstream gradient."""
        if torch.is_grad_enabled():  # the gradient will be differentiated again (`create_graph=True`)
            if ctx.inplace_grad:
                raise RuntimeError("inplace_grad=True has overwritten the input, which second derivatives need; pass inplace_grad=False")
            return operators.derivatives(ctx.bound, ctx.wanted, upstream, tensors)
        if not torch._C._has_storage(upstream):  # a batch of gradients (`is_grads_batched=True`)
            if ctx.bound.reduction == "none" and not ctx.bound.loss.writes_value("none"):
                name = ctx.bound.loss.__name__
                raise NotImplementedError(
                    f"{name} with reduction 'none' accepts no batch of upstream gradients (is_grads_batched=True); pass them one by one"
                )
            return [slope * append_axes(upstream, slope) for slope in slopes or ctx.bound.slopes(ctx.wanted, tensors)]
        if slopes:
            return list(map(times_upstream, slopes, (upstream, upstream)))
        if not ctx.inplace_grad:
            return ctx.bound.slopes(ctx.wanted, tensors, grad_output=to_array(upstream))
        grads = ctx.bound.slopes(ctx.wanted, tensors, grad_output=to_array(upstream), out=to_array(tensors[0]))
        increment_version(tensors[0])
        return grads


class SmallInputFunction(torch.autograd.Function):
    """The value of a loss for a small input without options, where overhead takes longer than the kernel.

    Forward and backward of 1,024 elements take 42 us with this class, of which PyTorch's engine takes 22, and 50 us with
    `LossFunction`.
    """

    @staticmethod
    def accepts(loss: AbstractLoss, reduction: str, input: Any, target: Any) -> bool:
        """Whether to compute a call with this class, given that it has no options and that its tensors have memory."""
        return (
            input.requires_grad
            and not is_on_gpu(input)
            and not target.requires_grad
            and torch.is_grad_enabled()
            and 0 < input.numel() <= ONE_RANGE
            and reduction in ("mean", "sum")
            and loss.definition is not None
            and input.dtype in FULL_PRECISION
            and target.dtype in FULL_PRECISION
        )

    @staticmethod
    def forward(ctx: Any, loss: AbstractLoss, reduction: str, input: Any, target: Any) -> Any:
        """Compute the value and the gradient in one pass over memory."""
        layouts = input.dtype, input.shape, input.stride(), target.dtype, target.shape, target.stride()
        launch, divisor, dtype = find_small_launch(loss, reduction, *layouts)
        slope = torch.empty_like(input)
        sums, _ = launch.run([input.data_ptr(), target.data_ptr(), slope.data_ptr()], (), 1.0 / divisor, None)
        ctx.call = loss, reduction
        ctx.save_for_backward(slope, input, target)
        return torch.from_numpy(np.array(sums[0] / divisor, dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the gradient, multiplied by the upstream gradient."""
        slope, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss, reduction = ctx.call
            bound = BoundLoss(loss, reduction, (), {}, slope.dtype)
            return None, None, *operators.derivatives(bound, ("slope",), upstream, tensors), None
        batched = not torch._C._has_storage(upstream)
        return None, None, slope * append_axes(upstream, slope) if batched else times_upstream(slope, upstream), None


@functools.lru_cache(maxsize=1024)
def find_small_launch(
    loss: AbstractLoss, reduction: str, dtype: Any, shape: Any, strides: Any, target_dtype: Any, target_shape: Any, target_strides: Any
) -> tuple[Any, int, np.dtype[Any]]:
    """Return the launch for `SmallInputFunction`, the number that divides the sum, and the dtype of the value."""
    z = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    t = torch.empty_strided(target_shape, target_strides, dtype=target_dtype, device="cpu")
    assert loss.definition is not None
    call = HostCall(loss.definition, Arguments(("value",), ("slope",), to_array(z), to_array(t), None, reduction, {}))
    return (
        find_launch(*call.request(("value",), ("slope",), [*call.arrays, to_array(torch.empty_like(z))])),
        call.count(),
        call.arrays[0].dtype,
    )


# `Function.apply` without its check for torch.func's transforms, which `has_memory` has already made: this saves 2 us
apply: Callable[..., Any] = super(torch.autograd.Function, LossFunction).apply
apply_small: Callable[..., Any] = super(torch.autograd.Function, SmallInputFunction).apply


def times_upstream(slope: Any, upstream: Any) -> Any:
    """Multiply a saved gradient by the upstream gradient: one number, or one for each sample.

    Unless the backward pass may run again, the saved gradient is multiplied in place and returned, because allocating a second
    array of its size takes longer than computing the loss.
    """
    is_retained = is_graph_retained()
    if is_on_gpu(slope):
        if is_retained or upstream.dim():
            return slope * append_axes(upstream.to(slope.dtype), slope)
        from fastloss.backends.torch import gpu

        return gpu.scale(slope, upstream)
    if torch.all(upstream == 1.0) if upstream.dim() else upstream.item() == 1.0:
        return slope.clone() if is_retained else slope
    factor = append_axes(upstream.to(slope.dtype), slope)
    return slope * factor if is_retained else slope.mul_(factor)


def append_axes(upstream: Any, slope: Any) -> Any:
    """Append axes of length 1 to an upstream gradient, so that it broadcasts against the gradient of an operand."""
    return upstream.reshape(upstream.shape + (1,) * (slope.dim() - upstream.dim()))


# whether the graph of the current backward pass is retained (`retain_graph=True`), so that the pass may run again
is_graph_retained: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
