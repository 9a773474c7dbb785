"""`Row`: one way to compute a case; what it should come to, and the check that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.batch import SCALE, Array, Batch
from fastloss import reference

Result = tuple[Any, Sequence[Array]]  # the value and the gradients; None and () where the case's pass has none

CHECKED = 1 << 24  # elements whose gradient is looked at; the value is of all
AT_ONCE = 1 << 20  # elements computed together: more, and NumPy's temporaries leave the caches
# A row whose error is larger computes something else, and its time would mean nothing. Not an opinion on digits, which the
# tests measure: a textbook formula in bfloat16 passes.
SAME = 1e-2


class WrongError(Exception):
    """A row computes something else than the case."""


@dataclass(frozen=True)
class Row:
    """A call that computes a case, and how its result is read; what is there to compare times with has none."""

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], Result] | None = None
    restore: Callable[[], Any] | None = None  # what calls destroyed; untimed
    before: Callable[[], Any] | None = None  # what runs directly before a call; untimed
    release: Callable[[], Any] | None = None  # what gives up the memory that is kept for the next call, where that is measured

    def errors(self, expected: Result) -> dict[str, float]:
        """Run; return the errors of value and gradients, relative to their sizes. Raises `WrongError` where one is large."""
        result = self.run()
        if self.read is None:
            return {}
        value, grads = self.read(result)
        errors = {} if value is None else {"value": distance(np.float64(value), expected[0])}
        if len(grads):
            found = [distance(np.asarray(got)[: len(want)], want) for got, want in zip(grads, expected[1], strict=True)]
            errors["gradient"] = float(np.max(found))
        if self.restore:
            self.restore()
        wrong = [error for error in errors.values() if not error <= SAME]  # NaN too
        if wrong or not errors:
            raise WrongError(f"its result is off by {wrong[0]:.1e}" if wrong else "it has no result")
        return errors


def expected(batch: Batch) -> Result:
    """Return a case's value and gradients by `fastloss.reference`, in float64; of large gradients the entries that are looked at."""
    if len(batch.case.subject.gradients) == 3 or "dice" in batch.case.loss:  # these are not sums over elements
        value, grads = getattr(reference, batch.case.loss)(*widened(batch, slice(None)))
        return value, as_tuple(grads)
    return of_parts(batch)


def of_parts(batch: Batch) -> Result:
    """Return value and gradients, computed a part of the batch at a time."""
    length, size = len(batch.arrays[0]), batch.arrays[0].size
    value: Any = 0.0
    kept: list[list[Array]] = [[] for _ in batch.case.subject.gradients]
    step = max(1, AT_ONCE * length // size)
    for first in range(0, length, step):
        added, grads = of_part(batch, slice(first, first + step))
        value += added
        if first * size < CHECKED * length:
            for parts, grad in zip(kept, grads, strict=True):
                parts.append(grad)
    return value, [np.concatenate(parts) for parts in kept]


def of_part(batch: Batch, part: slice) -> Result:
    """Return what a part of the batch adds to the value, and its gradients."""
    case, divisor = batch.case, batch.divisor()
    extra = {name: x[part] if x.shape == case.shape else x for name, x in batch.extra.items()}
    value, slopes = weighted(case.loss, widened(batch, part), extra)
    return value.sum() / divisor, [slope / divisor for slope in slopes]


def widened(batch: Batch, part: slice) -> list[Array]:
    """Return a part of the arrays in float64."""
    return [x[part].astype(np.float64) * (SCALE if x.dtype == np.uint8 else 1) for x in batch.arrays]


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
