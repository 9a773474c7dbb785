"""Find the GPU, or the stand-in for one, that a test runs on, and mark tests that do not run on every device."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.cuda import on_cpu

NO_COMPILER = f"there is no C++ compiler {on_cpu.COMPILER}"

needs_compiler = pytest.mark.skipif(shutil.which(on_cpu.COMPILER) is None, reason=NO_COMPILER)
only_on = pytest.mark.only_on
computes_nothing = only_on("cpu", reason="computes nothing: inspects an object, or expects an error before the computation")
has_the_hosts_arrays = only_on("cpu", reason="uses masked, read-only or memory-mapped arrays, or types that only NumPy supports")
warns_the_caller = only_on("cpu", reason="checks that warnings point at the caller, which on a device is the code that copies arrays")
sums_in_another_order = only_on("cpu", reason="compares sums bit by bit, but on a device the order of summation depends on the dtype")
is_about_the_host = only_on("cpu", reason="about the threads, processes or memory of the host")
is_long_on_the_stand_in = pytest.mark.long_on("stand-in")  # which runs one thread at a time
asks_the_stand_in = only_on("stand-in", reason="reads what the stand-in records: launches, streams, waits")


def some(cases, mark, *names):
    """Return the cases of a parametrization, with a mark on those named."""
    assert set(names) <= set(cases)
    return [pytest.param(case, marks=mark) if case in names else case for case in cases]


def array_module(device, monkeypatch):
    """Return CuPy, or the stand-in for it, and let `import cupy` find it until the test ends."""
    cp = on_cpu if device == "stand-in" else cupy_of_a_gpu()
    monkeypatch.setitem(sys.modules, "cupy", cp)
    if cp is on_cpu:
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", on_cpu.nvrtc)
    return cp


def cupy_of_a_gpu():
    """Return CuPy; without a GPU the test fails, because `-m gpu` asked for one."""
    try:
        import cupy

        cupy.cuda.runtime.getDevice()
    except (ImportError, RuntimeError) as error:
        pytest.fail(f"there is no GPU: {error}")
    return cupy
