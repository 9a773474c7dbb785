"""Losses as modules: PyTorch's own with their arguments, buffers and repr, and modules for the losses it does not have.

Each takes fastloss's options too: those that are numbers or flags where it is made, and all of them where it is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

import fastloss
from fastloss.torch import functional


class WithOptions(torch.nn.Module):
    """A module that keeps options of fastloss and shows them."""

    options: dict[str, Any]

    def extra_repr(self) -> str:
        """Return the options as they were given."""
        return ", ".join(f"{name}={x!r}" for name, x in self.options.items())


class OfInputAndTarget(WithOptions):
    """A module that calls its function of input and target with its own arguments, the options it keeps, and those of the call."""

    function: Any
    arguments: tuple[str, ...] = ("reduction",)  # attributes that are handed on under their names

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        """Return the loss."""
        own = {name: getattr(self, name) for name in self.arguments}
        return self.function(input, target, **{**own, **self.options, **options})


class BCEWithLogitsLoss(OfInputAndTarget, torch.nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss`, by `fastloss.binary_cross_entropy_with_logits`."""

    function = staticmethod(functional.binary_cross_entropy_with_logits)
    arguments = ("weight", "pos_weight", "reduction")

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
        pos_weight: Tensor | None = None, **options: Any
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.options = options


class BCELoss(OfInputAndTarget, torch.nn.BCELoss):
    """`torch.nn.BCELoss`, by `fastloss.binary_cross_entropy`."""

    function = staticmethod(functional.binary_cross_entropy)
    arguments = ("weight", "reduction")

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
        **options: Any
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, reduce, reduction)
        self.options = options


class MSELoss(OfInputAndTarget, torch.nn.MSELoss):
    """`torch.nn.MSELoss`, by `fastloss.mse_loss`."""

    function = staticmethod(functional.mse_loss)

    def __init__(self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean", **options: Any) -> None:
        super().__init__(size_average, reduce, reduction)
        self.options = options


class L1Loss(OfInputAndTarget, torch.nn.L1Loss):
    """`torch.nn.L1Loss`, by `fastloss.l1_loss`."""

    function = staticmethod(functional.l1_loss)

    def __init__(self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean", **options: Any) -> None:
        super().__init__(size_average, reduce, reduction)
        self.options = options


class SmoothL1Loss(OfInputAndTarget, torch.nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss`, by `fastloss.smooth_l1_loss`."""

    function = staticmethod(functional.smooth_l1_loss)
    arguments = ("reduction", "beta")

    def __init__(
        self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean", beta: float = 1.0, **options: Any
    ) -> None:
        super().__init__(size_average, reduce, reduction, beta)
        self.options = options


class HuberLoss(OfInputAndTarget, torch.nn.HuberLoss):
    """`torch.nn.HuberLoss`, by `fastloss.huber_loss`."""

    function = staticmethod(functional.huber_loss)
    arguments = ("reduction", "delta")

    def __init__(self, reduction: str = "mean", delta: float = 1.0, **options: Any) -> None:
        super().__init__(reduction, delta)
        self.options = options


class OwnLoss(OfInputAndTarget, _Loss):
    """A loss that PyTorch does not have, as a module: its options where it is made or where it is called."""

    def __init__(self, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction=reduction)
        self.options = options


class LogCoshLoss(OwnLoss):
    """`fastloss.log_cosh_loss` as a module."""

    function = fastloss.log_cosh_loss


class MSEWithLogitsLoss(OwnLoss):
    """`fastloss.mse_with_logits_loss` as a module."""

    function = fastloss.mse_with_logits_loss


class SigmoidFocalLoss(OwnLoss):
    """`fastloss.sigmoid_focal_loss` as a module, with `alpha` and `gamma`; its reduction is "mean", as a module's."""

    function = fastloss.sigmoid_focal_loss


class GaussianKLLoss(OwnLoss):
    """`fastloss.gaussian_kl_loss` of mu and logvar as a module."""

    function = fastloss.gaussian_kl_loss


class DiceWithLogitsLoss(OwnLoss):
    """`fastloss.dice_with_logits_loss` as a module, with `smooth`, `per_channel` and `per_sample`."""

    function = fastloss.dice_with_logits_loss


class DiceBCEWithLogitsLoss(OwnLoss):
    """`fastloss.dice_bce_with_logits_loss` as a module, with the options of Dice, `dice_weight` and `bce_weight`."""

    function = fastloss.dice_bce_with_logits_loss


class VAELoss(WithOptions):
    """`fastloss.vae_loss` as a module, with `reconstruction` and `beta`; returns (total, reconstruction, divergence)."""

    def __init__(self, reconstruction: str = "bce", beta: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.options = {"reconstruction": reconstruction, "beta": beta, **options}

    def forward(self, reconstruction_logits: Tensor, images: Tensor, mu: Tensor, logvar: Tensor, **options: Any) -> fastloss.VAEValue:
        """Return the objective with its two parts."""
        return fastloss.vae_loss(reconstruction_logits, images, mu, logvar, **{**self.options, **options})
