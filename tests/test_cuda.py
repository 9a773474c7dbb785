"""The losses on a device: the tests of the CPU, run there, and what only a device has.

Without a GPU, the device is the stand-in of `tests/cuda`: the same CUDA text, compiled by the C++ compiler. With one,
`pytest -m gpu` runs the same tests on it.
"""

from __future__ import annotations

import shutil
import sys

import pytest

import fastloss as fl
from tests.cuda import on_cpu, proxy

# every test of these that takes a loss, a dtype or a batch is run on the device
from tests.test_accuracy import test_edges_in_60_digits  # noqa: F401
from tests.test_options import (  # noqa: F401
    test_mask_takes_elements_out,
    test_reductions,
)


@pytest.fixture(scope="module", params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cp(request):
    """CuPy, or what stands in for it."""
    if request.param == "gpu":
        import cupy

        yield cupy
        return
    if shutil.which(on_cpu.COMPILER) is None:
        pytest.fail(f"the tests of kernels need a C++ compiler: {on_cpu.COMPILER}, or another one in CXX")
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = on_cpu
    yield on_cpu
    if before is None:
        del sys.modules["cupy"]
    else:
        sys.modules["cupy"] = before


@pytest.fixture(autouse=True)
def on_device(cp, monkeypatch):
    """Let the losses of `fastloss` take NumPy's arrays to the device and back."""
    for name in proxy.losses():
        monkeypatch.setattr(fl, name, proxy.OnDevice(getattr(fl, name), cp))
