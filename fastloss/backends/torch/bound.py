"""`Bound`: a loss with the arguments of one call, to be computed on tensors, now or in a backward pass."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastloss.backends.torch.memory_views import HALVES, is_on_gpu, to_array, to_tensor
from fastloss.backends.torch.reuse import empty_like
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, Call
from fastloss.core.plan import Array
from fastloss.cpu.call import HostCall


class TensorCall(HostCall):
    """A call of CPU tensors, viewed as arrays. Large outputs reuse memory of earlier gradients."""

    __slots__ = ()
    empty_like = staticmethod(empty_like)


@contextlib.contextmanager
def machine_of(tensor: Any, dtype: torch.dtype) -> Iterator[type[Call]]:
    """Enter the device of a tensor, and yield the class of calls whose values have a dtype there."""
    if not is_on_gpu(tensor):
        yield TensorCall
        return
    from fastloss.backends.torch import gpu

    with gpu.current(tensor):
        yield gpu.call_of(dtype)


class Bound(NamedTuple):
    """A loss with every argument of a call that is not a tensor."""

    loss: AbstractLoss
    reduction: str
    names: tuple[str, ...]  # of the tensors behind the two operands
    settings: Mapping[str, Any]  # the other options: numbers and flags
    dtype: torch.dtype  # of the value

    def compute(self, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: Sequence[Any], **options: Any) -> tuple[Any, list[Array]]:
        """Compute on the tensors' memory: the reduced value or None, and the arrays that are wanted."""
        with machine_of(tensors[0], self.dtype) as call:
            first, second, *others = [to_array(x) for x in tensors]
            options |= self.settings
            options |= zip(self.names, others, strict=True)
            weight = options.pop("weight", None)
            arguments = Arguments(summed, wanted, first, second, weight, self.reduction, options)
            if first.size:
                return self.loss.compute(arguments, call)
            with warnings.catch_warnings():  # PyTorch does not warn of a mean over no elements
                warnings.simplefilter("ignore", RuntimeWarning)
                return self.loss.compute(arguments, call)

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
        """Whether to compute gradients in the forward pass, assuming that the upstream gradient will be 1.

        With reduction "none" it seldom is. In 16 bits the gradient of a large mean would be 0 before the loss scale, which the
        upstream gradient carries, could save it.
        """
        return self.reduction != "none" and first.dtype not in HALVES and second.dtype not in HALVES


def as_value(value: Any, dtype: torch.dtype) -> Any:
    """Return a reduced value as a tensor."""
    if isinstance(value, float):
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    return to_tensor(value).to(dtype)
