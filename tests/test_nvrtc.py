"""NVRTC compiles every kind of kernel for every architecture without a GPU, and CuPy has every name that its stand-in has."""

from __future__ import annotations

import json
import operator
import subprocess
import sys
from pathlib import Path

import pytest

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="CuPy and NVRTC are installed only on Linux")


def run(*args):
    result = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]


def assert_none_spills(kernels):
    assert not [k["kernel"] for k in kernels if k["spilled"]]
    assert max(k["shared"] for k in kernels) <= 16 << 10
    # of 65,536, so that a block of 256 threads fits; up to 129 are taken on 75 to 90, and 153 on 100 and 120
    assert max(k["registers"] for k in kernels) <= 168


def kernels(*arguments):
    return [json.loads(line) for line in run("-m", "tests.cuda.variants", *map(str, arguments)).splitlines()]


@on_linux
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_none_spills(architecture):
    found = kernels(architecture)
    assert len(found) > 150
    assert_none_spills(found)


@on_linux
@pytest.mark.parametrize(
    ("architecture", "first"), [(75, 0), pytest.param(90, 1, marks=pytest.mark.slow), pytest.param(120, 2, marks=pytest.mark.slow)]
)
def test_every_third_kernel_compiles_and_none_spills(architecture, first):
    found = kernels(architecture, first, 3)
    assert len(found) > 50
    assert_none_spills(found)


KEPT = Path(__file__).parent.parent / "bench" / "results" / "gpu-static.json"
IS_WORSE = {"registers": operator.gt, "spilled": operator.gt, "slots": operator.gt, "loads_ahead": operator.lt, "widths": operator.lt}


@on_linux
def test_no_kernel_costs_more_than_the_table_says(tmp_path):
    file = tmp_path / "static.json"
    run("-m", "bench", "--device", "cuda", "--static", "--json", file)
    kept, found = (json.loads(path.read_text()) for path in (KEPT, file))
    assert kept["kernels"].keys() == found["kernels"].keys()
    worse = [
        f"{name}, sm_{architecture}: {what} {now[what]}, in the table {before[what]}"
        for name, kernel in kept["kernels"].items()
        for architecture, before in kernel["costs"].items()
        for now in [found["kernels"][name]["costs"][architecture]]
        for what, is_worse in IS_WORSE.items()
        if is_worse(now[what], before[what])
    ]
    assert not worse, f"the code is of NVRTC {found['nvrtc']}, the table of {kept['nvrtc']}"


NAMES = """
ndarray.get ndarray.fill ndarray.astype ndarray.reshape ndarray.copy RawModule.get_function RawKernel asarray empty empty_like zeros full
broadcast_to cuda.alloc cuda.alloc_pinned_memory cuda.MemoryPointer.memset_async cuda.MemoryPointer.copy_from_device_async
cuda.UnownedMemory cuda.Stream.is_capturing cuda.Stream.begin_capture cuda.Stream.end_capture cuda.Stream.null cuda.Stream.from_external
cuda.Device cuda.Device.compute_capability cuda.get_current_stream cuda.using_allocator cuda.PythonFunctionAllocator.malloc
cuda.function.Module.load cuda.function.Module.get_function cuda.memory.OutOfMemoryError cuda.runtime.getDevice
cuda.runtime.getDeviceCount cuda.runtime.deviceGetAttribute cuda.runtime.cudaDevAttrMultiProcessorCount cuda.runtime.deviceSynchronize
cuda.runtime.memcpy cuda.runtime.getDeviceProperties cuda.runtime.runtimeGetVersion cuda.runtime.driverGetVersion
cuda.runtime.CUDARuntimeError get_default_memory_pool
"""


@on_linux
def test_cupy_has_every_name_of_the_stand_in():
    code = f"""
import functools, cupy, ml_dtypes, numpy as np
for name in {NAMES.split()}:
    functools.reduce(getattr, name.split("."), cupy)
memory = cupy.cuda.UnownedMemory(4096, 1024, None, 0)
array = cupy.ndarray((3, 4), ml_dtypes.bfloat16, cupy.cuda.MemoryPointer(memory, 0) + 16, (2, 6))
print(array.data.ptr, array.data.device_id, array.strides, array.dtype, array[1:, ::2].data.ptr)
"""
    assert run("-c", code).split() == ["4112", "0", "(2,", "6)", "bfloat16", "4114"]


def test_the_error_without_cupy_names_what_to_install():
    code = """
import sys
sys.modules["cupy"] = None
try:
    import fastloss.cuda
except ImportError as error:
    print(error)
"""
    assert "pip install 'fastloss[cuda13]', or 'fastloss[cuda12]' for a driver of CUDA 12" in run("-c", code)


def test_the_error_without_a_gpu_says_so():
    code = """
import fastloss.cuda.workspace as device
try:
    print(device.current_device())
except RuntimeError as error:
    print(error)
"""
    assert "no GPU can be used: cudaError" in run("-c", code) or run("-c", "import cupy; print(cupy.cuda.runtime.getDeviceCount())") != "0"
