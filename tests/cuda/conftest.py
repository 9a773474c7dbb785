"""Every test of this folder runs on a device: a GPU with `-m gpu`, otherwise what stands in for one."""

from __future__ import annotations

import shutil
import sys

import pytest

import fastloss as fl
from tests.cuda import on_cpu, proxy

# for tests that ask the stand-in what happened
asks_the_stand_in = pytest.mark.parametrize("cp", ["stand-in"], indirect=True)


def a_gpu():
    """Return CuPy; whoever asks for tests on a GPU is not told that they were skipped."""
    try:
        import cupy

        cupy.cuda.runtime.getDevice()
    except (ImportError, RuntimeError) as error:
        pytest.fail(f"there is no GPU: {error}")
    return cupy


@pytest.fixture(scope="session", params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cp(request):
    """CuPy, or what stands in for it."""
    if request.param == "gpu":
        return a_gpu()
    if shutil.which(on_cpu.COMPILER) is None:
        pytest.fail(f"the kernels are compiled by {on_cpu.COMPILER}, which is not installed; or name a C++ compiler in CXX")
    return on_cpu


@pytest.fixture(autouse=True)
def imported(cp, monkeypatch):
    """Let `import cupy` find it, and losses the arrays that it makes."""
    monkeypatch.setitem(sys.modules, "cupy", cp)
    if cp is on_cpu:
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", on_cpu.nvrtc)


@pytest.fixture
def on_device(cp, monkeypatch):
    """Let the losses of `fastloss` take NumPy's arrays to the device and back."""
    for name in proxy.losses():
        monkeypatch.setattr(fl, name, proxy.OnDevice(getattr(fl, name), cp))
