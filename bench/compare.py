"""Say what of two results files got slower or faster beyond the noise.

A machine drifts between two runs, and so a row is compared by its ratio to the limit of its own case and run too, which was timed
in turn with it; the limit has noise of its own, and so by its time too: what changed has changed in both. The noise is that of the
medians, by resampling the rounds, and on top what two runs of the same code differ by, because their arrays lie elsewhere in
memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.results import Measured, Results, Timing

SAMPLES = 2000
SURE = (0.005, 0.995)  # the quantiles of the interval
BETWEEN_RUNS = 1.1  # what medians of two runs of the same code differ by, beyond their own noise


@dataclass(frozen=True)
class Change:
    """How a row's time changed, and the interval that this and its change over the limit's lie in."""

    what: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Slower, faster, or within the noise."""
        if self.low > BETWEEN_RUNS:
            return "slower"
        return "faster" if self.high < 1 / BETWEEN_RUNS else "same"


def compare(before: Results, after: Results) -> list[Change]:
    """Return the changes of our rows in the cases that both files have."""
    changes = []
    for case, old in before.measured.items():
        if (new := after.measured.get(case)) is not None:
            changes += [change(f"{case}: {name}", old, new, name) for name in old.rows if name.startswith("fastloss") and name in new.rows]
    return changes


def change(what: str, old: Measured, new: Measured, name: str) -> Change:
    """Return the change of a row."""
    rng = np.random.default_rng(0)
    times = resampled(new.rows[name], rng) / resampled(old.rows[name], rng)
    over_limit = times / (resampled(new.limit, rng) / resampled(old.limit, rng))
    low, high = np.quantile([times, over_limit], SURE, axis=1)
    return Change(what, float(np.median(times)), float(low.min()), float(high.max()))


def resampled(row: Timing, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return medians of rounds drawn from those that there are."""
    seconds = np.array(row.seconds)
    medians: npt.NDArray[np.float64] = np.median(seconds[rng.integers(0, len(seconds), (SAMPLES, len(seconds)))], axis=1)
    return medians
