"""The one table of losses: the tests are run over it, and the docs' tables are written from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import fastloss as fl
from fastloss import reference
from tests import oracle


@dataclass(frozen=True)
class Case:
    """A loss, what it is measured against, and where."""

    name: str
    domain: str = "logits"  # where inputs come from: "logits", or "probabilities", which lie in [0, 1]
    parameters: tuple[dict[str, float], ...] = field(default=({},))  # with which digits are looked at
    input: str = "logits"  # what it takes, as the documentation has it
    about: str = ""  # when to choose it

    @property
    def loss(self) -> Any:
        return getattr(fl, self.name)

    @property
    def oracle(self) -> Any:
        return getattr(oracle, self.name)

    @property
    def reference(self) -> Any:
        return getattr(reference, self.name)


LOSSES = {
    case.name: case
    for case in (
        Case("binary_cross_entropy_with_logits", about="targets in [0, 1]: classes, masks, the pixels of images"),
        Case("binary_cross_entropy", "probabilities", input="probabilities", about="only probabilities are available, no logits"),
        Case("mse_loss", input="any", about="large errors should count most; you want the mean"),
        Case("l1_loss", input="any", about="outliers should count in proportion to their size; you want the median"),
        Case(
            "smooth_l1_loss",
            parameters=({}, {"beta": 0.375}, {"beta": 0}),
            input="any",
            about="like `l1_loss`, without the jump of the gradient at the target: bounding boxes",
        ),
        Case(
            "huber_loss",
            parameters=({}, {"delta": 2.5}),
            input="any",
            about="like `mse_loss`, with the gradient of outliers limited to `delta`",
        ),
        Case("log_cosh_loss", input="any", about="like `huber_loss`, smooth everywhere and without a parameter"),
        Case("mse_with_logits_loss", about="the squared error of a sigmoid is the measure that counts, and outputs do not saturate"),
        Case(
            "sigmoid_focal_loss",
            parameters=({}, {"alpha": -1, "gamma": 0.5}, {"alpha": 0.75, "gamma": 3.25}),
            about="most elements are easy and would outweigh the few hard ones: detection",
        ),
    )
}
# Not functions of one element's input and target, and so not what the tests run over: for the documentation alone.
OTHERS = {
    case.name: case
    for case in (
        Case("gaussian_kl_loss", input="means, log-variances", about="the latent code of a variational autoencoder"),
        Case("vae_loss", input="logits, images, means, log-variances", about="the whole objective of a variational autoencoder"),
        Case(
            "dice_with_logits_loss",
            input="logits, (N, C, ...)",
            about="segmentation where small regions should count as much as large ones",
        ),
        Case(
            "dice_bce_with_logits_loss",
            input="logits, (N, C, ...)",
            about="segmentation as a first choice: Dice, with a gradient that does not vanish in saturated outputs",
        ),
        Case("binary_entropy", input="none", about="the lowest cross-entropy that soft targets allow"),
    )
}
