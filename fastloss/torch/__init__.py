"""fastloss for PyTorch: modules and functions with PyTorch's names, arguments and errors, and `patch`, which replaces PyTorch's.

    import fastloss.torch as ft

    criterion = ft.BCEWithLogitsLoss()               # in the place of torch.nn.BCEWithLogitsLoss()
    loss = criterion(logits, images)                 # computes the gradient too, in one pass over memory
    loss.backward()

The functions of `fastloss` itself also accept tensors. Tensors may be on the CPU or, if CuPy is installed, on an NVIDIA GPU. They
are read and written in place.
"""

from fastloss.backends.torch.reuse import empty_cache
from fastloss.losses.latent import gaussian_kl_loss
from fastloss.losses.logistic import binary_entropy, mse_with_logits_loss
from fastloss.losses.regression import log_cosh_loss
from fastloss.losses.segmentation import dice_bce_with_logits_loss, dice_with_logits_loss
from fastloss.losses.vae import vae_loss
from fastloss.torch.functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    huber_loss,
    l1_loss,
    mse_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from fastloss.torch.modules import (
    BCELoss,
    BCEWithLogitsLoss,
    DiceBCEWithLogitsLoss,
    DiceWithLogitsLoss,
    GaussianKLLoss,
    HuberLoss,
    L1Loss,
    LogCoshLoss,
    MSELoss,
    MSEWithLogitsLoss,
    SigmoidFocalLoss,
    SmoothL1Loss,
    VAELoss,
)
from fastloss.torch.patching import patch

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "DiceBCEWithLogitsLoss",
    "DiceWithLogitsLoss",
    "GaussianKLLoss",
    "HuberLoss",
    "L1Loss",
    "LogCoshLoss",
    "MSELoss",
    "MSEWithLogitsLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "VAELoss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "binary_entropy",
    "dice_bce_with_logits_loss",
    "dice_with_logits_loss",
    "empty_cache",
    "gaussian_kl_loss",
    "huber_loss",
    "l1_loss",
    "log_cosh_loss",
    "mse_loss",
    "mse_with_logits_loss",
    "patch",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "vae_loss",
]
