"""The backend for Dask arrays, whose blocks are NumPy or CuPy arrays. All results are lazy.

Design: a) Blocks are cut along the first axis alone, so that each holds whole samples. b) If a reduction has a number for each sample, or
is "none", each block is a call of its own. c) Otherwise each block leaves exact sums over its samples, which Dask adds up in a tree, so
the value does not depend on the blocks. d) A gradient is divided by a number that belongs to the whole array. If the shape decides it,
a block is read once, for its sums and its gradients; otherwise the sums of all blocks come first.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from fastloss.backends.numpy import BACKEND as NUMPY
from fastloss.backends.protocol import Backend
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.accumulated import Sums, exact, joined, rounded
from fastloss.core.call import Arguments, Call
from fastloss.core.checks import caller_level, is_none
from fastloss.core.definition import operand_of
from fastloss.core.dtypes import float_of
from fastloss.core.plan import Array

NO_OUT = "out is not supported for Dask arrays, because their results are computed later; accepted: no out"


class DaskBackend(Backend):
    """The backend for Dask arrays."""

    is_lazy = True

    @staticmethod
    def as_array(name: str, value: Any) -> Any:
        """Return an argument, which must be an array of Dask or of NumPy."""
        if not isinstance(value, (da.Array, np.ndarray)):
            found = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"{name} is a {found}, but the input is a dask.array.Array; accepted: Dask and NumPy arrays")
        return value

    @staticmethod
    def check_buffer(name: str, out: Any) -> None:
        """Refuse a buffer."""
        raise ValueError(NO_OUT)

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Array]]:
        """Compute the requested quantities of each block, and combine them."""
        if arguments.options.get("out") is not None:
            raise ValueError(NO_OUT)
        whole = Whole(loss, arguments)
        return whole.compute_independently() if whole.has_independent_samples else whole.compute_in_parts()

    def compute_jointly(self, method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call a method that computes several losses at once with the arrays as they are; each of its losses is then lazy."""
        return method(**operands, **options, call=self)

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape and chunks, by broadcasting a single element."""
        zero = np.zeros((), float_of(target.dtype))
        return da.broadcast_to(da.from_array(zero), target.shape, chunks=target.chunks)


class Task(NamedTuple):
    """The computation of a block, as far as it is the same for all blocks."""

    loss: AbstractLoss
    names: tuple[str, ...]  # of the arrays: "first", "second", and options given as arrays
    arguments: Arguments  # without the arrays

    def arguments_of(self, arrays: tuple[Any, ...]) -> tuple[Arguments, Any]:
        """Return the arguments of a call on a block's arrays, and the subclass of `Call` that reads them."""
        given = dict(zip(self.names, arrays, strict=True))
        first, second, weight = given.pop("first"), given.pop("second"), given.pop("weight", self.arguments.weight)
        options = {**self.arguments.options, **given}
        return self.arguments._replace(first=first, second=second, weight=weight, options=options), call_of(first)


