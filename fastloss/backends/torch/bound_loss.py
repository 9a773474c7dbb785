"""`BoundLoss`: a loss bound to tensors of given dtypes, shapes and strides, and to everything else of a call but its numbers.

A call with the same kinds of arguments finds the `BoundLoss` of an earlier one. Its value and gradients can be computed in the
forward pass or in the backward pass.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastloss.backends.torch.memory_views import HALVES, allocator_for, form_of, is_on_gpu, is_plain, to_array, to_tensor
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, Call
from fastloss.core.definition import operand_of
from fastloss.cpu.call import HostCall
from fastloss.cpu.prepared import PreparedPass

VALUE = ("value",)
data_ptr = torch.Tensor.data_ptr
NUMPY_FLOATS = {torch.float32: np.float32, torch.float64: np.float64}


@contextlib.contextmanager
def machine_of(tensor: Any, dtype: torch.dtype) -> Iterator[type[Call]]:
    """Enter the device of a tensor, and yield the subclass of `Call` that computes there and returns values of a dtype."""
    if not is_on_gpu(tensor):
        yield HostCall
        return
    from fastloss.backends.torch import gpu

    with gpu.current(tensor):
        yield gpu.call_of(dtype)


class BoundLoss:
    """A loss with all arguments of a call but its tensors and numbers, which each method takes.

    `tensors` are the two operands, followed by the tensors that are options. `settings` are the other options: numbers and flags.
    """

    def __init__(self, loss: AbstractLoss, reduction: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
        self.loss, self.reduction = loss, reduction
        self.names = names  # of the tensors that are options
        self.dtype = dtype  # of the value
        self.writes_value = loss.writes_value(reduction)
        is_elementwise = loss.definition is not None and not loss.definition.classes
        self.has_axes_of_its_own = reduction == "none" and not is_elementwise  # whether the value has other axes than the input
        self.saves_operands, self.has_early_slopes = True, False
        self.apply: Any = None  # applies the autograd function of the loss

    def plan_backward(self, first: Any, second: Any, settings: Mapping[str, Any]) -> None:
        """Decide what the forward pass computes and saves for the backward pass, given operands of which one requires a gradient."""
        has_halves = first.dtype in HALVES or second.dtype in HALVES
        # A loss whose slope does not depend on the distance between its operands needs neither of them in the backward pass, if each
        # element has the same weight. On a GPU, an upstream gradient that is divided by the number of elements there would underflow
        # in 16 bits.
        is_plain_sum = self.loss.is_piecewise_linear and not self.names and "ignore_index" not in settings
        self.saves_operands = not is_plain_sum or (has_halves and is_on_gpu(first))
        # In 16 bits the gradient of a large mean underflows to 0 unless it is computed from an upstream gradient that includes the
        # loss scale, and a product of two rounded numbers would be rounded twice. A loss may also have a value for each channel or
        # for each entry with several classes.
        self.has_early_slopes = not (self.saves_operands and has_halves) and not self.has_axes_of_its_own

    def compute(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: Sequence[Any], settings: Mapping[str, Any], **options: Any
    ) -> tuple[Any, list[Any]]:
        """Compute the reduced value or None, and one tensor for each quantity in `wanted`. Options may be `grad_output` and `out`."""
        with machine_of(tensors[0], self.dtype) as call:
            arguments = self.arguments(summed, wanted, tensors, settings, **options)
            if tensors[0].numel():
                value, computed = self.loss.compute(arguments, call)
            else:
                with warnings.catch_warnings():  # unlike NumPy, PyTorch does not warn of a mean over no elements
                    warnings.simplefilter("ignore", RuntimeWarning)
                    value, computed = self.loss.compute(arguments, call)
            return (self.as_value(value) if summed else None), [to_tensor(x) for x in computed]

    def arguments(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: Sequence[Any], settings: Mapping[str, Any], **options: Any
    ) -> Arguments:
        """Return the arguments of a call with arrays on the tensors' memory."""
        first, second, *others = [to_array(x) for x in tensors]
        given = {name: to_array(x) if isinstance(x, torch.Tensor) else x for name, x in options.items() if x is not None}
        given |= settings
        given |= zip(self.names, others, strict=True)
        weight = given.pop("weight", None)
        return Arguments(summed, wanted, first, second, weight, self.reduction, given)

    def value(self, tensors: Sequence[Any], settings: Mapping[str, Any]) -> Any:
        """Compute the value as a tensor."""
        if self.writes_value:
            return self.compute((), VALUE, tensors, settings)[1][0]
        return self.compute(VALUE, (), tensors, settings)[0]

    def value_and_slopes(
        self, wanted: tuple[str, ...], tensors: Sequence[Any], settings: Mapping[str, Any], unit: float
    ) -> tuple[Any, list[Any]]:
        """Compute the value, and gradients for the upstream gradient `unit`."""
        if self.writes_value:
            *slopes, value = self.compute((), (*wanted, "value"), tensors, settings)[1]
            return value, slopes
        if unit == 1.0:
            return self.compute(VALUE, wanted, tensors, settings)
        return self.compute(VALUE, wanted, tensors, settings, grad_output=unit)

    def unit(self, tensors: Sequence[Any]) -> float:
        """Return the upstream gradient for which a piecewise linear loss computes its gradients in the forward pass.

        For 16-bit tensors it is the number that the reduction divides by, so that gradients are 1, 0 and -1, without rounding error.
        """
        first = tensors[0]
        if first.dtype not in HALVES or self.reduction not in ("mean", "batchmean"):
            return 1.0
        return float(first.numel() if self.reduction == "mean" else len(first))

    def slopes(self, wanted: tuple[str, ...], tensors: Sequence[Any], settings: Mapping[str, Any], upstream: Any) -> list[Any]:
        """Compute gradients, given the upstream gradient."""
        return self.compute((), wanted, tensors, settings, grad_output=upstream)[1]

    def as_value(self, value: Any) -> Any:
        """Convert a reduced value to a tensor of the value's dtype."""
        return as_value(value, self.dtype)


