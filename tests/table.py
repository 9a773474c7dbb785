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
        Case("binary_cross_entropy", "probabilities", input="probabilities", about="only probabilities are to be had, no logits"),
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
            about="most elements are easy and would drown the few that are not: detection",
        ),
    )
}
# Not functions of one element's input and target, and so not what the tests run over: for the documentation alone.
OTHERS = {
    case.name: case
    for case in (
        Case("gaussian_kl_loss", input="means, log-variances", about="the latent code of a variational autoencoder"),
        Case("vae_loss", input="logits, images, means, log-variances", about="a variational autoencoder's whole objective"),
        Case("dice_with_logits_loss", input="logits, (N, C, ...)", about="segmentation in which small regions count as much as large"),
        Case("dice_bce_with_logits_loss", input="logits, (N, C, ...)", about="the same, with a slope that does not saturate"),
        Case("binary_entropy", input="none", about="how low the cross-entropy of soft targets can get"),
    )
}
