"""Losses on large image batches, and their gradients: as fast as memory allows, no temporaries, right to the last digits."""

# the families in the order of the table of losses
from fastloss.losses import logistic, regression, latent, vae, segmentation, classes, segmentation_classes  # isort: skip
from fastloss.accumulator import Accumulator
from fastloss.backends.find import raise_deferred
from fastloss.cpu.memory import empty_cache
from fastloss.cpu.threads import get_num_threads, set_num_threads
from fastloss.layer import LinearGradient, linear
from fastloss.loss import Loss, elementwise_loss
from fastloss.losses.classes import *
from fastloss.losses.latent import *
from fastloss.losses.logistic import *
from fastloss.losses.regression import *
from fastloss.losses.segmentation import *
from fastloss.losses.segmentation_classes import *
from fastloss.losses.vae import *
from fastloss.ops import FormulaError
from fastloss.version import __version__ as __version__

__all__ = [
    "Accumulator", "FormulaError", "LinearGradient", "Loss", "elementwise_loss", "empty_cache", "get_num_threads", "linear",
    "raise_deferred", "set_num_threads",
]  # fmt: skip
__all__ += logistic.__all__
__all__ += regression.__all__
__all__ += latent.__all__
__all__ += vae.__all__
__all__ += segmentation.__all__
__all__ += classes.__all__
__all__ += segmentation_classes.__all__
__all__.sort()
