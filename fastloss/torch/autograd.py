"""Losses of tensors: the value with autograd attached, and the passes that `grad`, `value_and_grad` and `curvature` make.

Two ways lead to the same kernels. Tensors whose memory can be read go straight there, and a `torch.autograd.Function` keeps
what the backward pass needs: `LossFunction`, or for small plain calls `ShortFunction`. Where PyTorch looks on without memory, as
under torch.compile, and to differentiate twice, there are the operators of `operators.py`, which take longer to be called.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastloss.call import Call, find_launch, take_validate
from fastloss.loss import AnyLoss, Loss
from fastloss.plan import ONE_RANGE, Array
from fastloss.torch import operators
from fastloss.torch.memory import empty_like
from fastloss.torch.tensors import (
    HALVES,
    check_tensors,
    has_memory,
    is_on_gpu,
    refuse_gradient,
    refuse_leaf,
    refuse_transforms,
    to_array,
    to_tensor,
)

CALL = None  # no call takes tensors as they are
WIDE = (torch.float32, torch.float64)
# which slopes are wanted, by whether the first operand and the second require a gradient
WANTED = {(True, False): ("slope",), (False, True): ("target_slope",), (True, True): ("slope", "target_slope"), (False, False): ()}


class TensorCall(Call):
    """A call of tensors on the CPU, as arrays: what is written lies in memory that is kept."""

    __slots__ = ()
    empty_like = staticmethod(empty_like)


@contextlib.contextmanager
def place_of(tensor: Any, dtype: torch.dtype) -> Iterator[type[Call]]:
    """Be where a tensor is, and give the kind of call that is made there for values of a dtype."""
    if not is_on_gpu(tensor):
        yield TensorCall
        return
    from fastloss.torch import device

    with device.current(tensor):
        yield device.call_of(dtype)


class Bound(NamedTuple):
    """A loss with everything of a call that is no tensor."""

    loss: AnyLoss
    reduction: str
    names: tuple[str, ...]  # of the tensors behind the two operands
    settings: Mapping[str, Any]  # the other options: numbers and flags
    dtype: torch.dtype  # of the value

    def compute(self, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: Sequence[Any], **options: Any) -> tuple[Any, list[Array]]:
        """Return the reduced value, if it is summed, and the arrays that are wanted, all NumPy's."""
        with place_of(tensors[0], self.dtype) as call:
            first, second, *others = [to_array(x) for x in tensors]
            options |= self.settings
            options |= zip(self.names, others, strict=True)
            weight = options.pop("weight", None)
            if first.size:
                return self.loss._compute(summed, wanted, first, second, weight, self.reduction, options, call)
            with warnings.catch_warnings():  # in PyTorch the mean of nothing is NaN without a word
                warnings.simplefilter("ignore", RuntimeWarning)
                return self.loss._compute(summed, wanted, first, second, weight, self.reduction, options, call)

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
        return as_value(value, self.dtype)

    def is_early(self, first: Any, second: Any) -> bool:
        """Whether slopes are computed along with the value, before it is known what they are to be multiplied by.

        Not where that is likely to be no 1, and not in 16 bits: gradients of a large mean are too small for them, until they
        are multiplied by the scale of the loss that is there for this very reason.
        """
        return self.reduction != "none" and first.dtype not in HALVES and second.dtype not in HALVES


