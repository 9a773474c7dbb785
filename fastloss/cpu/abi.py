"""The argument of a kernel, a frame, and the layout that it points to, in fields of 8 bytes: written by `launch.py`, read by `loop.py`.

The frame of a call consists of
    five fields: the next range to take, the address of the layout, the store mode (see below), 1 if each group has a scale of its own
    or 0, and the address of the scales;
    the address of each array; the options that are numbers; one scale;
    and for each range its partial sums and its number of bad elements; or if each lane computes a group, the same for each group, where
    those of one quantity lie side by side.

The layout of a plan consists of
    ten fields: the number of ranges, how many of them a thread takes at once, the number of ranges in a part (a group, or all groups
    if each lane computes one), the entries of a range, of a part, of a row and of a row's inner axis (elements, or groups), the number
    of elements that a lane computes for each entry, 1 if elements are prefetched or 0, and the number of axes outside the rows;
    the inner strides, the outer strides, and the first visited bytes relative to the addresses, each with a field for each array;
    and for each axis outside the rows, innermost first, its length and each array's stride.
"""

from __future__ import annotations

from typing import NamedTuple

from fastloss.core.plan import Plan, Spec

# Store modes: into the caches; non-temporal in pieces of 16 bytes; or non-temporal in whole cache lines, for arrays that start
# at a cache line or, as NumPy's large arrays do, 16 bytes after the start of a cache line.
CACHED, NONTEMPORAL, NONTEMPORAL_LINES, NONTEMPORAL_SHIFTED_LINES = range(4)
LINE, PIECE = 64, 16  # bytes of a cache line, and of the smallest non-temporal store

PREFETCH_FROM = 8 << 20  # bytes of operands, which then do not fit the caches of one core
COUNTERS = 1  # fields at the begin of the frame that start at 0
FIELDS = 5  # fields of the frame before the addresses
LAYOUT_FIELDS = 10  # fields of the layout before the strides


class Frame(NamedTuple):
    """The position of the first field of each part of a frame."""

    addresses: int
    numbers: int
    scale: int
    partials: int


def frame_of(arrays: int, numbers: int) -> Frame:
    """Return the positions of the parts of a frame, given the number of arrays and of options that are numbers."""
    scale = FIELDS + arrays + numbers
    return Frame(FIELDS, FIELDS + arrays, scale, scale + 1)


def count_partials(spec: Spec) -> int:
    """Return the number of partial sums of a range, or of a lane's group: the requested sums, and the number of bad elements."""
    return len(spec.summed) + 1


def layout_of(plan: Plan) -> list[int]:
    """Return the fields of the layout of a plan."""
    prefetches = plan.size * sum(operand.size for operand in plan.spec.operands) >= PREFETCH_FROM
    sizes = [plan.range_size, plan.cut[1], plan.row_size, plan.inner_size, plan.group_size if plan.spec.by_lane else 1]
    fields = [plan.ranges, plan.ranges_at_once, plan.ranges_per_part, *sizes, int(prefetches), len(plan.axes)]
    assert len(fields) == LAYOUT_FIELDS
    strides = [*plan.inner_strides, *plan.outer_strides, *plan.starts]
    return [*fields, *strides, *(x for length, by in plan.axes for x in (length, *by))]
