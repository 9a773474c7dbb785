"""Losses as modules: PyTorch's own, with their arguments, buffers and repr, and a module for every other loss of the table.

Each takes options of fastloss too: those that are numbers or flags in its constructor, and all of them in a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

import fastloss
from fastloss.losses.table import LOSSES, Row
from fastloss.torch import functional


class WithOptions(torch.nn.Module):
    """A module that stores options of fastloss and shows them in its repr."""

    options: dict[str, Any]

    def extra_repr(self) -> str:
        """Format the options as they were passed."""
        return ", ".join(f"{name}={x!r}" for name, x in self.options.items())


class OfInputAndTarget(WithOptions):
    """A module that calls a function of input and target, with its own arguments, its options, and those of the call."""

    function: Any
    arguments: tuple[str, ...] = ("reduction",)  # attributes that the function is passed by name

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        """Compute the loss."""
        own = {name: getattr(self, name) for name in self.arguments}
        return self.function(input, target, **{**own, **self.options, **options})


class BCEWithLogitsLoss(OfInputAndTarget, torch.nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss`, computed by `fastloss.binary_cross_entropy_with_logits`; further arguments are options of that loss."""

    function = staticmethod(functional.binary_cross_entropy_with_logits)
    arguments = ("weight", "pos_weight", "reduction")

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
        pos_weight: Tensor | None = None, **options: Any
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.options = options


class BCELoss(OfInputAndTarget, torch.nn.BCELoss):
    """`torch.nn.BCELoss`, computed by `fastloss.binary_cross_entropy`; further arguments are options of that loss."""

    function = staticmethod(functional.binary_cross_entropy)
    arguments = ("weight", "reduction")

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
        **options: Any
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, reduce, reduction)
        self.options = options


