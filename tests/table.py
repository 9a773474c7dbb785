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
        Case("binary_cross_entropy_with_logits"),
        Case("binary_cross_entropy", "probabilities"),
        Case("mse_loss"),
        Case("l1_loss"),
        Case("smooth_l1_loss", parameters=({}, {"beta": 0.375}, {"beta": 0})),
        Case("huber_loss", parameters=({}, {"delta": 2.5})),
        Case("log_cosh_loss"),
        Case("mse_with_logits_loss"),
        Case("sigmoid_focal_loss", parameters=({}, {"alpha": -1, "gamma": 0.5}, {"alpha": 0.75, "gamma": 3.25})),
    )
}
