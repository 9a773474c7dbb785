"""Whether fastloss computes a call of `torch.nn.functional` as PyTorch does, and what the obstacle is if it does not.

An obstacle is described in a few words; "" means that there is none. Each check takes some 50 ns, and a call with small arrays waits
for all of them, so they are plain tests in a row.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch.autograd import forward_ad

from fastloss.backends.torch.memory_views import HALVES, PLAIN, STRIDED, has_pre_dispatch_modes, is_on_gpu, is_transform_active
from fastloss.core.definition import class_axis, entries_of

DTYPES = (torch.float32, torch.float64, *(HALVES if importlib.util.find_spec("ml_dtypes") else ()))


def find_obstacle(
    input: Any, target: Any, options: Collection[tuple[str, Any]], names: tuple[str, ...], is_compiling: bool, has_classes: bool = False
) -> str:
    """Return the obstacle to a call with these operands and options, or "" if fastloss supports it.

    `names` are the options that PyTorch's function has. While torch.compile traces the call (`is_compiling`), transforms and memory are
    not checked: torch.compile does that itself. `has_classes` is whether the targets are classes.
    """
    if not is_compiling and (dispatch_modes() or has_pre_dispatch_modes() or is_transform_active()):
        return name_active_mode()
    if obstacle := find_tensor_obstacle("input", input, input, is_compiling):
        return obstacle
    if has_classes and isinstance(target, Tensor) and not target.is_floating_point():
        if obstacle := find_index_obstacle(target, input, is_compiling):
            return obstacle
    elif obstacle := find_tensor_obstacle("target", target, input, is_compiling):
        return obstacle
    elif input.shape != target.shape:
        return "input and target have different shapes"
    if has_classes and (obstacle := find_class_obstacle(target, input)):
        return obstacle
    return find_option_obstacle(options, names, input, is_compiling, has_classes) if options else ""


def find_index_obstacle(target: Any, input: Any, is_compiling: bool) -> str:
    """Return the obstacle in class indices."""
    if type(target) not in PLAIN and not is_compiling:
        return f"target is a {type(target).__name__}, a subclass of torch.Tensor"
    if target.dtype is not torch.int64 and target.dtype is not torch.uint8:  # PyTorch raises an error
        return f"target has dtype {target.dtype}"
    if not (target.is_cpu and input.is_cpu) and target.device != input.device:
        return "target is on another device than input"
    return "" if tuple(target.shape) == entries_of(tuple(input.shape)) else "input and target have different shapes"


def find_class_obstacle(target: Any, input: Any) -> str:
    """Return the obstacle in tensors of a loss of classes."""
    if not input.dim():
        return "input has no axis of classes"
    return "target requires a gradient" if target.requires_grad else ""


def name_active_mode() -> str:
    """Name the transform, tracer or mode that is active in this thread."""
    if transforms_active():
        return "under a transform of torch.func"
    if is_tracing():
        return "under torch.jit.trace"
    return "under forward-mode differentiation" if forward_ad._current_level >= 0 else "under a TorchDispatchMode"


def find_tensor_obstacle(name: str, x: Any, input: Any, is_compiling: bool) -> str:
    """Return the obstacle in an operand or a weight: in itself, or beside the input."""
    if type(x) not in PLAIN and not (is_compiling and isinstance(x, Tensor)):
        return f"{name} is a {type(x).__name__}, {'a subclass of' if isinstance(x, Tensor) else 'not a'} torch.Tensor"
    if x.layout is not STRIDED:
        return f"{name} has layout {x.layout}"
    if not x.is_cpu and (obstacle := find_device_obstacle(name, x)):
        return obstacle
    if (dtype := x.dtype) not in DTYPES:
        return f"{name} has dtype {dtype}{', and ml_dtypes is not installed' if dtype in HALVES else ''}"
    if x is not input:
        if dtype is not input.dtype and not are_widened(x, input):
            return f"{name} has dtype {dtype}, and input {input.dtype}"
        if not (x.is_cpu and input.is_cpu) and x.device != input.device:
            return f"{name} is on another device than input"
    return f"{name} is negated lazily" if not is_compiling and x.is_neg() else ""


def find_device_obstacle(name: str, x: Any) -> str:
    """Return the obstacle in the device of a tensor that is not on the CPU."""
    if not is_on_gpu(x):
        return f"{name} is on a device of type {x.device.type}"
    return "" if has_cupy() else f"{name} is on a GPU, and CuPy is not installed"


@functools.cache
def has_cupy() -> bool:
    """Whether CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


def are_widened(x: Any, input: Any) -> bool:
    """Whether two tensors of different dtypes get the same dtype under autocast."""
    return torch.is_autocast_enabled(input.device.type) and torch.float64 not in (input.dtype, x.dtype)


def find_option_obstacle(
    options: Iterable[tuple[str, Any]], names: tuple[str, ...], input: Any, is_compiling: bool, has_classes: bool
) -> str:
    """Return the obstacle in the arguments other than the operands."""
    weighted = input.shape[class_axis(input.dim()) :][:1] if has_classes else input.shape
    for name, x in options:
        if name not in names:
            return f"{name} is not an argument of PyTorch's function"
        if name == "reduction":
            if x not in ("mean", "sum", "none"):
                return f"reduction is {x!r}" if isinstance(x, str) else "reduction is not a string"
        elif name in ("weight", "pos_weight") and x is not None:
            if obstacle := find_tensor_obstacle(name, x, input, is_compiling) or find_weight_obstacle(name, x, weighted):
                return obstacle
        elif name in ("beta", "delta") and not (isinstance(x, (int, float)) and x > 0):
            return f"{name} is not a number above 0"
        elif name == "label_smoothing" and not (isinstance(x, (int, float)) and 0 <= x <= 1):
            return f"{name} is not a number from 0 to 1"
    return ""


def find_weight_obstacle(name: str, weight: Any, shape: tuple[int, ...]) -> str:
    """Return the obstacle in a weight that is a tensor like the input, and should broadcast to a shape."""
    if weight.requires_grad:
        return f"{name} requires a gradient"
    return "" if broadcasts_to(weight.shape, shape) else f"{name} does not broadcast to the shape of input"


def broadcasts_to(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to exactly another shape."""
    if shape == to:
        return True
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)
