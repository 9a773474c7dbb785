"""The state of the CPU: its features, and the floating-point state of the threads that call losses."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import numpy as np
import pytest

import fastloss as fl
from tests.test_threads import run_python

LOSS = fl.binary_cross_entropy_with_logits.value_and_grad
TARGETS = {  # CPUs without some instructions: environment variables
    "no AVX": {"NUMBA_ENABLE_AVX": "0"},
    "generic": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    "AVX2": {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+f16c,+sse4.2"},
    "AVX2 without F16C": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+sse4.2"},
}
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the features are those of x86")
HALVES = """
import numpy as np, fastloss as fl
from fastloss.cpu import features
halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
@fl.elementwise_loss
def copied(z, t):
    return z + t, z
with np.errstate(all="ignore"):
    zero = np.zeros(halves.shape, np.float32)
    widened = copied(halves, zero, reduction="none").astype(np.float32)
    assert np.array_equal(widened, halves.astype(np.float32), equal_nan=True)
    assert np.array_equal(copied.grad(halves, zero, reduction="sum"), halves, equal_nan=True)
    bits = np.concatenate([np.arange(0x33000000, 0x47900000, 4099), np.arange(0x387fe000, 0x38802000), np.arange(0x477fd000, 0x47802000),
                           [0, 1, 0x007fffff, 0x00800000, 0x7f800000, 0x7fc00000, 0x7f800001, 0x7f7fffff]]).astype(np.uint32)
    singles = np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)
    half_zero = np.zeros(singles.shape, np.float16)
    # the value is stored in the input's dtype, and target holds the number to round
    stored = copied(half_zero, singles, reduction="none")
    assert stored.dtype == np.float16
    assert np.array_equal(stored, singles.astype(np.float16), equal_nan=True)
print(features.has_half_conversion(), features.has_fma())"""


@on_x86
def test_halves_are_converted_without_the_instruction(tmp_path):
    for name, environment in TARGETS.items():
        said = run_python(HALVES, FASTLOSS_CACHE_DIR=str(tmp_path), **environment)
        assert said == f"{name == 'AVX2'} {'AVX2' in name}", name


@on_x86
@pytest.mark.parametrize("name", TARGETS)
def test_the_same_accuracy_without_instructions(name):
    """The bounds of `test_accuracy.py` hold where the CPU lacks instructions; here, results agree with those of this CPU."""
    code = """
import numpy as np, fastloss as fl
z = np.concatenate([np.linspace(-110, 110, 20001), [0, -0.0, np.inf, -np.inf]]).astype(np.float32)
t = (np.arange(z.size) % 5 / 4).astype(np.float32)
p = np.abs(np.sin(z[:-2]))
found = [fl.binary_cross_entropy_with_logits.grad(z, t), fl.log_cosh_loss(z, t, reduction="none")]
found += [fl.sigmoid_focal_loss(z, t, gamma=1.7), fl.binary_cross_entropy(p, t[:-2], reduction="none")]
found += [x for x in fl.gaussian_kl_loss.grad(p, z[:-2] / 4)]
print(*(x.tobytes().hex() for x in found))"""
    ours, plain = (
        [np.frombuffer(bytes.fromhex(x), np.float32) for x in run_python(code, **variables).split()] for variables in (TARGETS[name], {})
    )
    for a, b in zip(ours, plain, strict=True):
        assert np.array_equal(np.isfinite(a), np.isfinite(b))
        finite = np.isfinite(b)
        assert (np.abs(a[finite].view(np.int32).astype(np.int64) - b[finite].view(np.int32)) <= 8).all()


def test_numba_without_compilation_is_refused(tmp_path):
    environment = {"NUMBA_DISABLE_JIT": "1", "FASTLOSS_CACHE_DIR": str(tmp_path)}
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_python("import fastloss as fl; fl.mse_loss([1.0], [0.0])", **environment)
    assert "RuntimeError: NUMBA_DISABLE_JIT is set, and fastloss's kernels are compiled by Numba" in caught.value.stderr


def test_a_configuration_that_only_numba_knows_changes_nothing(tmp_path):
    code = """
import numba.core.config
numba.core.config.ENABLE_AVX = 0
import fastloss as fl
print(fl.mse_loss([1.5], [0.0]))"""
    assert float(run_python(code, FASTLOSS_CACHE_DIR=str(tmp_path))) == 2.25


@pytest.fixture
def numbers():
    z = np.full(1_000_001, 1e-20, np.float32)
    z[::3] = 88.5  # the gradient of a target of 1 there is a subnormal number
    t = np.zeros_like(z)
    t[::3] = 1
    return z, t


def results(numbers):
    """Return value and gradient on one thread and on two."""
    before = fl.get_num_threads()
    found = []
    for n in (1, 2):
        fl.set_num_threads(n)
        value, grad = LOSS(*numbers, reduction="sum")
        found.append((value.hex(), grad.tobytes()))
    fl.set_num_threads(before)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the numbers of rounding modes are those of glibc on x86 and ARM")
@pytest.mark.parametrize("mode", ["down", "up", "to zero"])
def test_another_rounding_mode_changes_nothing_and_is_kept(numbers, mode):
    library = ctypes.CDLL("libm.so.6")
    x86 = platform.machine() == "x86_64"
    number = {"down": 0x400, "up": 0x800, "to zero": 0xC00}[mode] if x86 else {"down": 0x800000, "up": 0x400000, "to zero": 0xC00000}[mode]
    wanted = results(numbers)
    assert wanted[0] == wanted[1]
    assert library.fesetround(number) == 0
    try:
        found, kept = results(numbers), library.fegetround()
    finally:
        library.fesetround(0)
    assert kept == number
    assert found == wanted


def test_flushing_subnormal_numbers_changes_nothing_and_is_kept(numbers):
    torch = pytest.importorskip("torch")
    wanted = results(numbers)
    assert 0 < np.abs(np.frombuffer(wanted[0][1], np.float32)[0]) < np.finfo(np.float32).tiny
    if not torch.set_flush_denormal(True):
        pytest.skip("the CPU cannot flush subnormal numbers")
    try:
        found, kept = results(numbers), float(torch.tensor(1e-38) * 1e-3)
    finally:
        torch.set_flush_denormal(False)
    assert kept == 0.0
    assert found == wanted
