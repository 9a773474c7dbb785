"""Sparse targets, of which one piece at a time becomes dense."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastloss.core.plan import Array


class SparseMatrix(NamedTuple):
    """The values of a sparse matrix, and the row and the column of each. The others are 0."""

    shape: tuple[int, ...]
    rows: Array
    columns: Array
    values: Array


def sparse_matrix_of(x: Any) -> SparseMatrix | None:
    """Return the values of a sparse matrix of SciPy or CuPy, of any format; None for anything else."""
    if not hasattr(x, "tocoo"):
        return None
    matrix = x.tocoo()
    return SparseMatrix(tuple(matrix.shape), matrix.row, matrix.col, matrix.data)


class SparseTarget:
    """The values of a sparse matrix, sorted by column and row, and memory for a dense piece."""

    def __init__(self, matrix: SparseMatrix, dtype: np.dtype[Any], keeps_integers: bool) -> None:
        rows, columns = matrix.rows.astype(np.int64), matrix.columns.astype(np.int64)
        self.length = matrix.shape[0]  # of a column
        keys = columns * self.length + rows
        order = np.argsort(keys)
        self.keys, self.rows, self.columns = keys[order], rows[order], columns[order]
        self.values = to_kernel_dtype(matrix.values[order], dtype, keeps_integers)
        self.check(matrix.shape[1])
        self.filled: Any = None  # the positions in `space` that are not 0
        self.space: Any = None

    def check(self, width: int) -> None:
        """Refuse indices that the matrix does not have, and two values at one place."""
        for name, indices, length in (("row", self.rows, self.length), ("column", self.columns, width)):
            least, most = (indices.min().tolist(), indices.max().tolist()) if len(indices) else (0, 0)
            if least < 0 or most >= max(1, length):
                raise ValueError(f"target has {name} indices from {least} to {most}; accepted: 0 to {length - 1}, the {name}s of its shape")
        if bool((self.keys[1:] == self.keys[:-1]).any()):
            raise ValueError("target has several values at one place; accepted: one; target.sum_duplicates() of SciPy adds them")

    def dense(self, rows: slice, columns: slice) -> Array:
        """Return a piece as a dense array, in memory that the next piece overwrites. No piece may be larger than the first."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if self.space is None:
            self.space = np.zeros_like(self.values, shape=height * width)
        else:
            self.space[self.filled] = 0
        edges = np.full_like(self.keys, columns.start * self.length, shape=2)
        edges[1] = columns.stop * self.length
        first, end = np.searchsorted(self.keys, edges).tolist()
        of_rows, positions, values = self.rows[first:end], self.columns[first:end] - columns.start, self.values[first:end]
        if height < self.length:
            inside = (of_rows >= rows.start) & (of_rows < rows.stop)
            of_rows, positions, values = of_rows[inside], positions[inside], values[inside]
        self.filled = (of_rows - rows.start) * width + positions
        self.space[self.filled] = values
        made: Array = self.space[: height * width].reshape(height, width)
        return made


def to_kernel_dtype(values: Array, dtype: np.dtype[Any], keeps_integers: bool) -> Array:
    """Convert the values of a sparse target to a dtype whose pieces take little memory: uint8 for small integers, else the input's."""
    if not (values.dtype.kind in "biu" and keeps_integers):
        return values.astype(dtype) if values.dtype != dtype else values
    if values.dtype.itemsize == 1:
        return values
    small = values.astype(np.uint8)
    return small if bool((small == values).all()) else values
