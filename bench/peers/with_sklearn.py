"""The rows of scikit-learn's loss module: compiled loops with OpenMP threads that write to the caller's buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn._loss.loss import AbsoluteError, HalfBinomialLoss, HalfSquaredError, HuberLoss

from bench.batch import Batch
from bench.row import Result, Row

# the class of each loss, and the factor that scales its value and gradient to those of fastloss
LOSSES: dict[str, tuple[Any, float]] = {
    "binary_cross_entropy_with_logits": (HalfBinomialLoss, 1.0),
    "mse_loss": (HalfSquaredError, 2.0),
    "l1_loss": (AbsoluteError, 1.0),
    "huber_loss": (lambda: HuberLoss(delta=1.0), 1.0),
}


def rows(batch: Batch, threads: int) -> list[Row]:
    """Return the row of a case, or no row if it is not supported. Dividing the gradient by the number of elements is not timed."""
    case = batch.case
    if case.loss not in LOSSES or case.is_half or case.option or case.dtype == "uint8 targets" or case.layout != "contiguous":
        return []
    make, factor = LOSSES[case.loss]
    loss = make()
    z, t = (x.reshape(-1) for x in batch.arrays)
    values, slope = np.zeros_like(z), np.zeros_like(z)
    given = {"y_true": t, "raw_prediction": z, "n_threads": threads}

    def run() -> Any:
        if case.part == "grad":
            loss.gradient(**given, gradient_out=slope)
        elif case.part == "value":
            loss.loss(**given, loss_out=values)
        else:
            loss.loss_gradient(**given, loss_out=values, gradient_out=slope)
        return None if case.part == "grad" else values.mean(dtype=np.float64)

    def read(mean: Any) -> Result:
        scaled = slope.reshape(case.shape) * (factor / case.elements)
        return None if mean is None else mean * factor, () if case.part == "value" else (scaled,)

    return [Row("scikit-learn", run, read)]
