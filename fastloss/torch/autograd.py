"""Losses of tensors: the value with autograd attached, and the passes that `grad`, `value_and_grad` and `curvature` make.

Two ways lead to the same kernels. Tensors whose memory can be read go straight there, and a `torch.autograd.Function` keeps
what the backward pass needs. Where PyTorch looks on without memory, as under torch.compile, and
to differentiate twice, there are the operators of `operators.py`, which take three times as long to be called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fastloss.loss import AnyLoss
from fastloss.plan import Array
from fastloss.torch import operators
from fastloss.torch.tensors import HALVES, Tensor, check_tensors, to_array, to_tensor

SLOPES = ("slope", "target_slope")  # towards the first operand and the second
PLAIN = (torch.Tensor, torch.nn.Parameter)


class Bound(NamedTuple):
    """A loss with everything of a call that is no tensor."""

    loss: AnyLoss
    reduction: str
    names: tuple[str, ...]  # of the tensors behind the two operands
    settings: Mapping[str, Any]  # the other options: numbers and flags
    dtype: torch.dtype  # of the value

    def compute(self, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: Sequence[Any], **options: Any) -> tuple[Any, list[Array]]:
        """Return the reduced value, if it is summed, and the arrays that are wanted, all NumPy's."""
        first, second, *others = map(to_array, tensors)
        options |= self.settings
        options.update(zip(self.names, others, strict=True))
        weight = options.pop("weight", None)
        if first.size:
            return self.loss._compute(summed, wanted, first, second, weight, self.reduction, options)
        with warnings.catch_warnings():  # in PyTorch the mean of nothing is NaN without a word
            warnings.simplefilter("ignore", RuntimeWarning)
            return self.loss._compute(summed, wanted, first, second, weight, self.reduction, options)

    def value(self, tensors: Sequence[Any]) -> Any:
        """Return the value as a tensor."""
        if self.loss.writes_value(self.reduction):
            return to_tensor(self.compute((), ("value",), tensors)[1][0])
        return self.as_value(self.compute(("value",), (), tensors)[0])

    def slopes(self, wanted: tuple[str, ...], tensors: Sequence[Any], **options: Any) -> list[Any]:
        """Return slopes as tensors."""
        return [to_tensor(x) for x in self.compute((), wanted, tensors, **options)[1]]

    def as_value(self, value: Any) -> Any:
        """Return a reduced value as a tensor."""
        if isinstance(value, float):
            return torch.scalar_tensor(value, dtype=self.dtype, device="cpu")
        return torch.from_numpy(value).to(self.dtype)

    def is_early(self, first: Any, second: Any) -> bool:
        """Whether slopes are computed along with the value, before it is known what they are to be multiplied by.

        Not where that is likely to be no 1, and not in 16 bits: gradients of a large mean are too small for them, until they
        are multiplied by the scale of the loss that is there for this very reason.
        """
        return self.reduction != "none" and first.dtype not in HALVES and second.dtype not in HALVES


