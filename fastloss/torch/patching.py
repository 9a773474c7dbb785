"""`patch`: make unchanged code that calls `torch.nn.functional` or modules of `torch.nn` compute losses with fastloss."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastloss.backends.torch.memory_views import HALVES, has_memory, is_on_gpu, is_transformed
from fastloss.core.checks import caller_level
from fastloss.torch import functional

NAMES = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss")
DTYPES = (torch.float32, torch.float64, *(HALVES if importlib.util.find_spec("ml_dtypes") else ()))


class Patch:
    """An active patch of `torch.nn.functional`. It ends when its `with` block is left, or when `undo` is called."""

    def __init__(self) -> None:
        self._originals = {name: getattr(torch.nn.functional, name) for name in NAMES}
        self._installed = {name: with_fallback(original, getattr(functional, name)) for name, original in self._originals.items()}
        for name, function in self._installed.items():
            setattr(torch.nn.functional, name, function)

    def undo(self) -> None:
        """Restore the functions that the patch replaced. Further calls do nothing.

        Raises:
            RuntimeError: a later patch is still active.
        """
        if changed := [name for name, function in self._installed.items() if getattr(torch.nn.functional, name) is not function]:
            raise RuntimeError(f"torch.nn.functional.{changed[0]} has been replaced since; patches must be undone in the reverse order")
        for name in self._installed:
            setattr(torch.nn.functional, name, self._originals[name])
        self._installed = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def patch() -> Patch:
    """Replace the losses of `torch.nn.functional`, which the modules of `torch.nn` call too, with those of fastloss, in all threads.

        patched = fastloss.torch.patch()      # until patched.undo()
        with fastloss.torch.patch(): ...      # only inside the block

    Calls that fastloss does not support still go to PyTorch's functions: other devices (also GPUs if CuPy is not installed), other
    or mixed dtypes, operands of different shapes, subclasses of `torch.Tensor` other than parameters, a weight that requires a
    gradient, transforms of torch.func, and torch.jit.trace. torch.jit.script compiles PyTorch's functions. Functions that were
    imported by name before the patch (`from torch.nn.functional import mse_loss`) are not replaced.
    """
    return Patch()


def with_fallback(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that calls fastloss's loss if it supports the arguments, and PyTorch's otherwise."""
    names = list(inspect.signature(original).parameters)[2:]

    @functools.wraps(original)
    def dispatch(input: Any, target: Any, *args: Any, **options: Any) -> Any:
        known = len(args) <= len(names) and options.keys() <= set(names)
        if known and is_supported(input, target, dict(zip(names, args, strict=False)) | options):
            return ours(input, target, *args, **options)
        if torch.compiler.is_compiling() or getattr(input, "shape", None) == getattr(target, "shape", None):
            return original(input, target, *args, **options)
        return call_from_users_line(functools.partial(original, input, target, *args, **options))

    # torch.jit.script compiles the function that this hook returns; under a second patch, `wraps` has copied the hook of the first
    vars(dispatch).setdefault("__prepare_scriptable__", lambda: original)
    return dispatch


def call_from_users_line(function: Callable[[], Any]) -> Any:
    """Call a function from a frame with the file, line and globals of the user's call.

    If the shapes of the operands differ, PyTorch's functions warn with `stacklevel=2`, which names the line of that frame.
    """
    user = sys._getframe(caller_level() - 1)
    code = compile("function()", user.f_code.co_filename, "eval")
    return eval(code.replace(co_firstlineno=user.f_lineno, co_name=user.f_code.co_name), user.f_globals, {"function": function})


def is_supported(input: Any, target: Any, options: dict[str, Any]) -> bool:
    """Whether fastloss supports a call and computes the same as PyTorch."""
    weights = [options[name] for name in ("weight", "pos_weight") if options.get(name) is not None]
    tensors = [input, target, *weights]
    if not all(isinstance(x, Tensor) and is_on_supported_device(x) and x.layout is torch.strided and x.dtype in DTYPES for x in tensors):
        return False
    if not torch.compiler.is_compiling() and (is_transformed(tensors) or not has_memory(tensors)):
        return False
    numbers = [options[name] for name in ("beta", "delta") if name in options]
    return (
        input.shape == target.shape
        and all(have_one_dtype(input, x) for x in tensors)
        and all(not x.requires_grad and broadcasts_to(x.shape, input.shape) for x in weights)
        and all(isinstance(x, (int, float)) and x > 0 for x in numbers)
        and options.get("reduction", "mean") in ("mean", "sum", "none")
    )


def is_on_supported_device(tensor: Any) -> bool:
    """Whether fastloss supports the device of a tensor: a CPU, or a GPU if CuPy is installed."""
    return bool(tensor.is_cpu) or (is_on_gpu(tensor) and has_cupy())


@functools.cache
def has_cupy() -> bool:
    """Whether CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


def have_one_dtype(input: Any, other: Any) -> bool:
    """Whether two tensors have the same dtype, or get the same dtype under autocast."""
    widened = torch.is_autocast_enabled(input.device.type) and torch.float64 not in (input.dtype, other.dtype)
    return input.dtype is other.dtype or widened


def broadcasts_to(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape broadcasts to exactly another shape."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)
