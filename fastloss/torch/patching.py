"""`patch`: code that calls `torch.nn.functional` or the modules of `torch.nn` computes with fastloss, without a change."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastloss.backends.torch.memory_views import HALVES, has_memory, is_on_gpu, is_transformed
from fastloss.torch import functional

NAMES = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss")
DTYPES = (torch.float32, torch.float64, *(HALVES if importlib.util.find_spec("ml_dtypes") else ()))


class Patch:
    """What `patch` did, to be undone: by leaving the block of `with`, or by `undo`."""

    def __init__(self) -> None:
        self._originals = {name: getattr(torch.nn.functional, name) for name in NAMES}
        self._installed = {name: served(original, getattr(functional, name)) for name, original in self._originals.items()}
        for name, function in self._installed.items():
            setattr(torch.nn.functional, name, function)

    def undo(self) -> None:
        """Put back what was there; once, further calls do nothing. Raises `RuntimeError` while a later patch is in the way."""
        if changed := [name for name, function in self._installed.items() if getattr(torch.nn.functional, name) is not function]:
            raise RuntimeError(f"torch.nn.functional.{changed[0]} has been replaced since; patches are undone in the reverse order")
        for name in self._installed:
            setattr(torch.nn.functional, name, self._originals[name])
        self._installed = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def patch() -> Patch:
    """Make `torch.nn.functional`'s losses, and with them the modules of `torch.nn`, those of fastloss, for every thread.

        fastloss.torch.patch()                # from now on; .undo() of what it returns ends it
        with fastloss.torch.patch(): ...      # in the block alone

    What fastloss does not serve goes on to PyTorch's own: other devices (GPUs too, without CuPy), other or mixed dtypes, other
    shapes, tensors that are no plain ones, a weight that requires a gradient, torch.func's transforms, torch.jit.trace. Not for
    torch.jit.script. Names that were imported before (`from torch.nn.functional import mse_loss`) stay what they were.
    """
    return Patch()


def served(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ours where that serves, and else PyTorch's."""
    names = list(inspect.signature(original).parameters)[2:]

    @functools.wraps(original)
    def either(input: Any, target: Any, *args: Any, **options: Any) -> Any:
        known = len(args) <= len(names) and options.keys() <= set(names)
        function = ours if known and serves(input, target, dict(zip(names, args, strict=False)) | options) else original
        return function(input, target, *args, **options)

    return either


def serves(input: Any, target: Any, options: dict[str, Any]) -> bool:
    """Whether fastloss computes what PyTorch would."""
    weights = [options[name] for name in ("weight", "pos_weight") if options.get(name) is not None]
    tensors = [input, target, *weights]
    if not all(isinstance(x, Tensor) and is_served(x) and x.layout is torch.strided and x.dtype in DTYPES for x in tensors):
        return False
    if not torch.compiler.is_compiling() and (is_transformed(tensors) or not has_memory(tensors)):
        return False
    numbers = [options[name] for name in ("beta", "delta") if name in options]
    return (
        input.shape == target.shape
        and all(agree(input, x) for x in tensors)
        and all(not x.requires_grad and broadcasts(x.shape, input.shape) for x in weights)
        and all(isinstance(x, (int, float)) and x > 0 for x in numbers)
        and options.get("reduction", "mean") in ("mean", "sum", "none")
    )


def is_served(tensor: Any) -> bool:
    """Whether a tensor is where fastloss computes: on the CPU, or on a GPU if CuPy is there."""
    return bool(tensor.is_cpu) or (is_on_gpu(tensor) and has_cupy())


@functools.cache
def has_cupy() -> bool:
    """Whether CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


def agree(input: Any, other: Any) -> bool:
    """Whether both have one dtype, or will have under autocast."""
    widened = torch.is_autocast_enabled(input.device.type) and torch.float64 not in (input.dtype, other.dtype)
    return input.dtype is other.dtype or widened


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of a shape broadcasts to another without changing it."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)
