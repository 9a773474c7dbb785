"""`BoundLoss`: a loss bound to the arguments of one call. It can be computed in the forward pass or in the backward pass."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastloss.backends.torch.gradient_memory import empty_like
from fastloss.backends.torch.memory_views import HALVES, is_on_gpu, to_array, to_tensor
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, Call
from fastloss.core.plan import Array
from fastloss.cpu.call import HostCall


class TensorCall(HostCall):
    """A call on CPU tensors, viewed as NumPy arrays. Large outputs reuse the memory of freed gradients."""

    __slots__ = ()
    empty_like = staticmethod(empty_like)


@contextlib.contextmanager
def machine_of(tensor: Any, dtype: torch.dtype) -> Iterator[type[Call]]:
    """Enter the device of a tensor, and yield the subclass of `Call` that computes there and returns values of a dtype."""
    if not is_on_gpu(tensor):
        yield TensorCall
        return
    from fastloss.backends.torch import gpu

    with gpu.current(tensor):
        yield gpu.call_of(dtype)


class BoundLoss(NamedTuple):
    """A loss with all arguments of a call that are not tensors."""

    loss: AbstractLoss
    reduction: str
    names: tuple[str, ...]  # of the tensors that follow the two operands
    settings: Mapping[str, Any]  # the other options: numbers and flags
    dtype: torch.dtype  # of the value

    def compute(self, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: Sequence[Any], **options: Any) -> tuple[Any, list[Array]]:
        """Compute the reduced value or None, and one array for each quantity in `wanted`, on the tensors' memory."""
        with machine_of(tensors[0], self.dtype) as call:
            first, second, *others = [to_array(x) for x in tensors]
            options |= self.settings
            options |= zip(self.names, others, strict=True)
            weight = options.pop("weight", None)
            arguments = Arguments(summed, wanted, first, second, weight, self.reduction, options)
            if first.size:
                return self.loss.compute(arguments, call)
            with warnings.catch_warnings():  # unlike NumPy, PyTorch does not warn of a mean over no elements
                warnings.simplefilter("ignore", RuntimeWarning)
                return self.loss.compute(arguments, call)

    def value(self, tensors: Sequence[Any]) -> Any:
        """Compute the value as a tensor."""
        if self.loss.writes_value(self.reduction):
            return to_tensor(self.compute((), ("value",), tensors)[1][0])
        return self.as_value(self.compute(("value",), (), tensors)[0])

    def slopes(self, wanted: tuple[str, ...], tensors: Sequence[Any], **options: Any) -> list[Any]:
        """Compute gradients as tensors."""
        return [to_tensor(x) for x in self.compute((), wanted, tensors, **options)[1]]

    def as_value(self, value: Any) -> Any:
        """Convert a reduced value to a tensor of the value's dtype."""
        return as_value(value, self.dtype)

    def has_early_slopes(self, first: Any, second: Any) -> bool:
        """Whether to compute gradients in the forward pass, assuming that the upstream gradient will be 1.

        With reduction "none" the upstream gradient seldom is 1. In 16 bits the gradient of a large mean underflows to 0 unless it is
        computed from an upstream gradient that includes the loss scale.
        """
        return self.reduction != "none" and first.dtype not in HALVES and second.dtype not in HALVES


def as_value(value: Any, dtype: torch.dtype) -> Any:
    """Convert a reduced value to a tensor of a dtype."""
    if isinstance(value, float):
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    return to_tensor(value).to(dtype)
