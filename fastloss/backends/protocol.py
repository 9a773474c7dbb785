"""`Backend`: what a framework must provide so that losses take its arrays.

To add a framework, write one subclass, in a module of its own, and name it in `find.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, Call
from fastloss.core.plan import Array


class Backend:
    """A framework whose arrays losses take. There is one instance of each subclass.

    A loss's method packs what its caller passed into `Arguments`, finds the backend by the type of the first array, and calls
    `compute`. The backend brings the arrays into a form that a machine's `Call` reads, without a copy, chooses the class of the
    call, lets the loss make its passes, and returns results of its own kind.
    """

    options: tuple[str, ...] = ()  # accepted besides those of a loss, such as PyTorch's `inplace_grad`

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Array]]:
        """Compute what the arguments ask for: the reduced value or None, and one array for each quantity that is wanted."""
        raise NotImplementedError

    def as_array(self, name: str, value: Any) -> Any:
        """Return an argument as an array of the framework, without a copy. Raise TypeError, naming the argument, if it is none."""
        raise NotImplementedError

    def compute_jointly(self, method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a method that makes several losses' passes, with arrays that a machine reads and the class of calls as `call`.

        The results that the method returns, in nested tuples, are converted to the framework's own.
        """
        raise NotImplementedError

    def unread_input(self, target: Any) -> Any:
        """Make an input of the target's shape for a formula that reads the target alone. It occupies one element."""
        raise NotImplementedError


class ArrayBackend(Backend):
    """A framework whose arrays a machine's calls read as they are."""

    call: type[Call]

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Array]]:
        """Let the loss make its passes over the arrays."""
        return loss.compute(arguments, self.call)

    def as_array(self, name: str, value: Any) -> Any:
        """Return an argument as an array, without a copy; make one of a number or a list."""
        return self.call.as_array(name, value)

    def compute_jointly(self, method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a method on the arrays as they are."""
        return method(**operands, **options, call=self.call)
