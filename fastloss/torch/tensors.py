"""Tensors as NumPy arrays on the same memory, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fastloss.plan import Array

Tensor = torch.Tensor
HALVES = (torch.float16, torch.bfloat16)


def to_array(tensor: Any) -> Array:
    """Return an array on a CPU tensor's memory."""
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(bfloat16())
    array: Array = tensor.numpy()
    return array


def to_tensor(array: Array) -> Any:
    """Return a tensor on an array's memory."""
    if array.dtype.kind == "V":  # bfloat16: its name takes longer to ask for
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bfloat16() -> np.dtype[Any]:
    """Return the dtype that NumPy does not have."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ImportError("bfloat16 tensors are read through ml_dtypes; install it, or fastloss[torch]") from None
    return np.dtype(bfloat16)


def check_tensors(named: Iterable[tuple[str, Any]]) -> None:
    """Refuse what is no tensor, and tensors that do not lie together in this machine's memory."""
    meta = None
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__module__}.{type(x).__qualname__}, and the input a tensor; accepted: torch.Tensor")
        if not x.is_cpu and x.device.type != "meta":
            raise NotImplementedError(f"{name} is on {x.device}; accepted: tensors on the CPU")
        if x.is_meta is not (meta := x.is_meta if meta is None else meta):
            raise ValueError(f"{name} is on {x.device}, and the input is not; accepted: tensors on one device")
        if x.layout is not torch.strided:
            raise TypeError(f"{name} has layout {x.layout}; accepted: torch.strided")
