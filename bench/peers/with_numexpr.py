"""The rows of numexpr, which compiles a formula given as text for a virtual machine that processes arrays block by block."""

from __future__ import annotations

import re

import numexpr
import numpy as np

from bench.batch import SCALE, Batch
from bench.formulas import TEXTS
from bench.row import Result, Row


def rows(batch: Batch, threads: int) -> list[Row]:
    """Return the row of a case, or no row if the loss has no formula as text, or the case has 16-bit arrays or an option."""
    case = batch.case
    if case.loss not in TEXTS or case.is_half or case.option:
        return []
    numexpr.set_num_threads(threads)
    names = dict(zip("zt", batch.arrays, strict=True)) | {"scale": np.float32(SCALE), "factor": batch.dtype.type(1 / case.elements)}
    value_text, slope_text = TEXTS[case.loss]
    if case.dtype == "uint8 targets":
        value_text, slope_text = (re.sub(r"\bt\b", "(scale * t)", text) for text in (value_text, slope_text))
    values, (slope,) = np.empty(case.shape, batch.dtype), batch.buffers()

    def run() -> Result:
        value = None
        if case.part != "grad":
            numexpr.evaluate(value_text, names, out=values)
            value = values.mean(dtype=np.float64)
        if case.part != "value":
            numexpr.evaluate(f"({slope_text}) * factor", names, out=slope)
        return value, [slope] if case.part != "value" else []

    return [Row("numexpr", run, lambda result: result)]
