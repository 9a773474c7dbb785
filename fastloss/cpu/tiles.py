"""Tiles of entries whose classes lie side by side in memory, such as pixels in the order (N, H, W, C), in LLVM code.

A tile is a step's width of entries, and of each entry the classes in 16 bytes. Memory is loaded and stored by entries, and the
arithmetic takes a vector of entries for each class: registers are transposed between them. With a load and a store for each element,
value and gradient of the cross-entropy took 1.8 times as long (8 x 256 x 256 entries with 19 classes, float32).
"""

from __future__ import annotations

from llvmlite import ir

from fastloss.core.plan import Operand
from fastloss.cpu.vector import indices, scalar_type

ENTRY_BYTES = 16  # of an entry in a tile: AVX interleaves elements within parts of a register of that size


def classes_of(array: Operand) -> ir.VectorType:
    """Return the type of the classes of an entry in a tile of an array."""
    return ir.VectorType(scalar_type(array.code), ENTRY_BYTES // array.size)


def load_tile(builder: ir.IRBuilder, pointers: list[ir.Value], width: int) -> list[ir.Value]:
    """Load `width` classes of each entry, given a pointer to them; return a vector of entries for each class."""
    entries = [builder.load(pointer, align=ENTRY_BYTES // width) for pointer in pointers]
    return transpose(builder, [join(builder, entries[k::width]) for k in range(width)])


def store_tile(builder: ir.IRBuilder, pointers: list[ir.Value], classes: list[ir.Value]) -> None:
    """Store a vector of entries for each class, given a pointer to the classes of each entry."""
    width, rows = len(classes), transpose(builder, classes)
    for k, pointer in enumerate(pointers):
        row = rows[k % width]
        builder.store(builder.shuffle_vector(row, row, indices(k - k % width, width)), pointer, align=ENTRY_BYTES // width)


def join(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Return the lanes of several vectors, one after another, as one vector."""
    while len(parts) > 1:
        parts = [builder.shuffle_vector(a, b, indices(0, 2 * a.type.count)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose squares: the groups of as many neighbouring lanes as there are rows.

    A stage interleaves each row of the first half with one of the second, by an instruction for each register of the result. The
    highest bit of an element's row thus becomes the lowest of its lane, and the highest of its lane the lowest of its row.
    """
    size, half = len(rows), len(rows) // 2
    for _ in range(half.bit_length()):
        rows = [interleave(builder, a, b, size, first) for a, b in zip(rows[:half], rows[half:], strict=True) for first in (0, half)]
    return rows


def interleave(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, size: int, first: int) -> ir.Value:
    """Take half of the lanes of each group of two vectors, from lane `first` of the group on, in turn from both."""
    lanes = a.type.count
    order = [group + first + k // 2 + k % 2 * lanes for group in range(0, lanes, size) for k in range(size)]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), lanes), order))
