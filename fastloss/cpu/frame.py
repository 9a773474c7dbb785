"""What a kernel is given, 8 bytes a field: written by `launch.py`, read by `loops.py`.

The frame of a call:
    the next range to take, how many are finished, how to store (see below), 1 if each group has a scale of its own, the
    address of the scales; the arrays' addresses; the options that are numbers; one scale; for each range its partial sums,
    those that were asked for and the number of bad elements.

The layout of a plan:
    how many ranges, how many a group, elements a range, elements a group, elements a row, elements a run, axes outside the
    rows; each array's stride along a run, from one run of a row to the next, and its first byte, from its address; for every
    axis outside the rows, innermost first, its length and each array's stride.
"""

from __future__ import annotations

from typing import NamedTuple

from fastloss.plan import Plan, Spec

# How to store: through the caches; past them by 16 bytes; or by whole lines, of arrays that start with one, or, as NumPy's
# large arrays do, 16 bytes into one.
THROUGH, PAST, PAST_BY_LINES, PAST_BY_LATER_LINES = range(4)
LINE, UNIT = 64, 16  # bytes: of a cache line, and of the smallest store past the caches

HOW = 2  # the field of the frame that says how to store; before it only counters, which begin at 0
COUNTERS = 5  # fields of the frame before the addresses
LAYOUT_COUNTERS = 7  # fields of the layout before the strides


class Frame(NamedTuple):
    """The first field of each part of a frame."""

    addresses: int
    numbers: int
    scale: int
    partials: int


def frame_of(spec: Spec) -> Frame:
    """Return where the parts of a spec's frames stand."""
    numbers = COUNTERS + len(spec.arrays)
    scale = numbers + len(spec.numbers)
    return Frame(COUNTERS, numbers, scale, scale + 1)


def partials_of(spec: Spec) -> int:
    """Return how many partial sums a range leaves: those that were asked for, and the number of bad elements."""
    return len(spec.summed) + 1


def layout_of(plan: Plan) -> list[int]:
    """Return the fields of a plan's layout."""
    counters = [plan.ranges, plan.ranges_per_group, plan.range_size, plan.group_size, plan.row_size, plan.run_size, len(plan.axes)]
    assert len(counters) == LAYOUT_COUNTERS
    strides = [*plan.row_strides, *plan.turn_strides, *plan.starts]
    return [*counters, *strides, *(x for length, by in plan.axes for x in (length, *by))]
