"""The argument of a kernel, a frame, and the layout that it points to, in fields of 8 bytes: written by `launch.py`, read by `loop.py`.

The frame of a call consists of
    seven fields: the next range to take, the number of threads that have taken a piece of the scratch memory, the address of the layout,
    the store mode (see below), 1 if each group has a scale of its own or 0, and the addresses of the scales and of the scratch memory;
    the address of each array; the options that are numbers; one scale;
    and for each range its partial sums and its number of bad elements; or if each lane computes a group, the same for each group, where
    those of one quantity lie side by side; then for each range and class, its partial sums of quantities with one for each class.

The layout of a plan consists of
    eleven fields: the number of ranges, how many of them a thread takes at once, the number of ranges in a part (a group, or all groups
    if each lane computes one), the entries of a range, of a part, of a row and of a row's inner axis (elements, or groups), the number
    of elements or classes that a lane computes for each entry, the number of entries whose classes a thread holds in its scratch memory,
    1 if elements are prefetched or 0 (with classes, the bytes of a thread's scratch memory), and the number of axes outside the rows;
    the inner strides, the outer strides, and the first visited bytes relative to the addresses, each with a field for each array;
    and for each axis outside the rows, innermost first, its length and each array's stride.
"""

from __future__ import annotations

from typing import NamedTuple

from fastloss.core.dtypes import BY_CODE
from fastloss.core.plan import Plan, Spec

# Store modes: into the caches; non-temporal in pieces of 16 bytes; or non-temporal in whole cache lines, for arrays that start
# at a cache line or, as NumPy's large arrays do, 16 bytes after the start of a cache line.
CACHED, NONTEMPORAL, NONTEMPORAL_LINES, NONTEMPORAL_SHIFTED_LINES = range(4)
LINE, PIECE = 64, 16  # bytes of a cache line, and of the smallest non-temporal store

PREFETCH_FROM = 8 << 20  # bytes of operands, which then do not fit the caches of one core
COUNTERS = 2  # fields at the begin of the frame that start at 0
FIELDS = 7  # fields of the frame before the addresses
LAYOUT_FIELDS = 11  # fields of the layout before the strides

# The classes of a block of entries stay in the first cache if they are few, otherwise in the second, as long as the rows of a block are
# long enough to read memory at full speed.
NEAR, FURTHER = 16 << 10, 128 << 10  # bytes
LONG_ENOUGH, LEAST_BLOCK, MOST_BLOCK = 128, 64, 1024  # entries
SCRATCH_ROWS = 7  # besides those of the classes


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
    return len(spec.sums_by_entry) + 1


def block_of(plan: Plan) -> int:
    """Return the number of entries whose classes are held in scratch memory at a time."""
    size = rows_of_classes(plan) * BY_CODE[plan.spec.compute].size
    if plan.spec.walk != "classes" or not size:
        return 0
    fitting = max(NEAR // size, min(LONG_ENOUGH, FURTHER // size))
    return max(LEAST_BLOCK, min(MOST_BLOCK, fitting) // LEAST_BLOCK * LEAST_BLOCK)


def rows_of_classes(plan: Plan) -> int:
    """Return the number of rows of scratch memory that belong to classes: for logits, and for probabilities."""
    return plan.walked * (1 + plan.spec.has_probabilities)


def scratch_size(plan: Plan) -> int:
    """Return the bytes of scratch memory of a thread: a row for each class, and the others of `classes.py`."""
    return block_of(plan) * (rows_of_classes(plan) + SCRATCH_ROWS) * BY_CODE[plan.spec.compute].size


def layout_of(plan: Plan) -> list[int]:
    """Return the fields of the layout of a plan."""
    prefetches = scratch_size(plan) or int(plan.size * sum(operand.size for operand in plan.spec.operands) >= PREFETCH_FROM)
    sizes = [plan.range_size, plan.cut[1], plan.row_size, plan.inner_size, plan.walked]
    fields = [plan.ranges, plan.ranges_at_once, plan.ranges_per_part, *sizes, block_of(plan), prefetches, len(plan.axes)]
    assert len(fields) == LAYOUT_FIELDS
    strides = [*plan.inner_strides, *plan.outer_strides, *plan.starts]
    return [*fields, *strides, *(x for length, by in plan.axes for x in (length, *by))]
