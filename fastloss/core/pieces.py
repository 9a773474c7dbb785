"""The lengths of a linear layer, and the pieces that its outputs are cut into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastloss.core.plan import Array

HALVES = ("float16", "bfloat16")

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
        same outputs follow each other.
        """
        rows, width = (self.places[0], math.prod(self.places[1:])) if self.places else (self.samples, 1)
        least = max(math.isqrt(elements), elements // max(1, rows * width))
        outputs = min(self.outputs, least) if splits_outputs else self.outputs
        for of_outputs in cut(self.outputs, outputs):
            for of_rows in cut(rows, elements // max(1, outputs * width)):
                if self.places:
                    yield from ((slice(n, n + 1), of_outputs, of_rows) for n in range(self.samples))
                else:
                    yield of_rows, of_outputs


def layer_of(x: Array, w: Array, b: Array | None) -> Layer:
    """Check the shapes and dtypes of a linear layer, and return its lengths."""
    if x.ndim < 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"input has shape {x.shape} and linear_weight {w.shape}; accepted: (N, K, ...) and (P, K)")
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"linear_bias has shape {b.shape}; accepted: {w.shape[:1]}, a number for each row of linear_weight")
    if x.dtype.name not in ("float32", "float64", *HALVES):
        raise TypeError(f"input has dtype {x.dtype}; accepted: float32, float64, float16, bfloat16")
    for name, a in (("linear_weight", w), ("linear_bias", b)):
        if a is not None and dtype_of_products(a) != dtype_of_products(x):
            raise TypeError(f"input has dtype {x.dtype} and {name} {a.dtype}; accepted: the same, or float32 with 16 bits")
    return Layer(x.shape[0], x.shape[1], w.shape[0], tuple(x.shape[2:]))


def dtype_of_products(x: Array) -> np.dtype[Any]:
    """Return the dtype in which an array is multiplied: float32 for 16 bits, else its own."""
    return np.dtype(np.float32) if x.dtype.name in HALVES else x.dtype


def cut(length: int, most: int) -> Iterator[slice]:
    """Cut a range into parts of nearly the same length, of at most `most`, and at least 1."""
    size = -(-length // -(-length // max(1, most))) if length else 1
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def by_entry(x: Array) -> Array:
    """Return an array (1, F, ...) of a sample as a matrix whose rows are places; one (N, F) as it is."""
    return x if x.ndim == 2 else x[0].reshape(x.shape[1], -1).T
