"""Run a plan on the CPU: write the frame that the kernel reads, call the kernel, and add up the partial sums."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from dataclasses import replace
from math import gcd
from typing import Any

import numpy as np

from fastloss.core.plan import ONE_RANGE, Plan
from fastloss.cpu.abi import HOW, LINE, PAST, PAST_BY_LATER_LINES, PAST_BY_LINES, PIECE, THROUGH, count_partials, frame_of, layout_of
from fastloss.cpu.compile import kernel
from fastloss.cpu.pool import POOL

STREAM_FROM = 4 << 20  # bytes of output from which storing past the caches pays


class Launch:
    """A plan with its compiled kernel and the parts of the frame that are the same in every call."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.kernel = kernel(plan.spec)
        fields = layout_of(plan)
        self.layout = (ctypes.c_int64 * len(fields))(*fields)
        self.ranges, self.by_group, self.is_small = plan.ranges, plan.group_axes > 0, plan.size <= ONE_RANGE
        frame = frame_of(plan.spec)
        self.write = struct.Struct(f"{frame.numbers - HOW}q{frame.partials - frame.numbers}d").pack_into
        self.scale_at, self.partials_at = 8 * frame.scale, 8 * frame.partials
        self.partials = count_partials(plan.spec)
        self.frame_type = ctypes.c_int64 * (frame.partials + self.partials * plan.ranges)
        self.unpack_sums = struct.Struct(f"{self.partials * plan.ranges}d" if not self.by_group else "").unpack_from
        self.step_bytes = output_step(plan)

    def run(self, addresses: list[int], numbers: Iterable[float], scale: Any, keep: Any) -> tuple[Any, bool]:
        """Compute on arrays given by their addresses; return the sums, and whether an element was bad.

        A sum is a number, or an array with one number for each group. `keep` holds references to the arrays' memory.
        """
        how = self.how_to_store(addresses) if self.step_bytes else THROUGH
        frame = self.frame_type()
        if isinstance(scale, np.ndarray):
            stride, scales, scale_here = 1, scale.ctypes.data, 0.0
        else:
            stride, scales, scale_here = 0, ctypes.addressof(frame) + self.scale_at, scale
        self.write(frame, 8 * HOW, how, stride, scales, *addresses, *numbers, scale_here)
        if self.is_small:
            self.kernel(frame, self.layout)
        else:
            POOL.run(self.kernel, frame, self.layout, self.ranges, [keep, scale])
        if self.by_group:
            shape = (self.plan.groups, -1, self.partials)
            partials = np.frombuffer(memoryview(frame), np.float64, self.partials * self.ranges, self.partials_at).reshape(shape)
            with np.errstate(all="ignore"):
                return partials[:, :, :-1].sum(axis=1).T, bool(partials[:, :, -1].any())
        sums = self.unpack_sums(frame, self.partials_at)
        if self.ranges == 1:
            return sums, sums[-1] > 0.0
        totals = [sum(sums[k :: self.partials]) for k in range(self.partials)]
        return totals, totals[-1] > 0.0

    def how_to_store(self, addresses: list[int]) -> int:
        """Choose how to store the outputs. In place it is through the caches, which hold their lines already."""
        reads = len(self.plan.spec.operands)
        if set(addresses[:reads]) & set(addresses[reads:]):
            return THROUGH
        firsts = {(address + start) % LINE for address, start in zip(addresses[reads:], self.plan.starts[reads:], strict=True)}
        if self.step_bytes % LINE == 0 and firsts <= {0}:
            return PAST_BY_LINES
        if self.step_bytes % LINE == 0 and firsts <= {PIECE}:
            return PAST_BY_LATER_LINES
        return PAST if all(first % PIECE == 0 for first in firsts) else THROUGH


class EmptyLaunch:
    """The launch of a plan without elements, none of which can overlap."""

    def __init__(self, plan: Plan) -> None:
        self.plan = replace(plan, overlaps=())

    def run(self, *_: Any) -> tuple[Any, bool]:
        """Return sums of 0."""
        return np.zeros((len(self.plan.spec.summed), self.plan.groups) if self.plan.group_axes else len(self.plan.spec.summed)), False


def output_step(plan: Plan) -> int:
    """Return the largest divisor, up to a line, of the bytes from one step's store to the next; 0 if the output is small."""
    if not plan.spec.outputs:
        return 0
    size = min(output.size for output in plan.spec.outputs)
    lengths = [plan.group_size * size, plan.row_size * size if plan.axes else 0]
    strides = [stride for _, by in plan.axes for stride in by[-len(plan.spec.outputs) :]]
    step = gcd(LINE, *lengths, *strides)
    return step if step >= PIECE and plan.size * size >= STREAM_FROM else 0
