"""`Definition`: the formula of a loss, and the arguments that the loss accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastloss.formula import Formula

Bounds = Mapping[str, tuple[float, float]]  # the smallest and the largest accepted number of each parameter

INPUT_AND_TARGET = ("input", "target")


class Definition(NamedTuple):
    """A formula, with the names and bounds of the arguments that a caller may pass."""

    formula: Formula
    bounds: Bounds
    probabilities: tuple[str, ...]  # operands that must lie in [0, 1]; `validate` checks them
    options: tuple[str, ...]  # names of the arguments accepted besides the operands
    operands: tuple[str, str] = INPUT_AND_TARGET  # the caller's names of the two arrays
    gradients: int = 1  # number of arrays in `out`
    classes: bool = False  # whether the last axis of the input is that of classes, of which each entry of the other axes has one


def class_axis(axes: int) -> int:
    """Return the axis of classes of an input with so many axes: (N, C, ...), or (C,)."""
    return min(1, axes - 1)


def classes_last(x: Any) -> Any:
    """Return a view of an array (N, C, ...) or (C,) with the axis of classes moved to the end."""
    return np.moveaxis(x, class_axis(x.ndim), -1)


def classes_second(x: Any) -> Any:
    """Return a view of an array whose last axis is that of classes as (N, C, ...) or (C,)."""
    return np.moveaxis(x, -1, class_axis(x.ndim))


def entry_axes(axes: int) -> tuple[int, ...]:
    """Return the axes of an input with so many axes that are not the axis of classes."""
    return tuple(axis for axis in range(axes) if axis != class_axis(axes))


def entries_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an input (N, C, ...) or (C,) without its axis of classes."""
    axis = class_axis(len(shape))
    return (*shape[:axis], *shape[axis + 1 :])


def operand_of(quantity: str) -> str:
    """Return the name of the operand whose shape and dtype a quantity has, and whose memory the quantity may overwrite."""
    return "target" if quantity.startswith("target_") else "input"
