"""The backend for PyTorch tensors. A value has autograd attached; torch.compile sees each loss as an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastloss.backends.protocol import Backend
from fastloss.backends.torch import operators
from fastloss.backends.torch.autograd import SmallInputFunction, apply, apply_small
from fastloss.backends.torch.bound_loss import BoundLoss, as_value, machine_of
from fastloss.backends.torch.memory_views import (
    HALVES,
    check_tensors,
    has_memory,
    refuse_gradient,
    refuse_leaf,
    refuse_transforms,
    to_array,
    to_tensor,
)
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments
from fastloss.core.checks import to_validate
from fastloss.core.plan import Array

SPECIAL = ("grad_output", "inplace_grad", "out")  # options that are not passed on to `Arguments` unchanged


class TorchBackend(Backend):
    """The backend for PyTorch tensors, on the CPU and on CUDA devices."""

    options = ("inplace_grad",)

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Any]]:
        """Compute the requested quantities as tensors. If only the value is requested, it has autograd attached."""
        summed, wanted, first, second, weight, reduction, options = arguments
        tensors = [first, second]
        names: list[str] = []
        settings: dict[str, Any] = {}
        special: dict[str, Any] = {}
        plain = not options and weight is None
        if not plain:
            sort({"weight": weight, **options}, names, tensors, settings, special)
        if not (with_memory := has_memory(tensors)):
            check_tensors(zip((*loss.operands, *names), tensors, strict=True))
            refuse_transforms(tensors)
        elif plain and summed == ("value",) and not wanted and SmallInputFunction.accepts(loss, reduction, first, second):
            return apply_small(loss, reduction, first, second), []
        bound = BoundLoss(loss, reduction, tuple(names), settings, value_dtype(first))
        if (*summed, *wanted) != ("value",):
            if special.get("inplace_grad"):
                raise ValueError("inplace_grad is an option of calls for the value alone; pass out= to choose where a gradient is written")
            return (evaluate if with_memory else operators.evaluate)(bound, summed, wanted, tensors, special)
        if "out" in special:
            raise ValueError("out is not supported in a call for the value of tensors; accepted: out in a call of grad or value_and_grad")
        for name, x in zip(names, tensors[2:], strict=True):
            refuse_gradient(name, x)
        if bound.dtype is not first.dtype and loss.writes_value(reduction):
            tensors[0] = first.to(bound.dtype)
        value = compute_value(bound, tensors, bool(special.get("inplace_grad"))) if with_memory else operators.value(bound, tensors)
        return (value, []) if summed else (None, [value])

    def as_array(self, name: str, value: Any) -> Any:
        """Return a tensor unchanged. Raise TypeError for anything else."""
        if not isinstance(value, Tensor):
            check_tensors([(name, value)])
        return value

    def compute_jointly(self, method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a method that computes several losses at once, with arrays on the tensors' memory. Return its results as tensors."""
        given = {**operands, **{name: x for name, x in options.items() if isinstance(x, Tensor)}}
        check_tensors(given.items())
        refuse_transforms(tuple(given.values()))
        if not has_memory(tuple(given.values())):
            raise NotImplementedError("grad and value_and_grad of this loss are not supported in compiled code; use backward()")
        first, out = next(iter(operands.values())), options.get("out")
        arrays: dict[str, Any] = {name: to_array(x) for name, x in given.items()}
        if out is not None:
            if not isinstance(out, (tuple, list)):
                raise TypeError(f"out must be tensors, one for each gradient, not {type(out).__name__}")
            arrays["out"] = view_buffers(out, [f"out[{k}]" for k in range(len(out))])
        with machine_of(first, value_dtype(first)) as call:
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

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape and dtype, or float32 for integers, by broadcasting a single element."""
        if target.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("target requires a gradient, but this function is not differentiable; pass target.detach()")
        dtype = target.dtype if target.is_floating_point() else torch.float32
        return torch.zeros((), dtype=dtype, device=target.device).expand(target.shape)


def sort(options: Mapping[str, Any], names: list[str], tensors: list[Any], settings: dict[str, Any], special: dict[str, Any]) -> None:
    """Sort the options that are not None into tensors with their names, numbers and flags, and the options of `SPECIAL`."""
    for name, x in options.items():
        if x is None:
            continue
        if name in SPECIAL:
            special[name] = x
        elif name == "validate":
            settings[name] = to_validate(x)
        elif isinstance(x, (Tensor, np.ndarray, list)):
            names.append(name)
            tensors.append(x)
        else:
            settings[name] = x


def value_dtype(first: Any) -> torch.dtype:
    """Return the dtype of the value: that of the first operand, but float32 for 16-bit operands under autocast, as in PyTorch."""
    return torch.float32 if first.dtype in HALVES and torch.is_autocast_enabled(first.device.type) else first.dtype


def compute_value(bound: BoundLoss, tensors: list[Any], inplace_grad: bool) -> Any:
    """Compute the value, with autograd attached if an operand requires a gradient."""
    first, second = tensors[:2]
    if not ((first.requires_grad or second.requires_grad) and torch.is_grad_enabled()):
        return bound.value(tensors)
    if inplace_grad and bound.loss.gradients > 1:
        raise TypeError(f"inplace_grad is not supported by {bound.loss.__name__}, which has two gradients")
    if inplace_grad and first.requires_grad:
        refuse_leaf("inplace_grad=True: the input", first)
    if second.requires_grad:
        bound.loss.require("target_slope")
    return apply(bound, inplace_grad, *tensors)


def evaluate(
    bound: BoundLoss, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: list[Any], special: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """Compute value and derivatives without autograd, and write the derivatives to `out` if the caller passed it."""
    upstream, out = special.get("grad_output"), special.get("out")
    options: dict[str, Any] = {} if upstream is None else {"grad_output": to_array(upstream) if isinstance(upstream, Tensor) else upstream}
    buffers: list[Any] = []
    if out is not None:
        several = isinstance(out, (tuple, list))
        buffers = list(out) if several else [out]
        arrays = view_buffers(buffers, [f"out[{k}]" for k in range(len(buffers))] if several else ["out"])
        options["out"] = arrays if several else arrays[0]
    value, computed = bound.compute(summed, wanted, tensors, **options)
    for x in buffers:
        increment_version(x)
    return (bound.as_value(value) if summed else None), [*buffers, *map(to_tensor, computed[len(buffers) :])]


def view_buffers(out: Sequence[Any], names: Sequence[str]) -> tuple[Array, ...]:
    """Return arrays on the memory of the tensors passed as `out`."""
    check_tensors(zip(names, out, strict=True))
    for name, x in zip(names, out, strict=True):
        refuse_leaf(name, x)
        if x.is_neg():
            raise TypeError(f"{name} is negated lazily, so its memory does not hold its values; pass {name}.resolve_neg()")
    return tuple(map(to_array, out))


BACKEND = TorchBackend()
