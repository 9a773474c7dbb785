"""Every test of this folder runs on a device: a GPU with `-m gpu`, otherwise what stands in for one."""

from __future__ import annotations

import shutil
import sys

import pytest

import fastloss as fl
from tests.cuda import on_cpu, proxy


@pytest.fixture(scope="session", params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cp(request):
    """CuPy, or what stands in for it."""
    if request.param == "gpu":
        return pytest.importorskip("cupy")
    if shutil.which(on_cpu.COMPILER) is None:
        pytest.fail(f"the kernels are compiled by {on_cpu.COMPILER}, which is not installed; or name a C++ compiler in CXX")
    return on_cpu


@pytest.fixture(autouse=True)
def imported(cp, monkeypatch):
    """Let `import cupy` find it, and losses the arrays that it makes."""
    monkeypatch.setitem(sys.modules, "cupy", cp)


@pytest.fixture
def on_device(cp, monkeypatch):
    """Let the losses of `fastloss` take NumPy's arrays to the device and back."""
    for name in proxy.losses():
        monkeypatch.setattr(fl, name, proxy.OnDevice(getattr(fl, name), cp))
