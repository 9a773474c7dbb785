"""`Accumulated`: a loss of a data set in parts, from sums over the samples: its value, and the gradients of each part."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastloss.core.call import Arguments
from fastloss.core.definition import Definition
from fastloss.core.exact import Exact

REDUCTIONS = ("mean", "sum", "batchmean")  # those that have a value over a data set
OF_ONE_CALL = ("reduction", "grad_output", "out")  # options that an accumulator does not take


Sums = dict[str, Exact]  # by name; empty for no part at all


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
        others = dict(options)
        arguments = Arguments(("value",), (), operands[0], operands[1], others.pop("weight", None), "sample_sum", others)
        value, _ = self.compute(arguments, in_float64(call))
        return {"value": value, "count": self.count(operands, options, call)}

    def count(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> Any:
        """Return the number of elements that count, whatever their weights: that of each sample, or if all count, one on the host."""
        if options.get("mask") is None and options.get("ignore_index") is None:
            return math.prod(operands[0].shape)
        others = {name: x for name, x in options.items() if name != "weight"}
        counted = call(self.definitions[0], Arguments((), (), operands[0], operands[1], None, "sample_mean", others)).count()
        return counted * len(operands[0]) if isinstance(counted, int) else counted

    def host_sums(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> dict[str, Any]:
        """Return the sums of the samples on the host."""
        return {name: call.to_host(x) for name, x in self.sample_sums(operands, options, call).items()}

    def value_of_sums(self, sums: Mapping[str, Any], samples: int, reduction: str, options: Mapping[str, Any]) -> Any:
        """Return the loss, given the sums: none of them if there was no batch. Leading axes of the sums are those of several losses."""
        value = sums["value"][..., 0] if sums else np.float64(0.0)
        return value / self.divisor_of_sums(sums, samples, reduction)

    def divisor_of_sums(self, sums: Mapping[str, Any], samples: int, reduction: str) -> Any:
        """Return the number that a reduction divides by, given the sums."""
        count = sums["count"][..., 0] if sums else 0.0
        return {"mean": count, "sum": 1, "batchmean": samples}[reduction]

    def gradients_of_part(self, arguments: Arguments, call: Any, sums: Mapping[str, Any], samples: int) -> list[Any]:
        """Return the gradients of a part with respect to the loss of all parts, given the sums and the number of samples of all."""
        divisor = self.divisor_of_sums(sums, samples, arguments.reduction)
        return self.compute_part(arguments._replace(summed=()), call, divisor, "sum")[1]

    def compute_part(self, arguments: Arguments, call: Any, divisor: Any, reduction: str) -> tuple[Any, list[Any]]:
        """Compute a part in one pass: its value by a reduction that does not divide, and gradients that are divided by a number."""
        with np.errstate(all="ignore"):
            upstream = np.divide(arguments.options.get("grad_output", 1.0), divisor)
        return self.compute(arguments._replace(reduction=reduction, options={**arguments.options, "grad_output": upstream}), call)


@functools.cache
def in_float64(call: Any) -> Any:
    """Return a subclass of `Call` like another one, whose reduced values are float64."""
    return call if call.value_dtype == np.float64 else type(call.__name__, (call,), {"__slots__": (), "value_dtype": np.float64})


def exact(*parts: Mapping[str, Any]) -> Sums:
    """Add up the sums of the samples of one or several parts without rounding."""
    return {name: Exact.over_first_axis(*[part[name] for part in parts]) for name in parts[0]}


def joined(these: Sums, those: Sums) -> Sums:
    """Return the sums of two sets of samples, of which one may be empty. Raise ValueError if they have different channels."""
    if not these or not those:
        return these or those
    check_channels(channels_of(these), channels_of(those))
    return {name: x.plus(those[name]) for name, x in these.items()}


def channels_of(sums: Sums) -> int:
    """Return the number of channels: some sums have a number for each."""
    return max(len(x.units) for x in sums.values())


def check_channels(before: int, found: int) -> None:
    """Raise ValueError if a batch has another number of channels than those before."""
    if before != found:
        raise ValueError(f"the batch has {found} channels; those before had {before}")


def rounded(sums: Sums) -> dict[str, Any]:
    """Return the sums as float64 arrays."""
    return {name: x.rounded() for name, x in sums.items()}
