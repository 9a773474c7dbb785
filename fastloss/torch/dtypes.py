"""NumPy's names of PyTorch's dtypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

NAMES = "float16 float32 float64 bool uint8 uint16 uint32 uint64 int8 int16 int32 int64"
NUMPY = {getattr(torch, name): np.dtype(name) for name in NAMES.split()}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return NumPy's name of a dtype."""
    if dtype is torch.bfloat16:
        return bfloat16()
    if dtype not in NUMPY:
        raise TypeError(f"a tensor has dtype {dtype}; accepted: {', '.join(map(str, NUMPY))}, torch.bfloat16")
    return NUMPY[dtype]


def bfloat16() -> np.dtype[Any]:
    """Return the dtype that NumPy does not have."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ImportError("bfloat16 tensors are read through ml_dtypes; install it, or fastloss[torch]") from None
    return np.dtype(bfloat16)