def as_value(value: Any, dtype: torch.dtype) -> Any:
    """Return a reduced value as a tensor."""
    if isinstance(value, float):
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    return to_tensor(value).to(dtype)


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
    def takes(loss: AnyLoss, reduction: str, input: Any, target: Any) -> bool:
        """Whether a call without options, of tensors that can be read, is plain and small."""
        return (
            input.requires_grad
            and not is_on_gpu(input)
            and not target.requires_grad
            and torch.is_grad_enabled()
            and 0 < input.numel() <= ONE_RANGE
            and reduction in ("mean", "sum")
            and isinstance(loss, Loss)
            and input.dtype in WIDE
            and target.dtype in WIDE
        )

    @staticmethod
    def forward(ctx: Any, loss: Loss, reduction: str, input: Any, target: Any) -> Any:
        """Return the value; compute the slope in the same pass."""
        layouts = input.dtype, input.shape, input.stride(), target.dtype, target.shape, target.stride()
        launch, divisor, dtype = short_launch(loss, reduction, *layouts)
        slope = torch.empty_like(input)
        sums, _ = launch.run_at([input.data_ptr(), target.data_ptr(), slope.data_ptr()], (), 1.0 / divisor, None)
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
    loss: Loss, reduction: str, dtype: Any, shape: Any, strides: Any, target_dtype: Any, target_shape: Any, target_strides: Any
) -> tuple[Any, int, np.dtype[Any]]:
    """Return what runs a short call, what its sum is divided by, and the value's dtype."""
    z = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    t = torch.empty_strided(target_shape, target_strides, dtype=target_dtype, device="cpu")
    call = Call(loss._definition, to_array(z), to_array(t), None, reduction, {})
    return find_launch(*call.request(("value",), ("slope",), [to_array(torch.empty_like(z))])), call.count(), call.arrays[0].dtype


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
        from fastloss.torch import device

        return device.scale(slope, upstream)
    if torch.all(upstream == 1.0) if upstream.dim() else upstream.item() == 1.0:
        return slope.clone() if kept else slope
    factor = beside(upstream.to(slope.dtype), slope)
    return slope * factor if kept else slope.mul_(factor)


def beside(upstream: Any, slope: Any) -> Any:
    """Return what comes down the chain, a number or one a sample, so that it broadcasts against the slope."""
    return upstream.reshape(upstream.shape + (1,) * (slope.dim() - upstream.dim()))


# whether the backward pass that runs now may run again (`retain_graph=True`)
keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def run(
    loss: AnyLoss, summed: tuple[str, ...], wanted: tuple[str, ...], first: Any, second: Any, weight: Any, reduction: str,
    options: dict[str, Any]
) -> tuple[Any, list[Any]]:  # fmt: skip
    """Return the reduced value, if it is summed, and what else is wanted, as tensors; a value alone has autograd attached."""
    tensors = [first, second]
    names: list[str] = []
    settings: dict[str, Any] = {}
    special: dict[str, Any] = {}
    plain = not options and weight is None
    if not plain:
        sort({"weight": weight, **options}, names, tensors, settings, special)
    if not (readable := has_memory(tensors)):
        check_tensors(zip((*loss.operands, *names), tensors, strict=True))
        refuse_transforms(tensors)
    elif plain and summed == ("value",) and not wanted and ShortFunction.takes(loss, reduction, first, second):
        return apply_short(loss, reduction, first, second), []
    bound = Bound(loss, reduction, tuple(names), settings, value_dtype(first))
    if (*summed, *wanted) != ("value",):
        if special.get("inplace_grad"):
            raise ValueError("inplace_grad is an option of a loss's value; a gradient is written to out=")
        return (derivatives if readable else operators.passes)(bound, summed, wanted, tensors, special)
    if "out" in special:
        raise ValueError("out takes a gradient, and the value of tensors has its own: use grad or value_and_grad")
    for name, x in zip(names, tensors[2:], strict=True):
        refuse_gradient(name, x)
    if bound.dtype is not first.dtype and loss.writes_value(reduction):
        tensors[0] = first.to(bound.dtype)
    value = differentiable(bound, tensors, bool(special.get("inplace_grad"))) if readable else operators.value(bound, tensors)
    return (value, []) if summed else (None, [value])


SPECIAL = ("grad_output", "inplace_grad", "out")  # options that are not handed on as they are


