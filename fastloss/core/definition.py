"""`Definition`: what a call needs to know of the loss that it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastloss.formula import Formula

Bounds = Mapping[str, tuple[float, float]]  # of parameters: the smallest and the largest number accepted

INPUT_AND_TARGET = ("input", "target")


class Definition(NamedTuple):
    """A formula, with the names and limits of what a caller may pass."""

    formula: Formula
    bounds: Bounds
    probabilities: tuple[str, ...]  # operands that must lie in [0, 1]; `validate` checks them
    options: tuple[str, ...]  # accepted names besides those of the operands
    operands: tuple[str, str] = INPUT_AND_TARGET  # the caller's names of the two arrays
    gradients: int = 1  # how many arrays `out` is


def operand_of(quantity: str) -> str:
    """Name the operand whose shape and dtype a quantity has when it is written, and which it may overwrite."""
    return "target" if quantity.startswith("target_") else "input"
