"""`AbstractLoss`, the base class of all losses, and the register of losses by key.

Pickle stores a loss by its name. Graphs that PyTorch compiles store it by its key.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from fastloss.core.accumulated import Accumulated
from fastloss.core.call import Arguments, Call
from fastloss.core.checks import check_shapes, count_group_axes
from fastloss.core.definition import INPUT_AND_TARGET, Definition, class_axis, entry_axes

C = TypeVar("C", bound=Call)
REGISTER: dict[str, AbstractLoss] = {}  # by key


class AbstractLoss(Accumulated):
    """A named loss of two operands that computes its value and derivatives on any kind of call."""

    __name__: str
    __qualname__: str
    operands: tuple[str, str] = INPUT_AND_TARGET
    definition: Definition | None = None  # None if the loss is not computed in one pass over input and target
    gradients = 1  # number of operands that have a gradient; a single gradient may overwrite the input
    __signature__: inspect.Signature
    key: str  # the key of the loss in REGISTER

    def __repr__(self) -> str:
        return f"<loss {self.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.__qualname__

    @property
    def is_own(self) -> bool:
        """Whether the loss is part of the package. Code that exec runs may define one without a module."""
        return (self.__module__ or "").partition(".")[0] == "fastloss"

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether the slopes are constant wherever they have a derivative, as those of the absolute error are."""
        return self.definition is not None and self.definition.formula.is_zero("curvature")

    def register(self, *definitions: Definition) -> None:
        """Add the loss to the register. Losses with the same name but different formulas get different keys."""
        self.definitions, self.options = definitions, definitions[0].options
        text = repr([(d.formula.text, d.bounds, d.probabilities) for d in definitions])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.key = self.__qualname__ if self.is_own else f"{self.__module__ or ''}.{self.__qualname__} {digest}"
        REGISTER[self.key] = self

    def writes_value(self, reduction: str) -> bool:
        """Whether a pass writes the value of every element to an array instead of summing the values."""
        return reduction == "none"

    def value_shape(self, shape: tuple[int, ...], reduction: str, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the loss's value for operands of a given shape."""
        return shape if reduction == "none" else shape[: count_group_axes(reduction, shape)]

    def bind(self, arguments: Arguments, call: type[C]) -> C:
        """Make the call of a loss that is computed in one pass."""
        assert self.definition is not None
        return call(self.definition, arguments)

    def axes_of(self, name: str, count: int, axes: int) -> tuple[int, ...]:
        """Return the axes of an input with so many axes that the `count` axes of an array lie along.

        The array is an operand, an option, or `grad_output`, whose axes are those of the value. A reduction keeps the leading axes.
        """
        if name == "grad_output":
            return tuple(range(count))
        if not self.definitions[0].classes or count == axes:
            return tuple(range(axes - count, axes))
        return (class_axis(axes),) if name == "weight" else entry_axes(axes)[axes - 1 - count :]

    def check_operands(self, first: tuple[int, ...], second: Any) -> None:
        """Raise an error if the second operand does not fit the shape of the first."""
        check_shapes(self.operands[0], first, self.operands[1], second.shape)

    def require(self, quantity: str) -> None:
        """Raise NotImplementedError if the loss's formula does not return a quantity, such as "curvature"."""


def signature(operands: tuple[str, str], reduction: str, options: Mapping[str, Any]) -> inspect.Signature:
    """Make the signature of a loss, which help() and editors show."""
    Parameter = inspect.Parameter
    leading = {**dict.fromkeys(operands, Parameter.empty), "weight": None, "reduction": reduction}
    return inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default) for name, default in leading.items()]
        + [Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in options.items()]
    )
