"""Kernels touch no byte outside their arrays: the arrays lie against pages that may not be read, between bytes that may not change.

The calls run in a child process, which prints each case before it runs it. A child that dies of a signal leaves the case's name.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import signal
import subprocess
import warnings

import numpy as np
import pytest

import fastloss as fl
from fastloss.cpu.step import VECTOR_BYTES
from tests.arguments import EVERY_LOSS, options_of, parameters_of
from tests.table import FLOATS
from tests.test_classes import SIDE_BY_SIDE, draw
from tests.test_threads import run_python

PAGE, GUARD, PROT_NONE = mmap.PAGESIZE, 0xA5, 0
WHOLE = tuple(map(np.dtype, ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bool")))
EDGES = {"begin": 0, "end": 0, "begin, off by a byte": 1, "end, off by a byte": 1}
LARGE = 40_003  # elements: several ranges
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


# --- memory ----------------------------------------------------------------------------------------------------------


def strides_of(shape, itemsize, layout):
    """Return the strides in bytes of an array with a memory layout."""
    order = list(range(len(shape)))[:: 1 if layout == "transposed" else -1]
    if layout == "classes last":
        order.insert(0, order.pop(order.index(1)))
    step, strides = itemsize * (2 if layout == "every second" else 1), [0] * len(shape)
    for axis in order:
        strides[axis] = -step if layout == "reversed" else step
        step *= shape[axis]
        step += 3 * itemsize if layout == "cropped" and axis == len(shape) - 1 else 0
    return [0 if layout == "broadcast" and axis == 0 else stride for axis, stride in enumerate(strides)]


class Fenced:
    """An array in memory of its own, against the page before or after it, and the memory's bytes before the call."""

    def __init__(self, values, layout, edge):
        shape, itemsize = values.shape, values.itemsize
        strides = strides_of(shape, itemsize, layout)
        reaches = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
        below = -sum(reach for reach in reaches if reach < 0)
        extent = below + sum(reach for reach in reaches if reach > 0) + itemsize
        inside = -(-(extent + 1) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, inside + 2 * PAGE)
        self.place = shape, values.dtype, (EDGES[edge] if edge.startswith("begin") else inside - extent - EDGES[edge]) + below, strides
        self.inside = np.frombuffer(self.memory, np.uint8, inside, PAGE)
        self.inside[:] = GUARD
        self.array = self.view(self.inside)
        self.array[...] = values
        self.before = self.inside.copy()
        address = self.inside.ctypes.data
        for fence in (address - PAGE, address + inside):
            assert _libc.mprotect(fence, PAGE, PROT_NONE) == 0

    def view(self, memory):
        """Return the array in this memory, or in a copy of it."""
        shape, dtype, offset, strides = self.place
        return np.ndarray(shape, dtype, memory, offset, strides)

    def assert_unchanged(self, is_output):
        """Assert that no byte has changed but the elements of an output."""
        if is_output:
            self.view(self.before)[...] = self.array
        np.testing.assert_array_equal(self.inside, self.before)


# --- cases -----------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "reversed", "every second", "transposed", "cropped", "broadcast", "mixed")
MIXED = ("contiguous", "cropped", "transposed", "reversed", "every second")
OPTIONS = ("none", "arrays", "small arrays", "whole targets")
CALLS = (("value_and_grad", "none"), ("grad", "mean"), ("__call__", "sum"), ("value_and_grad", "sample_mean"), ("curvature", "sum"))


def kinds(row):
    """Return the kinds of calls of a loss. Every dtype meets every layout, in turn with the options and the methods."""
    pairs = itertools.product(enumerate(FLOATS), enumerate(LAYOUTS))
    return [(dtype, layout, OPTIONS[(i + j) % 4], *CALLS[(2 * i + j) % 5], WHOLE[(7 * i + j) % 9]) for (i, dtype), (j, layout) in pairs]


def sizes(dtype):
    """Return odd sizes, those around the lanes of a step, and one of several ranges."""
    lanes = VECTOR_BYTES // max(4, dtype.itemsize)
    return 1, 2, 3, lanes - 1, lanes, lanes + 1, LARGE


def cases(row, every):
    """Return the cases of every `every`-th kind of call."""
    first = list(EVERY_LOSS).index(row.name) % every
    for kind in kinds(row)[first::every]:
        for n, edge in itertools.product(sizes(kind[0]), EDGES):
            for shape in ((1, 1, n), (2, 3, n)) if n != LARGE else ((1, 3, n),):
                yield kind, shape, edge


def values_of_options(row, names, shape, kind, rng):
    """Return the values of the options of a kind of call: arrays, arrays that broadcast, or whole targets with numbers."""
    dtype, _, options, _, reduction, _ = kind
    taken, given = options_of(row), {}
    if options == "whole targets":
        given = {name: 3.0 for name in ("ignore_index",) if name in taken}
        return given | ({"target_scale": 1 / 255} if "target_scale" in taken else {})
    if options == "none":
        return given
    entries = row.entries(shape)
    small = entries if options == "arrays" else (shape[1], 1) if row.pairs_elements else shape[-1:]
    given = {name: rng.uniform(0.25, 0.75, small).astype(dtype) for name in (row.entry_weight, *parameters_of(row))}
    given |= {"weight": rng.uniform(0.25, 0.75, shape[1]).astype(dtype)} if row.has_classes else {}
    given["mask"] = rng.random(entries if options == "arrays" else shape[-1:]) < 0.7
    if "grad_output" in taken and row.is_sum and row.has_one_gradient and "grad" in names and reduction in ("none", "sample_mean"):
        given["grad_output"] = rng.random(entries if reduction == "none" else shape[:1]).astype(dtype)
    return given


