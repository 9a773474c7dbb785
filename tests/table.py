"""The one table of losses and the one table of tolerances that the tests are run over."""

from __future__ import annotations

import numpy as np

import fastloss as fl
from fastloss import reference
from tests import oracle

LOSSES = {
    "binary_cross_entropy_with_logits": (fl.binary_cross_entropy_with_logits, oracle.binary_cross_entropy_with_logits, reference.binary_cross_entropy_with_logits),
    "mse_loss": (fl.mse_loss, oracle.mse_loss, reference.mse_loss),
    "mse_with_logits_loss": (fl.mse_with_logits_loss, oracle.mse_with_logits_loss, reference.mse_with_logits_loss),
}

# in units of the last place of the magnitude the oracle names, for hard targets (0 and 1) and for soft ones
ULP = {
    ("binary_cross_entropy_with_logits", "value"): (2, 3),
    ("binary_cross_entropy_with_logits", "slope"): (2, 2),
    ("binary_cross_entropy_with_logits", "curvature"): (3, 3),
    ("mse_loss", "value"): (2, 2),
    ("mse_loss", "slope"): (0.5, 0.5),
    ("mse_loss", "curvature"): (0, 0),
    ("mse_with_logits_loss", "value"): (4, 4),
    ("mse_with_logits_loss", "slope"): (4, 4),
    ("mse_with_logits_loss", "curvature"): (4, 4),
}
# of a reduced value: a float32 sum of at most 64 elements a lane, then float64
SUM_RTOL = {np.dtype(np.float32): 2e-7, np.dtype(np.float64): 1e-15}


def ulp_error(got, want, magnitude, dtype):
    """Return |got - want| in units of the last place, in `dtype`, of the magnitude; equal infinities and two NaNs are 0 apart."""
    got = np.asarray(got, np.longdouble)
    want, magnitude = (np.asarray(x, np.longdouble) for x in (want, magnitude))
    largest = np.finfo(dtype).max
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        rounded = np.minimum(np.abs(magnitude), largest).astype(dtype)
        unit = np.spacing(rounded).astype(np.longdouble)
        as_stored = np.where(np.abs(want) > largest, np.sign(want) * np.inf, want)  # what rounds to infinity
        error = np.abs(got - as_stored) / unit
    same = (got == as_stored) | (np.isnan(got) & np.isnan(want))
    return np.where(same, 0, np.where(np.isfinite(got) & np.isfinite(as_stored), error, np.inf))
