"""float16 and bfloat16: loaded and widened in the loop, computed in float32 as far as 16 bits show it, rounded once."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests import oracle
from tests.devices import is_long_on_the_stand_in, some, sums_in_another_order
from tests.table import FLOATS, HALVES
from tests.ulp import HALF, HALF_SUM, POWER_SUM, QUANTITIES, assert_rounded, compute, flat, half_error

pytestmark = pytest.mark.usefixtures("device")

POWERS = ("sigmoid_focal_loss", "mse_with_logits_loss")  # losses that are powers of a probability
LARGE = (2 << 20) + 8  # a size from which the CPU stores past its caches


@pytest.fixture(params=HALVES, ids=str)
def half(request):
    return request.param


def arrays(rng, shape, *dtypes):
    """Return arrays of numbers between 0 and 1, which are valid inputs and targets of every loss."""
    return [rng.random(shape).astype(dtype) for dtype in dtypes]


def every_number(half, row):
    """Return every finite number of 16 bits that is a reasonable input."""
    x = np.arange(1 << 16, dtype=np.uint16).view(half)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = x.astype(np.float64)
    low, high = (0, 1) if "probabilities" in row.arrays else (-1e4, 1e4)
    return x[(wide >= low) & (wide <= high)]


@pytest.mark.alike("stand-in")
@pytest.mark.rows("is_elementwise")
@pytest.mark.parametrize("target", [0, 0.25, 1])
def test_every_input_in_extended_precision(row, half, target):
    z = every_number(half, row)
    t = np.full(z.shape, target, half)
    for parameters in row.settings:
        with np.errstate(all="ignore"):
            want = row.oracle(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG, **parameters)
        for quantity, got, (true, magnitude) in zip(QUANTITIES, compute(row.loss, z, t, **parameters), want, strict=True):
            assert got.dtype == half
            error = half_error(got, true, magnitude)
            worst = np.argmax(error)
            assert error[worst] <= HALF, f"{quantity}: {error[worst]:.4f} ulp too many at {z[worst]}, {parameters}"


@pytest.mark.alike("stand-in")
@pytest.mark.rows("is_elementwise")
@pytest.mark.parametrize("target", [0, 0.25, 1])
def test_every_sum_of_one_element_in_extended_precision(device, row, half, target):
    """A sum is not rounded to 16 bits. Without a weight, its logarithms are summed as that of a product."""
    z = every_number(half, row)[:: 211 if device == "stand-in" else 1, np.newaxis]
    t, limit = np.full(z.shape, target, half), POWER_SUM if row.name in POWERS else HALF_SUM
    for parameters in row.settings:
        with np.errstate(all="ignore"):
            want, magnitude = row.oracle(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG, **parameters)[0]
        for weight in (None, np.ones_like(z)):
            got = row.loss(z, t, weight, reduction="sample_sum", **parameters)[:, np.newaxis]
            beyond = np.abs(got - want) - limit * magnitude
            worst = np.argmax(beyond)
            assert beyond.flat[worst] <= np.finfo(np.float32).smallest_subnormal, f"{got.flat[worst]} at {z.flat[worst]}, {parameters}"


@pytest.mark.alike
@sums_in_another_order
def test_results_are_those_of_float32_rounded(row, half, rng):
    loss, given = row.loss, row.draw(rng, half, (3, 2, 7, 11))
    wide = [x.astype(np.float32) if x.dtype == half else x for x in given]
    (weight,), mask = arrays(rng, row.entries((3, 2, 7, 11)), half), rng.random((7, 11)) < 0.7
    for reduction in ("mean", "sample_sum"):
        options = {"mask": mask, **row.reduced(reduction)}
        value, grads = loss.value_and_grad(*given, **{row.entry_weight: weight}, **options)
        want, want_grads = loss.value_and_grad(*wide, **{row.entry_weight: weight.astype(np.float32)}, **options)
        for got, exact in zip(flat(value), flat(want), strict=True):
            np.testing.assert_allclose(got, exact, rtol=HALF_SUM)
        for got, exact in zip(flat(grads), flat(want_grads), strict=True):
            assert_rounded(got, exact)
    if row.sums_elements:
        for got, exact in zip(compute(loss, *given), compute(loss, *wide), strict=True):
            assert_rounded(got, exact)


@sums_in_another_order
@pytest.mark.parametrize(("input_dtype", "target_dtype"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_every_combination_of_dtypes(input_dtype, target_dtype, rng):
    z, t, w, c = arrays(rng, (3, 2, 37), input_dtype, target_dtype, target_dtype, input_dtype)
    compute_dtype = np.float64 if np.dtype(np.float64) in (input_dtype, target_dtype) else np.float32
    wide = [x.astype(compute_dtype) for x in (z, t, w, c)]
    loss = fl.binary_cross_entropy_with_logits
    value, grad = loss.value_and_grad(z, t, w, pos_weight=c[:1])
    want, want_grad = loss.value_and_grad(*wide[:3], pos_weight=wide[3][:1])
    assert grad.dtype == input_dtype
    if input_dtype in HALVES and compute_dtype == np.float32:
        np.testing.assert_allclose(value, want, rtol=HALF_SUM)
        assert_rounded(grad, want_grad)
    else:
        assert value == want
        np.testing.assert_array_equal(grad, want_grad.astype(input_dtype))


def test_float64_is_rounded_once(half):
    """Test values so close to the middle of two 16-bit numbers that rounding to float32 first would give the middle itself."""
    one_up = float(np.asarray(1.0, half) + np.asarray(ml_dtypes.finfo(half).eps, half))
    middle = (1.0 + one_up) / 2
    t = -np.array([middle, middle + 1e-12, middle - 1e-12, -middle - 1e-12, 1e-300, np.inf, np.nan, 3e38 * 2])
    factor = fl.elementwise_loss(lambda z, t: (-t, -t))
    z = np.zeros(t.shape, half)
    got = factor.grad(z, t, reduction="sum").astype(np.float64)
    np.testing.assert_array_equal(got, [1.0, one_up, 1.0, -one_up, 0.0, np.inf, np.nan, np.inf])


@sums_in_another_order
@pytest.mark.parametrize("code", ["uint8", "bool", "int32"])
def test_integer_targets(half, code, rng):
    z, t = arrays(rng, (5, 130), half, half)
    images = (t.astype(np.float32) * (1 if code == "bool" else 255)).astype(code)
    value, grad = fl.mse_loss.value_and_grad(z, images, target_scale=1 / 255)
    want, want_grad = fl.mse_loss.value_and_grad(z, images.astype(np.float32) * np.float32(1 / 255))
    assert value == want
    np.testing.assert_array_equal(grad, want_grad)


def test_an_ignored_target_is_rounded_as_targets_are(half, rng):
    z, t = arrays(rng, (4, 50), half, half)
    t[1, 3:9] = 0.1
    assert fl.mse_loss(z, t, ignore_index=0.1) == fl.mse_loss(z, t, mask=t != np.asarray(0.1, half))


def test_sums_do_not_overflow(half):
    z = np.full(100_000, 200, half)
    assert fl.mse_loss(z, np.zeros_like(z)) == 40_000
    assert fl.mse_loss(z, np.zeros_like(z), reduction="sum") == 4e9


@pytest.mark.parametrize("size", some([1, 63, 65, 4097, LARGE, LARGE - 1], is_long_on_the_stand_in, LARGE, LARGE - 1))
def test_any_length_any_stride_in_place(half, size, rng):
    z, t = arrays(rng, size, half, half)
    want = fl.log_cosh_loss.grad(z, t, reduction="sum")
    assert_rounded(want, fl.log_cosh_loss.grad(z.astype(np.float32), t.astype(np.float32), reduction="sum"))
    np.testing.assert_array_equal(fl.log_cosh_loss.grad(z[::-1], t[::-1], reduction="sum"), want[::-1])
    np.testing.assert_array_equal(fl.log_cosh_loss.grad(z[::3], t[::3], reduction="sum"), want[::3])
    memory = np.zeros((size, 2), half)
    fl.log_cosh_loss.grad(z, t, reduction="sum", out=memory[:, 1])
    np.testing.assert_array_equal(memory[:, 1], want)
    assert not memory[:, 0].any()
    assert fl.log_cosh_loss.grad(z, t, reduction="sum", out=z) is z
    np.testing.assert_array_equal(z, want)


def test_infinite_logits_have_the_limit(half):
    z, t = np.array([np.inf, -np.inf, np.inf, np.nan], half), np.array([1, 0, 0.25, 0], half)
    value, slope, curvature = compute(fl.binary_cross_entropy_with_logits, z, t)
    np.testing.assert_array_equal(value.astype(np.float32), [0, 0, np.inf, np.nan])
    np.testing.assert_array_equal(slope.astype(np.float32), [0, 0, 0.75, np.nan])
    np.testing.assert_array_equal(curvature.astype(np.float32), [0, 0, 0, np.nan])
    np.testing.assert_array_equal(fl.log_cosh_loss.grad(z, t, reduction="sum").astype(np.float32), [1, -1, 1, np.nan])


def test_nan_and_infinity_are_stored(half):
    z = np.array([np.nan, -np.nan, np.inf, -np.inf], half)
    t = np.zeros(4, half)
    np.testing.assert_array_equal(fl.mse_loss.grad(z, t, reduction="sum").astype(np.float32), [np.nan, np.nan, np.inf, -np.inf])
    signalling = np.array([0x7F81 if half.name == "bfloat16" else 0x7C01], np.uint16).view(half)
    assert np.isnan(fl.mse_loss.grad(signalling, t[:1], reduction="sum").astype(np.float32))


@pytest.mark.first
def test_both_halves_in_turn():
    """Arrays of both types have the same shapes and strides."""
    t = np.zeros(9, np.float32)
    for half in (*HALVES, *HALVES):
        assert fl.mse_loss(np.full(9, 3, half), t) == 9


def test_wrong_half(half):
    z = np.zeros((2, 3), half)
    with pytest.raises(ValueError, match=f"out has shape .* and dtype float32; the result has shape .* and dtype {half.name}"):
        fl.mse_loss.grad(z, z, out=np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=f"target_scale multiplies integer targets, and target is {half.name}"):
        fl.mse_loss(z, z, target_scale=0.5)
    with pytest.raises(ValueError, match=r"target\[1, 2\] is 2"):
        fl.binary_cross_entropy_with_logits(z, np.array([[0, 0, 0], [0, 0, 2]], half), validate=True)
