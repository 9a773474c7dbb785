"""`PreparedPass`: a pass of a loss that takes one pass over arrays of given dtypes, shapes and strides.

Everything that does not depend on the arrays' elements and on the values of parameters is found once: a call with small arrays
spends most of its time on finding it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import ANY_NUMBER
from fastloss.core.checks import to_bounded
from fastloss.core.definition import classes_last, operand_of
from fastloss.cpu.call import HostCall, find_launch

MOST_PREPARED = 1024  # kinds of calls that a framework remembers


class PreparedPass:
    """A pass that computes one value for the whole batch, the sums of its samples, or none, and writes arrays."""

    def __init__(self, call: HostCall, names: tuple[str, ...], outputs: list[Any]) -> None:
        """Prepare the pass that `call.compute` would make, with its results in arrays like `outputs`.

        `names` are those of the arrays to read, in the order in which the caller has them. `outputs` have the caller's axes.
        """
        outputs = list(map(classes_last, outputs)) if call.loss.classes else outputs
        summed, wanted = call.arguments.summed, call.arguments.wanted
        order = [names.index(name) for name in call.names]
        self.order = None if order == list(range(len(order))) else order  # in which the pass takes the arrays
        self.alike = [int(operand_of(name) == "target") for name in wanted]  # the operands that the outputs resemble
        self.must_count = call.must_count
        self.divisor = 1 if call.must_count else call.count()
        self.counter: Any = None  # the launch that counts the elements of a mean before its gradient is computed
        if call.must_count and wanted:
            scan = call.narrowed(*call.counted)
            self.counter = find_launch(*scan.request(("count",), (), scan.arrays))
            self.counter_names = tuple(scan.numbers)
            self.counter_arrays = [call.names.index(name) for name in scan.names]
        elif call.must_count:
            summed = (*summed, "count")
        self.launch = find_launch(*call.request(summed, wanted, call.arrays + outputs, call.validate))
        self.numbers = call.numbers
        self.is_simple = not call.must_count and not call.numbers
        self.varying = [name for name in call.numbers if name in call.parameters]

    def run(self, addresses: Sequence[int], numbers: Mapping[str, float], upstream: float) -> tuple[Any, bool]:
        """Compute; return the value, and whether an element lies outside [0, 1] or a mean is one of no elements.

        `addresses` are those of the arrays to read and of the outputs. `numbers` holds the parameters that are passed as numbers.
        """
        if self.is_simple:
            sums, bad = self.launch.run(addresses, (), upstream / self.divisor)
            return sums[0] / self.divisor, bad
        given = self.numbers
        if self.varying:
            given = {**given, **{name: numbers[name] for name in self.varying}}
        divisor = self.divisor
        if self.counter is not None:
            arrays, counted = [addresses[k] for k in self.counter_arrays], [given[name] for name in self.counter_names]
            divisor = self.counter.run(arrays, counted, 1.0)[0][0]
        if not divisor:
            return math.nan, True
        sums, bad = self.launch.run(addresses, given.values(), upstream / divisor)
        if self.must_count and self.counter is None:
            divisor = sums[1]
        return (sums[0] / divisor, bad) if divisor else (math.nan, True)


def sort_options(
    loss: AbstractLoss, weight: Any, options: Mapping[str, Any], form_of: Callable[[Any], Any], refused: Container[str], skipped: str
) -> tuple[tuple[str, ...], list[Any], dict[str, float], tuple[Any, ...]] | None:
    """Sort options into arrays with their names, and numbers and flags. Also return all that decides how they are read.

    `form_of` returns the form of an array, or None if it needs a conversion. Return None if there is such an option, or one of those
    in `refused`. The option `skipped` is left to the caller.
    """
    names: tuple[str, ...] = ()
    arrays: list[Any] = []
    settings: dict[str, float] = {}
    forms: tuple[Any, ...] = ()
    parameters = loss.definition.formula.defaults if loss.definition is not None else {}
    for name, x in options.items() if weight is None else [("weight", weight), *options.items()]:
        if x is None or name == skipped:
            continue
        if name in refused:
            return None
        kind = type(x)
        if (kind is float or kind is int or kind is bool) and name != "weight" and name != "mask":
            settings[name] = x
            # a parameter equal to its default is a constant of the kernel; any other number only has to be within the bounds
            forms += (name, kind, is_default(loss, name, x) if name in parameters else x)
        elif (form := form_of(x)) is not None:
            names += (name,)
            arrays.append(x)
            forms += (name, form)
        else:
            return None
    return names, arrays, settings, forms


def is_default(loss: AbstractLoss, name: str, number: float) -> bool:
    """Whether a parameter of a loss's formula has its default. Raise an error if it is out of bounds."""
    definition = loss.definition
    assert definition is not None
    default: Any = definition.formula.defaults[name]
    return to_bounded(name, number, definition.bounds.get(name, ANY_NUMBER)) == default
