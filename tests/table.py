"""The one table of losses: the tests are run over it, and the docs' tables are written from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import fastloss as fl
from fastloss import reference
from fastloss.plan import REDUCTIONS
from tests import oracle

FEW = 5  # numbers in the latent code of an image
KINDS = {  # what an operand holds, by its name: how it is drawn
    "logits": lambda rng, shape: 3 * rng.standard_normal(shape),
    "probabilities": lambda rng, shape: 1 / (1 + np.exp(-3 * rng.standard_normal(shape))),
    "targets": lambda rng, shape: rng.random(shape),
    "mu": lambda rng, shape: rng.standard_normal(shape),
    "logvar": lambda rng, shape: rng.standard_normal(shape),
    "latent_mu": lambda rng, shape: rng.standard_normal((shape[0], FEW)),
    "latent_logvar": lambda rng, shape: rng.standard_normal((shape[0], FEW)),
}


@dataclass(frozen=True)
class Case:
    """A loss: what it takes, what it returns, when to choose it, and with which of its parameters the digits are looked at."""

    name: str
    arrays: tuple[str, ...] = ("logits", "targets")  # its operands, by what they hold
    slopes: tuple[int, ...] = (0,)  # the operands that have gradients
    reductions: tuple[str, ...] = REDUCTIONS  # that it takes; none where the reduction is not a choice
    is_elementwise: bool = True  # a sum over elements, each of which is a function of one element of every operand
    is_local: bool = True  # an element's gradient depends on that element alone
    parameters: tuple[dict[str, float], ...] = ({},)
    samples: tuple[str, ...] = ()  # the dtypes in which it stands for other losses where tests are many alike
    input: str = "logits"  # what it takes, as the documentation has it
    about: str = ""  # when to choose it

    def __str__(self) -> str:
        return self.name

    @property
    def loss(self) -> Any:
        return getattr(fl, self.name)

    @property
    def oracle(self) -> Any:
        return getattr(oracle, self.name)

    @property
    def reference(self) -> Any:
        return getattr(reference, self.name)

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
        return len(self.slopes) == 1

    def draw(self, rng: Any, dtype: Any, shape: tuple[int, ...]) -> list[Any]:
        """Return operands for a batch of images of a shape."""
        return [np.asarray(KINDS[kind](rng, shape)).astype(dtype) for kind in self.arrays]

    def reduced(self, reduction: str) -> dict[str, str]:
        """Return the option that asks for a reduction; for another if the loss does not have it."""
        return {"reduction": reduction if reduction in self.reductions else self.reductions[0]} if self.reductions else {}

    def out(self, buffers: list[Any]) -> Any:
        """Return buffers, one a gradient, as the option `out` takes them."""
        return buffers[0] if self.has_one_gradient else tuple(buffers)


LOSSES = {
    case.name: case
    for case in (
        Case(
            "binary_cross_entropy_with_logits",
            samples=("float32", "float64"),
            about="targets in [0, 1]: classes, masks, the pixels of images",
        ),
        Case(
            "binary_cross_entropy",
            ("probabilities", "targets"),
            input="probabilities",
            about="only probabilities are to be had, no logits",
        ),
        Case("mse_loss", input="any", about="large errors are to count most; the mean is sought"),
        Case("l1_loss", input="any", about="outliers are to count no more than their size; the median is sought"),
        Case(
            "smooth_l1_loss",
            parameters=({}, {"beta": 0.375}, {"beta": 0}),
            input="any",
            about="as `l1_loss`, but without its jump at the target: boxes",
        ),
        Case(
            "huber_loss",
            parameters=({}, {"delta": 2.5}),
            input="any",
            about="as `mse_loss`, but an outlier pulls no harder than an error of `delta`",
        ),
        Case("log_cosh_loss", input="any", about="as `huber_loss`, but smooth everywhere and with nothing to set"),
        Case("mse_with_logits_loss", about="a sigmoid's squared error itself is the aim, and outputs do not saturate"),
        Case(
            "sigmoid_focal_loss",
            parameters=({}, {"alpha": -1, "gamma": 0.5}, {"alpha": 0.75, "gamma": 3.25}),
            samples=("float32",),
            about="most elements are easy and would drown the few that are not: detection",
        ),
        Case(
            "gaussian_kl_loss",
            ("mu", "logvar"),
            slopes=(0, 1),
            samples=("float32",),
            input="means, log-variances",
            about="the latent code of a variational autoencoder",
        ),
        Case(
            "vae_loss",
            ("logits", "targets", "latent_mu", "latent_logvar"),
            slopes=(0, 2, 3),
            reductions=(),
            is_elementwise=False,
            samples=("float32",),
            input="logits, images, means, log-variances",
            about="a variational autoencoder's whole objective",
        ),
        Case(
            "dice_with_logits_loss",
            is_elementwise=False,
            is_local=False,
            samples=("float32",),
            input="logits, (N, C, ...)",
            about="segmentation in which small regions count as much as large",
        ),
        Case(
            "dice_bce_with_logits_loss",
            reductions=tuple(reduction for reduction in REDUCTIONS if reduction != "none"),
            is_elementwise=False,
            is_local=False,
            samples=("float32",),
            input="logits, (N, C, ...)",
            about="the same, with a slope that does not saturate",
        ),
    )
}
# a function of the target alone: for the documentation
OTHERS = {"binary_entropy": Case("binary_entropy", input="none", about="how low the cross-entropy of soft targets can get")}
