"""`linear` and the object that it makes: a loss with the arguments of a linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastloss.backends.find import find_backend
from fastloss.backends.protocol import Backend
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.checks import LARGEST, check_reduction, is_none, refuse_grad_output, to_bounded

REDUCTIONS = ("mean", "sum", "batchmean", "sample_mean", "sample_sum")
PIECE = 8 << 20  # bytes of the outputs that exist at a time


class LinearGradient(NamedTuple):
    """The gradients of a loss of the outputs of a linear layer."""

    input: Any
    linear_weight: Any
    linear_bias: Any  # None without a bias


@dataclass(frozen=True, repr=False)
class LinearLoss:
    """A loss of the outputs of a linear layer: call it for the value; `grad` and `value_and_grad` take the same arguments."""

    loss: AbstractLoss
    piece: int

    def __repr__(self) -> str:
        return f"<linear({self.loss.__name__})>"

    def __call__(
        self, input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, weight: Any = None, reduction: str | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Return the loss. This takes one product of matrices, or three if autograd will ask for the gradients."""
        if options.keys() & {"out", "accumulate"}:
            raise ValueError("out and accumulate are options of calls for gradients; use grad or value_and_grad")
        refuse_grad_output(options)
        backend = backend_of(input)
        operands, given = self._arguments(backend, input, linear_weight, target, linear_bias, weight, reduction, options)
        return backend.value_of_layer(self.loss, self.piece, operands, given)

    def grad(
        self, input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, weight: Any = None, reduction: str | None = None,
        **options: Any,
    ) -> LinearGradient:  # fmt: skip
        """Return the gradients with respect to the input, the weight and the bias of the layer."""
        return self.value_and_grad(input, linear_weight, target, linear_bias, weight, reduction, **options)[1]

    def value_and_grad(
        self, input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, weight: Any = None, reduction: str | None = None,
        **options: Any,
    ) -> tuple[Any, LinearGradient]:  # fmt: skip
        """Return the loss and the gradients. This takes three products of matrices."""
        backend, wanted = backend_of(input), (True, True, linear_bias is not None)
        operands, given = self._arguments(backend, input, linear_weight, target, linear_bias, weight, reduction, options)
        value, gradients = backend.compute_layer(self.loss, self.piece, operands, given, wanted)
        return value, LinearGradient(*gradients)

    def _arguments(
        self, backend: Backend, input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, reduction: str | None,
        options: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """Return the dense operands, and a sparse target and the options that are not None, by name."""
        operands = {"input": input, "linear_weight": linear_weight, "target": target}
        given = {name: x for name, x in {"linear_bias": linear_bias, "weight": weight, **options}.items() if x is not None}
        if (sparse := backend.sparse_matrix(target)) is not None:
            given["target"] = sparse
            del operands["target"]
        if reduction is None:
            reduction = "mean" if is_none(default := self.loss.default_reduction()) else default
        check_reduction(reduction, REDUCTIONS)
        return operands, {**given, "reduction": reduction}


def backend_of(x: Any) -> Backend:
    """Find the backend of the input, and refuse one whose results are computed later."""
    backend = find_backend(x)
    if backend.is_lazy:
        raise TypeError(f"input is a {type(x).__name__} of Dask; accepted: NumPy arrays, CuPy arrays, and tensors of PyTorch")
    return backend


def linear(loss: AbstractLoss, piece: int = PIECE) -> LinearLoss:
    """Make a loss of the outputs of a linear layer, whose outputs and their gradient never exist as a whole.

        total = fastloss.linear(fastloss.binary_cross_entropy_with_logits)
        value, (by_input, by_weight, by_bias) = total.value_and_grad(input, linear_weight, target, linear_bias)

    With z the outputs of the layer, and f the loss:

        z[n, p, ...] = sum over k of input[n, k, ...] linear_weight[p, k] + linear_bias[p]
        value        = f(z, target)
        by_input     = sum over p of f'(z, target)[n, p, ...] linear_weight[p, k], and so on

    This is a linear layer for an input (N, K), and a convolution with a kernel of one pixel for (N, K, H, W). Products of matrices are
    those of the array's library. A value takes one product, and a gradient three, for which the outputs are computed piece by piece: a
    piece is overwritten by its slopes, which are added to the gradients at once.

    The result is called as the loss, with `linear_weight` after the input, and `linear_bias` after the target; further arguments are
    those of the loss, for the outputs. A target (N, P) may be sparse: a matrix of SciPy, or of CuPy beside its arrays, or a sparse tensor.
    The reduction "none" is not supported; where it is the loss's default, "mean" takes its place. `grad` returns a `LinearGradient`: the
    gradients by input, weight and bias (None without a bias). Their `out` is a tuple of as many C-contiguous arrays, and `accumulate=True`
    adds to them. With PyTorch, the value has autograd attached to the three.

    Arrays are float32, float64, or of 16 bits, which are multiplied in float32 and may be mixed with float32.

    Results do not depend on the number of fastloss's threads. Other pieces add numbers in another order.

    Args:
        loss: an elementwise loss, also one of your own, or a loss of classes such as `cross_entropy`, for which a piece has all classes
            of its entries.
        piece: bytes of the outputs that exist at a time.

    Returns:
        An object with the methods `__call__`, `grad` and `value_and_grad`. The gradients have the dtype of their arrays, but are float32
        for 16 bits, except those of autograd.

    Raises:
        TypeError: not a loss, or one that has several gradients or needs all outputs at once, such as a Dice loss. Calls raise the errors
            of the loss, and a ValueError or TypeError for arrays that are no linear layer.

    Source: Wijmans and others, "Cut Your Losses in Large-Vocabulary Language Models", 2024, for cross-entropy.
    """
    if not (isinstance(loss, AbstractLoss) and loss.definition is not None and loss.gradients == 1):
        found = getattr(loss, "__name__", repr(loss))
        raise TypeError(f"loss is {found}; accepted: a loss with one value for each element or each entry, and one gradient")
    return LinearLoss(loss, int(to_bounded("piece", piece, (1.0, LARGEST))))