class LossFunction(torch.autograd.Function):
    """The value of a loss, and in the backward pass its slopes, which are there already where they could be."""

    @staticmethod
    def forward(ctx: Any, bound: Bound, inplace_grad: bool, *tensors: Any) -> Any:
        """Return the value; compute the slopes in the same pass."""
        ctx.bound, ctx.inplace_grad = bound, inplace_grad and ctx.needs_input_grad[2]
        ctx.wanted = tuple(name for name, needed in zip(SLOPES, ctx.needs_input_grad[2:4], strict=True) if needed)
        ctx.early = len(ctx.wanted) if bound.is_early(*tensors[:2]) else 0
        if not ctx.early:
            ctx.save_for_backward(*tensors)
            return bound.value(tensors)
        if not ctx.inplace_grad:
            value, slopes = bound.compute(("value",), ctx.wanted, tensors)
            ctx.save_for_backward(*map(to_tensor, slopes), *tensors)
        else:
            value, slopes = bound.compute(("value",), ctx.wanted, tensors, out=to_array(tensors[0]))
            increment_version(tensors[0])
            # the slope under the input's own version counter, so that whoever writes there before the backward pass is told
            ctx.save_for_backward(tensors[0].detach(), *map(to_tensor, slopes[1:]), None, *tensors[1:])
        return bound.as_value(value)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the slopes, multiplied by what comes down the chain."""
        saved = ctx.saved_tensors  # unpacked once: a checkpoint computes it anew
        slopes, tensors = saved[: ctx.early], saved[ctx.early :]
        if torch.is_grad_enabled():  # the gradient is to be differentiated once more
            if ctx.inplace_grad:
                raise RuntimeError("inplace_grad=True has overwritten the input, which the second derivative needs; leave it out")
            grads = operators.derivatives(ctx.bound, ctx.wanted, upstream, tensors)
        elif not torch._C._has_storage(upstream):  # a batch of gradients (`is_grads_batched=True`)
            if ctx.bound.reduction == "none" and not ctx.bound.loss.writes_value("none"):
                raise NotImplementedError("groups without a reduction have no batches of gradients; accepted: one gradient at a time")
            grads = [slope * beside(upstream, slope) for slope in slopes or ctx.bound.slopes(ctx.wanted, tensors)]
        elif ctx.early:
            grads = [scaled(slope, upstream) for slope in slopes]
        elif ctx.inplace_grad:
            grads = ctx.bound.slopes(ctx.wanted, tensors, grad_output=to_array(upstream), out=to_array(tensors[0]))
            increment_version(tensors[0])
        else:
            grads = ctx.bound.slopes(ctx.wanted, tensors, grad_output=to_array(upstream))
        by_name = dict(zip(ctx.wanted, grads, strict=True))
        return None, None, *map(by_name.get, SLOPES), *(None for _ in tensors[2:])


def scaled(slope: Any, upstream: Any) -> Any:
    """Return the slope times what comes down the chain: one number, or one a sample.

    If nobody can ask for it again, it is handed on itself, and multiplied where it is: a second array of its size costs more
    than the loss.
    """
    kept = keeps_graph()
    if upstream.item() == 1.0 if not upstream.dim() else torch.all(upstream == 1.0):
        return slope.clone() if kept else slope
    factor = beside(upstream.to(slope.dtype), slope)
    return slope * factor if kept else slope.mul_(factor)


def beside(upstream: Any, slope: Any) -> Any:
    """Return what comes down the chain, a number or one a sample, so that it broadcasts against the slope."""
    return upstream.reshape(upstream.shape + (1,) * (slope.dim() - upstream.dim()))


def keeps_graph() -> bool:
    """Whether the backward pass that runs now may run again (`retain_graph=True`)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def run(
    loss: AnyLoss, summed: tuple[str, ...], wanted: tuple[str, ...], first: Any, second: Any, weight: Any, reduction: str,
    options: dict[str, Any]
) -> tuple[Any, list[Any]]:  # fmt: skip
    """Return the reduced value, if it is summed, and what else is wanted, as tensors; a value alone has autograd attached."""
    options = {"weight": weight, **options}
    inplace_grad, out = bool(options.pop("inplace_grad", False)), options.pop("out", None)
    upstream = options.pop("grad_output", None)
    tensors, names, settings = [first, second], [], {}
    for name, x in options.items():
        if isinstance(x, (Tensor, np.ndarray, list)):
            tensors.append(x)
            names.append(name)
        elif x is not None:
            settings[name] = x
    check_tensors(zip((*loss.operands, *names), tensors, strict=True))
    bound = Bound(loss, reduction, tuple(names), settings, value_dtype(first))
    if (summed, wanted) in ((("value",), ()), ((), ("value",))):
        if out is not None:
            raise ValueError("out takes a gradient, and the value of tensors has its own: use grad or value_and_grad")
        if bound.dtype is not first.dtype and loss.writes_value(reduction):
            tensors[0] = first.to(bound.dtype)
        value = differentiable(bound, tensors, inplace_grad)
        return (value, []) if summed else (None, [value])
    if inplace_grad:
        raise ValueError("inplace_grad is an option of a loss's value; a gradient is written to out=")
    return derivatives(bound, summed, wanted, tensors, upstream, out)


def value_dtype(first: Any) -> torch.dtype:
    """Return a value's dtype: the first operand's, but under autocast float32 instead of 16 bits, as PyTorch has it of losses."""
    return torch.float32 if first.dtype in HALVES and torch.is_autocast_enabled("cpu") else first.dtype


def differentiable(bound: Bound, tensors: list[Any], inplace_grad: bool) -> Any:
    """Return the value, to be differentiated by the two operands."""
    needs = torch.is_grad_enabled() and (tensors[0].requires_grad or tensors[1].requires_grad)
    if torch.is_grad_enabled():
        refuse_others(bound, tensors)
    refuse_transforms(tensors)
    if not has_memory(tensors):
        return operators.value(bound, tensors)
    if not needs:
        return bound.value(tensors)
    if inplace_grad:
        check_overwritable(bound.loss, tensors[0])
    if tensors[1].requires_grad:
        bound.loss.require("target_slope")
    return LossFunction.apply(bound, inplace_grad, *tensors)