class Whole:
    """One call with Dask arrays: the arrays, in blocks of the same samples, and the task of a block."""

    def __init__(self, loss: AbstractLoss, arguments: Arguments) -> None:
        x, self.reduction = arguments.first, arguments.reduction
        self.loss, self.input = loss, x
        check_blocks(loss.operands[0], x)
        check_samples(loss, x)
        second = DaskBackend.as_array(loss.operands[1], arguments.second)
        loss.check_operands(x.shape, second)
        options = {name: value for name, value in arguments.options.items() if value is not None}
        self.shape = loss.value_shape(x.shape, self.reduction, options)
        self.arrays = {"first": x, "second": self.in_blocks(loss.operands[1], second)}
        self.take_arrays({"weight": arguments.weight, **options})
        self.task = Task(loss, tuple(self.arrays), arguments._replace(first=None, second=None, weight=None, options=self.options))
        self.check()

    @property
    def has_independent_samples(self) -> bool:
        """Whether the value has numbers for each sample, or none for all: then each block can be computed by itself."""
        return (is_none(self.reduction) or self.reduction.startswith("sample")) and self.shape[:1] == self.input.shape[:1]

    def take_arrays(self, given: Mapping[str, Any]) -> None:
        """Sort the options into arrays and others."""
        self.options: dict[str, Any] = {}
        for name, value in given.items():
            if not isinstance(value, da.Array) and (np.ndim(value) == 0 or (name == "grad_output" and not self.has_independent_samples)):
                self.options |= {} if value is None else {name: value}
            else:
                self.arrays[name] = self.in_blocks(name, DaskBackend.as_array(name, value))

    def in_blocks(self, name: str, array: Any) -> Any:
        """Return an array in the input's blocks, or in one block if it is the same for all samples."""
        first = self.input.chunks[0] if self.has_samples(name, array) else array.shape[:1]
        chunks = (first, *[(length,) for length in array.shape[1:]]) if array.ndim else ()
        if isinstance(array, np.ndarray):
            return da.from_array(array, chunks)
        if self.has_samples(name, array) and array.chunks != chunks:
            what = f"{name} has chunks {array.chunks} and is rechunked to {chunks}, those of {self.loss.operands[0]}"
            warnings.warn(what, da.PerformanceWarning, stacklevel=caller_level())
        return array.rechunk(chunks)

    def axes_of(self, name: str, array: Any) -> tuple[int, ...]:
        """Return the axes of the input that the axes of an array lie along."""
        name = {"first": self.loss.operands[0], "second": self.loss.operands[1]}.get(name, name)
        return self.loss.axes_of(name, array.ndim, self.input.ndim)

    def has_samples(self, name: str, array: Any) -> bool:
        """Whether an array has an entry for each sample along its first axis."""
        return self.axes_of(name, array)[:1] == (0,) and array.shape[0] == self.input.shape[0]

    def empty(self) -> tuple[Any, ...]:
        """Return the arrays of a block without samples."""
        shapes = {name: (0, *x.shape[1:]) if self.has_samples(name, x) else x.shape for name, x in self.arrays.items()}
        return tuple(np.zeros_like(x._meta, shape=shapes[name]) for name, x in self.arrays.items())

    def check(self) -> None:
        """Raise the errors of bad arguments now, and not when results are computed, by a call with no samples."""
        arguments, call = self.task.arguments_of(self.empty())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no elements
            self.loss.compute(arguments, call)

    # --- ways of computing

    def compute_independently(self) -> tuple[Any, list[Any]]:
        """Make the call block by block."""
        blocks = self.map(compute_block)
        return self.written(blocks, 0, np.float64) if self.task.arguments.summed else None, self.outputs(blocks)

    def compute_in_parts(self) -> tuple[Any, list[Any]]:
        """Add up the sums of all blocks; gradients are divided by a number that follows from the sums, or from the shape."""
        summed, wanted = self.task.arguments.summed, self.task.arguments.wanted
        divisor = self.known_divisor()
        if wanted and divisor is not None:
            blocks = self.map(compute_part, divisor=divisor)
            return self.value(add_up(blocks)) if summed else None, self.outputs(blocks)
        sums = add_up(self.map(sum_block))
        outputs = self.outputs(self.map(differentiate_block, sums, samples=self.input.shape[0])) if wanted else []
        return self.value(sums) if summed else None, outputs

    def known_divisor(self) -> float | None:
        """Return the number that gradients are divided by, if the shape decides it and a block takes one pass."""
        if len(self.loss.definitions) > 1 or (self.reduction == "mean" and self.must_count()):
            return None
        return {"mean": count_entries(self.loss, self.input.shape), "sum": 1, "batchmean": self.input.shape[0]}[self.reduction]

    def must_count(self) -> bool:
        """Whether elements decide what a mean divides by: a mask, targets that may be ignored, or class weights."""
        arguments, call = self.task.arguments_of(self.empty())
        options = {**arguments.options, "weight": arguments.weight}
        return not isinstance(self.loss.count((arguments.first, arguments.second), options, call), int)

    def map(self, function: Callable[..., Any], *others: Any, **settings: Any) -> Any:
        """Call a function with the arrays of each block; return an array whose blocks are the results, whatever they are.

        It has as many axes as the input. With fewer, Dask would copy the blocks, and not read them in the task that computes with them.
        """
        axes = tuple(range(self.input.ndim))
        placed = [(x, self.axes_of(name, x)) for name, x in self.arrays.items()] + [(x, ()) for x in others]
        return da.blockwise(
            function, axes, *itertools.chain(*placed), task=self.task, **settings, adjust_chunks=dict.fromkeys(axes, 1), dtype=object,
            meta=np.empty((0,) * len(axes), object),
        )  # fmt: skip

    def outputs(self, blocks: Any) -> list[Any]:
        """Return the arrays that the blocks have written. The first result of a block is its value or its sums."""
        return [self.output(blocks, k, name) for k, name in enumerate(self.task.arguments.wanted, 1)]

    def output(self, blocks: Any, k: int, name: str) -> Any:
        """Return the array of a quantity, which is the k-th result of each block."""
        if name == "value":
            return self.written(blocks, k, self.input.dtype)
        like = self.arrays["second" if operand_of(name) == "target" else "first"]
        return pick(blocks, k, like.chunks, like.dtype, like._meta)

    def written(self, blocks: Any, k: int, dtype: Any) -> Any:
        """Return the values that are the k-th result of each block. The axes of the input that they lack are added, then removed."""
        axes = self.loss.axes_of("grad_output", len(self.shape), self.input.ndim)
        lengths = dict(zip(axes, self.shape, strict=True))
        missing = tuple(axis for axis in range(self.input.ndim) if axis not in lengths)
        chunks = (self.input.chunks[0], *[(lengths.get(axis, 1),) for axis in range(1, self.input.ndim)])
        return pick(blocks, k, chunks, dtype, self.input._meta, missing).squeeze(missing)

    def value(self, sums: Any) -> Any:
        """Return the value that follows from the sums of all blocks."""
        settings = {"loss": self.loss, "samples": self.input.shape[0], "reduction": self.reduction, "options": self.options}
        chunks = tuple((length,) for length in self.shape)
        new = list(range(len(chunks))) or None
        return da.map_blocks(value_of, sums, **settings, new_axis=new, chunks=chunks, dtype=np.float64, meta=np.empty((0,) * len(chunks)))


