"""Arrays with more elements than 32 bits count. Most are one element in many places, which takes no memory."""

from __future__ import annotations

import numpy as np
import pytest

import fastloss as fl
from tests.ulp import MANY_EQUAL

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(0)]

LARGE = (1 << 31) + 5
MSE = fl.mse_loss


def spread(number, dtype, shape):
    """Return an array of equal elements, which lie in one place."""
    return np.broadcast_to(np.asarray(number, dtype), shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_mean_over_ten_thousand_million_elements(dtype):
    z, t = spread(0.1, dtype, (10**10,)), spread(0.7, dtype, (10**10,))
    wide = np.float64 if dtype == np.float64 else np.float32  # of the arithmetic
    assert abs(MSE(z, t) / float(MSE(z[:1].astype(wide), t[:1].astype(wide), reduction="none")[0]) - 1) <= 1e-7


def test_a_mean_of_cross_entropies_over_ten_thousand_million_elements():
    """Their logarithms are summed as the logarithm of a product."""
    z, t = spread(0.1, np.float32, (10**10,)), spread(1, np.uint8, (10**10,))
    assert abs(fl.binary_cross_entropy_with_logits(z, t) / np.log1p(np.exp(-np.float64(z[0]))) - 1) <= 1e-7


@pytest.mark.parametrize("shape", [(LARGE,), (3, LARGE), (LARGE // 7, 7), (1 << 16, (1 << 16) + 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "sample_mean", "sample_sum"])
def test_every_reduction(shape, reduction):
    if reduction.startswith("sample") and shape[0] > 1 << 20:
        shape = shape[1:] + shape[:1] if len(shape) > 1 else (1, *shape)
    z, t = spread(3, np.float32, shape), spread(1, np.float32, shape)
    each, count = np.prod(shape[1:], dtype=np.int64), np.prod(shape, dtype=np.int64)
    want = {"mean": 4, "sum": 4 * count, "batchmean": 4 * each, "sample_mean": 4, "sample_sum": 4 * each}[reduction]
    np.testing.assert_array_equal(MSE(z, t, reduction=reduction), want)


def test_masked_elements_are_counted():
    z, mask = spread(3, np.float32, (3, LARGE)), np.array([[True], [False], [True]])
    assert MSE(z, spread(1, np.float32, z.shape), mask=mask) == 4
    assert MSE(z, spread(1, np.float32, z.shape), mask=mask, reduction="sum") == 8 * LARGE
    assert MSE(z, spread(1, np.uint8, z.shape), ignore_index=2) == 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_element_of_a_gradient_is_written(reduction):
    out = np.full(LARGE, 9, np.float16)
    z, t = spread(3, np.float16, out.shape), np.zeros(LARGE, np.uint8)
    t[-1] = 1
    _, grad = MSE.value_and_grad(z, t, reduction=reduction, out=out, grad_output=1.0 if reduction != "mean" else 2.0**31)
    assert grad is out
    assert out[-1] == 4
    assert (out[:-1] == 6).all()


def test_the_first_bad_element_beyond_32_bits_is_named():
    t = np.zeros(LARGE, np.uint8)
    t[-2] = 2
    with pytest.raises(ValueError, match=rf"target\[{LARGE - 2}\] is 2; accepted"):
        fl.binary_cross_entropy_with_logits(spread(0, np.float16, t.shape), t)


def test_dice():
    shape = (1, 2, LARGE)
    z, t = spread(0, np.float32, shape), spread(1, np.uint8, shape)
    want = 1 - (LARGE + 1) / (1.5 * LARGE + 1)
    np.testing.assert_allclose(fl.dice_with_logits_loss(z, t, reduction="none"), [[want, want]], rtol=MANY_EQUAL)
