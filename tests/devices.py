"""The GPU, or the stand-in for one, that a test runs on, and marks for tests that do not run on every device."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.cuda import on_cpu

NO_COMPILER = f"there is no C++ compiler {on_cpu.COMPILER}"

needs_compiler = pytest.mark.skipif(shutil.which(on_cpu.COMPILER) is None, reason=NO_COMPILER)
only_on = pytest.mark.only_on
computes_nothing = only_on("cpu", reason="looks at the object itself, or is refused before anything is computed")
has_the_hosts_arrays = only_on("cpu", reason="its arrays are masked, read-only, memory-mapped or of a type that only NumPy takes")
warns_the_caller = only_on("cpu", reason="warnings point at the caller, which on a device is the code that carries the arrays there")
sums_in_another_order = only_on("cpu", reason="on a device, sums of other dtypes take another order: equal, but not to the last bit")
is_about_the_host = only_on("cpu", reason="about the threads, processes or memory of the host")
is_long_on_the_stand_in = pytest.mark.long_on("stand-in")  # which runs a thread at a time
asks_the_stand_in = only_on("stand-in", reason="reads what the stand-in records: launches, streams, waits")


def some(cases, mark, *names):
    """Return the cases of a parametrization; those of these names carry the mark."""
    assert set(names) <= set(cases)
    return [pytest.param(case, marks=mark) if case in names else case for case in cases]


def array_module(device, monkeypatch):
    """Return CuPy, or the stand-in for it; until the test ends, `import cupy` finds it and losses take its arrays."""
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
