"""Relations between losses that hold independently of their accuracy."""

from __future__ import annotations

import numpy as np
import pytest

import fastloss as fl
from tests.ulp import PROBABILITY, SUM, ULP, assert_close, assert_same, assert_ulp, compute

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.alike]


def test_focal_without_focus_is_cross_entropy(batch):
    z, t = batch
    z.flat[:6] = 0, -0.0, 1e-30, 90, -90, np.inf
    for targets in (t, np.round(t)):
        plain = compute(fl.binary_cross_entropy_with_logits, z, targets)
        assert_same(compute(fl.sigmoid_focal_loss, z, targets, alpha=-1, gamma=0), plain)


def test_focal_balances_by_alpha(batch):
    z, t = batch
    plain = compute(fl.sigmoid_focal_loss, z, t, alpha=-1)
    for got, want in zip(compute(fl.sigmoid_focal_loss, z, t, alpha=0.25), plain, strict=True):
        assert_close(got, (0.25 * t + 0.75 * (1 - t)) * want, 2 * SUM[z.dtype])


@pytest.mark.parametrize("delta", [0.25, 1.0, 3.0])
def test_huber_is_delta_times_smooth_l1(batch, delta):
    z, t = batch
    limits = [ULP["huber_loss", q][1] + ULP["smooth_l1_loss", q][1] + 1 for q in ("value", "slope", "curvature")]
    smooth = compute(fl.smooth_l1_loss, z, t, beta=delta)
    for got, want, limit in zip(compute(fl.huber_loss, z, t, delta=delta), smooth, limits, strict=True):
        want = delta * want.astype(np.longdouble)
        assert_ulp(got, want, want, limit, z.dtype)


def test_smooth_l1_without_a_parabola_is_l1(batch):
    assert_same(compute(fl.smooth_l1_loss, *batch, beta=0), compute(fl.l1_loss, *batch))


def test_an_error_of_delta_is_on_the_parabola_of_huber(dtype):
    z = np.array([1, np.nextafter(1, 2, dtype=dtype)], dtype)
    assert fl.huber_loss.curvature(z, np.zeros_like(z), reduction="sum").tolist() == [1, 0]


def test_huber_with_a_large_delta_is_half_the_squared_error(batch):
    for got, want in zip(compute(fl.huber_loss, *batch, delta=np.inf), compute(fl.mse_loss, *batch), strict=True):
        np.testing.assert_array_equal(2 * got, want)


def test_log_cosh_lies_between_l1_and_l1_minus_log_2(batch, rng):
    z, t = batch
    z.flat[:100] = t.flat[:100] + 10.0 ** rng.uniform(-30, 4, 100)
    value, l1 = fl.log_cosh_loss(z, t, reduction="none"), fl.l1_loss(z, t, reduction="none")
    assert (value <= l1).all()
    assert (value >= l1 - np.log(2) - np.spacing(l1)).all()
    assert (value >= 0).all()
    assert (np.abs(fl.log_cosh_loss.grad(z, t, reduction="sum")) <= 1).all()


def test_a_sum_of_log_cosh_by_multiplying_equals_the_sum_of_its_terms(dtype, rng):
    for size in (1e-6, 1e-3, 1, 30):
        z, t = (size * rng.standard_normal((2, 100_000))).astype(dtype)
        terms = fl.log_cosh_loss(z.astype(np.longdouble).astype(np.float64), t.astype(np.float64), reduction="none")
        assert_close(fl.log_cosh_loss(z, t, reduction="sum"), terms.sum(dtype=np.longdouble), SUM[np.dtype(dtype)])


def test_probabilities_and_logits_agree(batch):
    z, t = (x.astype(np.float64) for x in batch)
    p = 1 / (1 + np.exp(-z))
    assert_close(
        fl.binary_cross_entropy(p, t, reduction="none"), fl.binary_cross_entropy_with_logits(z, t, reduction="none"), PROBABILITY[z.dtype]
    )
    assert_close(fl.mse_loss(p, t, reduction="none"), fl.mse_with_logits_loss(z, t, reduction="none"), SUM[z.dtype])


def test_losses_of_the_difference_are_even_and_their_slopes_odd(batch):
    z, t = batch
    for loss in (fl.mse_loss, fl.l1_loss, fl.smooth_l1_loss, fl.huber_loss, fl.log_cosh_loss):
        value, slope, curvature = compute(loss, z, t)
        assert_same(compute(loss, t, z), (value, -slope, curvature))


def test_losses_of_logits_are_symmetric_in_the_classes(batch):
    z, t = batch
    t = np.round(t * 16) / 16  # so that 1 - t is exact
    for loss, options in (
        (fl.binary_cross_entropy_with_logits, {}),
        (fl.mse_with_logits_loss, {}),
        (fl.sigmoid_focal_loss, {"alpha": -1}),
    ):
        value, slope, curvature = compute(loss, z, t, **options)
        assert_same(compute(loss, -z, 1 - t, **options), (value, -slope, curvature))


def test_cross_entropy_minus_entropy_is_a_divergence(batch):
    z, t = (x.astype(np.float64) for x in batch)
    p = 1 / (1 + np.exp(-z))
    divergence = t * np.log(t / p) + (1 - t) * np.log((1 - t) / (1 - p))
    gap = fl.binary_cross_entropy_with_logits(z, t, reduction="none") - fl.binary_entropy(t, reduction="none")
    assert_close(gap, divergence, PROBABILITY[z.dtype])
    assert (gap > 0).all()
