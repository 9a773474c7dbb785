"""Calls of methods that compute several losses at once, with arrays on the memory of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastloss.backends.torch.bound_loss import as_value, machine_of, value_dtype
from fastloss.backends.torch.memory_views import check_tensors, has_memory, refuse_leaf, refuse_transforms, to_array, to_tensor
from fastloss.core.plan import Array


def compute_jointly(
    method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Any:
    """Call a method that computes several losses at once, with arrays on the tensors' memory. Return its results as tensors.

    Values have the given dtype, or that of the value of a loss of the first operand.
    """
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
    dtype = value_dtype(first) if dtype is None else dtype
    with machine_of(first, dtype) as call:
        result = method(**{**options, **arrays, "call": call})
    buffers = {} if out is None else {id(array): x for array, x in zip(arrays["out"], out, strict=True)}
    for x in buffers.values():
        increment_version(x)

    def convert(x: Any) -> Any:
        if x is None:
            return None
        if isinstance(x, tuple):
            return type(x)(*map(convert, x)) if hasattr(x, "_fields") else tuple(map(convert, x))
        if id(x) in buffers:
            return buffers[id(x)]
        return as_value(x, dtype) if isinstance(x, float) or not x.ndim else to_tensor(x)

    return convert(result)


def view_buffers(out: Sequence[Any], names: Sequence[str]) -> tuple[Array, ...]:
    """Return arrays on the memory of the tensors passed as `out`."""
    check_tensors(zip(names, out, strict=True))
    for name, x in zip(names, out, strict=True):
        refuse_leaf(name, x)
        if x.is_neg():
            raise TypeError(f"{name} is negated lazily, so its memory does not hold its values; pass {name}.resolve_neg()")
    return tuple(map(to_array, out))
