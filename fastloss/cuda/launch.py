"""Launch a plan on a GPU: cut it into ranges, choose the kernel, write the kernel's arguments, and launch it."""

from __future__ import annotations

import itertools
import struct
import weakref
from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from fastloss.core.plan import Plan, Request, make_plan
from fastloss.cuda import workspace
from fastloss.cuda.compile import kernel
from fastloss.cuda.source import GROUPS, THREADS, WORD, Variant, pack_of, packs_of, source

MAX_RANGES = GROUPS  # there are at most twice as many ranges; either groups have one, or there are at most so many groups
# A device computes about so many ranges at the same time. More of them pay their tails (sums across a block, a count, the last block's
# sum) one after another, so there are only more if a thread has a whole turn of the loop.
AT_ONCE = 256
BLOCKS = 8  # launched for each multiprocessor, at most; no device has room for more blocks of 256 threads
TEAM_FROM = 2 * THREADS  # classes, side by side in memory, from which on all threads of a block compute an entry together
INT32 = 2**31 - 2**20  # elements that are indexed in 32 bits; the loop's indices go a little beyond the last element
LAUNCHES: weakref.WeakValueDictionary[int, Launch] = weakref.WeakValueDictionary()  # by number, which a record of a bad element holds
_numbers = itertools.count(1)


class Outcome(NamedTuple):
    """How a kernel finishes sums and scales gradients: the last fields of a `Variant`."""

    result: str = "f8"
    is_mean: bool = False
    upstream: str = ""
    counts: bool = False
    divides: bool = False


class Cut(NamedTuple):
    """The sizes of groups, segments, packs and ranges, in the order of the fields of `Arguments` in elements.cuh."""

    groups: int
    group_packs: int
    group_segments: int
    segment_size: int
    segment_packs: int
    row_segments: int
    group_ranges: int
    segment_ranges: int  # 0 if ranges are cut from groups
    range_packs: int

    @property
    def is_local(self) -> bool:
        """Whether each range lies in one segment."""
        return self.segment_ranges > 0


