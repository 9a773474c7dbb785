"""`Backend`: the protocol that a framework implements so that losses accept its arrays.

To add a framework, write one subclass in a module of its own and add it to `find.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, Call
from fastloss.core.layer import Wanted, compute_layer
from fastloss.core.plan import Array
from fastloss.core.products import PRODUCTS
from fastloss.core.sparse import SparseMatrix, sparse_matrix_of


class Backend:
    """A framework whose arrays losses accept. There is one instance of each subclass.

    A method of a loss packs its arguments into `Arguments`, finds the backend by the type of the first array, and calls `compute`.
    The backend converts the arrays, without a copy, to a form that a subclass of `Call` can read, chooses that subclass, lets the
    loss compute with it, and returns the results as arrays of the framework.
    """

    options: tuple[str, ...] = ()  # accepted in addition to those of a loss, such as PyTorch's `inplace_grad`
    is_lazy = False  # whether results are computed later

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Array]]:
        """Compute the requested quantities: the reduced value or None, and one array for each quantity in `arguments.wanted`."""
        raise NotImplementedError

    def as_array(self, name: str, value: Any) -> Any:
        """Return an argument as an array of the framework, without a copy. Raise a TypeError that names it if that is impossible."""
        raise NotImplementedError

    def compute_jointly(self, method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a method that computes several losses at once, with converted arrays and the subclass of `Call` that reads them.

        The subclass is passed as `call`. The arrays that the method returns, in nested tuples, are converted to the framework's.
        """
        raise NotImplementedError

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape for a formula that reads only the target. It takes the memory of one element."""
        raise NotImplementedError

    def value_of_layer(self, loss: AbstractLoss, piece: int, operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Compute the value of a loss of a linear layer in pieces of so many bytes; see `fastloss/core/layer.py`."""
        return self.compute_layer(loss, piece, operands, options, (False, False, False))[0]

    def compute_layer(
        self, loss: AbstractLoss, piece: int, operands: Mapping[str, Any], options: Mapping[str, Any], wanted: Wanted
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """Compute the value of a loss of a linear layer, and its gradients by input, weight and bias, of which not all may be wanted."""
        raise NotImplementedError

    @staticmethod
    def sparse_matrix(x: Any) -> SparseMatrix | None:
        """Return the values of a sparse matrix of the framework, or of SciPy; None for anything else."""
        return sparse_matrix_of(x)


class ArrayBackend(Backend):
    """A framework whose arrays can be passed to a subclass of `Call` without conversion."""

    call: type[Call]

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Array]]:
        """Compute the requested quantities on the arrays as they are."""
        return loss.compute(arguments, self.call)

    def as_array(self, name: str, value: Any) -> Any:
        """Return an argument as an array, without a copy. Numbers and lists are converted."""
        return self.call.as_array(name, value)

    def compute_jointly(self, method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a method that computes several losses at once, with the arrays as they are."""
        return method(**operands, **options, call=self.call)

    def compute_layer(
        self, loss: AbstractLoss, piece: int, operands: Mapping[str, Any], options: Mapping[str, Any], wanted: Wanted
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """Compute the value of a loss of a linear layer, and the wanted gradients, on the arrays as they are."""
        return compute_layer(loss, piece, **operands, **options, call=self.call, products=PRODUCTS, wanted=wanted)
