"""A loss of the outputs of a linear layer, computed piece by piece, so that the outputs never exist as a whole.

A piece is some of the outputs of some entries: samples, or places of a sample. For each piece, one product of matrices makes the
outputs, the loss overwrites them with its slopes, and two products add the slopes to the gradients. Products are those of the
framework whose arrays are passed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, Call
from fastloss.core.checks import check_flag, check_output, count_group_axes, to_buffers
from fastloss.core.overlap import check_buffers, span_of
from fastloss.core.pieces import Piece, dtype_of_products, layer_of, matrices
from fastloss.core.plan import Array
from fastloss.core.products import Products
from fastloss.core.sparse import SparseMatrix, SparseTarget

VALUE, SLOPE = ("value",), ("slope",)

Wanted = tuple[bool, ...]  # whether the gradients of input, weight and bias are wanted
Buffers = tuple[Array | None, ...]  # for these gradients; None for those that are not wanted


def compute_layer(
    loss: AbstractLoss, piece: int, input: Any, linear_weight: Any, target: Any, *, call: type[Call], products: Products, wanted: Wanted,
    reduction: str, linear_bias: Any = None, grad_output: Any = 1.0, out: Any = None, accumulate: bool = False, **options: Any,
) -> tuple[Any, Buffers]:  # fmt: skip
    """Compute the value and the wanted gradients, in pieces of so many bytes, on arrays that the class `call` reads."""
    check_flag("accumulate", accumulate)
    if accumulate and out is None:
        raise ValueError("accumulate=True adds to the arrays that out passes, and out is None")
    arrays = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
    made = LinearCall(loss, arrays, options, reduction, call, products)
    buffers = made.new_buffers(wanted) if out is None else made.check_buffers(out, wanted)
    return made.run(piece, grad_output, buffers, accumulate), buffers


class LinearCall:
    """One call of a loss of the outputs of a linear layer, and the pieces that it computes."""

    def __init__(
        self, loss: AbstractLoss, arrays: Mapping[str, Any], options: Mapping[str, Any], reduction: str, call: type[Call],
        products: Products,
    ) -> None:  # fmt: skip
        self.loss, self.reduction, self.call, self.products = loss, reduction, call, products
        self.input: Array = call.as_array("input", arrays["input"])
        self.weight: Array = call.as_array("linear_weight", arrays["linear_weight"])
        bias = arrays["linear_bias"]
        self.bias: Array | None = None if bias is None else call.as_array("linear_bias", bias)
        self.layer = layer_of(self.input, self.weight, self.bias)
        self.dtype = dtype_of_products(self.input.dtype)
        self.sparse: SparseTarget | None = None
        self.target = self.take_target(arrays["target"])
        loss.check_operands(self.layer.shape, self.target)
        self.options = {name: x if call.is_number(x) else call.as_array(name, x) for name, x in options.items()}
        if self.sparse and "ignore_index" in self.options:
            raise TypeError("ignore_index is not supported with a sparse target; accepted: mask")
        self.placeholder = self.zeros(self.dtype)  # of the outputs
        self.is_by_sample = count_group_axes(reduction, self.layer.shape) > 0
        self.space: Any = None  # memory of a piece of the outputs

    @property
    def has_classes(self) -> bool:
        """Whether a piece has all outputs of its entries, because the loss is one of classes."""
        return bool(self.loss.definitions[0].classes)

    def zeros(self, dtype: Any) -> Array:
        """Return zeros of the shape of the outputs, which take the memory of one element."""
        zero = np.zeros_like(self.input, dtype, shape=(1,) * self.input.ndim)
        zeros: Array = np.broadcast_to(zero, self.layer.shape)
        return zeros

    def take_target(self, target: Any) -> Array:
        """Return a dense target, or zeros in the place of a sparse one."""
        if not isinstance(target, SparseMatrix):
            dense: Array = self.call.as_array("target", target)
            return dense
        if target.shape != self.layer.shape:
            raise ValueError(f"a sparse target has shape {target.shape}; accepted: {self.layer.shape[:2]}, for an input (N, K)")
        if isinstance(target.values, np.ndarray) != isinstance(self.input, np.ndarray):
            kinds = (f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}" for x in (target.values, self.input))
            raise TypeError("a sparse target has arrays of {}, and the input is one of {}; accepted: the same".format(*kinds))
        self.sparse = SparseTarget(target, self.dtype, keeps_integers=not self.has_classes)
        return self.zeros(self.sparse.values.dtype)

    def new_buffers(self, wanted: Wanted) -> Buffers:
        """Allocate arrays for the wanted gradients."""
        arrays = zip((self.input, self.weight, self.bias), wanted, strict=True)
        return tuple(None if x is None or not needed else self.new_buffer(x) for x, needed in arrays)

    def new_buffer(self, x: Array) -> Array:
        """Allocate an array for the gradient of another: C-contiguous, and float32 for 16 bits."""
        is_like = x.flags.c_contiguous and x.dtype == self.dtype
        buffer: Array = self.call.empty_like(x if is_like else np.empty_like(x, self.dtype, order="C"))
        return buffer

    def check_buffers(self, out: Any, wanted: Wanted) -> Buffers:
        """Return the caller's arrays for the gradients, after every check that could fail once they are written to."""
        likes = [x for x, needed in zip((self.input, self.weight, self.bias), wanted, strict=True) if needed and x is not None]
        buffers = to_buffers(out, len(likes), self.call.check_buffer)
        for k, (buffer, like) in enumerate(zip(buffers, likes, strict=True)):
            check_output(f"out[{k}]", (buffer.dtype, buffer.shape, buffer.strides), like.shape, self.dtype)
            if not buffer.flags.c_contiguous:
                raise ValueError(f"out[{k}] has shape {buffer.shape} and strides {buffer.strides}; accepted: C-contiguous arrays")
        read = {"input": self.input, "linear_weight": self.weight, "target": self.target, "linear_bias": self.bias, **self.options}
        spans = {name: span_of(x, self.call.address_of(x)) for name, x in read.items() if np.ndim(x)}
        check_buffers([span_of(x, self.call.address_of(x)) for x in buffers], spans)
        if self.may_refuse_elements():
            self.check_elements()
        given = iter(buffers)
        return tuple(next(given) if needed else None for needed in wanted)

    def may_refuse_elements(self) -> bool:
        """Whether the loss refuses some targets of this dtype."""
        bound = self.bind((), self.placeholder, self.target, self.options)
        return bound.validate or bool(bound.always_checked)

    def check_elements(self) -> None:
        """Raise the error for a target or an option that the loss refuses, which names its shape or its index in the whole target."""
        if self.sparse is None:
            self.bind((), self.placeholder, self.target, self.options).compute()
        elif not self.has_classes:
            rows, columns = self.sparse.rows, self.sparse.columns
            options = {k: np.broadcast_to(x, self.layer.shape)[rows, columns] if np.ndim(x) else x for k, x in self.options.items()}
            try:
                self.bind((), self.placeholder[rows, columns], self.sparse.values, options).compute()
            except ValueError as error:
                raise ValueError(re.sub(r"target\[(\d+)\]", lambda k: self.name_of(int(k[1])), str(error))) from None

    def name_of(self, k: int) -> str:
        """Return the name of a sparse target's value with its index in the whole target."""
        assert self.sparse is not None
        return f"target[{int(self.sparse.rows[k])}, {int(self.sparse.columns[k])}]"

    def bind(self, wanted: tuple[str, ...], outputs: Array, target: Array, options: Mapping[str, Any]) -> Call:
        """Return the call of the loss for the sum over some outputs, or that of each sample."""
        given, reduction = dict(options), "sample_sum" if self.is_by_sample else "sum"
        return self.loss.bind(Arguments(VALUE, wanted, outputs, target, given.pop("weight", None), reduction, given), self.call)

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
        for piece in self.layer.pieces(max(1, size // self.dtype.itemsize), splits_outputs=not self.has_classes):
            entries, columns, outputs = self.outputs_of(piece)
            values[piece[0] if self.is_by_sample else ...] += self.evaluate(piece, outputs, scale)
            if has_gradient:
                adds = accumulate or piece[1].start > 0, accumulate or piece[1] == last
                self.add_gradients(piece, entries, columns, outputs, buffers, adds)
            last = piece[1]
        if last is None and not accumulate:  # there are no outputs
            for buffer in buffers:
                if buffer is not None:
                    buffer.fill(0)
        with np.errstate(all="ignore"):
            found = values / divisor
        return found if self.is_by_sample else found[0]

    def outputs_of(self, piece: Piece) -> tuple[list[Array], Array, Array]:
        """Compute a piece of the outputs; return it after its factors: the entries, and the weight's rows."""
        of_samples, of_outputs, *of_places = piece
        entries = [self.as_factor(x) for x in matrices(self.input[(of_samples, slice(None), *of_places)])]
        columns = self.as_factor(self.weight[of_outputs])
        bias = None if self.bias is None else self.as_factor(self.bias[np.newaxis, of_outputs])
        outputs = self.space_of(piece)
        for rows, out in zip(entries, matrices(outputs), strict=True):
            self.products.multiply(rows, columns.T, out, bias)
        return entries, columns, outputs

    def space_of(self, piece: Piece) -> Array:
        """Return memory for the outputs of a piece, which the next piece overwrites."""
        shape = *(part.stop - part.start for part in piece), *self.layer.places[1:]
        size = math.prod(shape)
        if self.space is None:
            self.space = self.call.scratch_like(np.empty_like(self.input, self.dtype, shape=size))
        space: Array = self.space[:size].reshape(shape)
        return space

    def as_factor(self, x: Array) -> Array:
        """Return a matrix as products read it: one of 16 bits is converted to float32."""
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    def evaluate(self, piece: Piece, outputs: Array, scale: Any) -> Any:
        """Compute the sum of the loss of a piece and, given their factor, overwrite the outputs by the slopes."""
        target = self.part("target", self.target, piece) if self.sparse is None else self.sparse.dense(*piece)
        options = {name: self.part(name, x, piece) if np.ndim(x) else x for name, x in self.options.items()}
        if scale is not None:
            options |= {"out": outputs, "grad_output": scale[piece[0]] if np.ndim(scale) else scale}
        try:
            return self.bind(() if scale is None else SLOPE, outputs, target, options).compute()[0]
        except ValueError:
            self.check_elements()
            raise

    def part(self, name: str, x: Array, piece: Piece) -> Array:
        """Return the part of a target or an option that belongs to a piece."""
        axes = self.loss.axes_of(name, x.ndim, len(self.layer.shape))
        return x[tuple(piece[axis] if axis < len(piece) and n > 1 else slice(None) for axis, n in zip(axes, x.shape, strict=True))]

    def add_gradients(
        self, piece: Piece, entries: list[Array], columns: Array, slopes: Array, buffers: Buffers, adds: tuple[bool, bool]
    ) -> None:  # fmt: skip
        """Write or add the products of a piece's slopes to the gradients: first that of the input, then those of weight and bias."""
        of_samples, of_outputs, *of_places = piece
        by_input, by_weight, by_bias = buffers
        factors = matrices(slopes)
        if by_input is not None:
            for factor, out in zip(factors, matrices(by_input[(of_samples, slice(None), *of_places)]), strict=True):
                self.products.multiply(factor, columns, out, out if adds[0] else None)
        for k, (factor, rows) in enumerate(zip(factors, entries, strict=True)):
            if by_weight is not None:
                out = by_weight[of_outputs]
                self.products.multiply(factor.T, rows, out, out if adds[1] or k else None)
            if by_bias is not None:
                self.products.sum_rows(factor, by_bias[of_outputs], adds[1] or k > 0)
