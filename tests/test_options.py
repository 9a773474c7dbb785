"""Every option, as a relation to calls without it: for each loss, dtype and method."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest

import fastloss as fl
from fastloss.core.checks import REDUCTIONS
from tests.table import LOSSES
from tests.ulp import PRODUCT, SUM, ULP, assert_close, assert_ulp, compute

SHAPES = {"full": (4, 3, 17, 13), "per channel": (3, 1, 1), "per sample": (4, 1, 1, 1), "per pixel": (17, 13), "number": ()}


def all_of(loss, z, t, **options):
    """Return the value, the gradient, and the curvature, under a reduction."""
    options = {"reduction": "mean"} | options
    value, grad = loss.value_and_grad(z, t, **options)
    np.testing.assert_array_equal(loss(z, t, **{k: v for k, v in options.items() if k != "grad_output"}), value)
    np.testing.assert_array_equal(loss.grad(z, t, **options), grad)
    return value, grad, loss.curvature(z, t, **options)


def assert_scaled(got, plain, factor, dtype, roundings="scale"):
    """Assert that an array is `plain * factor`, up to the rounding of the factors and of the product."""
    want = plain.astype(np.longdouble) * factor
    assert_ulp(got, want, want, PRODUCT[roundings], dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "sample_mean", "sample_sum"])
def test_reductions(name, batch, reduction):
    z, t = batch
    loss = LOSSES[name].loss
    value, slope, curvature = compute(loss, z, t)
    by_sample = reduction.startswith("sample")
    axes = (1, 2, 3) if by_sample else None
    count = {"mean": z.size, "sum": 1, "batchmean": len(z), "sample_mean": z[0].size, "sample_sum": 1}[reduction]
    got = all_of(loss, z, t, reduction=reduction)
    assert_close(got[0], value.sum(axis=axes, dtype=np.longdouble) / count, SUM[z.dtype])
    assert isinstance(got[0], np.ndarray if by_sample else np.float64)
    assert np.asarray(got[0]).dtype == np.float64
    assert_scaled(got[1], slope, np.longdouble(1) / count, z.dtype)
    assert_scaled(got[2], curvature, np.longdouble(1) / count, z.dtype)


def test_no_reduction(name, batch):
    z, t = batch
    loss = LOSSES[name].loss
    value, grad = loss.value_and_grad(z, t, reduction="none")
    assert value.dtype == grad.dtype == z.dtype
    assert value.shape == grad.shape == z.shape
    np.testing.assert_array_equal(value, loss(z, t, reduction="none"))
    np.testing.assert_array_equal(grad, loss.grad(z, t, reduction="sum"))


# The loops know no loss: every shape once, and every reduction once, is what a loss can tell apart.
BY_SHAPE_OR_REDUCTION = [*((shape, "mean") for shape in SHAPES), *(("full", reduction) for reduction in ("sum", "none", "sample_mean"))]


@pytest.mark.parametrize(("shape", "reduction"), BY_SHAPE_OR_REDUCTION)
def test_weight_multiplies_and_leaves_the_mean_its_count(name, batch, rng, shape, reduction):
    z, t = batch
    loss, weight = LOSSES[name].loss, rng.random(SHAPES[shape]).astype(z.dtype)
    value, slope, curvature = compute(loss, z, t)
    got = all_of(loss, z, t, weight=weight, reduction=reduction)
    count = {"mean": z.size, "sample_mean": z[0].size}.get(reduction, 1)
    if reduction == "none":
        assert_scaled(got[0], value, weight, z.dtype, "weight")
    else:
        axes = (1, 2, 3) if reduction == "sample_mean" else None
        assert_close(got[0], (value.astype(np.longdouble) * weight).sum(axis=axes) / count, SUM[z.dtype])
    assert_scaled(got[1], slope, np.longdouble(1) * weight / count, z.dtype, "weight and scale")
    assert_scaled(got[2], curvature, np.longdouble(1) * weight / count, z.dtype, "weight and scale")


def test_weights_of_0_and_2_drop_and_repeat(name, batch):
    z, t = (x.reshape(-1) for x in batch)
    weight = np.tile([0.0, 1.0, 2.0], z.size)[: z.size]
    times = weight.astype(int)
    loss = LOSSES[name].loss
    assert_close(loss(z, t, weight, "sum"), loss(z.repeat(times), t.repeat(times), reduction="sum"), SUM[z.dtype])


MASKS = [*(("full", reduction) for reduction in REDUCTIONS), *((shape, "sample_mean") for shape in ("per channel", "per pixel"))]


@pytest.mark.parametrize(("shape", "reduction"), [*MASKS, ("per sample", "mean"), ("per sample", "sample_sum")])
def test_mask_takes_elements_out(name, batch, rng, shape, reduction):
    z, t = batch
    loss, mask = LOSSES[name].loss, rng.random(SHAPES[shape]) < 0.6
    mask.flat[0] = True
    inside = np.broadcast_to(mask, z.shape)
    z[~inside] = np.nan  # counts nowhere, not even as NaN
    got = all_of(loss, z, t, mask=mask, reduction=reduction)
    assert not np.any(got[1][~inside])
    assert not np.any(got[2][~inside])
    value, slope, curvature = compute(loss, z[inside], t[inside])
    axes, count = None, {"mean": inside.sum(), "batchmean": len(z)}.get(reduction, 1)
    if reduction.startswith("sample"):
        axes, count = (1, 2, 3), inside.sum(axis=(1, 2, 3)) if reduction == "sample_mean" else 1
    if reduction == "none":
        np.testing.assert_array_equal(got[0][inside], value)
        assert not np.any(got[0][~inside])
    else:
        spread = np.zeros(z.shape, np.longdouble)
        spread[inside] = value
        assert_close(got[0], spread.sum(axis=axes) / count, SUM[z.dtype])
    factor = np.broadcast_to(np.reshape(np.longdouble(1) / count, (-1, 1, 1, 1)), z.shape)[inside]
    assert_scaled(got[1][inside], slope, factor, z.dtype)
    assert_scaled(got[2][inside], curvature, factor, z.dtype)


@pytest.mark.filterwarnings("ignore:mean of no elements:RuntimeWarning")
def test_a_sample_without_elements_has_mean_nan_and_gradient_0(name, batch):
    z, t = batch
    mask = np.ones(z.shape, bool)
    mask[2] = False
    value, grad = LOSSES[name].loss.value_and_grad(z, t, mask=mask, reduction="sample_mean")
    assert np.isnan(value).tolist() == [False, False, True, False]
    assert not grad[2].any()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("kind", "reduction"), [("uint8", "mean"), ("uint8", "none"), ("int64", "sample_mean"), ("int8", "sum"), ("float", "mean")]
)
def test_ignore_index_is_a_mask(name, batch, rng, kind, reduction):
    z, _ = batch
    t = rng.integers(0, 2, z.shape)
    ignored = {"uint8": 255, "int64": -100, "int8": -1, "float": 255.0}[kind]
    out = rng.random(z.shape) < 0.3
    t[out] = ignored
    t = t.astype(z.dtype if kind == "float" else kind)
    loss = LOSSES[name].loss
    for a, b in zip(
        all_of(loss, z, t, ignore_index=ignored, reduction=reduction),
        all_of(loss, z, np.where(out, 0, t).astype(t.dtype), mask=~out, reduction=reduction),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_ignore_index_that_the_targets_cannot_hold_ignores_none(batch, rng):
    z, _ = batch
    t = rng.integers(0, 2, z.shape).astype(np.uint8)
    t[0] = 156  # -100 in eight bits
    assert fl.mse_loss(z, t, ignore_index=-100) == fl.mse_loss(z, t)


def test_ignore_index_and_mask_together(name, batch, rng):
    z, _ = batch
    t = rng.integers(0, 2, z.shape).astype(np.uint8)
    t[rng.random(z.shape) < 0.3] = 255
    mask = rng.random(z.shape) < 0.5
    got = all_of(LOSSES[name].loss, z, t, mask=mask, ignore_index=255)
    for a, b in zip(got, all_of(LOSSES[name].loss, z, t, mask=mask & (t != 255)), strict=True):
        np.testing.assert_array_equal(a, b)


INTEGERS = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def assert_equals_its_float_copy(loss, z, t, scale):
    copy = t.astype(z.dtype) * z.dtype.type(scale)
    for a, b in zip(all_of(loss, z, t, target_scale=scale), all_of(loss, z, copy), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(all_of(loss, z, t), all_of(loss, z, t.astype(z.dtype)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_uint8_batch_equals_its_float_copy_bit_by_bit(name, batch, rng):
    assert_equals_its_float_copy(LOSSES[name].loss, batch[0], rng.integers(0, 256, batch[0].shape).astype(np.uint8), 1 / 255)


@pytest.mark.parametrize("code", INTEGERS)
def test_integer_targets_equal_their_float_copy_bit_by_bit(batch, rng, code):
    t = rng.integers(0, 2 if code == "bool" else 120, batch[0].shape).astype(code)
    assert_equals_its_float_copy(fl.binary_cross_entropy_with_logits, batch[0], t, 1 / 119)


def test_extreme_integers_are_converted_not_wrapped():
    z = np.zeros(4, np.float64)
    for t in (np.array([0, 2**64 - 1, 2**63, 1], np.uint64), np.array([-(2**63), 2**63 - 1, -1, 0], np.int64)):
        np.testing.assert_array_equal(fl.mse_loss.grad(z, t, reduction="sum"), -2 * t.astype(np.float64))


def test_mixed_dtypes_compute_in_float64(name, batch, rng):
    z, t = batch
    other = np.dtype(np.float32 if z.dtype == np.float64 else np.float64)
    t = rng.random(z.shape).astype(other)
    wide = compute(LOSSES[name].loss, z.astype(np.float64), t.astype(np.float64))
    for got, want in zip(compute(LOSSES[name].loss, z, t), wide, strict=True):
        assert got.dtype == z.dtype
        np.testing.assert_array_equal(got, want.astype(z.dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "sample_mean", "sample_sum", "none"])
def test_grad_output_is_the_chain_rule(name, batch, rng, reduction):
    z, t = batch
    loss = LOSSES[name].loss
    shape = {"none": z.shape}.get(reduction, z.shape[:1] if reduction.startswith("sample") else ())
    for upstream in (0.37, np.float32(2.5), rng.normal(size=shape), rng.normal(size=shape).astype(np.float32)):
        factor = np.asarray(upstream, np.longdouble)
        factor = factor.reshape(-1, 1, 1, 1) if np.ndim(upstream) == 1 else factor
        for method in (loss.grad, loss.curvature, lambda *a, **k: loss.value_and_grad(*a, **k)[1]):
            plain = method(z, t, reduction="sum").astype(np.longdouble)
            count = {"mean": z.size, "batchmean": len(z), "sample_mean": z[0].size}.get(reduction, 1)
            assert_scaled(method(z, t, reduction=reduction, grad_output=upstream), plain, factor / count, z.dtype, "weight and scale")
    assert loss.value_and_grad(z, t, reduction="sum", grad_output=3.0)[0] == loss(z, t, reduction="sum")


def test_out_receives_the_result(name, batch):
    z, t = batch
    loss = LOSSES[name].loss
    for method in (loss.grad, loss.curvature):
        out = np.full_like(z, 7)
        assert method(z, t, out=out) is out
        np.testing.assert_array_equal(out, method(z, t))
    out = np.full_like(z, 7)
    assert loss(z, t, reduction="none", out=out) is out
    np.testing.assert_array_equal(out, loss(z, t, reduction="none"))
    for reduction in ("mean", "none"):
        value, grad = loss.value_and_grad(z, t, reduction=reduction, out=out)
        assert grad is out
        want = loss.value_and_grad(z, t, reduction=reduction)
        np.testing.assert_array_equal(value, want[0])
        np.testing.assert_array_equal(grad, want[1])


def test_in_place(name, batch):
    z, t = batch
    loss = LOSSES[name].loss
    want = loss.value_and_grad(z, t, reduction="mean")
    overwritten = z.copy()
    value, grad = loss.value_and_grad(overwritten, t, reduction="mean", out=overwritten)
    assert grad is overwritten
    assert value == want[0]
    np.testing.assert_array_equal(grad, want[1])


def test_label_smoothing_equals_smoothed_targets(batch):
    z, t = batch
    for amount in (0.0, 0.1, 1.0):
        smooth = t.astype(np.longdouble) * (1 - amount) + amount / 2
        got = compute(fl.binary_cross_entropy_with_logits, z, t, label_smoothing=amount)
        want = compute(fl.binary_cross_entropy_with_logits, z, smooth.astype(z.dtype))
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, SUM[z.dtype])


@pytest.mark.parametrize("shape", ["full", "per channel", "per pixel", "number"])
def test_pos_weight_weights_the_positive_part(batch, rng, shape):
    z, t = batch
    loss = fl.binary_cross_entropy_with_logits
    c = rng.uniform(0.5, 3, SHAPES[shape]).astype(z.dtype)
    ones, zeros = compute(loss, z, np.ones_like(t)), compute(loss, z, np.zeros_like(t))
    for got, one, zero in zip(compute(loss, z, t, pos_weight=c), ones, zeros, strict=True):
        assert_close(got, c * t.astype(np.longdouble) * one + (1 - t.astype(np.longdouble)) * zero, 2 * SUM[z.dtype])


def test_pos_weight_of_1_is_the_plain_loss(batch):
    z, t = batch
    for got, want in zip(
        compute(fl.binary_cross_entropy_with_logits, z, t, pos_weight=1), compute(fl.binary_cross_entropy_with_logits, z, t), strict=True
    ):
        assert_ulp(got, want, np.maximum(np.abs(want), z.dtype.type(0.1)), 4, z.dtype)


def test_cross_entropy_lies_above_its_floor(batch, rng):
    z, t = (x.astype(np.float64) for x in batch)
    loss = fl.binary_cross_entropy_with_logits
    for options in (
        {},
        {"pos_weight": 2.5},
        {"label_smoothing": 0.2},
        {"pos_weight": rng.uniform(0.5, 2, (3, 1, 1)), "label_smoothing": 0.1},
    ):
        floor = fl.binary_entropy(t, reduction="none", **options)
        assert (loss(z, t, reduction="none", **options) >= floor).all()
        smooth = t + options.get("label_smoothing", 0) * (0.5 - t)
        best = np.log(options.get("pos_weight", 1) * smooth / (1 - smooth))
        assert_close(loss(best, t, reduction="none", **options), floor, SUM[z.dtype])


def test_entropy_takes_the_options_of_the_losses(batch, rng):
    t = batch[1]
    entropy = fl.binary_entropy(t, reduction="none")
    assert entropy.dtype == t.dtype
    assert entropy.shape == t.shape
    mask, weight = rng.random(t.shape) < 0.5, rng.random((3, 1, 1))
    assert_close(fl.binary_entropy(t, mask=mask), entropy[mask].mean(dtype=np.float64), SUM[t.dtype])
    assert_close(fl.binary_entropy(t, weight), (entropy * weight).mean(dtype=np.float64), SUM[t.dtype])
    assert_close(fl.binary_entropy(t, reduction="sample_sum"), entropy.sum(axis=(1, 2, 3), dtype=np.float64), SUM[t.dtype])
    images = (t * 255).astype(np.uint8)
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    assert fl.binary_entropy(images, target_scale=1 / 255) == fl.binary_entropy(scaled)
    assert fl.binary_entropy(images, target_scale=1 / 255, reduction="none").dtype == np.float32
    with pytest.raises(ValueError, match=r"target\[0, 0, 0, 0\] is .*; accepted: targets in \[0, 1\]"):
        fl.binary_entropy(images | 2, validate=True)


@pytest.mark.parametrize("method", ["__call__", "grad", "value_and_grad", "curvature"])
def test_empty_input(name, dtype, method):
    loss, empty = LOSSES[name].loss, np.empty((0, 3), dtype)
    result = getattr(loss, method)(empty, empty, reduction="sum")
    value, grad = {"__call__": (result, empty), "value_and_grad": result}.get(method, (0.0, result))
    assert value == 0.0
    assert grad.shape == (0, 3)
    with pytest.warns(RuntimeWarning, match="mean of no elements") if method in ("__call__", "value_and_grad") else nullcontext():
        result = getattr(loss, method)(empty, empty, reduction="mean")
    if method == "__call__":
        assert np.isnan(result)
    assert loss(empty, empty, reduction="sample_sum").shape == (0,)
    assert loss(np.empty((2, 0), dtype), np.empty((2, 0), dtype), reduction="sample_sum").tolist() == [0.0, 0.0]


def test_the_warning_points_at_the_caller():
    with pytest.warns(RuntimeWarning, match="mean of no elements") as record:
        fl.mse_loss(np.empty(0), np.empty(0))
    assert record[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="mean of no elements") as record:
        fl.binary_entropy(np.empty(0))
    assert record[0].filename == __file__


def test_value_and_grad_warns_at_the_caller_too():
    with pytest.warns(RuntimeWarning, match="mean of no elements") as record:
        fl.mse_loss.value_and_grad(np.empty(0), np.empty(0))
    assert record[0].filename == __file__


def test_a_constant_batch_sums_without_bias():
    for x in (0.1, 0.7, 1 / 3):
        z = np.full(1_000_000, x, np.float32)
        assert_close(fl.mse_loss(z, np.zeros_like(z)), np.float32(z[0] * z[0]), SUM[z.dtype])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_logarithms_sum_without_overflow(name, dtype):
    """At z = t = 0 every factor of the product that collects logarithms is at its largest, 2."""
    z = np.zeros(100_000, dtype)
    loss = LOSSES[name].loss
    want = loss(z, z, reduction="none").mean(dtype=np.float64)
    assert_close(loss(z, z, reduction="mean"), want, SUM[z.dtype])


def test_any_byte_but_0_is_true(rng):
    t = np.array([0, 1, 2, 255], np.uint8)
    z = np.zeros(4, np.float32)
    np.testing.assert_array_equal(fl.mse_loss(z, t.view(bool), reduction="none"), [0, 1, 1, 1])
    np.testing.assert_array_equal(
        fl.mse_loss(z + 1, t, mask=t.view(bool), reduction="none", ignore_index=7) == 0, [True, True, False, False]
    )


def test_numpy_set_to_raise_changes_nothing(batch):
    z, t = batch
    z[0, 0, 0, :2] = np.inf, -np.inf
    with np.errstate(all="raise"):
        LOSSES["mse_loss"].loss.value_and_grad(z, t, reduction="sample_mean", grad_output=np.finfo(np.float64).tiny)


def test_scalars_and_lists_are_taken_as_numpy_would():
    assert fl.mse_loss(3.0, 1.0) == 4.0
    value, grad = fl.mse_loss.value_and_grad([1.0, 2.0], [0.0, 0.0])
    assert value == 2.5
    assert grad.tolist() == [1.0, 2.0]
    value, grad = fl.mse_loss.value_and_grad(np.float32(3), np.float32(1))
    assert grad.shape == ()
    assert grad == 4.0


def test_positional_arguments_are_those_of_torch(batch, rng):
    z, t = batch
    weight = rng.random(z.shape).astype(z.dtype)
    assert fl.binary_cross_entropy_with_logits(z, t, weight) == fl.binary_cross_entropy_with_logits(z, t, weight=weight, reduction="mean")


def test_options_do_not_interact(batch, rng):
    """A sample of everything at once, against NumPy."""
    z, t8 = batch[0], rng.integers(0, 256, batch[0].shape).astype(np.uint8)
    for use_weight, use_mask, ignored, smoothing in itertools.product([0, 1], [0, 1], [None, 255], [None, 0.1]):
        weight = rng.random((3, 1, 1)) if use_weight else None
        mask = rng.random((17, 13)) < 0.5 if use_mask else None
        value, grad = fl.binary_cross_entropy_with_logits.value_and_grad(
            z, t8, weight, mask=mask, ignore_index=ignored, target_scale=1 / 255, label_smoothing=smoothing, pos_weight=2.0, grad_output=3.0
        )
        kept = np.broadcast_to(True if mask is None else mask, z.shape) & (t8 != 255 if ignored else True)
        v, g = LOSSES["binary_cross_entropy_with_logits"].reference(
            z.astype(np.float64), t8 / 255, pos_weight=2.0, label_smoothing=smoothing or 0
        )
        w = np.broadcast_to(1 if weight is None else weight, z.shape) * kept
        assert_close(value, (v * w).sum() / kept.sum(), SUM[z.dtype])
        assert_close(grad, 3 * g * w / kept.sum(), 2 * SUM[z.dtype])


def test_ulp_table_has_every_loss():
    assert all((name, quantity) in ULP for name in LOSSES for quantity in ("value", "slope", "curvature"))
