"""`Row`: one way to compute a case, with the expected result and the check of a row against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.batch import Array, Batch
from fastloss import reference

Result = tuple[Any, Sequence[Array]]  # the value or None, and the gradients or (), as the pass of the case says

CHECKED = 1 << 24  # elements of a gradient that are checked; the value is checked over all elements
AT_ONCE = 1 << 20  # elements that NumPy computes at once, so that its temporaries stay in the caches
# A row with a larger error does not compute the case, and its time would be meaningless. Accuracy is measured by the tests; this
# bound is loose enough for a textbook formula in bfloat16.
LARGEST_ERROR = 1e-2


class WrongError(Exception):
    """The result of a row is not that of its case."""


@dataclass(frozen=True)
class Row:
    """A function that computes a case, and a function that reads its result. A row of the limit has no result to read."""

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], Result] | None = None
    restore: Callable[[], Any] | None = None  # restores arrays that calls have overwritten; not timed
    before: Callable[[], Any] | None = None  # is called before the calls of a round; not timed
    release: Callable[[], Any] | None = None  # frees memory that the library caches, before memory is measured

    def errors(self, expected: Result) -> dict[str, float]:
        """Call the row, and return the relative errors of value and gradients. Raise WrongError if one exceeds `LARGEST_ERROR`."""
        result = self.run()
        if self.read is None:
            return {}
        value, grads = self.read(result)
        errors = {} if value is None else {"value": distance(np.float64(value), expected[0])}
        if len(grads):
            distances = [distance(np.asarray(got)[: len(want)], want) for got, want in zip(grads, expected[1], strict=True)]
            errors["gradient"] = float(np.max(distances))
        if self.restore:
            self.restore()
        wrong = [error for error in errors.values() if not error <= LARGEST_ERROR]  # also NaN
        if wrong or not errors:
            raise WrongError(f"its result is off by {wrong[0]:.1e}" if wrong else "it has no result")
        return errors


def expected(batch: Batch) -> Result:
    """Compute the expected value and gradients with `fastloss.reference` in float64; of large gradients only the part that is checked."""
    if batch.case.subject.reduction:  # not a sum over entries
        value, grads = getattr(reference, batch.case.loss)(*batch.numbers(np.float64))
        return value, as_tuple(grads)
    return expected_in_parts(batch)


def expected_in_parts(batch: Batch) -> Result:
    """Compute the expected value and gradients of a sum over entries, `AT_ONCE` elements at a time."""
    length, size = len(batch.arrays[0]), batch.arrays[0].size
    value: Any = 0.0
    gradients: list[list[Array]] = [[] for _ in batch.case.subject.gradients]
    entries = max(1, AT_ONCE * length // size)
    for first in range(0, length, entries):
        added, grads = expected_of_part(batch, slice(first, first + entries))
        value += added
        if first * size < CHECKED * length:
            for parts, grad in zip(gradients, grads, strict=True):
                parts.append(grad)
    return value, [np.concatenate(parts) for parts in gradients]


def expected_of_part(batch: Batch, part: slice) -> Result:
    """Compute the contribution of a part of the batch to the value, and the gradients of the part."""
    case, divisor = batch.case, batch.divisor()
    extra = {name: x[part] if x.shape == case.shape else x for name, x in batch.extra.items()}
    value, slopes = weighted(case.loss, batch.numbers(np.float64, part), extra)
    return value.sum() / divisor, [slope / divisor for slope in slopes]


def weighted(loss: str, arrays: Sequence[Array], extra: Mapping[str, Array]) -> tuple[Array, list[Array]]:
    """Compute the value of every entry and the derivatives by every element with `fastloss.reference`, given the option of the case."""
    factors = dict(extra)
    parameters = {"pos_weight": factors.pop("pos_weight")} if "pos_weight" in factors else {}
    value, *slopes = getattr(reference, loss)(*arrays, **parameters)
    for factor in factors.values():
        value, slopes = value * factor, [slope * factor for slope in slopes]
    return value, slopes


def split(part: str, result: Any) -> tuple[Any, Any]:
    """Split the result of a pass of fastloss or JAX into value and gradients, of which one may be missing."""
    return result if part == "value_and_grad" else (result, ()) if part == "value" else (None, result)


def as_tuple(grads: Any) -> tuple[Array, ...]:
    """Return gradients as a tuple, also if there is only one."""
    return grads if isinstance(grads, tuple) else (grads,)


def distance(got: npt.ArrayLike, want: npt.ArrayLike) -> float:
    """Compute the relative error |got - want| / |want| in the Euclidean norm."""
    difference = np.subtract(got, want, dtype=np.float64)
    return float(np.linalg.norm(difference.ravel()) / np.linalg.norm(np.ravel(want)))