def sort(options: Mapping[str, Any], names: list[str], tensors: list[Any], settings: dict[str, Any], special: dict[str, Any]) -> None:
    """Sort the options that are given into tensors with their names, what is no tensor, and what is taken care of here."""
    for name, x in options.items():
        if x is None:
            continue
        if name in SPECIAL:
            special[name] = x
        elif name == "validate":
            settings[name] = take_validate(x)
        elif isinstance(x, (Tensor, np.ndarray, list)):
            names.append(name)
            tensors.append(x)
        else:
            settings[name] = x


def value_dtype(first: Any) -> torch.dtype:
    """Return a value's dtype: the first operand's, but under autocast float32 instead of 16 bits, as PyTorch has it of losses."""
    return torch.float32 if first.dtype in HALVES and torch.is_autocast_enabled(first.device.type) else first.dtype


def differentiable(bound: Bound, tensors: list[Any], inplace_grad: bool) -> Any:
    """Return the value, to be differentiated by the two operands."""
    first, second = tensors[:2]
    if not ((first.requires_grad or second.requires_grad) and torch.is_grad_enabled()):
        return bound.value(tensors)
    if inplace_grad and not bound.loss.overwrites:
        raise TypeError(f"{bound.loss.__name__} has two gradients, and no inplace_grad")
    if inplace_grad and first.requires_grad:
        refuse_leaf("inplace_grad=True: the input", first)
    if second.requires_grad:
        bound.loss.require("target_slope")
    return apply(bound, inplace_grad, *tensors)


def derivatives(
    bound: Bound, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: list[Any], special: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """Return value and derivatives without autograd, in the caller's tensors if there are any."""
    upstream, out = special.get("grad_output"), special.get("out")
    options: dict[str, Any] = {} if upstream is None else {"grad_output": to_array(upstream) if isinstance(upstream, Tensor) else upstream}
    buffers: list[Any] = []
    if out is not None:
        several = isinstance(out, (tuple, list))
        buffers = list(out) if several else [out]
        arrays = as_buffers(buffers, [f"out[{k}]" for k in range(len(buffers))] if several else ["out"])
        options["out"] = arrays if several else arrays[0]
    value, computed = bound.compute(summed, wanted, tensors, **options)
    for x in buffers:
        increment_version(x)
    return (bound.as_value(value) if summed else None), [*buffers, *map(to_tensor, computed[len(buffers) :])]


def as_buffers(out: Sequence[Any], names: Sequence[str]) -> tuple[Array, ...]:
    """Return arrays on the memory of tensors that are to be written."""
    check_tensors(zip(names, out, strict=True))
    for name, x in zip(names, out, strict=True):
        refuse_leaf(name, x)
        if x.is_neg():
            raise TypeError(f"{name} is negated lazily, and has no memory of its own numbers; pass {name}.resolve_neg()")
    return tuple(map(to_array, out))


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
        if not isinstance(out, (tuple, list)):
            raise TypeError(f"out must be tensors, one a gradient, not {type(out).__name__}")
        arrays["out"] = as_buffers(out, [f"out[{k}]" for k in range(len(out))])
    with place_of(first, value_dtype(first)) as call:
        result = method(**{**options, **arrays, "call": call})
    buffers = {} if out is None else {id(array): x for array, x in zip(arrays["out"], out, strict=True)}
    for x in buffers.values():
        increment_version(x)

    def convert(x: Any) -> Any:
        if isinstance(x, tuple):
            return type(x)(*map(convert, x)) if hasattr(x, "_fields") else tuple(map(convert, x))
        if id(x) in buffers:
            return buffers[id(x)]
        return as_value(x, value_dtype(first)) if isinstance(x, float) or not x.ndim else to_tensor(x)

    return convert(result)


def unread_like(target: Any) -> Any:
    """Return an input for a loss of the target alone, which does not read it: one element, of the target's shape."""
    if target.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("target requires a gradient, and a quantity of the target alone has none; pass target.detach()")
    dtype = target.dtype if target.is_floating_point() else torch.float32
    return torch.zeros((), dtype=dtype, device=target.device).expand(target.shape)
