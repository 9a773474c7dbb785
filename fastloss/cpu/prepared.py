"""`PreparedPass`: a pass of an elementwise loss over arrays of given dtypes, shapes and strides.

Everything that does not depend on the arrays' elements and on the values of parameters is found once: a call with small arrays
spends most of its time on finding it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastloss.cpu.call import HostCall, find_launch


class PreparedPass:
    """A pass that computes one value for the whole batch, or none, and writes arrays."""

    def __init__(self, call: HostCall, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Any]) -> None:
        """Prepare the pass that `call.compute` would make: `summed` is reduced, `wanted` is written to arrays like `outputs`."""
        assert call.group_axes == 0
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

    def run(self, addresses: Sequence[int], numbers: Mapping[str, float], upstream: float, references: Any) -> tuple[float, bool]:
        """Compute; return the value, and whether an element lies outside [0, 1].

        `addresses` are those of the arrays to read and of the outputs. `numbers` holds the parameters that are passed as numbers.
        """
        if self.is_simple:
            sums, bad = self.launch.run(addresses, (), upstream / self.divisor, references)
            return sums[0] / self.divisor, bad
        given = self.numbers
        if self.varying:
            given = {**given, **{name: numbers[name] for name in self.varying}}
        divisor = self.divisor
        if self.counter is not None:
            arrays, counted = [addresses[k] for k in self.counter_arrays], [given[name] for name in self.counter_names]
            divisor = self.counter.run(arrays, counted, 1.0, references)[0][0]
        scale = upstream / divisor if divisor else math.nan  # if no element counts, every gradient is 0 whatever the factor is
        sums, bad = self.launch.run(addresses, given.values(), scale, references)
        if self.must_count and self.counter is None:
            divisor = sums[1]
        return (sums[0] / divisor if divisor else math.nan), bad
