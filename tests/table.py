"""The losses that the tests run over: the rows of the library's table, with properties that only the tests need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fastloss import reference
from fastloss.core.checks import REDUCTIONS
from fastloss.core.definition import class_axis, entries_of
from fastloss.losses import table
from tests import oracle

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FLOATS = (*HALVES, np.dtype(np.float32), np.dtype(np.float64))
LATENTS = 5  # numbers in the latent code of an image
KINDS = {  # how to draw an operand, by its kind
    "logits": lambda rng, shape: 3 * rng.standard_normal(shape),
    "probabilities": lambda rng, shape: 1 / (1 + np.exp(-3 * rng.standard_normal(shape))),
    "targets": lambda rng, shape: rng.random(shape),
    "classes": lambda rng, shape: rng.integers(shape[class_axis(len(shape))], size=entries_of(shape), dtype=np.uint8),
    "mu": lambda rng, shape: rng.standard_normal(shape),
    "logvar": lambda rng, shape: rng.standard_normal(shape),
    "latent_mu": lambda rng, shape: rng.standard_normal((shape[0], LATENTS)),
    "latent_logvar": lambda rng, shape: rng.standard_normal((shape[0], LATENTS)),
}


@dataclass(frozen=True)
class Case:
    """A loss with gradients: its row in the library's table, and the relations that hold for it."""

    row: table.Row
    reductions: tuple[str, ...] = REDUCTIONS  # the reductions that the loss supports; empty if it has no such option
    is_sum: bool = True  # whether the value is a sum over entries: elements, or in losses of classes the pixels with their classes
    is_local: bool = True  # whether an element's gradient depends on its own entry alone
    samples: tuple[str, ...] = ()  # dtypes in which this loss is the sample of many similar tests

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def loss(self) -> Any:
        return self.row.loss

    @property
    def settings(self) -> tuple[Mapping[str, float], ...]:
        return self.row.settings

    @property
    def arrays(self) -> tuple[str, ...]:
        return self.row.arrays

    @property
    def gradients(self) -> tuple[int, ...]:
        return self.row.gradients

    @property
    def is_elementwise(self) -> bool:
        return self.row.is_elementwise

    @property
    def has_classes(self) -> bool:
        return self.row.classes

    @property
    def pairs_elements(self) -> bool:
        """Whether each element of the input, not each entry with several classes, has a target, a weight and a place in the mask."""
        return not self.has_classes

    @property
    def entry_weight(self) -> str:
        """The name of the option with a weight for each entry."""
        return "pixel_weight" if self.has_classes else "weight"

    @property
    def sums_elements(self) -> bool:
        return self.is_sum and self.pairs_elements

    @property
    def sums_pixels(self) -> bool:
        return self.is_sum and self.has_classes

    @property
    def has_targets(self) -> bool:
        return "targets" in self.arrays

    @property
    def has_reductions(self) -> bool:
        return bool(self.reductions)

    @property
    def has_curvature(self) -> bool:
        return hasattr(self.loss, "curvature")

    @property
    def has_one_gradient(self) -> bool:
        return len(self.gradients) == 1

    @property
    def oracle(self) -> Any:
        return getattr(oracle, self.name)

    @property
    def reference(self) -> Any:
        return getattr(reference, self.name)

    def draw(self, rng: Any, dtype: Any, shape: tuple[int, ...]) -> list[Any]:
        """Draw random operands for a batch of images of a shape. Class indices are bytes for each dtype of the others."""
        drawn = (np.asarray(KINDS[kind](rng, shape)) for kind in self.arrays)
        return [x if x.dtype == np.uint8 else x.astype(dtype) for x in drawn]

    def entries(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the values, and of masks and weights, of a batch of a shape."""
        return entries_of(shape) if self.has_classes else shape

    def reduced(self, reduction: str) -> dict[str, str]:
        """Return the option `reduction` with this reduction, or with another one if the loss does not support it."""
        return {"reduction": reduction if reduction in self.reductions else self.reductions[0]} if self.reductions else {}

    def out(self, buffers: list[Any]) -> Any:
        """Return buffers, one for each gradient, in the form that the option `out` takes."""
        return buffers[0] if self.has_one_gradient else tuple(buffers)


# the properties of losses that are not sums over entries, and the samples
OWN: dict[str, dict[str, Any]] = {
    "binary_cross_entropy_with_logits": {"samples": ("float32", "float64")},
    "sigmoid_focal_loss": {"samples": ("float32",)},
    "gaussian_kl_loss": {"samples": ("float32",)},
    "vae_loss": {"reductions": (), "is_sum": False, "samples": ("float32",)},
    "dice_with_logits_loss": {"is_sum": False, "is_local": False, "samples": ("float32",)},
    "dice_bce_with_logits_loss": {
        "reductions": tuple(reduction for reduction in REDUCTIONS if reduction != "none"),
        "is_sum": False,
        "is_local": False,
        "samples": ("float32",),
    },
    "cross_entropy": {"samples": ("float32",)},
    "dice_softmax_loss": {"is_sum": False, "is_local": False},
    "dice_cross_entropy_loss": {
        "reductions": tuple(reduction for reduction in REDUCTIONS if reduction != "none"),
        "is_sum": False,
        "is_local": False,
    },
}
LOSSES = {name: Case(row, **OWN.get(name, {})) for name, row in table.LOSSES.items() if row.gradients}
