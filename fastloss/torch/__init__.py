"""fastloss for PyTorch: modules and functions with PyTorch's names, arguments and errors, and `patch`, which replaces PyTorch's.

    import fastloss.torch as ft

    criterion = ft.BCEWithLogitsLoss()               # in the place of torch.nn.BCEWithLogitsLoss()
    loss = criterion(logits, images)                 # computes the gradient too, in one pass over memory
    loss.backward()

The functions of `fastloss` itself also accept tensors. Tensors may be on the CPU or, if CuPy is installed, on an NVIDIA GPU. They
are read and written in place.

Raises:
    ImportError: PyTorch cannot be imported; the message says how to install it.
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    importlib.import_module("torch")
except ImportError as error:
    raise ImportError(
        f"fastloss.torch needs PyTorch, which cannot be imported ({error}); pip install 'fastloss[torch]', and without a GPU first "
        "PyTorch's CPU build: pip install torch --index-url https://download.pytorch.org/whl/cpu"
    ) from error

from fastloss.backends.torch import backend  # noqa: F401  # registers the operators
from fastloss.cpu.memory import empty_cache
from fastloss.losses.table import LOSSES
from fastloss.torch import functional, modules
from fastloss.torch.functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    linear_binary_cross_entropy_with_logits,
    linear_cross_entropy,
    linear_mse_loss,
    linear_sigmoid_focal_loss,
    mse_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from fastloss.torch.modules import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    HuberLoss,
    L1Loss,
    LinearLoss,
    MSELoss,
    SmoothL1Loss,
    VAELoss,
)
from fastloss.torch.patching import patch

_OWN = {**modules.OWN, **{name: row.loss for name, row in LOSSES.items() if not hasattr(functional, name)}}
globals().update(_OWN)  # losses that PyTorch does not have, as modules and as functions

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


__all__ = [
    "BCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "HuberLoss", "L1Loss", "LinearLoss", "MSELoss", "SmoothL1Loss", "VAELoss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy", "empty_cache", "huber_loss", "l1_loss",
    "linear_binary_cross_entropy_with_logits", "linear_cross_entropy", "linear_mse_loss", "linear_sigmoid_focal_loss", "mse_loss", "patch",
    "sigmoid_focal_loss", "smooth_l1_loss",
]  # fmt: skip
__all__ += list(_OWN)
__all__.sort()
