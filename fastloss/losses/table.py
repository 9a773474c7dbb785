"""The table of losses: a row for each loss, from which tests, benchmarks, documentation and PyTorch modules are made.

A loss enters the table where it is defined, by the decorator `row`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

L = TypeVar("L")
Limit = float | tuple[float, float]  # a pair is for targets 0 and 1, and for other targets


@dataclass(frozen=True)
class Row:
    """A loss, with the facts about it that are not in its formula or its docstring."""

    loss: Any
    title: str  # short name in tables and pictures
    purpose: str  # when to choose the loss
    input: str = "logits"  # kinds of its operands, in words
    arrays: tuple[str, ...] = ("logits", "targets")  # kind of each operand: an attribute of `bench.batch.Batch`
    gradients: tuple[int, ...] = (0,)  # positions of the operands that have gradients
    axes: int = 1  # least number of axes of the arrays that it is used with
    reduction: str | None = None  # the reduction of all its benchmarks; None: that of the case
    is_elementwise: bool = True  # a sum over the elements of an input and a target
    classes: bool = False  # its targets are classes
    ulp: Mapping[str, Limit] = field(default_factory=dict)  # largest errors by quantity, in units in the last place
    settings: tuple[Mapping[str, float], ...] = ({},)  # parameters at which the errors are measured
    module: str = ""  # its class in fastloss.torch, if torch.nn has none

    @property
    def name(self) -> str:
        """The loss's name in `fastloss`."""
        return str(self.loss.__name__)


LOSSES: dict[str, Row] = {}  # by name


def row(title: str, purpose: str, **fields: Any) -> Callable[[L], L]:
    """Enter a loss into the table; the arguments are the fields of `Row`."""

    def enter(loss: L) -> L:
        made = Row(loss, title, purpose, **fields)
        LOSSES[made.name] = made
        return loss

    return enter
