"""`Batch`: the arrays of a case, which all of its rows share."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bench.cases import LATENTS, Case
from fastloss import reference

Array = npt.NDArray[Any]

DRAWN = 1 << 22  # random elements; larger batches repeat them, because drawing 10**9 takes longer than timing all rows
SCALE = 1 / 255


def to_dtype(name: str) -> Any:
    """Return the dtype of the inputs of a case, given the name of its dtype."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "uint8 targets": np.float32}.get(name, name))


class Batch:
    """Random arguments of a loss, such as logits and targets, in the dtype and layout of the case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = to_dtype(case.dtype)
        self.rng = np.random.default_rng(0)
        self.arrays: tuple[Array, ...] = tuple(getattr(self, name)() for name in case.subject.arrays)
        self.options = {"target_scale": SCALE} if case.dtype == "uint8 targets" else {}
        self.extra = self.option_arrays()

    def buffers(self) -> tuple[Array, ...]:
        """Allocate arrays for the gradients, in the layout of their arguments. The first call, which is not timed, touches their pages."""
        return tuple(np.empty_like(self.arrays[k]) for k in self.case.subject.gradients)

    def divisor(self) -> Any:
        """Return the number that divides the sum of the loss: the number of elements that count in a mean, and 1 for a sum."""
        if self.case.reduction == "sum":
            return 1
        return self.extra["mask"].sum() if "mask" in self.extra else prod(self.case.entries)

    def numbers(self, dtype: Any, part: slice = slice(None)) -> list[Array]:
        """Convert a part of the arrays to a dtype, with targets in [0, 1]. Class indices stay as they are."""
        kinds = self.case.subject.arrays
        made = [x[part] if kind == "classes" else x[part].astype(dtype, copy=False) for kind, x in zip(kinds, self.arrays, strict=True)]
        if self.case.dtype == "uint8 targets":
            at = kinds.index("targets")
            made[at] = made[at] * SCALE
        return made

    def logits(self) -> Array:
        """Draw logits as at the start of a training, where few probabilities are close to 0 or 1."""
        return self.place(3 * self.normal(), self.dtype)

    def probabilities(self) -> Array:
        """Draw probabilities: the sigmoid of logits as at the start of a training."""
        return self.place(reference.sigmoid(3 * self.normal()), self.dtype)

    def targets(self) -> Array:
        """Draw images in [0, 1], or of bytes if the targets of the case are uint8."""
        pixels = self.rng.integers(0, 256, min(self.case.elements, DRAWN), np.uint8)
        if self.case.dtype == "uint8 targets":
            return self.place(pixels, np.uint8)
        return self.place(pixels * np.float32(SCALE), self.dtype)

    def classes(self) -> Array:
        """Draw a class index for each entry, in bytes."""
        drawn = self.rng.integers(self.case.shape[1], size=min(prod(self.case.entries), DRAWN), dtype=np.uint8)
        return np.resize(drawn, self.case.entries)

    def mu(self) -> Array:
        """Draw the means of Gaussians."""
        return self.place(self.normal(), self.dtype)

    def logvar(self) -> Array:
        """Draw logarithms of the variances of Gaussians."""
        return self.place(self.normal() / 2, self.dtype)

    def latent_mu(self) -> Array:
        """Draw the means of the images' latent codes."""
        return self.rng.standard_normal((self.case.shape[0], LATENTS), np.float32).astype(self.dtype)

    latent_logvar = latent_mu

    def normal(self) -> npt.NDArray[np.float32]:
        """Draw normal numbers: one for each element of the batch, but no more than `DRAWN`."""
        return self.rng.standard_normal(min(self.case.elements, DRAWN), np.float32)

    def option_arrays(self) -> dict[str, Array]:
        """Return the option of the case as keyword arguments of a loss, without arguments if it has none."""
        name, _, per = self.case.option.partition(" ")
        if not name:
            return {}
        shape = (self.case.shape[1], 1, 1) if per else self.case.shape
        if name == "mask":
            return {name: self.rng.random(shape, np.float32) < 0.8}
        return {name: self.rng.random(shape, np.float32).astype(self.dtype) + self.dtype.type(0.5)}

    def place(self, values: Array, dtype: Any) -> Array:
        """Convert values to the shape, layout and dtype of the case, and repeat them if the case has more elements."""
        shape, layout = self.case.shape, self.case.layout
        array = np.resize(values.astype(dtype), self.case.elements).reshape(shape)
        if layout == "channels-last":
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
        if layout == "every second":
            return np.repeat(array, 2, axis=-1)[..., ::2]
        return array
