"""The conversion of PyTorch's dtypes to NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastloss.core.dtypes import NAMES

NUMPY = {getattr(torch, name): np.dtype(name) for name in NAMES if name != "bfloat16"}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Convert a PyTorch dtype to the NumPy dtype of the same name."""
    if dtype is torch.bfloat16:
        return bfloat16()
    if dtype not in NUMPY:
        raise TypeError(f"a tensor has dtype {dtype}; accepted: {', '.join(map(str, NUMPY))}, torch.bfloat16")
    return NUMPY[dtype]


def bfloat16() -> np.dtype[Any]:
    """Return the bfloat16 dtype of ml_dtypes, which NumPy itself lacks."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ImportError("bfloat16 tensors need the package ml_dtypes; install it or fastloss[torch]") from None
    return np.dtype(bfloat16)
