"""The lengths of a linear layer, and the pieces that its outputs are cut into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from fastloss.core.dtypes import FLOATS, is_float
from fastloss.core.plan import Array

Piece = tuple[slice, ...]  # of the outputs: samples, outputs and, if there are places, those of their first axis


class Layer(NamedTuple):
    """The lengths of a linear layer: input (N, K, ...), weight (P, K), outputs (N, P, ...)."""

    samples: int
    features: int
    outputs: int
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the outputs."""
        return (self.samples, self.outputs, *self.places)

    def pieces(self, elements: int, splits_outputs: bool) -> Iterator[Piece]:
        """Yield the pieces, of about so many elements. None is larger than the first.

        A product of matrices reads its factors once for each piece, so pieces are as close to squares as the layer allows. Those of the
        same outputs follow each other. A piece of places has those of one sample, or all of several samples.
        """
        rows, width = (self.places[0], math.prod(self.places[1:])) if self.places else (self.samples, 1)
        least = max(math.isqrt(elements), elements // max(1, rows * width))
        outputs = min(self.outputs, least) if splits_outputs else self.outputs
        for of_outputs in cut(self.outputs, outputs):
            for of_rows in cut(rows, elements // max(1, outputs * width)):
                if not self.places:
                    yield of_rows, of_outputs
                else:
                    together = elements // max(1, outputs * rows * width)  # samples
                    yield from ((of_samples, of_outputs, of_rows) for of_samples in cut(self.samples, together))


def layer_of(x: Array, w: Array, b: Array | None) -> Layer:
    """Check the shapes and dtypes of a linear layer, and return its lengths."""
    if x.ndim < 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"input has shape {x.shape} and linear_weight {w.shape}; accepted: (N, K, ...) and (P, K)")
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"linear_bias has shape {b.shape}; accepted: {w.shape[:1]}, a number for each row of linear_weight")
    if not is_float(x.dtype):
        raise TypeError(f"input has dtype {x.dtype}; accepted: {', '.join(FLOATS)}")
    for name, a in (("linear_weight", w), ("linear_bias", b)):
        if a is not None and dtype_of_products(a.dtype) != dtype_of_products(x.dtype):
            raise TypeError(f"input has dtype {x.dtype} and {name} {a.dtype}; accepted: the same, or float32 with 16 bits")
    return Layer(x.shape[0], x.shape[1], w.shape[0], tuple(x.shape[2:]))


@cache
def dtype_of_products(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which arrays of a dtype are multiplied: float32 for 16 bits, else the same."""
    return np.dtype(np.float32) if is_float(dtype) and dtype.itemsize == 2 else dtype


def cut(length: int, most: int) -> Iterator[slice]:
    """Cut a range into parts of nearly the same length, of at most `most`, and at least 1."""
    size = -(-length // -(-length // max(1, most))) if length else 1
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def matrices(x: Array) -> list[Array]:
    """Return matrices whose rows are entries: an array (N, F) as it is, and one for each sample of (N, F, ...)."""
    return [x] if x.ndim == 2 else [sample.reshape(len(sample), -1).T for sample in x]