def cut(plan: Plan) -> Cut:
    """Cut a plan into ranges, by its sizes alone, so that sums depend neither on the device nor on addresses.

    Ranges are cut from segments if these are few and long, so that the position of a range is found once, and otherwise from groups.
    They are as equal as whole turns of a block allow.
    """
    pack, size, lanes = pack_of(plan.spec), max(1, min(plan.row_size, plan.group_size)), THREADS // team_of(plan)
    group_segments, segment_packs = plan.group_size // size, -(-size // pack)
    group_packs = group_segments * segment_packs
    is_local = group_segments == 1 or (segment_packs >= lanes and plan.groups * group_segments <= MAX_RANGES)
    walked = segment_packs if is_local else group_packs
    total = plan.groups * group_packs
    share = max(-(-total // MAX_RANGES), min(-(-total // AT_ONCE), lanes * packs_of(plan.spec)))
    parts = max(1, -(-walked // turns(share, lanes)))
    range_packs = turns(-(-walked // parts), lanes)
    parts = max(1, -(-walked // range_packs))
    return Cut(
        groups=plan.groups,
        group_packs=group_packs,
        group_segments=group_segments,
        segment_size=size,
        segment_packs=segment_packs,
        row_segments=max(1, plan.row_size // size),
        group_ranges=parts * group_segments if is_local else parts,
        segment_ranges=parts if is_local else 0,
        range_packs=range_packs,
    )


def turns(packs: int, lanes: int) -> int:
    """Return the smallest number of packs, at least `packs`, that gives each thread or team of a block as many."""
    return max(1, -(-packs // lanes)) * lanes


def team_of(plan: Plan) -> int:
    """Return how many threads compute an entry together."""
    if plan.spec.walk != "classes" or plan.spec.sums_by_class or plan.walked < TEAM_FROM:
        return 1
    _, (stride, *_) = plan.axes[0]
    return THREADS if abs(stride) == plan.spec.arrays[0].size else 1


class Launch:
    """A plan with its kernels, and the part of the kernels' arguments that is the same in every call."""

    def __init__(self, request: Request, outcome: Outcome) -> None:
        self.request, self.plan, self.outcome = request, make_plan(request), outcome
        self.cut, plan = cut(self.plan), self.plan
        self.number = next(_numbers)
        LAUNCHES[self.number] = self
        spec, arrays = plan.spec, len(plan.spec.arrays)
        has_classes = spec.walk == "classes"
        self.classes, self.axes = plan.axes[:has_classes], plan.axes[has_classes:]  # the axis of classes, and those outside the rows
        self.ranges = self.cut.groups * self.cut.group_ranges
        self.alignments = [self.alignment(k) for k in range(arrays)]
        self.kernels: dict[tuple[int, ...], Any] = {}  # by device and the addresses' distances from whole words
        axes = [*self.classes, *(self.axes or [(0, (0,) * arrays)])]
        sizes = [plan.inner_size, *plan.inner_strides, *plan.outer_strides, *(x for length, by in axes for x in (length, *by))]
        fields = [self.number, *self.cut, *sizes]
        self.fixed = struct.pack(f"{len(fields)}q", *fields)
        self.varying = struct.Struct(f"{arrays + 7 + 2 * bool(spec.sums_by_class)}q{2 + max(1, len(spec.numbers))}d")
        self.no_numbers = (0.0,) * (not spec.numbers)
        self.frame = np.dtype((np.void, self.varying.size + len(self.fixed)))

    def alignment(self, k: int) -> int:
        """Return how many bytes of array k can be loaded at once along a row, if its address is as well aligned."""
        operand, plan, pack = self.plan.spec.arrays[k], self.plan, pack_of(self.plan.spec)
        size = operand.size
        if operand.access != "contiguous":
            return size
        distances = [pack * size, *(by[k] for _, by in plan.axes)]
        if self.cut.row_segments > 1:
            distances.append(self.cut.segment_size * size)
        return gcd(WORD, *distances)

    def kernel(self, device: int, addresses: Sequence[int]) -> Any:
        """Return the kernel for the current device and for the alignment of the addresses of the arrays' first visited elements."""
        places = device, *[address % WORD for address in addresses]
        found = self.kernels.get(places)
        if found is None:
            widths = tuple([gcd(width, address) for width, address in zip(self.alignments, addresses, strict=True)])
            self.check_alignment(widths)
            variant = self.variant(widths)
            found = self.kernels[places] = kernel(source(variant), variant.name, device)
        return found

    def check_alignment(self, widths: tuple[int, ...]) -> None:
        """Raise ValueError if the elements of an array are not aligned to their size, because a GPU cannot load such elements."""
        for k, operand in enumerate(self.plan.spec.arrays):
            size = operand.size
            if widths[k] < size or any(stride % size for stride in self.strides(k)):
                name = "out" if operand in self.plan.spec.outputs else operand.name
                accepted = f"addresses and strides that are multiples of the element size, {size} bytes"
                raise ValueError(f"{name} is not aligned; accepted on a GPU: {accepted}")

    def strides(self, k: int) -> list[int]:
        """Return the strides of an array, in bytes."""
        return [self.plan.inner_strides[k], self.plan.outer_strides[k], *(by[k] for _, by in self.plan.axes)]

    def variant(self, widths: tuple[int, ...]) -> Variant:
        """Return the variant of the kernel whose loads and stores have these widths in bytes."""
        whole = self.cut.groups * self.cut.group_packs * pack_of(self.plan.spec) * self.plan.walked
        ragged = self.cut.segment_size % pack_of(self.plan.spec) != 0
        return Variant(self.plan.spec, len(self.axes), whole > INT32, ragged, self.cut.is_local, widths, *self.outcome, team_of(self.plan))

    def run(
        self, device: int, addresses: Sequence[int], numbers: Iterable[float], results: int = 0, numerator: float = 1.0,
        divisor: float = 1.0, upstream: tuple[int, int] = (0, 0), divisors: int = 0, by_class: tuple[int, ...] = ()
    ) -> None:  # fmt: skip
        """Launch on the current stream of the current device, which the caller knows.

        Arrays, results, divisors and the upstream gradient (with its stride) are given by address; and so are the results that have a
        number for each class, with memory for those of each range.
        """
        if not self.ranges:
            return
        firsts = [address + start for address, start in zip(addresses, self.plan.starts, strict=True)]
        space = workspace.find_workspace(device)
        shared = space.partials.ptr, space.counters.ptr, space.slot.address
        places = *firsts, *upstream, results, divisors, *shared, *by_class
        varying = self.varying.pack(*places, numerator, divisor, *numbers, *self.no_numbers)
        frame = np.frombuffer(varying + self.fixed, self.frame)
        self.kernel(device, firsts)((self.blocks(workspace.count_multiprocessors(device)),), (THREADS,), (frame,))

    def blocks(self, multiprocessors: int) -> int:
        """Return the number of blocks: as many as get the same number of ranges each."""
        in_turn = -(-self.ranges // (BLOCKS * multiprocessors))
        return -(-self.ranges // in_turn)

    def bad_element(self, key: int) -> tuple[str, tuple[int, ...]]:
        """Return the operand and the index of a recorded bad element. If several indices share its memory, return the first."""
        checked, plan = self.request.checked, self.plan
        name, linear = checked[key % len(checked)], key // len(checked)
        k = self.request.operands.index(name)
        row, column = divmod(linear, plan.row_size)
        outer, inner = divmod(column, plan.inner_size)
        offset = plan.starts[k] + outer * plan.outer_strides[k] + inner * plan.inner_strides[k]
        for length, by in self.axes:
            row, at = divmod(row, length)
            offset += at * by[k]
        return name, index_at(offset, *self.request.layouts[k][1:])


def index_at(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of the element at an offset in bytes from an array's address."""
    index = [0] * len(shape)
    offset -= sum(stride * (length - 1) for length, stride in zip(shape, strides, strict=True) if stride < 0)
    for axis in sorted(range(len(shape)), key=lambda k: -abs(strides[k])):
        if strides[axis] and shape[axis] > 1:
            count = min(offset // abs(strides[axis]), shape[axis] - 1)
            offset -= count * abs(strides[axis])
            index[axis] = count if strides[axis] > 0 else shape[axis] - 1 - count
    return tuple(index)
