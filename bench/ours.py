"""The rows of a case that need only fastloss and NumPy: those of fastloss, of NumPy, and of the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import fastloss as fl
from bench import limit as limits
from bench.batch import Array, Batch
from bench.cases import CURVE
from bench.formulas import NAIVE
from bench.row import Result, Row, as_tuple, split, weighted
from fastloss import reference

OURS = ("fastloss, out=", "fastloss")  # the row that represents fastloss: with `out`, or for the value alone
PLAIN = "fastloss, plain"  # the same case in float32, contiguous, without an option
ONE_THREAD = 1 << 17  # elements up to which the limit is fastest on one thread, because waking others takes longer


def rows(batch: Batch) -> list[Row]:
    """Return the rows of fastloss: with `out`, with a newly allocated gradient, in place, and on plain arrays if the case has others.

    Cases of `CURVE` have only the row with `out`, because the other rows would need too much memory for the largest arrays.
    """
    case = batch.case
    plain = replace(case, dtype="float32", layout="contiguous", option="")
    others = [Row(PLAIN, call(Batch(plain)))] if case != plain else []  # without a check, which the plain case makes
    read = partial(read_result, case.part)
    if case.part == "value":
        return [Row("fastloss", call(batch), read), *others]
    with_out = Row("fastloss, out=", call(batch), read)
    if case.size in CURVE:
        return [with_out]
    fresh = Row("fastloss, fresh gradient", call(batch, fresh=True), read, release=fl.empty_cache)
    return [with_out, fresh, in_place(batch), *others]


def call(
    batch: Batch, fresh: bool = False, arrays: Sequence[Array] | None = None, out: tuple[Array, ...] | None = None
) -> Callable[[], Any]:
    """Return a function that computes the case with fastloss, and writes gradients to buffers unless `fresh` is set."""
    case = batch.case
    loss = getattr(fl, case.loss)
    method = loss if case.part == "value" else getattr(loss, case.part)
    options: dict[str, Any] = batch.options | batch.extra
    if case.subject.reduction is None:
        options["reduction"] = case.reduction
    if case.part != "value" and not fresh:
        buffers = out or batch.buffers()
        options["out"] = buffers if len(buffers) > 1 else buffers[0]
    given = arrays or batch.arrays
    return lambda: method(*given, **options)


def read_result(part: str, result: Any) -> Result:
    """Return the value and the gradients from a result of fastloss."""
    value, grads = split(part, result)
    return getattr(value, "total", value), as_tuple(grads)


def in_place(batch: Batch) -> Row:
    """Return the row whose gradients overwrite their arguments. From the second call on it therefore reads gradients."""
    slopes, overwritten = batch.case.subject.gradients, batch.buffers()
    arrays = list(batch.arrays)
    for k, buffer in zip(slopes, overwritten, strict=True):
        arrays[k] = buffer

    def restore() -> None:
        for k, buffer in zip(slopes, overwritten, strict=True):
            np.copyto(buffer, batch.arrays[k])

    restore()
    return Row("fastloss, in place", call(batch, arrays=arrays, out=overwritten), partial(read_result, batch.case.part), restore)


def numpy_rows(batch: Batch) -> list[Row]:
    """Return the rows of NumPy: `fastloss.reference`, and the textbook formula if there is one for the case."""
    case = batch.case
    read = reader_of_pairs(batch)
    made = [Row("NumPy, stable", lambda: compute_reference(batch), read)]
    if case.loss in NAIVE and not case.option:
        made.append(Row("NumPy, naive", lambda: compute_naive(batch), read))
    return made


def reader_of_pairs(batch: Batch) -> Callable[[Any], Result]:
    """Return a function that selects, from a pair of value and gradients, the parts that the pass of the case computes."""
    part = batch.case.part
    return lambda result: (None if part == "grad" else result[0], () if part == "value" else result[1])


def in_float(batch: Batch) -> list[Array]:
    """Convert the arrays for NumPy: bytes are scaled to [0, 1], and 16-bit numbers become float32."""
    return batch.numbers(np.float32 if batch.case.is_half else batch.dtype)


def compute_reference(batch: Batch) -> Result:
    """Compute value and gradients with `fastloss.reference` in the dtype of the arrays, for every pass."""
    case = batch.case
    if case.subject.reduction:
        value, grads = getattr(reference, case.loss)(*in_float(batch))
        return value, as_tuple(grads)
    value, slopes = weighted(case.loss, in_float(batch), batch.extra)
    count = batch.divisor()
    return value.sum(dtype=np.float64) / count, [(slope / value.dtype.type(count)).astype(batch.dtype, copy=False) for slope in slopes]


def compute_naive(batch: Batch) -> Result:
    """Compute value, gradients or both, as the case says, with the textbook formula."""
    case = batch.case
    with np.errstate(all="ignore"):
        value, *slopes = NAIVE[case.loss](*in_float(batch))
        count = batch.divisor()
        return (
            None if case.part == "grad" else value().sum() / count,
            [] if case.part == "value" else [(slope() / count).astype(batch.dtype, copy=False) for slope in slopes],
        )


def limit_rows(batch: Batch, threads: int) -> list[Row]:
    """Return the rows of the limit: loops that move as many bytes as the case does, and compute next to nothing.

    For the Gaussian divergence, which reads two arrays and writes two, they move only three arrays.
    """
    case = batch.case
    if case.subject.classes:
        return [limit_of_classes(batch, threads)]
    a, b = (x.reshape(-1) if x.flags.c_contiguous else np.ones(x.size, x.dtype) for x in batch.arrays[:2])
    limit = limits.Limit(a.itemsize, b.itemsize, threads if case.elements > ONE_THREAD else 1)
    limits.check(limit, a.dtype, b.dtype)
    if case.part == "value":
        return [Row("limit: dot product", lambda: limit.dot(a, b))]
    out = limits.aligned(a.size, a.dtype)
    if "dice" in case.loss:  # the gradient of an element needs the sums over all elements

        def dot_then_triad() -> None:
            limit.dot(a, b)
            limit.triad(out, a, b)

        return [Row("limit: dot product, then triad", dot_then_triad)]
    return [
        Row("limit: triad", lambda: limit.triad(out, a, b)),
        Row("limit: triad, prefetched", lambda: limit.prefetched(out, a, b)),
    ]


def limit_of_classes(batch: Batch, threads: int) -> Row:
    """Return the row of the limit of a loss of classes: read class indices and logits, and for a gradient copy the logits.

    The gradient of a Dice loss needs the sums over all logits, so everything is read once before.
    """
    logits, indices = (x.reshape(-1) if x.flags.c_contiguous else np.ones(x.size, x.dtype) for x in batch.arrays)
    used = threads if batch.case.elements > ONE_THREAD else 1
    of_logits, of_indices = (limits.Limit(x.itemsize, 0, used) for x in (logits, indices))
    for limit, x in ((of_logits, logits), (of_indices, indices)):
        limits.check(limit, x.dtype)
    out = limits.aligned(logits.size, logits.dtype)

    def read() -> None:
        of_indices.dot(indices, indices)
        of_logits.dot(logits, logits)

    def copy() -> None:
        of_indices.dot(indices, indices)
        of_logits.triad(out, logits, logits)

    def read_then_copy() -> None:
        read()
        copy()

    if batch.case.part == "value":
        return Row("limit: read", read)
    return Row("limit: read, then copy", read_then_copy) if "dice" in batch.case.loss else Row("limit: copy", copy)
