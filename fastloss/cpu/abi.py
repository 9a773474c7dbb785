"""What a kernel is given, in fields of 8 bytes: written by `launch.py`, read by `loop.py`.

The frame of a call holds
    the next range to take, the number of finished ranges, how to store (see below), 1 if each group has a scale of its own, and
    the address of the scales; the arrays' addresses; the options that are numbers; one scale; and for each range its partial
    sums and its number of bad elements.

The layout of a plan holds
    the number of ranges, the number of ranges in a group, the elements of a range, of a group, of a row and of a row's inner
    axis, and the number of axes outside the rows; for each array its inner stride, its outer stride, and its first byte
    relative to its address; and for every axis outside the rows, innermost first, its length and each array's stride.
"""

from __future__ import annotations

from typing import NamedTuple

from fastloss.core.plan import Plan, Spec

# How to store: through the caches; past them in pieces of 16 bytes; or past them in whole cache lines, for arrays that start at
# a cache line or, as NumPy's large arrays do, 16 bytes after the start of one.
THROUGH, PAST, PAST_BY_LINES, PAST_BY_LATER_LINES = range(4)
LINE, PIECE = 64, 16  # bytes of a cache line, and of the smallest store past the caches

HOW = 2  # the field of the frame that says how to store; the fields before it are counters that start at 0
COUNTERS = 5  # fields of the frame before the addresses
LAYOUT_COUNTERS = 7  # fields of the layout before the strides


class Frame(NamedTuple):
    """The first field of each part of a frame."""

    addresses: int
    numbers: int
    scale: int
    partials: int


def frame_of(spec: Spec) -> Frame:
    """Locate the parts of a spec's frames."""
    numbers = COUNTERS + len(spec.arrays)
    scale = numbers + len(spec.numbers)
    return Frame(COUNTERS, numbers, scale, scale + 1)


def count_partials(spec: Spec) -> int:
    """Count the partial sums that a range leaves: those that were asked for, and the number of bad elements."""
    return len(spec.summed) + 1


def layout_of(plan: Plan) -> list[int]:
    """List the fields of a plan's layout."""
    counters = [plan.ranges, plan.ranges_per_group, plan.range_size, plan.group_size, plan.row_size, plan.inner_size, len(plan.axes)]
    assert len(counters) == LAYOUT_COUNTERS
    strides = [*plan.inner_strides, *plan.outer_strides, *plan.starts]
    return [*counters, *strides, *(x for length, by in plan.axes for x in (length, *by))]
