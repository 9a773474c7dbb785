"""Launch a plan on the CPU: write the frame that the kernel reads, call the kernel, and add up the partial sums."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from dataclasses import replace
from math import gcd
from typing import Any

import numpy as np

from fastloss.core.plan import Plan
from fastloss.cpu.abi import (
    CACHED,
    COUNTERS,
    LINE,
    NONTEMPORAL,
    NONTEMPORAL_LINES,
    NONTEMPORAL_SHIFTED_LINES,
    PIECE,
    count_partials,
    frame_of,
    layout_of,
    scratch_size,
)
from fastloss.cpu.compile import kernel
from fastloss.cpu.threads import THREADS

NO_SUMS = ((0.0,), False)  # the result of a pass that writes arrays alone
NONTEMPORAL_FROM = 4 << 20  # bytes of output from which non-temporal stores are faster


class Launch:
    """A plan with its compiled kernel, its layout, and the positions of the fields of a frame."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.kernel = kernel(plan.spec)
        fields = layout_of(plan)
        self.layout = (ctypes.c_int64 * len(fields))(*fields)
        self.layout_at = ctypes.addressof(self.layout)
        self.ranges, self.work, self.by_group = plan.ranges, plan.work, plan.group_axes > 0
        frame = frame_of(len(plan.spec.arrays), len(plan.spec.numbers))
        self.write = struct.Struct(f"{frame.numbers - COUNTERS}q{frame.partials - frame.numbers}d").pack_into
        self.scale_at, self.partials_at = 8 * frame.scale, 8 * frame.partials
        self.partials = count_partials(plan.spec)
        numbers = self.partials * plan.partials
        self.frame_type = ctypes.c_int64 * (frame.partials + numbers + len(plan.spec.sums_by_class) * plan.walked * plan.ranges)
        self.unpack_sums = struct.Struct(f"{numbers}d" if not self.by_group else "").unpack_from
        self.alignment = output_alignment(plan)
        self.has_sums = bool(plan.spec.summed or plan.spec.checked)
        self.scratch = scratch_size(plan)

    def run(self, addresses: list[int], numbers: Iterable[float], scale: Any) -> tuple[Any, bool]:
        """Compute on arrays given by their addresses; return the sums, and whether an element lies outside [0, 1].

        A sum is a number, or an array with one number for each group.
        """
        store_mode = self.choose_store_mode(addresses) if self.alignment else CACHED
        frame = self.frame_type()
        if isinstance(scale, np.ndarray):
            stride, scales, number = 1, scale.ctypes.data, 0.0
        else:
            stride, scales, number = 0, ctypes.addressof(frame) + self.scale_at, scale
        threads = min(self.ranges, THREADS.count)  # at most; another thread may change the count
        scratch = np.empty(self.scratch * threads, np.uint8) if self.scratch else None
        scratch_at = scratch.ctypes.data if scratch is not None else 0
        self.write(frame, 8 * COUNTERS, self.layout_at, store_mode, stride, scales, scratch_at, *addresses, *numbers, number)
        if self.ranges == 1:
            self.kernel(frame)
        else:
            THREADS.run(self.kernel, frame, threads, self.work)
        if self.by_group:
            partials = np.frombuffer(memoryview(frame), np.float64, offset=self.partials_at)
            return self.sums_of_classes(partials) if self.plan.spec.sums_by_class else self.sums_of_groups(partials)
        if not self.has_sums:
            return NO_SUMS
        sums = self.unpack_sums(frame, self.partials_at)
        if self.ranges == 1:
            return sums, sums[-1] > 0.0
        totals = [sum(sums[k :: self.partials]) for k in range(self.partials)]
        return totals, totals[-1] > 0.0

    def sums_of_groups(self, partials: Any) -> tuple[Any, bool]:
        """Add up the partial sums of each group's ranges; return the sums, and whether an element lies outside [0, 1]."""
        if self.plan.spec.walk == "group":
            sums = partials.reshape(self.partials, self.plan.groups)
        elif self.ranges == self.plan.groups:
            sums = partials.reshape(self.ranges, self.partials).T
        else:
            with np.errstate(all="ignore"):
                sums = partials.reshape(self.plan.groups, -1, self.partials).sum(axis=1).T
        return sums[:-1], self.plan.spec.checked != () and bool(sums[-1].any())

    def sums_of_classes(self, partials: Any) -> tuple[list[Any], bool]:
        """Add up partial sums of which some have a number for each class; return the sums as `sums_of_groups` does."""
        spec, groups = self.plan.spec, self.plan.groups
        by_entry, bad = self.sums_of_groups(partials[: self.partials * self.ranges])
        rest = partials[self.partials * self.ranges :].reshape(groups, -1, self.plan.walked, len(spec.sums_by_class))
        by_class = np.moveaxis(rest.sum(axis=1), -1, 0)
        named = dict(zip((*spec.sums_by_entry, *spec.sums_by_class), (*by_entry, *by_class), strict=True))
        return [named[name] for name in spec.summed], bad

    def choose_store_mode(self, addresses: list[int]) -> int:
        """Choose the store mode. An output that overwrites its operand is stored into the caches, which already hold its lines."""
        reads = len(self.plan.spec.operands)
        if set(addresses[:reads]) & set(addresses[reads:]):
            return CACHED
        firsts = {(address + start) % LINE for address, start in zip(addresses[reads:], self.plan.starts[reads:], strict=True)}
        if self.alignment % LINE == 0 and firsts <= {0}:
            return NONTEMPORAL_LINES
        if self.alignment % LINE == 0 and firsts <= {PIECE}:
            return NONTEMPORAL_SHIFTED_LINES
        return NONTEMPORAL if all(first % PIECE == 0 for first in firsts) else CACHED


class EmptyLaunch:
    """The launch of a plan that has no elements. Its arrays cannot overlap."""

    def __init__(self, plan: Plan) -> None:
        self.plan = replace(plan, overlaps=())

    def run(self, *_: Any) -> tuple[Any, bool]:
        """Return sums of 0, and that no element lies outside [0, 1]."""
        plan, spec = self.plan, self.plan.spec
        if not plan.group_axes:
            return np.zeros(len(spec.summed)), False
        shapes = [(plan.groups, plan.walked) if name in spec.sums_by_class else plan.groups for name in spec.summed]
        return list(map(np.zeros, shapes)), False


def output_alignment(plan: Plan) -> int:
    """Return the alignment, at most a cache line, of every step's store relative to the first; 0 if stores go into the caches."""
    if not plan.spec.outputs or plan.spec.walk == "group":
        return 0
    size = min(output.size for output in plan.spec.outputs)
    lengths = [plan.group_size * size, plan.row_size * size if plan.axes else 0]
    strides = [stride for _, by in plan.axes for stride in by[-len(plan.spec.outputs) :]]
    alignment = gcd(LINE, *lengths, *strides)
    return alignment if alignment >= PIECE and plan.size * size >= NONTEMPORAL_FROM else 0
