"""`Accumulated`: what an `Accumulator` asks of a loss: numbers of each sample that add up over a data set, and the value of their sums."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastloss.core.call import Arguments
from fastloss.core.definition import Definition

REDUCTIONS = ("mean", "sum", "batchmean")  # those that have a value over a data set
OF_ONE_CALL = ("reduction", "grad_output", "out")  # options that an accumulator does not take


class Accumulated:
    """A loss whose value over a data set follows from sums over the samples, the entries of the first axis."""

    operands: tuple[str, ...]  # names of the arrays
    options: tuple[str, ...]  # names of the arguments accepted besides the operands
    settings: Mapping[str, Any] = {}  # defaults of the options that are not parameters of a formula; the same for a whole data set
    definitions: tuple[Definition, ...]

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute the requested quantities with a subclass of `Call`: return the reduced value or None, and the written arrays."""
        raise NotImplementedError

    def accumulated_options(self) -> tuple[str, ...]:
        """Return the names of the options that an accumulator takes."""
        return tuple(name for name in self.options if name not in OF_ONE_CALL)

    def accumulated_reductions(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the reductions that have a value over a data set."""
        return REDUCTIONS

    def default_reduction(self) -> str:
        """Return the reduction of a call that names none."""
        return str(inspect.signature(self).parameters["reduction"].default)  # type: ignore[arg-type]

    def sample_sums(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> dict[str, Any]:
        """Return arrays whose sums over the first axes of all batches decide the loss, among them "count", the number of elements."""
        options = dict(options)
        arguments = Arguments(("value",), (), operands[0], operands[1], options.pop("weight", None), "sample_sum", options)
        value, _ = self.compute(arguments, in_float64(call))
        counted = call(self.definitions[0], arguments._replace(reduction="sample_mean")).count()
        return {"value": value, "count": np.full(len(value), float(counted)) if isinstance(counted, int) else counted}

    def value_of_sums(self, sums: Mapping[str, Any], samples: int, reduction: str, options: Mapping[str, Any]) -> Any:
        """Return the loss, given the sums: none of them if there was no batch. Leading axes of the sums are those of several losses."""
        value, count = (sums[name][..., 0] if sums else np.float64(0.0) for name in ("value", "count"))
        return value / {"mean": count, "sum": 1, "batchmean": samples}[reduction]


@functools.cache
def in_float64(call: Any) -> Any:
    """Return a subclass of `Call` like another one, whose reduced values are float64."""
    return call if call.value_dtype == np.float64 else type(call.__name__, (call,), {"__slots__": (), "value_dtype": np.float64})
