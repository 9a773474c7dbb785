"""Run a plan: put addresses and numbers into a frame, call the kernel, bring the partial sums home."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastloss.cpu import jit
from fastloss.cpu.pool import POOL
from fastloss.plan import ONE_RANGE, Array, Plan, check_overlap

# An array's data pointer is the first field after the object header (NumPy's C API, PyArrayObject). Read like this it
# costs 0.3 us; `array.ctypes.data` builds an object for it and takes 1.6, a third of a small call.
_POINTER_AT = object.__basicsize__
_pointer = ctypes.c_size_t.from_address

ALIGNMENT = 16  # bytes, of NumPy's arrays and of the smallest store past the caches
STREAM_FROM = 4 << 20  # bytes of output from which storing past the caches pays


def address(array: Array) -> int:
    """Return the address of an array's first element."""
    return _pointer(id(array) + _POINTER_AT).value


_probe = np.zeros(3)[1:]
if address(_probe) != _probe.ctypes.data:  # pragma: no cover  an interpreter with other object headers

    def address(array: Array) -> int:
        """Return the address of an array's first element."""
        return int(array.ctypes.data)


class Launch:
    """A plan with its compiled kernel and the fixed parts of its frame."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.kernel = jit.kernel(plan.spec)
        arrays, numbers = len(plan.row_strides), max(1, len(plan.spec.numbers))
        fields = [plan.ranges, plan.ranges_per_sample, plan.range_size, plan.sample_size, plan.row_size, len(plan.axes), *plan.row_strides]
        for length, strides in plan.axes:
            fields += [length, *strides]
        self.layout = (ctypes.c_int64 * len(fields))(*fields)
        self.layout_address = ctypes.addressof(self.layout)
        # the frame: work (next range, finished ranges, streaming, scale step), addresses, numbers, one scale, partial sums
        self.head = struct.Struct(f"4q{arrays}q{numbers}dd")
        self.padding = [0.0] * (numbers - len(plan.spec.numbers))
        self.offsets = [8 * n for n in (4, 4 + arrays, 4 + arrays + numbers, 5 + arrays + numbers)]
        self.frame_type = ctypes.c_int64 * (5 + arrays + numbers + 2 * plan.ranges)
        self.moved = any(plan.starts)
        self.may_stream = streams(plan)

    def out_of_place_and_aligned(self, addresses: list[int]) -> bool:
        """Whether no output is read as well (its lines are in the cache then), and all begin where a 16-byte store may."""
        read, written = addresses[: len(self.plan.spec.operands)], addresses[len(self.plan.spec.operands) :]
        return all(a % ALIGNMENT == 0 and a not in read for a in written)

    def run(self, arrays: Mapping[str, Array], numbers: Iterable[float], scale: float | Array, borrowed: str | None) -> tuple[Any, bool]:
        """Compute; return the sum (an array of them with one a sample) and whether a target was bad.

        `borrowed` names the output that is the caller's own buffer, if one is, and so may overlap.
        """
        plan = self.plan
        addresses = [address(a) for a in arrays.values()]
        if borrowed is not None:
            check_overlap(plan, arrays, addresses, borrowed)
        stream = self.may_stream and self.out_of_place_and_aligned(addresses)
        if self.moved:
            addresses = [a + start for a, start in zip(addresses, plan.starts, strict=True)]
        frame = self.frame_type()
        base = ctypes.addressof(frame)
        at_addresses, at_numbers, at_scale, at_partials = self.offsets
        if isinstance(scale, np.ndarray):
            scales, step, number = address(scale), 1, 0.0
        else:
            scales, step, number = base + at_scale, 0, scale
        self.head.pack_into(frame, 0, 0, 0, stream, step, *addresses, *numbers, *self.padding, number)
        args = (base, self.layout_address, base + at_addresses, base + at_numbers, scales, base + at_partials)
        if plan.size <= ONE_RANGE:
            self.kernel(*args)
        else:
            POOL.run(self.kernel, args, frame, plan.ranges, (self, frame, arrays, scale))
        if plan.ranges == 1 and not plan.by_sample:
            total, bad = struct.unpack_from("dd", frame, at_partials)
            return total, bad > 0
        partials = np.frombuffer(frame, np.float64, offset=at_partials).reshape(plan.samples, plan.ranges_per_sample, 2)
        sums = partials[:, :, 0].sum(axis=1)
        return sums if plan.by_sample else sums[0], bool(partials[:, :, 1].any())

    def out_of_place_and_aligned(self, addresses: list[int]) -> bool:
        """Whether no output is read as well (its lines are in the cache then), and all begin where a 16-byte store may."""
        read, written = addresses[: len(self.plan.spec.operands)], addresses[len(self.plan.spec.operands) :]
        return all(a % ALIGNMENT == 0 and a not in read for a in written)


def streams(plan: Plan) -> bool:
    """Whether the output is large, and wherever a step may begin is as well aligned as the first element."""
    if not plan.spec.outputs:
        return False
    size = int(plan.spec.outputs[-1].code[1])
    lengths = [plan.sample_size, plan.row_size if plan.axes else 0]
    strides = [stride for _, by in plan.axes for stride in by[-len(plan.spec.outputs) :]]
    return plan.size * size >= STREAM_FROM and all(n * size % ALIGNMENT == 0 for n in lengths) and all(s % ALIGNMENT == 0 for s in strides)