class MSELoss(OfInputAndTarget, torch.nn.MSELoss):
    """`torch.nn.MSELoss`, computed by `fastloss.mse_loss`; further arguments are options of that loss."""

    function = staticmethod(functional.mse_loss)

    def __init__(self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean", **options: Any) -> None:
        super().__init__(size_average, reduce, reduction)
        self.options = options


class L1Loss(OfInputAndTarget, torch.nn.L1Loss):
    """`torch.nn.L1Loss`, computed by `fastloss.l1_loss`; further arguments are options of that loss."""

    function = staticmethod(functional.l1_loss)

    def __init__(self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean", **options: Any) -> None:
        super().__init__(size_average, reduce, reduction)
        self.options = options


class SmoothL1Loss(OfInputAndTarget, torch.nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss`, computed by `fastloss.smooth_l1_loss`; further arguments are options of that loss."""

    function = staticmethod(functional.smooth_l1_loss)
    arguments = ("reduction", "beta")

    def __init__(
        self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean", beta: float = 1.0, **options: Any
    ) -> None:
        super().__init__(size_average, reduce, reduction, beta)
        self.options = options


class HuberLoss(OfInputAndTarget, torch.nn.HuberLoss):
    """`torch.nn.HuberLoss`, computed by `fastloss.huber_loss`; further arguments are options of that loss."""

    function = staticmethod(functional.huber_loss)
    arguments = ("reduction", "delta")

    def __init__(self, reduction: str = "mean", delta: float = 1.0, **options: Any) -> None:
        super().__init__(reduction, delta)
        self.options = options


class CrossEntropyLoss(OfInputAndTarget, torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, computed by `fastloss.cross_entropy`; further arguments are options of that loss."""

    function = staticmethod(functional.cross_entropy)
    arguments = ("weight", "ignore_index", "reduction", "label_smoothing")

    def __init__(
        self, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None,
        reduction: str = "mean", label_smoothing: float = 0.0, **options: Any
    ) -> None:  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options = options


class OwnLoss(OfInputAndTarget, _Loss):
    """A loss that PyTorch does not have, as a module. Options go to the constructor or to the call."""

    def __init__(self, reduction: str = "mean", **options: Any) -> None:
        super().__init__(reduction=reduction)
        self.options = options


def make_module(row: Row) -> type[OwnLoss]:
    """Make the module of a row of the table of losses."""
    parameters = row.loss.__signature__.parameters.values()
    example = ", ".join(f"{p.name}={p.default}" for p in parameters if type(p.default) in (int, float))
    doc = f"""`fastloss.{row.name}` as a module, with reduction "mean" by default.

    The constructor takes `reduction` and the options of the loss that are numbers or flags; a call takes all of them, after its two
    operands. See `fastloss.{row.name}`.

    Example:
        criterion = fastloss.torch.{row.module}({example})
    """
    return type(row.module, (OwnLoss,), {"function": row.loss, "__doc__": doc, "__module__": __name__})


OWN = {row.module: make_module(row) for row in LOSSES.values() if row.module}
globals().update(OWN)


class VAELoss(WithOptions):
    """`fastloss.vae_loss` as a module, with `reconstruction` and `beta`; returns (total, reconstruction, divergence)."""

    def __init__(self, reconstruction: str = "bce", beta: float = 1.0, **options: Any) -> None:
        super().__init__()
        self.options = {"reconstruction": reconstruction, "beta": beta, **options}

    def forward(self, reconstruction_logits: Tensor, images: Tensor, mu: Tensor, logvar: Tensor, **options: Any) -> fastloss.VAEValue:
        """Compute the objective and its two parts."""
        return fastloss.vae_loss(reconstruction_logits, images, mu, logvar, **{**self.options, **options})


class LinearLoss(WithOptions):
    """A linear layer and a loss of its outputs, computed by `fastloss.linear`, so that the outputs never exist as a whole.

        criterion = fastloss.torch.LinearLoss(fastloss.binary_cross_entropy_with_logits, torch.nn.Linear(256, 100_000))
        loss = criterion(features, labels)
        logits = criterion.layer(features)        # for predictions

    A call takes the input of the layer, the target, and options of the loss. Hooks of the layer are not called.

    Args:
        loss: a loss that `fastloss.linear` accepts.
        layer: `torch.nn.Linear`, for inputs (N, K); or `torch.nn.Conv1d`, `Conv2d` or `Conv3d` with a kernel of one pixel.
        reduction, options: those of the loss. Tensors among the options become buffers of the module.

    Raises:
        TypeError: another loss or layer.
    """

    def __init__(self, loss: Any, layer: torch.nn.Module, reduction: str = "mean", **options: Any) -> None:
        super().__init__()
        check_layer(layer)
        self.loss, self.layer, self.reduction = fastloss.linear(loss), layer, reduction
        self.buffered = tuple(name for name, x in options.items() if isinstance(x, Tensor))
        self.options = {name: x for name, x in options.items() if name not in self.buffered}
        for name in self.buffered:
            self.register_buffer(name, options[name])

    def extra_repr(self) -> str:
        """Format the loss and its options as they were passed."""
        return ", ".join([self.loss.loss.__name__, f"reduction={self.reduction!r}", super().extra_repr()]).removesuffix(", ")

    def forward(self, input: Tensor, target: Any, **options: Any) -> Tensor:
        """Compute the loss of the layer's outputs."""
        if isinstance(self.layer, torch.nn.Linear) and input.dim() != 2:
            raise ValueError(f"input has shape {tuple(input.shape)}; accepted with a Linear layer: (N, K); pass input.flatten(0, -2)")
        own = {name: getattr(self, name) for name in self.buffered}
        weight, given = self.layer.weight.flatten(1), {"reduction": self.reduction, **self.options, **own, **options}
        value: Tensor = self.loss(input, weight, target, self.layer.bias, **given)
        return value


def check_layer(layer: Any) -> None:
    """Raise TypeError unless the outputs of a layer are products of its weight and single entries of its input."""
    if isinstance(layer, torch.nn.Linear):
        return
    if not isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        raise TypeError(f"layer is a {type(layer).__name__}; accepted: Linear, or Conv1d, Conv2d or Conv3d with a kernel of one pixel")
    if layer.groups != 1 or any(x != 1 for x in (*layer.kernel_size, *layer.stride)) or any(layer._reversed_padding_repeated_twice):
        raise TypeError(f"layer is {layer}; accepted: a kernel of one pixel, stride 1, no padding, and one group")
