"""`Row`: one way to compute a case, and the check that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastloss import reference
from fastloss.bench.batch import SCALE, Array, Batch

Result = tuple[Any, Sequence[Array]]  # the value and the gradients; None and () where the case's pass has none

CHECKED = 1 << 24  # elements whose gradient is looked at; the value is of all
AT_ONCE = 1 << 20  # elements computed together: more, and NumPy's temporaries leave the caches
# A row whose error is larger computes something else, and its time would mean nothing. Not an opinion on digits, which the
# tests measure: a textbook formula in bfloat16 passes.
SAME = 1e-2


@dataclass(frozen=True)
class Row:
    """A call that computes a case, and how its result is read; what is there to compare times with has none."""

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], Result] | None = None
    restore: Callable[[], Any] | None = None  # what calls destroyed; untimed
    before: Callable[[], Any] | None = None  # what runs directly before a call; untimed
    release: Callable[[], Any] | None = None  # what gives up the memory that is kept for the next call, where that is measured


class WrongError(Exception):
    """A row computes something else than the case."""


class Expected:
    """What a case's value and gradients are: `fastloss.reference` in float64, a part of the batch at a time."""

    def __init__(self, batch: Batch) -> None:
        self.batch, case = batch, batch.case
        whole = len(case.subject.slopes) == 3 or "dice" in case.loss  # these are not sums over elements
        if whole:
            self.value, self.grads = self.of_whole()
        else:
            self.value, self.grads = self.of_parts(len(case.subject.slopes))
        self.looked_at = len(self.grads[0])

    def of_parts(self, slopes: int) -> tuple[Any, list[Array]]:
        """Return the value, and the gradients of as many entries of the first axis as are looked at."""
        length, size = len(self.batch.arrays[0]), self.batch.arrays[0].size
        value: Any = 0.0
        kept: list[list[Array]] = [[] for _ in range(slopes)]
        step = max(1, AT_ONCE * length // size)
        for first in range(0, length, step):
            added, grads = self.of_part(slice(first, first + step))
            value += added
            if first * size < CHECKED * length:
                for parts, grad in zip(kept, grads, strict=True):
                    parts.append(grad)
        return value, [np.concatenate(parts) for parts in kept]

    def widened(self, part: slice) -> list[Array]:
        """Return a part of the arrays in float64."""
        arrays = [x[part].astype(np.float64) for x in self.batch.arrays]
        return [x * SCALE if original.dtype == np.uint8 else x for x, original in zip(arrays, self.batch.arrays, strict=True)]

    def of_whole(self) -> Result:
        """Return value and gradients of a loss that is not a sum."""
        value, grads = getattr(reference, self.batch.case.loss)(*self.widened(slice(None)))
        return value, as_tuple(grads)

    def of_part(self, part: slice) -> Result:
        """Return what a part of the batch adds to the value, and its gradients."""
        case, divisor = self.batch.case, self.batch.divisor()
        extra = {name: x[part] if x.shape == case.shape else x for name, x in self.batch.extra.items()}
        value, slopes = weighted(case.loss, self.widened(part), extra)
        return value.sum() / divisor, [slope / divisor for slope in slopes]

    def errors(self, row: Row) -> dict[str, float]:
        """Run a row; return the errors of its value and gradients, relative to their sizes. Raises `WrongError` where one is large."""
        result = row.run()
        if row.read is None:
            return {}
        value, grads = row.read(result)
        errors = {} if value is None else {"value": distance(np.float64(value), self.value)}
        if case_grads := [np.asarray(g)[: self.looked_at] for g in grads]:
            errors["gradient"] = float(np.max([distance(got, want) for got, want in zip(case_grads, self.grads, strict=True)]))
        if row.restore:
            row.restore()
        wrong = [error for error in errors.values() if not error <= SAME]  # NaN too
        if wrong or not errors:
            raise WrongError(f"its result is off by {wrong[0]:.1e}" if wrong else "it has no result")
        return errors


def weighted(loss: str, arrays: Sequence[Array], extra: Mapping[str, Array]) -> tuple[Array, list[Array]]:
    """Return value and slopes of every element by the reference, with a case's option."""
    factors = dict(extra)
    parameters = {"pos_weight": factors.pop("pos_weight")} if "pos_weight" in factors else {}
    value, *slopes = getattr(reference, loss)(*arrays, **parameters)
    for factor in factors.values():
        value, slopes = value * factor, [slope * factor for slope in slopes]
    return value, slopes


def split(part: str, result: Any) -> tuple[Any, Any]:
    """Return value and gradients of what a call of a pass returned: both, the value, or the gradients."""
    return result if part == "value_and_grad" else (result, ()) if part == "value" else (None, result)


def as_tuple(grads: Any) -> tuple[Array, ...]:
    """Return gradients as a tuple, also where there is one, by itself."""
    return grads if isinstance(grads, tuple) else (grads,)


def distance(got: npt.ArrayLike, want: npt.ArrayLike) -> float:
    """Return |got - want| / |want|, in the Euclidean norm."""
    difference = np.subtract(got, want, dtype=np.float64)
    return float(np.linalg.norm(difference.ravel()) / np.linalg.norm(np.ravel(want)))
