"""Every test of this folder runs on a device: a GPU with `-m gpu`, otherwise what stands in for one."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cuda import on_cpu, proxy

# for tests that ask the stand-in what happened
asks_the_stand_in = pytest.mark.parametrize("cp", ["stand-in"], indirect=True)


# cases of the CPU's tests about what a device does not have: arrays that are masked or read-only, or NumPy's
HOST_ONLY = re.compile(
    r"test_bad_latents\[.*-masked array\]|test_bad_out(_of_the_objective)?\[.*-(None|read-only)\]"
    r"|test_bad_input_of_gradients\[.*-out (read-only|type)\]"
)
# and what takes fibers too long: sizes at which the CPU's loop changes; and options, which are written around any formula alike,
# of any dtype and loss
LONG = re.compile(r"test_any_length_any_stride_in_place\[.*-20971\d\d\]|test_many_small_groups")
LOSSES = ("binary_cross_entropy_with_logits", "binary_cross_entropy", "smooth_l1_loss", "sigmoid_focal_loss")


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if item.path.parent == Path(__file__).parent and is_left_out(item)]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


def is_left_out(item):
    """Whether a case has no meaning on a device, or is left to a GPU."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if HOST_ONLY.match(item.name):
        return True
    if params.get("cp") != "stand-in":
        return False
    of_options = item.path.stem in ("test_options", "test_relations")
    is_more = params.get("dtype", np.float32) != np.float32 or params.get("name", LOSSES[0]) not in LOSSES
    return bool(LONG.match(item.name)) or (of_options and is_more)


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
    """Let losses take NumPy's arrays to the device and back."""
    carrier = proxy.Carrier(cp)
    for kind, name in proxy.methods():
        monkeypatch.setattr(kind, name, carrier.carry(vars(kind)[name]))
    yield
    assert carrier.calls, "nothing was computed on the device"
