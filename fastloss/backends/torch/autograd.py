"""The autograd functions: they save what the backward pass needs, and compute on the memory of tensors.

`LossFunction` serves every call, and `ShortFunction` small plain ones, for which Python takes longer than the kernel. Where
PyTorch traces without memory, as under torch.compile, and for second derivatives, the operators of `operators.py` take over;
calling those takes longer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from fastloss.backends.torch import operators
from fastloss.backends.torch.bound import Bound
from fastloss.backends.torch.memory_views import is_on_gpu, to_array, to_tensor
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments
from fastloss.core.plan import ONE_RANGE
from fastloss.cpu.call import HostCall, find_launch

WIDE = (torch.float32, torch.float64)
# the gradients that are wanted, by whether the first operand and the second require one
WANTED = {(True, False): ("slope",), (False, True): ("target_slope",), (True, True): ("slope", "target_slope"), (False, False): ()}


class LossFunction(torch.autograd.Function):
    """The value of a loss, and in the backward pass its slopes, which are there already where they could be."""

    @staticmethod
    def forward(ctx: Any, bound: Bound, inplace_grad: bool, *tensors: Any) -> Any:
        """Return the value; compute the slopes in the same pass."""
        needs = ctx.needs_input_grad
        wanted = WANTED[needs[2:4]]
        ctx.bound, ctx.wanted, ctx.early, ctx.inplace_grad = bound, wanted, len(wanted), inplace_grad and needs[2]
        if not bound.is_early(tensors[0], tensors[1]):
            ctx.early = 0
            ctx.save_for_backward(*tensors)
            return bound.value(tensors)
        if ctx.inplace_grad:
            value, slopes = bound.compute(("value",), wanted, tensors, out=to_array(tensors[0]))
            increment_version(tensors[0])
            # the slope under the input's own version counter, so that whoever writes there before the backward pass is told
            ctx.save_for_backward(tensors[0].detach(), *map(to_tensor, slopes[1:]), None, *tensors[1:])
            return bound.as_value(value)
        value, slopes = bound.compute(("value",), wanted, tensors)
        ctx.save_for_backward(*map(to_tensor, slopes), *tensors)
        return bound.as_value(value)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the slopes, multiplied by what comes down the chain."""
        saved = ctx.saved_tensors  # unpacked once: a checkpoint computes it anew
        slopes, tensors = saved[: ctx.early], saved[ctx.early :]
        grads, needs = LossFunction.gradients(ctx, upstream, slopes, tensors), ctx.needs_input_grad
        return None, None, grads[0] if needs[2] else None, grads[-1] if needs[3] else None, *(None,) * (len(tensors) - 2)

    @staticmethod
    def gradients(ctx: Any, upstream: Any, slopes: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
        """Return the gradients that are wanted."""
        if torch.is_grad_enabled():  # the gradient is to be differentiated once more
            if ctx.inplace_grad:
                raise RuntimeError("inplace_grad=True has overwritten the input, which the second derivative needs; leave it out")
            return operators.derivatives(ctx.bound, ctx.wanted, upstream, tensors)
        if not torch._C._has_storage(upstream):  # a batch of gradients (`is_grads_batched=True`)
            if ctx.bound.reduction == "none" and not ctx.bound.loss.writes_value("none"):
                raise NotImplementedError("groups without a reduction have no batches of gradients; accepted: one gradient at a time")
            return [slope * beside(upstream, slope) for slope in slopes or ctx.bound.slopes(ctx.wanted, tensors)]
        if slopes:
            return list(map(scaled, slopes, (upstream, upstream)))
        if not ctx.inplace_grad:
            return ctx.bound.slopes(ctx.wanted, tensors, grad_output=to_array(upstream))
        grads = ctx.bound.slopes(ctx.wanted, tensors, grad_output=to_array(upstream), out=to_array(tensors[0]))
        increment_version(tensors[0])
        return grads


class ShortFunction(torch.autograd.Function):
    """The same for the plain calls of small arrays: there is little to compute, and everything else is most of the time.

    Of 1,024 elements, forward and backward, PyTorch's engine takes 22 us, all of this 42, and `LossFunction` took 50.
    """

    @staticmethod
    def takes(loss: AbstractLoss, reduction: str, input: Any, target: Any) -> bool:
        """Whether a call without options, of tensors that can be read, is plain and small."""
        return (
            input.requires_grad
            and not is_on_gpu(input)
            and not target.requires_grad
            and torch.is_grad_enabled()
            and 0 < input.numel() <= ONE_RANGE
            and reduction in ("mean", "sum")
            and loss.definition is not None
            and input.dtype in WIDE
            and target.dtype in WIDE
        )

    @staticmethod
    def forward(ctx: Any, loss: AbstractLoss, reduction: str, input: Any, target: Any) -> Any:
        """Return the value; compute the slope in the same pass."""
        layouts = input.dtype, input.shape, input.stride(), target.dtype, target.shape, target.stride()
        launch, divisor, dtype = short_launch(loss, reduction, *layouts)
        slope = torch.empty_like(input)
        sums, _ = launch.run([input.data_ptr(), target.data_ptr(), slope.data_ptr()], (), 1.0 / divisor, None)
        ctx.call = loss, reduction
        ctx.save_for_backward(slope, input, target)
        return torch.from_numpy(np.array(sums[0] / divisor, dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the slope, multiplied by what comes down the chain."""
        slope, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss, reduction = ctx.call
            bound = Bound(loss, reduction, (), {}, slope.dtype)
            return None, None, *operators.derivatives(bound, ("slope",), upstream, tensors), None
        batched = not torch._C._has_storage(upstream)
        return None, None, slope * beside(upstream, slope) if batched else scaled(slope, upstream), None


@functools.lru_cache(maxsize=1024)
def short_launch(
    loss: AbstractLoss, reduction: str, dtype: Any, shape: Any, strides: Any, target_dtype: Any, target_shape: Any, target_strides: Any
) -> tuple[Any, int, np.dtype[Any]]:
    """Return what runs a short call, what its sum is divided by, and the value's dtype."""
    z = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    t = torch.empty_strided(target_shape, target_strides, dtype=target_dtype, device="cpu")
    assert loss.definition is not None
    call = HostCall(loss.definition, Arguments(("value",), ("slope",), to_array(z), to_array(t), None, reduction, {}))
    return (
        find_launch(*call.request(("value",), ("slope",), [*call.arrays, to_array(torch.empty_like(z))])),
        call.count(),
        call.arrays[0].dtype,
    )


# without the look for torch.func's transforms that `Function.apply` takes, and `has_memory` has taken: 2 us
apply: Callable[..., Any] = super(torch.autograd.Function, LossFunction).apply
apply_short: Callable[..., Any] = super(torch.autograd.Function, ShortFunction).apply


def scaled(slope: Any, upstream: Any) -> Any:
    """Return the slope times what comes down the chain: one number, or one a sample.

    If nobody can ask for it again, it is handed on itself, and multiplied where it is: a second array of its size costs more
    than the loss.
    """
    kept = keeps_graph()
    if is_on_gpu(slope):
        if kept or upstream.dim():
            return slope * beside(upstream.to(slope.dtype), slope)
        from fastloss.backends.torch import gpu

        return gpu.scale(slope, upstream)
    if torch.all(upstream == 1.0) if upstream.dim() else upstream.item() == 1.0:
        return slope.clone() if kept else slope
    factor = beside(upstream.to(slope.dtype), slope)
    return slope * factor if kept else slope.mul_(factor)


def beside(upstream: Any, slope: Any) -> Any:
    """Return what comes down the chain, a number or one a sample, so that it broadcasts against the slope."""
    return upstream.reshape(upstream.shape + (1,) * (slope.dim() - upstream.dim()))


# whether the backward pass that runs now may run again (`retain_graph=True`)
keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
