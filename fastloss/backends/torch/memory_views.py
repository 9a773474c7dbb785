"""Conversions between tensors and arrays on the same memory, and checks of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_included
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastloss.backends.torch.dtypes import bfloat16, numpy_dtype
from fastloss.core.plan import Array
from fastloss.cpu import memory

PROPERTIES = attrgetter("__class__", "dtype", "shape", "layout", "is_cpu")
PLAIN, STRIDED = (torch.Tensor, torch.nn.Parameter), torch.strided
HALVES = (torch.float16, torch.bfloat16)
# whether there are dispatch modes of that kind; torch._ops counts them in 0.25 us, and this takes 0.09
has_pre_dispatch_modes = functools.partial(_dispatch_tls_is_dispatch_key_included, DispatchKey.PreDispatch)


def is_on_gpu(tensor: Any) -> bool:
    """Whether a tensor is in the memory of a GPU."""
    return bool(tensor.is_cuda)


def to_array(tensor: Any) -> Array:
    """Return an array on a tensor's memory: a NumPy array, or a CuPy array on a GPU. A tensor that is negated lazily is copied."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if is_on_gpu(tensor):
        from fastloss.backends.torch.gpu import to_array

        return to_array(tensor)
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(bfloat16())
    array: Array = tensor.numpy()
    return array


def to_tensor(array: Array) -> Any:
    """Return a tensor on the memory of a NumPy or CuPy array."""
    if not isinstance(array, np.ndarray):
        from fastloss.backends.torch.gpu import to_tensor

        return to_tensor(array)
    if array.dtype.kind == "V":  # bfloat16; comparing the kind is faster than comparing the name
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def allocator_for(tensor: Any) -> Callable[[Any], Any]:
    """Return a function that allocates as `torch.empty_like` does. A large tensor on the CPU reuses the memory of freed gradients."""
    is_dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return empty_from_cache if is_dense and memory.is_cached(tensor.numel() * tensor.element_size()) else torch.empty_like


def empty_from_cache(tensor: Any) -> Any:
    """Allocate a tensor of the same dtype, shape and strides from the memory of freed gradients."""
    dtype = numpy_dtype(tensor.dtype)
    return to_tensor(memory.empty(tuple(tensor.shape), dtype, tuple([dtype.itemsize * stride for stride in tensor.stride()])))


def form_of(tensor: Any) -> tuple[Any, ...]:
    """Return all that decides how a tensor is read: class, dtype, shape, layout and place, strides, and whether it is negated lazily."""
    return PROPERTIES(tensor), tensor.stride(), tensor.is_neg()


def is_plain(tensor: Any) -> bool:
    """Whether a tensor's values lie in the memory of the CPU, at the places that its strides say."""
    return type(tensor) in PLAIN and tensor.is_cpu and not is_on_gpu(tensor) and tensor.layout is STRIDED and not tensor.is_neg()


def check_tensors(named: Iterable[tuple[str, Any]]) -> None:
    """Refuse arguments that are not tensors, and tensors that are sparse or on different devices."""
    place: Any = None
    for name, x in named:
        if not isinstance(x, Tensor):
            found = f"{type(x).__module__}.{type(x).__qualname__}"
            raise TypeError(f"{name} is a {found}, but the input is a tensor; accepted: torch.Tensor; pass torch.as_tensor({name})")
        if not (x.is_cpu or x.is_meta or is_on_gpu(x)):
            raise NotImplementedError(f"{name} is on {x.device}; accepted: tensors on the CPU or on a CUDA device")
        if x.device != (place := x.device if place is None else place):
            raise ValueError(f"{name} is on {x.device}, but the input is on {place}; accepted: tensors on one device")
        if x.layout is not STRIDED:
            raise TypeError(f"{name} has layout {x.layout}; accepted: torch.strided")


def has_memory(tensors: Sequence[Any]) -> bool:
    """Whether tensors have real memory, and no compiler, transform or dispatch mode is tracing."""
    if is_compiling():
        return False
    for x in tensors:
        if type(x) not in PLAIN or x.layout is not STRIDED or x.is_neg():  # negated lazily: the memory holds the values before negation
            return False
        if not x.is_cpu and not (is_on_gpu(x) and x.device == tensors[0].device):
            return False
    return not is_traced()


def is_traced() -> bool:
    """Whether a transform or a dispatch mode is active, which may replace tensors that look plain."""
    return is_transform_active() or dispatch_modes() > 0 or has_pre_dispatch_modes()


def is_transform_active() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or torch.jit.trace is active."""
    return forward_ad._current_level >= 0 or transforms_active() or is_tracing()


def is_transformed(tensors: Sequence[Any]) -> bool:
    """Whether an active transform may apply to these tensors. Under torch.compile, which makes its own checks, the answer is no."""
    if is_compiling() or not is_transform_active():
        return False
    only_forward_mode = forward_ad._current_level >= 0 and not transforms_active()
    return not only_forward_mode or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_transforms(tensors: Sequence[Any]) -> None:
    """Refuse tensors under a transform, which would compute wrong derivatives, none at all, or a constant."""
    if is_transformed(tensors):
        raise NotImplementedError(
            "fastloss does not support torch.func's transforms (grad, vmap, jvp, ...), forward-mode derivatives or torch.jit.trace; "
            "accepted: torch.autograd, torch.compile, torch.export"
        )


def refuse_gradient(name: str, tensor: Any) -> None:
    """Refuse an option that requires a gradient: losses are differentiable only with respect to their operands."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name} requires a gradient, and losses are not differentiable with respect to it; pass {name}.detach()")


def refuse_leaf(name: str, tensor: Any) -> None:
    """Refuse to overwrite a leaf that requires a gradient, or a view of one: it may be a parameter that an optimiser updates."""
    base = tensor._base if tensor._is_view() else tensor
    if base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is a leaf that requires a gradient, or a view of one, and must not be overwritten; "
            "accepted: tensors that do not require a gradient, and outputs of operations"
        )
