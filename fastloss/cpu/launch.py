"""Run a plan: lay out what the kernel reads, call it, bring the partial sums home."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from math import gcd
from typing import Any

import numpy as np

from fastloss.cpu import jit
from fastloss.cpu.frame import HOW, LINE, PAST, PAST_BY_LATER_LINES, PAST_BY_LINES, THROUGH, UNIT, frame_of, layout_of, partials_of
from fastloss.cpu.pool import POOL
from fastloss.plan import ONE_RANGE, Array, Plan, check_overlap

STREAM_FROM = 4 << 20  # bytes of output from which storing past the caches pays


# An array's data pointer is the first field after the object header (NumPy's C API, PyArrayObject). Reading it there takes
# 0.15 us; `array.ctypes.data` builds an object for it and takes 0.9, an array.
POINTER_AT = object.__basicsize__
read_pointer = ctypes.c_size_t.from_address


def addresses_of(arrays: list[Array]) -> list[int]:
    """Return the addresses of arrays' first elements."""
    return [read_pointer(id(array) + POINTER_AT).value for array in arrays]


class Launch:
    """A plan with its compiled kernel and the fixed parts of what it reads."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.kernel = jit.kernel(plan.spec)
        fields = layout_of(plan)
        self.layout = (ctypes.c_int64 * len(fields))(*fields)
        self.ranges, self.by_group, self.is_small = plan.ranges, plan.kept > 0, plan.size <= ONE_RANGE
        frame = frame_of(plan.spec)
        self.pointers = slice(HOW, frame.numbers)
        self.pack_numbers = struct.Struct(f"{frame.partials - frame.numbers}d").pack_into
        self.numbers_at, self.scale_at, self.partials_at = 8 * frame.numbers, 8 * frame.scale, 8 * frame.partials
        self.partials = partials_of(plan.spec)
        self.frame_type = ctypes.c_int64 * (frame.partials + self.partials * plan.ranges)
        self.unpack_sums = struct.Struct(f"{self.partials * plan.ranges}d" if not self.by_group else "").unpack_from
        self.step = stored_step(plan)

    def run(self, arrays: list[Array], numbers: Iterable[float], scale: Any, borrowed: bool) -> tuple[Any, bool]:
        """Compute; return the sums, a number or an array with one a group for each, and whether an element was bad.

        `borrowed` says that the outputs are the caller's own buffers, which may overlap with what is read.
        """
        addresses = addresses_of(arrays)
        if borrowed:
            check_overlap(self.plan, arrays, addresses)
        return self.run_at(addresses, numbers, scale, arrays)

    def run_at(self, addresses: list[int], numbers: Iterable[float], scale: Any, keep: Any) -> tuple[Any, bool]:
        """Do so for arrays given by their addresses; `keep` is what holds their memory."""
        how = self.how_to_store(addresses) if self.step else THROUGH
        frame = self.frame_type()
        base = ctypes.addressof(frame)
        if isinstance(scale, np.ndarray):
            step, scales, scale_here = 1, scale.ctypes.data, 0.0
        else:
            step, scales, scale_here = 0, base + self.scale_at, scale
        frame[self.pointers] = [how, step, scales, *addresses]
        self.pack_numbers(frame, self.numbers_at, *numbers, scale_here)
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
        """Return how the outputs are stored; in place through the caches, because their lines are there then."""
        reads = len(self.plan.spec.operands)
        if set(addresses[:reads]) & set(addresses[reads:]):
            return THROUGH
        firsts = {(address + start) % LINE for address, start in zip(addresses[reads:], self.plan.starts[reads:], strict=True)}
        if self.step % LINE == 0 and firsts <= {0}:
            return PAST_BY_LINES
        if self.step % LINE == 0 and firsts <= {UNIT}:
            return PAST_BY_LATER_LINES
        return PAST if all(first % UNIT == 0 for first in firsts) else THROUGH


class Nothing:
    """What runs a plan without elements."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, *_: Any) -> tuple[Any, bool]:
        """Return the sums of nothing."""
        return np.zeros((len(self.plan.spec.summed), self.plan.groups) if self.plan.kept else len(self.plan.spec.summed)), False


def stored_step(plan: Plan) -> int:
    """Return of how many bytes all distances between the starts of steps are multiples, up to a line; 0 if the output is small."""
    if not plan.spec.outputs:
        return 0
    size = min(int(output.code[1]) for output in plan.spec.outputs)
    lengths = [plan.group_size * size, plan.row_size * size if plan.axes else 0]
    strides = [stride for _, by in plan.axes for stride in by[-len(plan.spec.outputs) :]]
    step = gcd(LINE, *lengths, *strides)
    return step if step >= UNIT and plan.size * size >= STREAM_FROM else 0
