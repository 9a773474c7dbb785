"""The arrays of a case: made once, and read by every row."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bench.cases import LATENTS, Case
from fastloss import reference

Array = npt.NDArray[Any]

REPEATED = 1 << 22  # elements drawn; a larger batch repeats them, because drawing 10**9 would take longer than all its rows
SCALE = 1 / 255


def to_dtype(name: str) -> Any:
    """Return the dtype of a case's inputs."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "uint8 targets": np.float32}.get(name, name))


class Batch:
    """Random logits and targets, or what else a loss is given, in the dtype and layout of the case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = to_dtype(case.dtype)
        self.rng = np.random.default_rng(0)
        self.arrays: tuple[Array, ...] = tuple(getattr(self, name)() for name in case.subject.arrays)
        self.options = {"target_scale": SCALE} if case.dtype == "uint8 targets" else {}
        self.extra = self.option()

    def buffers(self) -> tuple[Array, ...]:
        """Return new arrays for the gradients, of the same layout; what is checked first brings their pages."""
        return tuple(np.empty_like(self.arrays[k]) for k in self.case.subject.gradients)

    def divisor(self) -> Any:
        """Return by what the reduction divides the sum."""
        if self.case.reduction == "sum":
            return 1
        return self.extra["mask"].sum() if "mask" in self.extra else self.case.elements

    def logits(self) -> Array:
        """Return logits as they are at a training's start: most probabilities neither 0 nor 1."""
        return self.place(3 * self.normal(), self.dtype)

    def probabilities(self) -> Array:
        """Return the sigmoid of such logits."""
        return self.place(reference.sigmoid(3 * self.normal()), self.dtype)

    def targets(self) -> Array:
        """Return images in [0, 1], or as bytes."""
        pixels = self.rng.integers(0, 256, min(self.case.elements, REPEATED), np.uint8)
        if self.case.dtype == "uint8 targets":
            return self.place(pixels, np.uint8)
        return self.place(pixels * np.float32(SCALE), self.dtype)

    def mu(self) -> Array:
        """Return means of Gaussians."""
        return self.place(self.normal(), self.dtype)

    def logvar(self) -> Array:
        """Return logarithms of variances."""
        return self.place(self.normal() / 2, self.dtype)

    def latent_mu(self) -> Array:
        """Return the means of the images' latent codes."""
        return self.rng.standard_normal((self.case.shape[0], LATENTS), np.float32).astype(self.dtype)

    latent_logvar = latent_mu

    def normal(self) -> npt.NDArray[np.float32]:
        """Return normal numbers, as many as the batch has or as are drawn."""
        return self.rng.standard_normal(min(self.case.elements, REPEATED), np.float32)

    def option(self) -> dict[str, Array]:
        """Return the case's option as an argument of a loss."""
        name, _, per = self.case.option.partition(" ")
        if not name:
            return {}
        shape = (self.case.shape[1], 1, 1) if per else self.case.shape
        if name == "mask":
            return {name: self.rng.random(shape, np.float32) < 0.8}
        return {name: self.rng.random(shape, np.float32).astype(self.dtype) + self.dtype.type(0.5)}

    def place(self, values: Array, dtype: Any) -> Array:
        """Return values in the case's shape, layout and dtype; they repeat if they are fewer."""
        shape, layout = self.case.shape, self.case.layout
        array = np.resize(values.astype(dtype), self.case.elements).reshape(shape)
        if layout == "channels-last":
            return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        if layout == "every second":
            return np.repeat(array, 2, axis=-1)[..., ::2]
        return array
