"""Thumbnails of images and their targets, as bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastloss import reference
from fastloss.core.plan import Array
from fastloss.losses.table import LOSSES
from fastloss.score.batches import Batches

PIXELS = 256  # the longer side of a thumbnail, at most

Bytes = npt.NDArray[np.uint8]


def check_shape(shape: tuple[int, ...], classes: bool) -> None:
    """Raise ValueError for images that are no pictures. `classes` is whether the second axis is that of classes."""
    if len(shape) not in ((4,) if classes else (3, 4)):
        accepted = "(C, H, W) with C classes" if classes else "(H, W), (C, H, W) or (H, W, C)"
        raise ValueError(f"--png: an image has shape {shape[1:]}; accepted: {accepted}")


def thumbnails(batches: Batches, image: int) -> tuple[Bytes, Bytes]:
    """Return an image and its target as bytes.

    Logits go through a sigmoid. Probabilities are shown from 0 to 1, other numbers from the smallest to the largest of the target. Of
    several classes, the most probable one of each pixel is shown.
    """
    arrays = batches.read_one(image)
    row = LOSSES[batches.loss.__name__]
    if row.classes:
        return class_colours(arrays["input"][0].argmax(axis=0)), class_colours(to_indices(arrays["target"][0]))
    kind = row.input
    shown, target = (thin_out(arrays[name][0]) for name in ("input", "target"))
    shown = reference.sigmoid(shown) if "logits" in kind else shown
    target = target * (batches.settings.get("target_scale") or 1.0)
    low, high = (0.0, 1.0) if "logits" in kind or "probabilities" in kind else limits(target)
    return to_bytes(shown, low, high), to_bytes(target, low, high)


def to_indices(target: Array) -> Any:
    """Return class indices (H, W), also of probabilities (C, H, W)."""
    return target.argmax(axis=0) if target.ndim == 3 else target


def class_colours(indices: Any) -> Bytes:
    """Return class indices as an image (height, width, 3), of few pixels, in the colours of PASCAL VOC: class 0 is black."""
    step = math.ceil(max(indices.shape) / PIXELS)
    bits = indices[::step, ::step, np.newaxis].astype(np.int64) >> np.arange(24) & 1  # every third one is of the same colour
    colours: Bytes = (bits.reshape(*bits.shape[:2], 8, 3) << np.arange(7, -1, -1)[:, np.newaxis]).sum(axis=2).astype(np.uint8)
    return colours


def thin_out(x: Array) -> Any:
    """Return an image as (height, width) or (height, width, 3), of few pixels; the first channel if there are not 1 or 3."""
    if x.ndim == 3:
        x = np.moveaxis(x, 0, -1) if channels_come_first(x.shape) else x
        x = x if x.shape[-1] == 3 else x[..., 0]
    step = math.ceil(max(x.shape[:2]) / PIXELS)
    return x[::step, ::step].astype(np.float64)


def channels_come_first(shape: tuple[int, ...]) -> bool:
    """Whether the channels of an image of three axes are the first one, as they are unless only the last can be."""
    return shape[0] in (1, 3) or shape[-1] not in (1, 3, 4)


def channels(shape: tuple[int, ...]) -> int:
    """Return the number of channels of an image."""
    return 1 if len(shape) == 2 else shape[0 if channels_come_first(shape) else -1]


def limits(x: Any) -> tuple[float, float]:
    """Return the smallest and the largest finite number, or two others if there is none or they are equal."""
    finite = x[np.isfinite(x)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return low, high if high > low else low + 1.0


def to_bytes(x: Any, low: float, high: float) -> Bytes:
    """Scale numbers to bytes, from black at `low` to white at `high`. NaN is black."""
    with np.errstate(invalid="ignore"):
        scaled = np.nan_to_num(np.clip((x - low) / (high - low), 0, 1))
    scaled_bytes: Bytes = (255 * scaled + 0.5).astype(np.uint8)
    return scaled_bytes
