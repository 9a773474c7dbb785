"""Losses on large image batches, and their gradients: as fast as memory allows, no temporaries, right to the last digits."""

from fastloss.backends.find import raise_deferred
from fastloss.cpu.pool import get_num_threads, set_num_threads
from fastloss.loss import Loss, elementwise_loss
from fastloss.losses.latent import gaussian_kl_loss
from fastloss.losses.logistic import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    binary_entropy,
    mse_with_logits_loss,
    sigmoid_focal_loss,
)
from fastloss.losses.regression import huber_loss, l1_loss, log_cosh_loss, mse_loss, smooth_l1_loss
from fastloss.losses.segmentation import dice_bce_with_logits_loss, dice_with_logits_loss
from fastloss.losses.vae import VAEGradient, VAEValue, vae_loss
from fastloss.ops import FormulaError
from fastloss.version import __version__ as __version__

__all__ = [
    "FormulaError",
    "Loss",
    "VAEGradient",
    "VAEValue",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "binary_entropy",
    "dice_bce_with_logits_loss",
    "dice_with_logits_loss",
    "elementwise_loss",
    "gaussian_kl_loss",
    "get_num_threads",
    "huber_loss",
    "l1_loss",
    "log_cosh_loss",
    "mse_loss",
    "mse_with_logits_loss",
    "raise_deferred",
    "set_num_threads",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "vae_loss",
]
