"""Find the backend of an array. This never imports a framework: an array of a framework that is not imported cannot exist."""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np

from fastloss.backends.numpy import BACKEND as NUMPY
from fastloss.backends.protocol import Backend
from fastloss.kernel.builds import built


def find_backend(array: Any) -> Backend:
    """Find the backend of an array by its type. Types of no known framework go to NumPy's backend, which converts or refuses them."""
    if type(array) is np.ndarray:
        return NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):  # () while PyTorch is still being imported
        return import_torch_backend() if torch.compiler.is_compiling() else torch_backend()
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        from fastloss.backends.cupy import BACKEND as CUPY

        return CUPY
    dask = sys.modules.get("dask.array")
    if dask is not None and isinstance(array, getattr(dask, "Array", ())):
        from fastloss.backends.dask import BACKEND as DASK

        return DASK
    return NUMPY


def import_torch_backend() -> Backend:
    """Return PyTorch's backend."""
    # an import statement, because torch.compile refuses import_module and adds a guard for each lookup in sys.modules
    from fastloss.backends.torch.backend import BACKEND as TORCH

    return TORCH


@functools.cache
def torch_backend() -> Backend:
    """Return PyTorch's backend, imported in a thread that no signal handler interrupts."""
    backend: Backend = built("torch backend", import_torch_backend)
    return backend


def raise_deferred() -> None:
    """Wait for the GPU, and raise the error if an earlier call found an element outside [0, 1], or a class index that no class has.

    A call on a GPU does not wait for the result of its check. The error is raised by the next call that checks elements, or by this
    function. Without a GPU this function does nothing.

    Raises:
        ValueError: an earlier call found such an element; the message names it.
    """
    if (calls := sys.modules.get("fastloss.cuda.call")) is not None:
        calls.raise_deferred()