class TensorPass(PreparedPass):
    """A prepared pass over tensors, which allocates its outputs."""

    def __init__(self, call: HostCall, names: tuple[str, ...], tensors: Sequence[Any]) -> None:
        """Prepare the pass of a call. `names` are those of the tensors, and `tensors` are examples."""
        alike = [tensors[operand_of(name) == "target"] for name in call.arguments.wanted]
        super().__init__(call, names, [to_array(torch.empty_like(x, requires_grad=False)) for x in alike])
        self.allocators = list(zip(map(allocator_for, alike), self.alike, strict=True))

    def run_on(self, tensors: Sequence[Any], settings: Mapping[str, Any], upstream: float) -> tuple[float, bool, list[Any]]:
        """Compute; return the value, whether an element lies outside [0, 1] or a mean is one of no elements, and the outputs."""
        outputs = [allocate(tensors[k]) for allocate, k in self.allocators] if self.allocators else []
        read = tensors if self.order is None else [tensors[k] for k in self.order]
        addresses = [*map(data_ptr, read), *map(data_ptr, outputs)]
        value, bad = self.run(addresses, settings, upstream)
        return value, bad, outputs


class PreparedLoss(BoundLoss):
    """A `BoundLoss` of a loss that takes one pass, on the CPU, with passes prepared for tensors of given dtypes, shapes and strides."""

    def __init__(
        self, loss: AbstractLoss, reduction: str, names: tuple[str, ...], dtype: torch.dtype, tensors: Sequence[Any],
        settings: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(loss, reduction, names, dtype)
        self.plan_backward(tensors[0], tensors[1], settings)
        self.forms = list(map(form_of, tensors))
        self.passes: dict[Any, TensorPass] = {}  # by the quantities, and the form of an upstream gradient of the loss's shape

    def compute(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: Sequence[Any], settings: Mapping[str, Any],
        grad_output: Any = None, **options: Any
    ) -> tuple[Any, list[Any]]:  # fmt: skip
        """Compute the reduced value or None, and one tensor for each quantity in `wanted`."""
        upstream, form, read = 1.0, None, tensors
        if grad_output is not None:
            if isinstance(grad_output, torch.Tensor) and grad_output.dim():
                form, read = form_of(grad_output), [*tensors, grad_output]
            else:
                upstream = float(grad_output)
        if options or (form is not None and not is_plain(grad_output)):
            return super().compute(summed, wanted, tensors, settings, grad_output=grad_output, **options)
        made = self.passes.get((summed, wanted, form))
        if made is None:
            call = self.loss.bind(self.arguments(summed, wanted, tensors, settings, grad_output=grad_output), HostCall)
            made = self.passes[summed, wanted, form] = TensorPass(call, (*self.loss.operands, *self.names, "grad_output"), read)
        value, bad, outputs = made.run_on(read, settings, upstream)
        if bad:  # raises the error that names the element, or warns
            return super().compute(summed, wanted, tensors, settings, grad_output=grad_output)
        return (self.as_value(value) if summed else None), outputs

    def slopes(self, wanted: tuple[str, ...], tensors: Sequence[Any], settings: Mapping[str, Any], upstream: Any) -> list[Any]:
        """Compute gradients, given the upstream gradient."""
        if list(map(form_of, tensors)) == self.forms:
            return self.compute((), wanted, tensors, settings, grad_output=upstream)[1]
        return BoundLoss.compute(self, (), wanted, tensors, settings, grad_output=upstream)[1]  # a hook has changed a saved tensor

    def as_value(self, value: float) -> Any:
        """Convert a reduced value to a tensor of the value's dtype."""
        dtype = NUMPY_FLOATS.get(self.dtype)
        return as_value(value, self.dtype) if dtype is None else torch.from_numpy(np.array(value, dtype))


def as_value(value: Any, dtype: torch.dtype) -> Any:
    """Convert a reduced value to a tensor of a dtype."""
    if isinstance(value, float):
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")
    return to_tensor(value).to(dtype)


def value_dtype(first: Any) -> torch.dtype:
    """Return the dtype of the value: that of the first operand, but float32 for 16-bit operands under autocast, as in PyTorch."""
    return torch.float32 if first.dtype in HALVES and torch.is_autocast_enabled(first.device.type) else first.dtype
