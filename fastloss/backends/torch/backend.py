"""The backend for PyTorch tensors. A value has autograd attached; torch.compile sees each loss as an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_grad_enabled
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from fastloss.backends.protocol import Backend
from fastloss.backends.torch import operators
from fastloss.backends.torch.autograd import function_of
from fastloss.backends.torch.bound_loss import VALUE, BoundLoss, PreparedLoss, value_dtype
from fastloss.backends.torch.joint import compute_jointly, view_buffers
from fastloss.backends.torch.layer import compute_layer_of_tensors, value_of_layer
from fastloss.backends.torch.memory_views import (
    HALVES,
    PROPERTIES,
    STRIDED,
    check_tensors,
    form_of,
    has_memory,
    is_plain,
    is_traced,
    refuse_gradient,
    refuse_leaf,
    refuse_transforms,
    to_array,
)
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments
from fastloss.core.checks import refuse_shared_elements, to_validate
from fastloss.core.sparse import SparseMatrix, sparse_matrix_of
from fastloss.cpu.prepared import MOST_PREPARED, sort_options

NO_ARRAYS: list[Any] = []
SPECIAL = ("grad_output", "inplace_grad", "out", "process_group")  # options that are not passed on to `Arguments` unchanged
UNPREPARED = ("grad_output", "out", "process_group")  # options of calls for which no pass is prepared


class TorchBackend(Backend):
    """The backend for PyTorch tensors, on the CPU and on CUDA devices."""

    options = ("inplace_grad", "process_group")

    def __init__(self) -> None:
        self.bound: dict[Any, PreparedLoss] = {}  # by everything of a call but its tensors' elements and the values of parameters

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Any]]:
        """Compute the requested quantities as tensors. If only the value is requested, it has autograd attached."""
        if is_compiling():
            return self.compute_unprepared(loss, arguments)
        summed, wanted, first, second, weight, reduction, options = arguments
        if not isinstance(second, Tensor) or type(reduction) is not str or is_traced():
            return self.compute_unprepared(loss, arguments)
        is_cast = first.dtype in HALVES and torch.is_autocast_enabled(first.device.type)
        key: tuple[Any, ...] = (  # with `form_of` of both, without its calls
            loss, reduction, is_cast, PROPERTIES(first), first.stride(), first.is_neg(),
            PROPERTIES(second), second.stride(), second.is_neg(),
        )  # fmt: skip
        tensors: tuple[Any, ...] = (first, second)
        settings: dict[str, Any] = {}
        names: tuple[str, ...] = ()
        if weight is not None or options:
            found = sort_options(loss, weight, options, form_of_option, UNPREPARED, "inplace_grad")
            if found is None or options.get("inplace_grad"):
                return self.compute_unprepared(loss, arguments)
            names, others, settings, forms = found
            tensors, key = (*tensors, *others), (*key, forms)
        bound = self.bound.get(key) or self.bind(key, tensors, names, settings)
        if bound is None:
            return self.compute_unprepared(loss, arguments)
        if (summed and wanted) or (wanted and wanted != VALUE):
            return bound.compute(summed, wanted, tensors, settings)
        if is_grad_enabled() and (first.requires_grad or second.requires_grad):
            value = differentiable_value(bound, tensors, settings)
        else:
            value = bound.value(tensors, settings)
        return (value, NO_ARRAYS) if summed else (None, [value])

    def bind(
        self, key: tuple[Any, ...], tensors: Sequence[Any], names: tuple[str, ...], settings: Mapping[str, Any]
    ) -> PreparedLoss | None:
        """Bind a loss to the kinds of the arguments of a call and remember it; return None if no pass can be prepared."""
        loss, reduction, is_cast, *_ = key
        if loss.definition is None or not all(map(is_plain, tensors)) or not tensors[0].numel():
            return None
        if reduction not in ("mean", "sum", "batchmean") and (reduction != "none" or is_cast or loss.definition.classes):
            return None
        bound = PreparedLoss(loss, reduction, names, torch.float32 if is_cast else tensors[0].dtype, tensors, settings)
        bound.apply = function_of(loss)
        if len(self.bound) >= MOST_PREPARED:
            self.bound.clear()
        self.bound[key] = bound
        return bound

    def compute_unprepared(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Any]]:
        """Compute what no pass can be prepared for: traced tensors, those on a GPU, and losses or options that take several passes."""
        summed, wanted, first, second, weight, reduction, options = arguments
        tensors = [first, second]
        names: list[str] = []
        settings: dict[str, Any] = {}
        special: dict[str, Any] = {}
        sort({"weight": weight, **options}, names, tensors, settings, special)
        if not (with_memory := has_memory(tensors)):
            check_tensors(zip((*loss.operands, *names), tensors, strict=True))
            refuse_transforms(tensors)
        bound = BoundLoss(loss, reduction, tuple(names), value_dtype(first))
        if "process_group" in special:
            return joined(bound, summed, wanted, tensors, settings, special, with_memory)
        if (*summed, *wanted) != VALUE:
            if special.get("inplace_grad"):
                raise ValueError("inplace_grad is an option of calls for the value alone; pass out= to choose where a gradient is written")
            return (evaluate if with_memory else operators.evaluate)(bound, summed, wanted, tensors, settings, special)
        if "out" in special:
            raise ValueError("out is not supported in a call for the value of tensors; accepted: out in a call of grad or value_and_grad")
        for name, x in zip(names, tensors[2:], strict=True):
            refuse_gradient(name, x)
        if bound.dtype is not first.dtype and bound.writes_value:
            tensors[0] = first.to(bound.dtype)
        if with_memory:
            bound.plan_backward(tensors[0], tensors[1], settings)
            bound.apply = function_of(loss)
            requires_grad = is_grad_enabled() and (tensors[0].requires_grad or tensors[1].requires_grad)
            in_place = bool(special.get("inplace_grad"))
            value = differentiable_value(bound, tensors, settings, in_place) if requires_grad else bound.value(tensors, settings)
        else:
            value = operators.value(bound, tensors, settings)
        return (value, []) if summed else (None, [value])

    def as_array(self, name: str, value: Any) -> Any:
        """Return a tensor unchanged. Raise TypeError for anything else."""
        if not isinstance(value, Tensor):
            check_tensors([(name, value)])
        return value

    def compute_jointly(self, method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a method that computes several losses at once, with arrays on the tensors' memory. Return its results as tensors."""
        return compute_jointly(method, operands, options)

    def compute_layer(
        self, loss: AbstractLoss, piece: int, operands: Mapping[str, Any], options: Mapping[str, Any], wanted: tuple[bool, ...]
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """Compute the value of a loss of a linear layer, and the wanted gradients."""
        return compute_layer_of_tensors(loss, piece, operands, options, wanted, value_dtype(operands["input"]))

    def value_of_layer(self, loss: AbstractLoss, piece: int, operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Compute the value of a loss of a linear layer, with autograd attached to input, weight and bias."""
        return value_of_layer(functools.partial(self.compute_layer, loss, piece), loss, piece, operands, options)

    @staticmethod
    def sparse_matrix(x: Any) -> SparseMatrix | None:
        """Return the values of a sparse tensor, or of a matrix of SciPy; None for anything else."""
        if not isinstance(x, Tensor):
            return sparse_matrix_of(x)
        if x.layout is STRIDED:
            return None
        refuse_gradient("target", x)
        matrix = x.to_sparse_coo().coalesce()
        rows, columns = matrix.indices().clone()  # torch.compile cannot trace a view of a sparse tensor
        return SparseMatrix(tuple(matrix.shape), *map(to_array, (rows, columns, matrix.values().clone())))

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape and dtype, or float32 for integers, by broadcasting a single element."""
        if target.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("target requires a gradient, but this function is not differentiable; pass target.detach()")
        dtype = target.dtype if target.is_floating_point() else torch.float32
        return torch.zeros((), dtype=dtype, device=target.device).expand(target.shape)


def form_of_option(x: Any) -> Any:
    """Return the form of a tensor that is an option; None if it is not a tensor, a number, or requires a gradient."""
    return form_of(x) if isinstance(x, Tensor) and x.dim() and not x.requires_grad else None


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


def differentiable_value(bound: BoundLoss, tensors: Sequence[Any], settings: Mapping[str, Any], inplace_grad: bool = False) -> Any:
    """Compute the value with autograd attached."""
    if inplace_grad and bound.loss.gradients > 1:
        raise TypeError(f"inplace_grad is not supported by {bound.loss.__name__}, which has two gradients")
    if inplace_grad and tensors[0].requires_grad:
        refuse_leaf("inplace_grad=True: the input", tensors[0])
        refuse_shared_elements("the input, which inplace_grad=True overwrites,", tensors[0].shape, tensors[0].stride(), 1)
    if tensors[1].requires_grad:
        bound.loss.require("target_slope")
    return bound.apply((bound, settings, inplace_grad), *tensors)


def joined(
    bound: BoundLoss, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: list[Any], settings: Mapping[str, Any],
    special: Mapping[str, Any], with_memory: bool,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """Compute the value of a batch that lies on the processes of a group."""
    if not with_memory:
        raise NotImplementedError("process_group is not supported in compiled code; call the loss outside")
    if summed != VALUE or wanted or special.keys() & {"out", "inplace_grad"}:
        others = "without out, inplace_grad, and reductions that keep an axis"
        raise TypeError(f"process_group is an option of calls for the value, {others}; gradients come from backward()")
    for name, x in zip(bound.names, tensors[2:], strict=True):
        refuse_gradient(name, x)
    from fastloss.backends.torch import ranks  # PyTorch may be built without torch.distributed

    return ranks.joined_value(bound, tensors, settings, special["process_group"]), []


def evaluate(
    bound: BoundLoss, summed: tuple[str, ...], wanted: tuple[str, ...], tensors: list[Any], settings: Mapping[str, Any],
    special: Mapping[str, Any],
) -> tuple[Any, list[Any]]:  # fmt: skip
    """Compute value and derivatives without autograd, and write the derivatives to `out` if the caller passed it."""
    out = special.get("out")
    options: dict[str, Any] = {"grad_output": special.get("grad_output")}
    buffers: list[Any] = []
    if out is not None:
        several = isinstance(out, (tuple, list))
        buffers = list(out) if several else [out]
        arrays = view_buffers(buffers, [f"out[{k}]" for k in range(len(buffers))] if several else ["out"])
        options["out"] = arrays if several else arrays[0]
    value, computed = bound.compute(summed, wanted, tensors, settings, **options)
    for x in buffers:
        increment_version(x)
    return value, [*buffers, *computed[len(buffers) :]]


BACKEND = TorchBackend()
