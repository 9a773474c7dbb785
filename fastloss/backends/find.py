"""Which backend takes an array. A framework is never imported here: an array of one that is not imported cannot exist."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fastloss.backends.numpy import BACKEND as NUMPY
from fastloss.backends.protocol import Backend


def find_backend(array: Any) -> Backend:
    """Find the backend of an array by its type. NumPy's takes everything that is no other framework's, or refuses it."""
    if type(array) is np.ndarray:
        return NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):  # () while PyTorch is still being imported
        # a plain import statement: torch.compile refuses import_module, and puts a guard on every look into sys.modules
        from fastloss.backends.torch.backend import BACKEND as TORCH

        return TORCH
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        from fastloss.backends.cupy import BACKEND as CUPY

        return CUPY
    return NUMPY


def raise_deferred() -> None:
    """Wait for the GPU, and raise the error of a bad element that an earlier call with `validate` found on it.

    A call on a GPU does not wait for the result of its check. Its error is raised by the next call that validates, or here.
    Without a GPU this does nothing.

    Raises:
        ValueError: an earlier call found an element outside [0, 1]; the message names it.
    """
    if (calls := sys.modules.get("fastloss.cuda.call")) is not None:
        calls.raise_deferred()
