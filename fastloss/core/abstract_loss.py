"""`AbstractLoss`: what every kind of loss has in common, and the register of losses by key.

A loss is pickled by its name, and named by its key in graphs that PyTorch compiles.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from fastloss.core.call import Arguments
from fastloss.core.checks import count_group_axes
from fastloss.core.definition import INPUT_AND_TARGET, Definition

LOSSES: dict[str, AbstractLoss] = {}  # by key


class AbstractLoss:
    """A named loss of two operands that computes its value and derivatives on any kind of call."""

    __name__: str
    __qualname__: str
    operands: tuple[str, str] = INPUT_AND_TARGET
    options: tuple[str, ...]  # accepted names besides those of the operands
    settings: Mapping[str, Any] = {}  # defaults of options that are not parameters of a formula
    definition: Definition | None = None  # of a loss of input and target that takes one pass
    gradients = 1  # how many operands have one; a single gradient may replace the input in memory
    key: str  # in LOSSES

    def __reduce__(self) -> str:
        return self.__qualname__

    @property
    def is_own(self) -> bool:
        """Whether the loss is part of the package. Code that exec runs may define one without a module."""
        return (self.__module__ or "").partition(".")[0] == "fastloss"

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute what the arguments ask for with a class of calls: the reduced value or None, and the arrays."""
        raise NotImplementedError

    def register(self, *definitions: Definition) -> None:
        """Enter the loss into the register. Two losses that share a name but compute different things get different keys."""
        self.options = definitions[0].options
        text = repr([(d.formula.text, d.bounds, d.probabilities) for d in definitions])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.key = self.__qualname__ if self.is_own else f"{self.__module__ or ''}.{self.__qualname__} {digest}"
        LOSSES[self.key] = self

    def writes_value(self, reduction: str) -> bool:
        """Whether a pass writes the value as an array shaped like the first operand, instead of summing it."""
        return reduction == "none"

    def value_shape(self, shape: tuple[int, ...], reduction: str, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the value for operands of a given shape."""
        return shape if reduction == "none" else shape[: count_group_axes(reduction, shape)]

    def require(self, quantity: str) -> None:
        """Raise NotImplementedError if the loss's formula does not return a quantity, such as "curvature"."""


def signature(operands: tuple[str, str], reduction: str, options: Mapping[str, Any]) -> inspect.Signature:
    """Make the signature of a loss, shown by help() and by editors."""
    Parameter = inspect.Parameter
    leading = {**dict.fromkeys(operands, Parameter.empty), "weight": None, "reduction": reduction}
    return inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default) for name, default in leading.items()]
        + [Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in options.items()]
    )