def run(row, kind, shape, edge):
    """Make one call with fenced arrays, and compare its gradients with those of plain copies."""
    dtype, layout, options, method, reduction, whole = kind
    rng, entries = np.random.default_rng(1), row.entries(shape)
    method = method if hasattr(row.loss, method) else "__call__"
    operands = row.draw(rng, dtype, shape)
    if options == "whole targets" and row.has_targets:
        at = row.arrays.index("targets")
        operands[at] = rng.integers(0, 2 if whole.kind == "b" else 100, shape).astype(whole)
    if row.has_classes:
        operands[1] = operands[1].astype(whole)
    reduction = row.reduced(reduction) if row.name != "binary_entropy" else {"reduction": reduction}
    given = values_of_options(row, method, shape, kind, rng)
    spread = itertools.cycle(MIXED if layout == "mixed" else [layout])
    if layout == "broadcast":
        operands = [np.broadcast_to(x[:1], x.shape) for x in operands]
    fenced = [Fenced(x, next(spread), edge) for x in operands]
    arrays = {name: Fenced(x, next(spread) if x.shape == entries else "contiguous", edge) for name, x in given.items() if np.ndim(x)}
    if layout == "broadcast":
        given |= {name: np.broadcast_to(given[name][:1], entries) for name in arrays if given[name].shape == entries}
    writes = "grad" in method or (method == "curvature")
    out_layout = {"broadcast": "contiguous", "mixed": "cropped"}.get(layout, layout)
    outputs = [Fenced(np.zeros_like(operands[k], order="C"), out_layout, edge) for k in row.gradients] if writes else []
    passed = given | {name: x.array for name, x in arrays.items()} | reduction
    given = {name: x if name not in arrays else np.array(arrays[name].array) for name, x in given.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # every element may be masked
        out = {"out": row.out([x.array for x in outputs])} if writes else {}
        getattr(row.loss, method)(*(x.array for x in fenced), **passed, **out)
        want = getattr(row.loss, method)(*(np.array(x.array) for x in fenced), **given, **reduction)
    for x in (*fenced, *arrays.values()):
        x.assert_unchanged(is_output=False)
    for x in outputs:
        x.assert_unchanged(is_output=True)
    if writes and row.is_local:
        want = want[1] if method == "value_and_grad" else want
        for x, grad in zip(outputs, want if isinstance(want, tuple) else [want], strict=True):
            np.testing.assert_array_equal(x.array, grad)


def run_all(names, every):
    """Run the cases of losses, printing each before it runs, and then their number."""
    every_case = [(name, *case) for name in names for case in cases(EVERY_LOSS[name], every)]
    for name, *case in every_case:
        print(name, *case, flush=True)
        run(EVERY_LOSS[name], *case)
    print(len(every_case))


def run_side_by_side():
    """Compute gradients of entries whose classes lie side by side, into another array and in place; print each case, and their number."""
    every_case = list(itertools.product(FLOATS, SIDE_BY_SIDE, EDGES))
    for dtype, (classes, entries), edge in every_case:
        print(dtype, classes, entries, edge, flush=True)
        z, t = draw(np.random.default_rng(1), (1, classes, entries), dtype)
        given, out = (Fenced(x, "classes last", edge) for x in (z, np.zeros_like(z)))
        fl.cross_entropy.grad(given.array, t, reduction="sum", out=out.array)
        given.assert_unchanged(is_output=False)
        fl.cross_entropy.grad(given.array, t, reduction="sum", out=given.array)
        for x in (given, out):
            x.assert_unchanged(is_output=True)
            np.testing.assert_array_equal(x.array, fl.cross_entropy.grad(z, t, reduction="sum"))
    print(len(every_case))


# --- tests -----------------------------------------------------------------------------------------------------------


def assert_fenced(call, count):
    """Run cases in a child process, by a call of a function of this file, and fail with the last case that it began."""
    try:
        printed = run_python(f"from tests.test_fences import *; {call}")
    except subprocess.CalledProcessError as error:
        ended = signal.Signals(-error.returncode).name if error.returncode < 0 else error.stderr.strip()[-2000:]
        pytest.fail(f"{error.stdout.strip().splitlines()[-1]}: {ended}")
    assert int(printed.splitlines()[-1]) == count > 0


def assert_losses_fenced(names, every):
    """Run the cases of losses in a child process."""
    assert_fenced(f"run_all({names!r}, {every})", sum(1 for name in names for _ in cases(EVERY_LOSS[name], every)))


def test_no_call_touches_a_byte_outside_its_arrays():
    assert_losses_fenced(list(EVERY_LOSS), 50)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_every_dtype_and_layout(name):
    assert_losses_fenced([name], 1)


def test_classes_side_by_side():
    assert_fenced("run_side_by_side()", len(FLOATS) * len(SIDE_BY_SIDE) * len(EDGES))


def test_a_fence_stops_a_read_and_a_guard_finds_a_write():
    code = "import numpy as np; from tests.test_fences import Fenced; x = Fenced(np.zeros(9), 'contiguous', {!r}); x.memory[{}]"
    for edge, byte in (("begin", PAGE - 1), ("end", 2 * PAGE)):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            run_python(code.format(edge, byte))
        assert -caught.value.returncode in (signal.SIGSEGV, signal.SIGBUS)
    x = Fenced(np.zeros(9), "contiguous", "end")
    x.inside[-73] = 0
    with pytest.raises(AssertionError):
        x.assert_unchanged(is_output=True)