def derivatives(bound: Bound, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: list[Any], upstream: Any, out: Any) -> Any:
    """Return value and derivatives without autograd, in the caller's tensors if there are any."""
    refuse_transforms(tensors)
    if not has_memory(tensors):
        if out is not None:
            raise NotImplementedError("out is not for compiled code, which plans its memory itself; leave it out")
        return operators.passes(bound, summed, wanted, tensors, upstream)
    options: dict[str, Any] = {"grad_output": to_array(upstream) if isinstance(upstream, Tensor) else upstream}
    buffers: list[Any] = []
    if out is not None:
        buffers = list(out) if isinstance(out, (tuple, list)) else [out]
        check_tensors((f"out[{k}]" if len(buffers) > 1 else "out", x) for k, x in enumerate(buffers))
        for x in buffers:
            refuse_leaf("out", x)
        arrays = tuple(to_array(x) for x in buffers)
        options["out"] = arrays if isinstance(out, (tuple, list)) else arrays[0]
    value, computed = bound.compute(summed, wanted, tensors, **{k: x for k, x in options.items() if x is not None})
    for x in buffers:
        increment_version(x)
    return (bound.as_value(value) if summed else None), [*buffers, *map(to_tensor, computed[len(buffers) :])]


def through_arrays(method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Call a method with arrays on the memory of the tensors it was given; return its results as tensors."""
    given = {**operands, **{name: x for name, x in options.items() if isinstance(x, Tensor)}}
    check_tensors(given.items())
    refuse_transforms(tuple(given.values()))
    if not has_memory(tuple(given.values())):
        raise NotImplementedError("gradients of the objective as a whole are not for compiled code; differentiate its value")
    first, out = next(iter(operands.values())), options.get("out")
    arrays: dict[str, Any] = {name: to_array(x) for name, x in given.items()}
    if out is not None:
        check_tensors((f"out[{k}]", x) for k, x in enumerate(out))
        for k, x in enumerate(out):
            refuse_leaf(f"out[{k}]", x)
        arrays["out"] = tuple(map(to_array, out))
    result = method(**{**options, **arrays})
    buffers = {} if out is None else {id(array): x for array, x in zip(arrays["out"], out, strict=True)}
    for x in buffers.values():
        increment_version(x)

    def convert(x: Any) -> Any:
        if isinstance(x, tuple):
            return type(x)(*map(convert, x)) if hasattr(x, "_fields") else tuple(map(convert, x))
        if isinstance(x, np.ndarray):
            return buffers[id(x)] if id(x) in buffers else to_tensor(x)
        return torch.scalar_tensor(x, dtype=value_dtype(first), device="cpu")

    return convert(result)


def unread_like(target: Any) -> Any:
    """Return an input for a loss of the target alone, which does not read it: one element, of the target's shape."""
    if target.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("target requires a gradient, and a quantity of the target alone has none; pass target.detach()")
    dtype = target.dtype if target.is_floating_point() else torch.float32
    return torch.zeros((), dtype=dtype, device=target.device).expand(target.shape)


def has_memory(tensors: Sequence[Any]) -> bool:
    """Whether tensors can be read now: they are no compiler's symbols, and nobody looks on who records what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not _len_torch_dispatch_stack_pre_dispatch()
        and all(type(x) in PLAIN and x.is_cpu for x in tensors)
    )


def is_transformed(tensors: Sequence[Any]) -> bool:
    """Whether torch.func's transforms are at work, or forward-mode differentiation, or torch.jit.trace."""
    if torch.compiler.is_compiling():  # the compiler refuses itself what it cannot do
        return False
    dual = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    return dual or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


def refuse_transforms(tensors: Sequence[Any]) -> None:
    """Refuse what would get wrong derivatives or none, or a constant."""
    if is_transformed(tensors):
        raise NotImplementedError(
            "fastloss has no rules for torch.func's transforms (grad, vmap, jvp, ...), forward-mode derivatives and torch.jit.trace; "
            "accepted: torch.autograd, torch.compile, torch.export"
        )


def refuse_others(bound: Bound, tensors: Sequence[Any]) -> None:
    """Refuse a gradient towards anything but the two operands."""
    for name, x in zip(bound.names, tensors[2:], strict=True):
        if x.requires_grad:
            raise NotImplementedError(
                f"{name} requires a gradient, and losses are not differentiable with respect to it; pass {name}.detach()"
            )


def check_overwritable(loss: AnyLoss, tensor: Any) -> None:
    """Refuse to overwrite what has to keep its values."""
    if not loss.overwrites:
        raise TypeError(f"{loss.__name__} has two gradients, and no inplace_grad")
    if tensor.requires_grad:
        refuse_leaf("inplace_grad=True: the input", tensor)


def refuse_leaf(name: str, tensor: Any) -> None:
    """Refuse to write into what an optimiser holds: a leaf that requires a gradient, or a view of one."""
    base = tensor._base if tensor._is_view() else tensor
    if base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} is a leaf that requires a gradient, or a view of one; its values cannot be overwritten")
