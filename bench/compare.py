"""Compare two results files, and find the rows that got slower or faster by more than the noise.

The speed of a machine drifts between two results files, so a row is compared not only by its time but also by its ratio to the
limit row of its own case and file, which was timed in the same rounds. The limit row has noise too, so a change counts only if
both comparisons show it. The noise of medians is estimated by resampling the rounds. `UNCHANGED` allows for the further
difference between two files measured with the same code, whose arrays have other addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.results import Measured, Results, Timing

SAMPLES = 2000  # of the rounds
QUANTILES = (0.005, 0.995)  # the ends of the interval
UNCHANGED = 1.1  # the ratio by which medians in two files of the same code may differ, beyond their own noise


@dataclass(frozen=True)
class Change:
    """The ratio of a row's new time to its old one, and an interval that contains this ratio with and without the limit row."""

    what: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """The result of the comparison: "slower", "faster" or "same"."""
        if self.low > UNCHANGED:
            return "slower"
        return "faster" if self.high < 1 / UNCHANGED else "same"


def compare(before: Results, after: Results) -> list[Change]:
    """Return the changes of all rows of fastloss that both files have."""
    changes = []
    for case, old in before.measured.items():
        if (new := after.measured.get(case)) is not None:
            changes += [change(f"{case}: {name}", old, new, name) for name in old.rows if name.startswith("fastloss") and name in new.rows]
    return changes


def change(what: str, old: Measured, new: Measured, name: str) -> Change:
    """Return the change of a row, described by `what`."""
    rng = np.random.default_rng(0)
    times = resampled(new.rows[name], rng) / resampled(old.rows[name], rng)
    over_limit = times / (resampled(new.limit, rng) / resampled(old.limit, rng))
    low, high = np.quantile([times, over_limit], QUANTILES, axis=1)
    return Change(what, float(np.median(times)), float(low.min()), float(high.max()))


def resampled(row: Timing, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return medians of random samples of a row's rounds, drawn with replacement."""
    seconds = np.array(row.seconds)
    medians: npt.NDArray[np.float64] = np.median(seconds[rng.integers(0, len(seconds), (SAMPLES, len(seconds)))], axis=1)
    return medians
