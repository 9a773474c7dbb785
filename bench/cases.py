"""The one table of cases: which losses are timed, in which pass, on which arrays.

A case is a cell of loss x pass x dtype x size x layout x option. `quick` and `full` are selections of the cells; any other
is named on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod

from fastloss.core.definition import entries_of
from fastloss.losses.table import LOSSES, Row

PASSES = ("value", "grad", "value_and_grad")
DTYPES = ("float32", "float64", "float16", "bfloat16", "uint8 targets")
LAYOUTS = ("contiguous", "channels-last", "every second")
OPTIONS = ("", "weight", "weight per channel", "mask", "pos_weight", "pos_weight per channel")
SIZES = {
    "1Ki": (1024,),
    "16Ki": (16 * 1024,),
    "mnist": (128, 1, 28, 28),
    "small": (64, 3, 64, 64),
    "large": (64, 3, 256, 256),
    "huge": (256, 3, 256, 256),
}
CLASS_SIZES = {  # of the logits (N, C, ...) of losses of classes; "small" stands for each in tests
    "mnist": (64, 10),
    "small": (2, 5, 16, 16),
    "large": (8, 19, 256, 256),
    "many classes": (4, 150, 128, 128),
    "volume": (2, 14, 128, 128, 128),
    "large volume": (1, 118, 96, 96, 96),
}
DECADES = {f"10^{k}": (10**k,) for k in range(3, 10)}
# whole decades, and a size between those of small batches, where libraries overtake each other
CURVE = dict(sorted((DECADES | {f"3x10^{k}": (3 * 10**k,) for k in range(3, 6)}).items(), key=lambda size: size[1]))
LATENTS = 256  # numbers in the latent code of an image


SUBJECTS = {name: row for name, row in LOSSES.items() if row.gradients}
BCE, MSE, CROSS_ENTROPY = "binary_cross_entropy_with_logits", "mse_loss", "cross_entropy"


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    loss: str = BCE
    part: str = "value_and_grad"
    dtype: str = "float32"
    size: str = "large"
    layout: str = "contiguous"
    option: str = ""

    @property
    def subject(self) -> Row:
        """The loss's row of the table of losses."""
        return SUBJECTS[self.loss]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the batch: of the logits."""
        return self.sizes[self.size]

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes in which the loss is timed."""
        return CLASS_SIZES if self.subject.classes else SIZES | CURVE

    @property
    def elements(self) -> int:
        """How many elements a batch has."""
        return prod(self.shape)

    @property
    def entries(self) -> tuple[int, ...]:
        """The shape of the values: a value for each element, or for each entry with several classes."""
        return entries_of(self.shape) if self.subject.classes else self.shape

    @property
    def tiny(self) -> Case:
        """The same case with few elements: for whether it is computed, not for how fast."""
        return replace(self, size="small" if self.subject.classes else "mnist" if len(self.shape) > 1 else "1Ki")

    @property
    def is_half(self) -> bool:
        """Whether arrays are stored in 16 bits."""
        return self.dtype in ("float16", "bfloat16")

    @property
    def reduction(self) -> str:
        """The mean; in 16 bits the sum, because the gradients of a large batch's mean are too small for them."""
        return self.subject.reduction or ("sum" if self.is_half else "mean")

    @property
    def is_possible(self) -> bool:
        """Whether the loss takes such arrays, and the suite has its options."""
        if self.size not in self.sizes:
            return False
        axes, named = len(self.shape), "per channel" in self.option or self.layout == "channels-last"
        needed = 4 if named else self.subject.axes
        targets = "targets" in self.subject.arrays or self.dtype != "uint8 targets"
        weighted = self.loss == BCE or "pos_weight" not in self.option
        has_options = len(self.subject.arrays) == 2 and not self.subject.classes
        return axes >= needed and targets and weighted and (has_options or not self.option)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return ", ".join(filter(None, (self.loss, self.part, self.dtype, shape, self.layout, self.option)))


def select(**axes: tuple[str, ...] | None) -> list[Case]:
    """Return the cells of the product of what is given for each axis; what is not given stays at the default case's."""
    given = {name: values for name, values in axes.items() if values}
    cells = (replace(Case(), **dict(zip(given, values, strict=True))) for values in product(*given.values()))
    return [case for case in cells if case.is_possible]


def unique(cases: list[Case]) -> list[Case]:
    """Return the cases without repetitions, in their order."""
    return list(dict.fromkeys(cases))


HEADLINES = [*select(loss=(BCE, MSE)), *select(size=("1Ki", "mnist"))]


def quick() -> list[Case]:
    """Return the cases of about a minute: the headlines, every loss, some sizes."""
    return unique([*HEADLINES, *select(loss=tuple(SUBJECTS)), *select(loss=(BCE, MSE), size=tuple(DECADES)[:5])])


def table() -> list[Case]:
    """Return the cases of record."""
    return unique([
        *select(loss=tuple(SUBJECTS), part=PASSES),
        *select(loss=(BCE, MSE), part=PASSES, dtype=DTYPES),
        *select(loss=(BCE, MSE), part=PASSES, size=tuple(SIZES)),
        *select(loss=(BCE, MSE), layout=LAYOUTS),
        *select(option=OPTIONS),
        *select(loss=(CROSS_ENTROPY,), part=("value", "value_and_grad"), size=("mnist", "many classes", "volume")),
        *select(loss=(CROSS_ENTROPY,), size=("large volume",)),
        *select(loss=(CROSS_ENTROPY,), dtype=("bfloat16",)),
        *select(loss=(CROSS_ENTROPY,), layout=("channels-last",)),
    ])  # fmt: skip


def full() -> list[Case]:
    """Return the cases of record, and all sizes."""
    return [*table(), *select(loss=(BCE, MSE), size=tuple(CURVE))]
