"""The rows of a case that need nothing but fastloss and NumPy: ours, NumPy's, and the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import fastloss as fl
from bench import limit as limits
from bench import naive
from bench.batch import SCALE, Array, Batch
from bench.cases import CURVE
from bench.row import Result, Row, as_tuple, split, weighted
from fastloss import reference

OURS = ("fastloss, out=", "fastloss")  # the row that stands for us: with `out`, or of the value alone
PLAIN = "fastloss, plain"  # float32, contiguous, without an option
ALONE = 1 << 17  # elements up to which waking a second thread costs the limit more than it saves


def rows(batch: Batch) -> list[Row]:
    """Return fastloss with `out`, with a fresh gradient, and in place; and on plain arrays, where the case's are not.

    Over a range of sizes there is the first alone: the others would need more memory than the largest leave.
    """
    case = batch.case
    plain = replace(case, dtype="float32", layout="contiguous", option="")
    others = [Row(PLAIN, call(Batch(plain)))] if case != plain else []  # checked where it is a case of its own
    read = partial(read_result, case.part)
    if case.part == "value":
        return [Row("fastloss", call(batch), read), *others]
    with_out = Row("fastloss, out=", call(batch), read)
    if case.size in CURVE:
        return [with_out]
    fresh = Row("fastloss, fresh gradient", call(batch, fresh=True), read)
    return [with_out, fresh, in_place(batch), *others]


def call(
    batch: Batch, fresh: bool = False, arrays: Sequence[Array] | None = None, out: tuple[Array, ...] | None = None
) -> Callable[[], Any]:
    """Return the call of fastloss that a case is, with buffers for its gradients unless they are to be fresh."""
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
    """Return value and gradients of what a call of fastloss returned."""
    value, grads = split(part, result)
    return getattr(value, "total", value), as_tuple(grads)


def in_place(batch: Batch) -> Row:
    """Return the row whose gradients overwrite what they are gradients of: at the second call, gradients."""
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
    """Return `fastloss.reference`, and the formula that one would write down."""
    case = batch.case
    read = reader(batch)
    made = [Row("NumPy, stable", lambda: stable(batch), read)]
    if case.loss in naive.FORMULAS and not case.option:
        made.append(Row("NumPy, naive", lambda: written_down(batch), read))
    return made


def reader(batch: Batch) -> Callable[[Any], Result]:
    """Return what takes the parts of (value, gradients) that the case's pass has."""
    part = batch.case.part
    return lambda result: (None if part == "grad" else result[0], () if part == "value" else result[1])


def in_float(batch: Batch) -> list[Array]:
    """Return the arrays as NumPy can compute with them: bytes scaled, 16 bits widened."""
    arrays = [x * np.float32(SCALE) if x.dtype == np.uint8 else x for x in batch.arrays]
    return [x.astype(np.float32) if batch.case.is_half else x for x in arrays]


def stable(batch: Batch) -> Result:
    """Compute value and gradients by the reference, in the dtype of the arrays, whichever of them the case asks for."""
    case = batch.case
    if case.subject.reduction:
        value, grads = getattr(reference, case.loss)(*in_float(batch))
        return value, as_tuple(grads)
    value, slopes = weighted(case.loss, in_float(batch), batch.extra)
    count = batch.divisor()
    return value.sum(dtype=np.float64) / count, [(slope / value.dtype.type(count)).astype(batch.dtype, copy=False) for slope in slopes]


def written_down(batch: Batch) -> Result:
    """Compute by the naive formula what the case asks for."""
    case = batch.case
    with np.errstate(all="ignore"):
        value, *slopes = naive.FORMULAS[case.loss](*in_float(batch))
        count = batch.divisor()
        return (
            None if case.part == "grad" else value().sum() / count,
            [] if case.part == "value" else [(slope() / count).astype(batch.dtype, copy=False) for slope in slopes],
        )


def limit_rows(batch: Batch, threads: int) -> list[Row]:
    """Return what moves as many bytes as the case does, and computes next to nothing.

    Of the four streams of the Gaussian divergence it moves three.
    """
    case = batch.case
    a, b = (x.reshape(-1) if x.flags.c_contiguous else np.ones(x.size, x.dtype) for x in batch.arrays[:2])
    bound = limits.Limit(a.itemsize, b.itemsize, threads if case.elements > ALONE else 1)
    limits.check(bound, a.dtype, b.dtype)
    if case.part == "value":
        return [Row("limit: dot product", lambda: bound.dot(a, b))]
    out = limits.aligned(a.size, a.dtype)
    if "dice" in case.loss:  # no element's slope is known before all are summed

        def both() -> None:
            bound.dot(a, b)
            bound.triad(out, a, b)

        return [Row("limit: dot product, then triad", both)]
    return [
        Row("limit: triad", lambda: bound.triad(out, a, b)),
        Row("limit: triad, prefetched", lambda: bound.prefetched(out, a, b)),
    ]
