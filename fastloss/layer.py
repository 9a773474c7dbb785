"""`linear`: a linear layer and a loss of its outputs as one, computed piece by piece, so that the outputs never exist as a whole.

A piece is some of the outputs of some entries: samples, or places of one sample. For each piece, one product of matrices makes the
outputs, the loss overwrites them with its slopes, and two products add the slopes to the gradients. Products are those of the
framework whose arrays are passed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends.find import find_backend
from fastloss.backends.protocol import Backend
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, Call
from fastloss.core.checks import (
    LARGEST,
    check_output,
    check_reduction,
    count_group_axes,
    is_none,
    refuse_grad_output,
    to_bounded,
    to_buffers,
)
from fastloss.core.overlap import check_buffers, span_of
from fastloss.core.plan import Array
from fastloss.loss import SLOPE, VALUE

REDUCTIONS = ("mean", "sum", "batchmean", "sample_mean", "sample_sum")
PIECE = 8 << 20  # bytes of the outputs that exist at a time
DTYPES = ("float32", "float64")

Multiply = Callable[[Any, Any, Any, bool], None]  # writes the product of two matrices to a third, or adds it there
Wanted = tuple[bool, bool, bool]  # whether the gradients of input, weight and bias are wanted
Buffers = tuple[Array | None, ...]  # for these gradients; None for those that are not wanted
Piece = tuple[slice, ...]  # of the outputs: samples, outputs and, if there are places, those of their first axis


class LinearGradient(NamedTuple):
    """The gradients of a loss of the outputs of a linear layer."""

    input: Any
    linear_weight: Any
    linear_bias: Any  # None without a bias


class Layer(NamedTuple):
    """The lengths of a linear layer: input (N, K, ...), weight (P, K), outputs (N, P, ...)."""

    samples: int
    features: int
    outputs: int
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the outputs."""
        return (self.samples, self.outputs, *self.places)

    def pieces(self, elements: int, splits_outputs: bool) -> Iterator[Piece]:
        """Yield the pieces, of about so many elements.

        A product of matrices reads its factors once for each piece, so pieces are as close to squares as the layer allows. Those of the
        same outputs follow each other.
        """
        rows, width = (self.places[0], math.prod(self.places[1:])) if self.places else (self.samples, 1)
        least = max(math.isqrt(elements), elements // max(1, rows * width))
        outputs = min(self.outputs, least) if splits_outputs else self.outputs
        for of_outputs in cut(self.outputs, outputs):
            for of_rows in cut(rows, elements // max(1, outputs * width)):
                if self.places:
                    yield from ((slice(n, n + 1), of_outputs, of_rows) for n in range(self.samples))
                else:
                    yield of_rows, of_outputs


def cut(length: int, most: int) -> Iterator[slice]:
    """Cut a range into parts of nearly the same length, of at most `most`, and at least 1."""
    size = -(-length // -(-length // max(1, most))) if length else 1
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def by_entry(x: Array) -> Array:
    """Return an array (1, F, ...) of a sample as a matrix whose rows are places; one (N, F) as it is."""
    return x if x.ndim == 2 else x[0].reshape(x.shape[1], -1).T


class LinearLoss:
    """A loss of the outputs of a linear layer: call it for the value; `grad` and `value_and_grad` take the same arguments."""

    def __init__(self, loss: AbstractLoss, piece: int) -> None:
        self.loss, self.piece = loss, piece
        self.__name__ = f"linear({loss.__name__})"

    def __repr__(self) -> str:
        return f"<{self.__name__}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return linear, (self.loss, self.piece)

    def __call__(
        self, input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, weight: Any = None, reduction: str | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Return the loss. This takes one product of matrices, or three if autograd will ask for the gradients."""
        if options.keys() & {"out", "accumulate"}:
            raise ValueError("out and accumulate are options of calls for gradients; use grad or value_and_grad")
        refuse_grad_output(options)
        operands, given = self._arguments(input, linear_weight, target, linear_bias, weight, reduction, options)
        backend = backend_of(input)
        return backend.value_of_layer(functools.partial(self._compute, multiply=backend.multiply), operands, given)

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
        operands, given = self._arguments(input, linear_weight, target, linear_bias, weight, reduction, options)
        backend, wanted = backend_of(input), (True, True, linear_bias is not None)
        method = functools.partial(self._compute, wanted=wanted, multiply=backend.multiply)
        value, gradients = backend.compute_jointly(method, operands, given)
        return value, LinearGradient(*gradients)

    def _arguments(
        self, input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, reduction: str | None, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """Return the operands and the options of a call that are not None, by name."""
        operands = {"input": input, "linear_weight": linear_weight, "target": target}
        given = {name: x for name, x in {"linear_bias": linear_bias, "weight": weight, **options}.items() if x is not None}
        if reduction is None:
            reduction = "mean" if is_none(default := self.loss.default_reduction()) else default
        check_reduction(reduction, REDUCTIONS)
        return operands, {**given, "reduction": reduction}

    def _compute(
        self, input: Any, linear_weight: Any, target: Any, *, call: Any, multiply: Multiply, wanted: Wanted, reduction: str,
        linear_bias: Any = None, grad_output: Any = 1.0, out: Any = None, accumulate: bool = False, **options: Any,
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """Compute the value and the wanted gradients, on arrays that the class `call` reads; None for the others."""
        arrays = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
        made = LinearCall(self.loss, arrays, options, reduction, call, multiply)
        if accumulate and out is None:
            raise ValueError("accumulate=True adds to the arrays that out passes, and out is None")
        buffers = made.new_buffers(wanted) if out is None else made.check_buffers(out, wanted)
        return made.run(self.piece, grad_output, buffers, accumulate), buffers


class LinearCall:
    """One call of a loss of the outputs of a linear layer, and the pieces that it computes."""

    def __init__(
        self, loss: AbstractLoss, arrays: Mapping[str, Any], options: Mapping[str, Any], reduction: str, call: type[Call],
        multiply: Multiply,
    ) -> None:  # fmt: skip
        found: dict[str, Any] = {name: None if x is None else call.as_array(name, x) for name, x in arrays.items()}
        self.input: Array = found["input"]
        self.weight: Array = found["linear_weight"]
        self.target: Array = found["target"]
        self.bias: Array | None = found["linear_bias"]
        self.layer = layer_of(self.input, self.weight, self.bias)
        loss.check_operands(self.layer.shape, self.target)
        self.loss, self.reduction, self.call, self.multiply = loss, reduction, call, multiply
        self.options = {name: x if call.is_number(x) else call.as_array(name, x) for name, x in options.items()}
        self.splits_outputs = not loss.definitions[0].classes
        zero = np.zeros_like(self.input, shape=(1,) * self.input.ndim)
        self.placeholder = np.broadcast_to(zero, self.layer.shape)  # of the outputs
        self.is_by_sample = count_group_axes(reduction, self.layer.shape) > 0
        self.space: Any = None  # memory of a piece of the outputs

    def new_buffers(self, wanted: Wanted) -> Buffers:
        """Allocate arrays for the wanted gradients."""
        likes = [x if x is None or x.flags.c_contiguous else np.empty_like(x, order="C") for x in (self.input, self.weight, self.bias)]
        return tuple(self.call.empty_like(like) if needed else None for like, needed in zip(likes, wanted, strict=True))

    def check_buffers(self, out: Any, wanted: Wanted) -> Buffers:
        """Return the caller's arrays for the gradients, after every check that could fail once they are written to."""
        likes = [x for x, needed in zip((self.input, self.weight, self.bias), wanted, strict=True) if needed and x is not None]
        buffers = to_buffers(out, len(likes), self.call.check_buffer)
        for k, (buffer, like) in enumerate(zip(buffers, likes, strict=True)):
            check_output(f"out[{k}]", (buffer.dtype, buffer.shape, buffer.strides), like.shape, like.dtype)
            if not buffer.flags.c_contiguous:
                raise ValueError(f"out[{k}] has shape {buffer.shape} and strides {buffer.strides}; accepted: C-contiguous arrays")
        read = {"input": self.input, "linear_weight": self.weight, "target": self.target, "linear_bias": self.bias, **self.options}
        spans = {name: span_of(x, self.call.address_of(x)) for name, x in read.items() if np.ndim(x)}
        check_buffers([span_of(x, self.call.address_of(x)) for x in buffers], spans)
        self.check_elements()
        given = iter(buffers)
        return tuple(next(given) if needed else None for needed in wanted)

    def check_elements(self) -> None:
        """Raise the error for a target that the loss refuses, which names its index in the whole target."""
        self.compute((), self.placeholder, self.target, self.options)

    def compute(self, wanted: tuple[str, ...], outputs: Array, target: Array, options: Mapping[str, Any]) -> Any:
        """Compute the loss of some outputs, and return its sum, or that of each sample."""
        given, reduction = dict(options), "sample_sum" if self.is_by_sample else "sum"
        arguments = Arguments(VALUE, wanted, outputs, target, given.pop("weight", None), reduction, given)
        return self.loss.compute(arguments, self.call)[0]

    def divisor(self) -> Any:
        """Return the number that the reduction divides by, or with one value for each sample, an array."""
        if self.reduction not in ("mean", "sample_mean"):
            return self.layer.samples if self.reduction == "batchmean" else 1
        counted = self.loss.count((self.placeholder, self.target), self.options, self.call)
        is_one = isinstance(counted, int)
        if self.reduction == "sample_mean":
            counted = counted / max(1, self.layer.samples) if is_one else counted
        elif not is_one:
            counted = counted.sum()
        self.call.warn_of_empty_mean(counted)
        return counted

    def run(self, size: int, upstream: Any, buffers: Buffers, accumulate: bool) -> Any:
        """Compute the value, and write the gradients to the buffers that are there, or add them."""
        divisor, has_gradient = self.divisor(), any(buffer is not None for buffer in buffers)
        scale = upstream / np.where(divisor == 0, 1.0, divisor) if has_gradient else None
        values = np.zeros_like(self.input, np.float64, shape=self.layer.samples if self.is_by_sample else 1)
        last = None  # range of outputs of the piece before
        for piece in self.layer.pieces(max(1, size // self.input.dtype.itemsize), self.splits_outputs):
            rows, columns, outputs = self.outputs_of(piece)
            values[piece[0] if self.is_by_sample else ...] += self.evaluate(piece, outputs, scale)
            if has_gradient:
                adds = accumulate or piece[1].start > 0, accumulate or piece[1] == last
                self.add_gradients(piece, rows, columns, outputs, buffers, adds)
            last = piece[1]
        if last is None and not accumulate:  # there are no outputs
            for buffer in buffers:
                if buffer is not None:
                    buffer.fill(0)
        with np.errstate(all="ignore"):
            found = values / divisor
        return found if self.is_by_sample else found[0]

    def outputs_of(self, piece: Piece) -> tuple[Array, Array, Array]:
        """Compute a piece of the outputs; return it after its two factors, all as matrices whose rows are entries, or outputs."""
        of_samples, of_outputs, *of_places = piece
        rows, columns = by_entry(self.input[(of_samples, slice(None), *of_places)]), self.weight[of_outputs]
        shape = (len(rows), len(columns))
        if self.space is None:  # no piece is larger than the first
            self.space = np.empty_like(self.input, shape=shape[0] * shape[1])
        space = self.space[: shape[0] * shape[1]]
        outputs = space.reshape(shape[::-1]).T if self.layer.places else space.reshape(shape)
        self.product(rows, columns.T, outputs)
        if self.bias is not None:
            np.add(outputs, self.bias[of_outputs], out=outputs)
        return rows, columns, outputs

    def product(self, a: Array, b: Array, out: Array, adds: bool = False) -> None:
        """Write a product to a matrix whose memory is C-contiguous, or that of its transpose, or add it there."""
        if self.layer.places and out.shape[0] > 1 and out.strides[0] < out.strides[1]:
            a, b, out = b.T, a.T, out.T
        self.multiply(a, b, out, adds)

    def evaluate(self, piece: Piece, outputs: Array, scale: Any) -> Any:
        """Compute the sum of the loss of a piece and, given their factor, overwrite the outputs by the slopes."""
        if self.layer.places:
            outputs = outputs.T.reshape(1, outputs.shape[1], -1, *self.layer.places[1:])
        options = {name: self.part(name, x, piece) if np.ndim(x) else x for name, x in self.options.items()}
        if scale is not None:
            options |= {"out": outputs, "grad_output": scale[piece[0]] if np.ndim(scale) else scale}
        try:
            return self.compute(() if scale is None else SLOPE, outputs, self.part("target", self.target, piece), options)
        except ValueError:
            self.check_elements()
            raise

    def part(self, name: str, x: Array, piece: Piece) -> Array:
        """Return the part of a target or an option that belongs to a piece."""
        axes = self.loss.axes_of(name, x.ndim, len(self.layer.shape))
        return x[tuple(piece[axis] if axis < len(piece) and n > 1 else slice(None) for axis, n in zip(axes, x.shape, strict=True))]

    def add_gradients(
        self, piece: Piece, rows: Array, columns: Array, slopes: Array, buffers: Buffers, adds: tuple[bool, bool]
    ) -> None:  # fmt: skip
        """Write or add the products of a piece's slopes to the gradients: first that of the input, then those of weight and bias."""
        of_samples, of_outputs, *of_places = piece
        by_input, by_weight, by_bias = buffers
        if by_input is not None:
            self.product(slopes, columns, by_entry(by_input[(of_samples, slice(None), *of_places)]), adds[0])
        if by_weight is not None:
            self.product(slopes.T, rows, by_weight[of_outputs], adds[1])
        if by_bias is not None:
            ones = np.ones_like(slopes, shape=(1, len(slopes)))
            self.product(ones, slopes, by_bias[np.newaxis, of_outputs], adds[1])


def backend_of(x: Any) -> Backend:
    """Find the backend of the input, and refuse one whose results are computed later."""
    backend = find_backend(x)
    if backend.is_lazy:
        raise TypeError(f"input is a {type(x).__name__} of Dask; accepted: NumPy arrays, CuPy arrays, and tensors of PyTorch")
    return backend


def layer_of(x: Array, w: Array, b: Array | None) -> Layer:
    """Check the shapes and dtypes of a linear layer, and return its lengths."""
    if x.ndim < 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"input has shape {x.shape} and linear_weight {w.shape}; accepted: (N, K, ...) and (P, K)")
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"linear_bias has shape {b.shape}; accepted: {w.shape[:1]}, a number for each row of linear_weight")
    if x.dtype.name not in DTYPES:
        raise TypeError(f"input has dtype {x.dtype}; accepted: {', '.join(DTYPES)}")
    for name, a in (("linear_weight", w), ("linear_bias", b)):
        if a is not None and a.dtype != x.dtype:
            raise TypeError(f"input has dtype {x.dtype} and {name} {a.dtype}; they must be equal")
    return Layer(x.shape[0], x.shape[1], w.shape[0], tuple(x.shape[2:]))


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
    those of the loss, for the outputs. The reduction "none" is not supported; where it is the loss's default, "mean" takes its place.
    `grad` returns a `LinearGradient`: the gradients by input, weight and bias (None without a bias). Their `out` is a tuple of as many
    C-contiguous arrays, and `accumulate=True` adds to them. With PyTorch, the value has autograd attached to the three.

    Results do not depend on the number of fastloss's threads. Other pieces add numbers in another order.

    Args:
        loss: an elementwise loss, also one of your own, or a loss of classes such as `cross_entropy`, for which a piece has all classes
            of its entries.
        piece: bytes of the outputs that exist at a time.

    Returns:
        An object with the methods `__call__`, `grad` and `value_and_grad`. The gradients have the dtype of the input.

    Raises:
        TypeError: not a loss, or one that has several gradients or needs all outputs at once, such as a Dice loss.

    Source: Wijmans and others, "Cut Your Losses in Large-Vocabulary Language Models", 2024, for cross-entropy.
    """
    if not (isinstance(loss, AbstractLoss) and loss.definition is not None and loss.gradients == 1):
        found = getattr(loss, "__name__", repr(loss))
        raise TypeError(f"loss is {found}; accepted: a loss with one value for each element or each entry, and one gradient")
    return made(loss, int(to_bounded("piece", piece, (1.0, LARGEST))))


made = functools.cache(LinearLoss)