# --- tasks ------------------------------------------------------------------------------------------------------------


def compute_block(*arrays: Any, task: Task) -> list[Any]:
    """Return the value of a block, and its arrays."""
    value, outputs = task.loss.compute(*task.arguments_of(arrays))
    return [value, *outputs]


def sum_block(*arrays: Any, task: Task) -> list[Any]:
    """Return the sums over the samples of a block."""
    arguments, call = task.arguments_of(arrays)
    options = {**arguments.options, "weight": arguments.weight}
    options.pop("grad_output", None)
    return [exact(task.loss.host_sums((arguments.first, arguments.second), options, call))]


def compute_part(*arrays: Any, task: Task, divisor: float) -> list[Any]:
    """Return the sums over the samples of a block, and its gradients, from one pass."""
    arguments, call = task.arguments_of(arrays)
    value, outputs = task.loss.compute_part(arguments, call, divisor, "sample_sum")
    sums = {"value": call.to_host(value)} if arguments.summed else {}
    return [exact({**sums, "count": count_entries(task.loss, arguments.first.shape)}), *outputs]


def differentiate_block(*arrays: Any, task: Task, samples: int) -> list[Any]:
    """Return the gradients of a block, given the sums of all blocks as the last argument."""
    arguments, call = task.arguments_of(arrays[:-1])
    return [None, *task.loss.gradients_of_part(arguments, call, rounded(arrays[-1]), samples)]


def value_of(sums: Sums, *, loss: AbstractLoss, samples: int, reduction: str, options: Mapping[str, Any]) -> Any:
    """Return the value of a loss, given the sums of all blocks."""
    with np.errstate(all="ignore"):
        return loss.value_of_sums(rounded(sums), samples, reduction, options)


def add_up(blocks: Any) -> Any:
    """Add up the sums that are the first results of blocks, in Dask's tree."""
    return da.reduction(
        blocks, chunk=sums_of, combine=join_all, aggregate=join_all, dtype=object, concatenate=False, meta=np.empty((), object)
    )


def sums_of(block: list[Any], axis: Any, keepdims: bool) -> Sums:
    """Return the sums of a block."""
    sums: Sums = block[0]
    return sums


def join_all(parts: Any, axis: Any, keepdims: bool) -> Sums:
    """Add up the sums of several blocks, which lie in a list for each axis."""
    if isinstance(parts, dict):
        return parts
    return functools.reduce(joined, [join_all(part, axis, keepdims) for part in parts])


def count_entries(loss: AbstractLoss, shape: tuple[int, ...]) -> int:
    """Return the number of values of an elementwise loss or of a loss of classes, before they are reduced."""
    return math.prod(loss.value_shape(shape, "none", {}))


def pick(blocks: Any, k: int, chunks: Any, dtype: Any, like: Any, missing: tuple[int, ...] = ()) -> Any:
    """Return the array that consists of each block's k-th result, with axes of length 1 where some are missing."""
    meta = np.empty_like(like, dtype, shape=(0,) * len(chunks))
    return blocks.map_blocks(item, k=k, missing=missing, chunks=chunks, dtype=dtype, meta=meta)


def item(block: list[Any], *, k: int, missing: tuple[int, ...]) -> Any:
    """Return the k-th result of a block, with axes of length 1 where some are missing."""
    return np.expand_dims(block[k], missing) if missing else block[k]


def call_of(block: Any) -> type[Call]:
    """Return the subclass of `Call` that reads a block."""
    if isinstance(block, np.ndarray):
        return NUMPY.call
    from fastloss.backends.cupy import BACKEND as CUPY

    return CUPY.call


def check_blocks(name: str, x: Any) -> None:
    """Raise an error if blocks are no arrays that a loss accepts, or do not hold whole samples."""
    if (kind := type(x._meta).__module__.partition(".")[0]) not in ("numpy", "cupy"):
        raise TypeError(f"{name} is a dask.array.Array of blocks of {kind}; accepted: blocks of NumPy or CuPy")
    if any(np.isnan(length) for along in x.chunks for length in along):
        raise ValueError(f"{name} has chunks of unknown lengths; accepted: known lengths ({name}.compute_chunk_sizes())")
    if not x.ndim or any(count > 1 for count in x.numblocks[1:]):
        found, whole = f"{name} has shape {x.shape} and chunks {x.chunks}", ("auto", *[-1] * (x.ndim - 1))
        raise ValueError(f"{found}; accepted: a first axis, along which alone it is cut ({name}.rechunk({whole}))")


def check_samples(loss: AbstractLoss, x: Any) -> None:
    """Raise an error if the first axis of a loss's input is not that of samples."""
    if loss.axes_of("grad_output", 1, x.ndim) != (0,):
        raise ValueError(f"{loss.operands[0]} has shape {x.shape}, a single sample; accepted for Dask arrays: (N, C, ...)")


BACKEND = DaskBackend()
