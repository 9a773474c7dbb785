"""`Values`: statistics of a file of numbers, of which a part at a time is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 19  # numbers in memory at a time
DIGITS = 1 << 16

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.intp]


class Values:
    """The losses of all images, in a file of float64 numbers. NaN stands for an image of which no element counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path.stat().st_size // 8
        self.count = sum(len(x) for x in self.numbers())

    def chunks(self) -> Iterator[Floats]:
        """Yield all numbers, a part at a time."""
        for first in range(0, self.images, CHUNK):
            yield np.fromfile(self.path, np.float64, CHUNK, offset=8 * first)

    def numbers(self) -> Iterator[Floats]:
        """Yield all numbers but NaN, a part at a time."""
        for x in self.chunks():
            yield x[~np.isnan(x)]

    def finite(self) -> Iterator[Floats]:
        """Yield all finite numbers, a part at a time."""
        for x in self.chunks():
            yield x[np.isfinite(x)]

    def worst(self, count: int) -> list[tuple[int, float]]:
        """Return the images with the largest losses, and these, in descending order; of equal losses, the first image."""
        found: list[tuple[int, float]] = []
        for k, x in enumerate(self.chunks()):
            order = np.argsort(-x, kind="stable")[: min(count, np.count_nonzero(~np.isnan(x)))]  # NaN is sorted to the end
            found += zip((order + k * CHUNK).tolist(), x[order].tolist(), strict=True)
            found = sorted(found, key=lambda pair: -pair[1])[:count]
        return found

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Return the smallest losses that are not exceeded in these shares of the images; NaN if there is no loss."""
        if not self.count:
            return [math.nan] * len(shares)
        return self.order_statistics([max(0, math.ceil(share * self.count) - 1) for share in shares])

    def order_statistics(self, ranks: Sequence[int]) -> list[float]:
        """Return the numbers that would have these indices if all were sorted.

        Their bits are found in four passes, 16 bits at a time: the numbers with the same leading bits are counted by their next ones.
        """
        found = {rank: (0, rank) for rank in ranks}  # leading bits, and the rank among the numbers that have them
        for shift in (48, 32, 16, 0):
            counts = self.count_digits({bits for bits, _ in found.values()}, shift)
            for rank, (bits, left) in found.items():
                ends = np.cumsum(counts[bits])
                digit = int(np.searchsorted(ends, left, side="right"))
                found[rank] = bits << 16 | digit, left - (int(ends[digit - 1]) if digit else 0)
        return [from_key(found[rank][0]) for rank in ranks]

    def count_digits(self, prefixes: set[int], shift: int) -> dict[int, Counts]:
        """Count the 16 bits above `shift` of all keys, separately for the keys that have each prefix above these bits."""
        counts = {prefix: np.zeros(DIGITS, np.intp) for prefix in prefixes}
        for x in self.numbers():
            keys = to_keys(x) >> np.uint64(shift)
            for prefix, count in counts.items():
                chosen = keys[keys >> np.uint64(16) == np.uint64(prefix)]
                count += np.bincount((chosen % np.uint64(DIGITS)).astype(np.intp), minlength=DIGITS)
        return counts

    def histogram(self, bins: int) -> tuple[Counts, Floats]:
        """Count the finite numbers in intervals of equal length, and return the ends of these too."""
        low = min((float(x.min()) for x in self.finite() if x.size), default=0.0)
        high = max((float(x.max()) for x in self.finite() if x.size), default=1.0)
        edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
        counts = np.zeros(bins, np.intp)
        for x in self.finite():
            counts += np.histogram(x, edges)[0]
        return counts, edges


def to_keys(x: Floats) -> npt.NDArray[np.uint64]:
    """Return whole numbers that are in the same order as the float64 numbers x."""
    bits = x.view(np.uint64)
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def from_key(key: int) -> float:
    """Return the float64 number of a key."""
    bits = key & ~(1 << 63) if key >> 63 else ~key & (1 << 64) - 1
    return float(np.array(bits, np.uint64).view(np.float64))
