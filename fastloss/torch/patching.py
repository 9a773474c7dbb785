"""`patch`: code that calls `torch.nn.functional` or the modules of `torch.nn` computes with fastloss, without a change."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from fastloss.torch import functional
from fastloss.torch.autograd import has_memory
from fastloss.torch.tensors import HALVES, Tensor

NAMES = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss")
DTYPES = (torch.float32, torch.float64, *(HALVES if importlib.util.find_spec("ml_dtypes") else ()))


class Patch:
    """What `patch` did, to be undone: by leaving the block of `with`, or by `undo`."""

    def __init__(self) -> None:
        self._originals: dict[str, Callable[..., Any]] | None = {name: getattr(torch.nn.functional, name) for name in NAMES}
        for name, original in self._originals.items():
            setattr(torch.nn.functional, name, served(original, getattr(functional, name)))

    def undo(self) -> None:
        """Put back what was there; once, further calls do nothing."""
        originals, self._originals = self._originals or {}, None
        for name, original in originals.items():
            setattr(torch.nn.functional, name, original)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def patch() -> Patch:
    """Make `torch.nn.functional`'s losses, and with them the modules of `torch.nn`, those of fastloss, for every thread.

        fastloss.torch.patch()                # from now on; .undo() of what it returns ends it
        with fastloss.torch.patch(): ...      # in the block alone

    What fastloss does not serve goes on to PyTorch's own: other devices, other or mixed dtypes, other shapes, tensors that are
    no plain ones, a weight that requires a gradient. Names that were imported before (`from torch.nn.functional import mse_loss`)
    stay what they were. Patches are undone in the reverse order.
    """
    return Patch()


def served(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ours where that serves, and else PyTorch's."""

    @functools.wraps(original)
    def either(input: Any, target: Any, *args: Any, **options: Any) -> Any:
        function = ours if serves(input, target, [*args, *options.values()]) else original
        return function(input, target, *args, **options)

    return either


def serves(input: Any, target: Any, others: list[Any]) -> bool:
    """Whether fastloss computes exactly what PyTorch would."""
    tensors = [input, target, *(x for x in others if isinstance(x, Tensor))]
    if not all(isinstance(x, Tensor) and x.is_cpu and x.layout is torch.strided and x.dtype in DTYPES for x in tensors):
        return False
    if not torch.compiler.is_compiling() and not has_memory(tensors):
        return False
    same_dtype = input.dtype is target.dtype or (torch.is_autocast_enabled("cpu") and torch.float64 not in (input.dtype, target.dtype))
    return input.shape == target.shape and same_dtype and all(map(functools.partial(fits, input), others))


def fits(input: Any, other: Any) -> bool:
    """Whether an argument behind input and target is one that fastloss takes as PyTorch does."""
    if isinstance(other, Tensor):
        return not other.requires_grad and broadcasts(other.shape, input.shape)
    if isinstance(other, str):
        return other in ("mean", "sum", "none")
    return other is None or isinstance(other, bool) or other > 0  # flags of PyTorch 0.4; beta and delta, which PyTorch may refuse itself


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of a shape broadcasts to another without changing it."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)
