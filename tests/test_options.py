"""Every option is tested as a relation to calls without it, for each loss, dtype and method."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest

import fastloss as fl
from fastloss.core.checks import REDUCTIONS
from tests.devices import warns_the_caller
from tests.table import LOSSES
from tests.ulp import PRODUCT, SUM, assert_close, assert_same, assert_ulp, compute, flat

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.alike]

SHAPES = {"full": (4, 3, 17, 13), "per channel": (3, 1, 1), "per sample": (4, 1, 1, 1), "per pixel": (17, 13), "number": ()}


def all_of(row, *arrays, **options):
    """Return the value, the gradients, and the curvatures where the loss has them, under a reduction.

    Values alone and gradients alone are the same: of every loss without further options, of a sample of the losses with any.
    """
    options = row.reduced("mean") | options
    value, grads = row.loss.value_and_grad(*arrays, **options)
    if row.samples or options.keys() <= {"reduction"}:
        assert_same(flat(row.loss(*arrays, **{k: v for k, v in options.items() if k != "grad_output"})), flat(value))
        assert_same(flat(row.loss.grad(*arrays, **options)), flat(grads))
    return flat(value, grads, row.loss.curvature(*arrays, **options) if row.has_curvature else ())


def assert_scaled(got, plain, factor, dtype, roundings="scale"):
    """Assert that an array is `plain * factor`, up to the rounding of the factors and of the product."""
    want = plain.astype(np.longdouble) * factor
    assert_ulp(got, want, want, PRODUCT[roundings], dtype)


@pytest.mark.in_turn
@pytest.mark.rows("sums_elements")
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "sample_mean", "sample_sum"])
def test_reductions(row, arrays, dtype, reduction):
    z = arrays[0]
    value, *derivatives = compute(row.loss, *arrays)
    by_sample = reduction.startswith("sample")
    axes = (1, 2, 3) if by_sample else None
    count = {"mean": z.size, "sum": 1, "batchmean": len(z), "sample_mean": z[0].size, "sample_sum": 1}[reduction]
    got = all_of(row, *arrays, reduction=reduction)
    assert_close(got[0], value.sum(axis=axes, dtype=np.longdouble) / count, SUM[dtype])
    assert isinstance(got[0], np.ndarray if by_sample else np.float64)
    assert np.asarray(got[0]).dtype == np.float64
    for x, plain in zip(got[1:], derivatives, strict=True):
        assert_scaled(x, plain, np.longdouble(1) / count, dtype)


@pytest.mark.rows("sums_elements")
def test_no_reduction(row, arrays, dtype):
    value, grads = row.loss.value_and_grad(*arrays, reduction="none")
    for x in flat(value, grads):
        assert (x.dtype, x.shape) == (dtype, arrays[0].shape)
    np.testing.assert_array_equal(value, row.loss(*arrays, reduction="none"))
    assert_same(flat(grads), flat(row.loss.grad(*arrays, reduction="sum")))


# Loops do not depend on the loss, so each loss is tested with every shape once and with every reduction once.
BY_SHAPE_OR_REDUCTION = [*((shape, "mean") for shape in SHAPES), *(("full", reduction) for reduction in ("sum", "none", "sample_mean"))]


@pytest.mark.in_turn
@pytest.mark.rows("sums_elements")
@pytest.mark.parametrize(("shape", "reduction"), BY_SHAPE_OR_REDUCTION)
def test_weight_multiplies_but_does_not_change_the_denominator_of_the_mean(row, arrays, dtype, rng, shape, reduction):
    z, weight = arrays[0], rng.random(SHAPES[shape]).astype(dtype)
    value, *derivatives = compute(row.loss, *arrays)
    got = all_of(row, *arrays, weight=weight, reduction=reduction)
    count = {"mean": z.size, "sample_mean": z[0].size}.get(reduction, 1)
    if reduction == "none":
        assert_scaled(got[0], value, weight, dtype, "weight")
    else:
        axes = (1, 2, 3) if reduction == "sample_mean" else None
        assert_close(got[0], (value.astype(np.longdouble) * weight).sum(axis=axes) / count, SUM[dtype])
    for x, plain in zip(got[1:], derivatives, strict=True):
        assert_scaled(x, plain, np.longdouble(1) * weight / count, dtype, "weight and scale")


@pytest.mark.rows("has_reductions", "pairs_elements")
def test_weights_of_0_and_2_equal_dropped_and_repeated_elements(row, arrays, dtype):
    arrays = [x.reshape(-1) if row.sums_elements else x.reshape(1, 1, -1) for x in arrays]
    times = np.arange(arrays[0].size) % 3
    value, grads = row.loss.value_and_grad(*arrays, times.astype(float), "sum")
    want, want_grads = row.loss.value_and_grad(*(x.repeat(times, axis=-1) for x in arrays), reduction="sum")
    last = np.cumsum(times)[times == 2] - 1  # the last places of repeated elements
    assert_close(value, want, SUM[dtype])
    for grad, repeated in zip(flat(grads), flat(want_grads), strict=True):
        assert_close(grad[..., times == 2], 2 * repeated[..., last], 2 * SUM[dtype])
        assert not grad[..., times == 0].any()


F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
MASKS = [("full", reduction) for reduction in REDUCTIONS]
MASKS += [("per channel", "sample_mean"), ("per pixel", "sample_mean"), ("per sample", "mean"), ("per sample", "sample_sum")]


@pytest.mark.in_turn
@pytest.mark.rows("sums_elements")
@pytest.mark.parametrize(
    ("dtype", "shape", "reduction"), [*((F32, *mask) for mask in MASKS), (F64, "full", "none"), (F64, "per pixel", "sample_mean")], ids=str
)
def test_mask_takes_elements_out(row, arrays, dtype, rng, shape, reduction):
    z, mask = arrays[0], rng.random(SHAPES[shape]) < 0.6
    mask.flat[0] = True
    inside = np.broadcast_to(mask, z.shape)
    for k in row.gradients:
        arrays[k][~inside] = np.nan  # a masked element does not count, even if it is NaN
    got = all_of(row, *arrays, mask=mask, reduction=reduction)
    for x in got[1:]:
        assert not np.any(x[~inside])
    value, *derivatives = compute(row.loss, *(x[inside] for x in arrays))
    axes, count = None, {"mean": inside.sum(), "batchmean": len(z)}.get(reduction, 1)
    if reduction.startswith("sample"):
        axes, count = (1, 2, 3), inside.sum(axis=(1, 2, 3)) if reduction == "sample_mean" else 1
    if reduction == "none":
        np.testing.assert_array_equal(got[0][inside], value)
        assert not np.any(got[0][~inside])
    else:
        spread = np.zeros(z.shape, np.longdouble)
        spread[inside] = value
        assert_close(got[0], spread.sum(axis=axes) / count, SUM[dtype])
    factor = np.broadcast_to(np.reshape(np.longdouble(1) / count, (-1, 1, 1, 1)), z.shape)[inside]
    for x, plain in zip(got[1:], derivatives, strict=True):
        assert_scaled(x[inside], plain, factor, dtype)


@pytest.mark.in_turn
@pytest.mark.rows("has_reductions")
@pytest.mark.parametrize("shape", ["full", "per sample"])
def test_a_sample_without_elements_has_mean_nan_and_gradient_0(row, arrays, dtype, device, shape):
    mask = np.ones(row.entries(SHAPES[shape]), bool)
    mask[2] = False
    warns = pytest.warns(RuntimeWarning, match="mean of no elements") if device == "cpu" else nullcontext()  # a device would wait
    with warns:
        value, grads = row.loss.value_and_grad(*arrays, mask=mask, reduction="sample_mean")
    want, want_grads = row.loss.value_and_grad(*(np.delete(x, 2, 0) for x in arrays), reduction="sample_mean")
    assert np.isnan(value).tolist() == [False, False, True, False]
    assert_close(np.delete(value, 2), want, SUM[dtype])
    for grad, x in zip(flat(grads), flat(want_grads), strict=True):
        assert not grad[2].any()
        assert_close(np.delete(grad, 2, 0), x, SUM[dtype])


@pytest.mark.in_turn
@pytest.mark.rows("has_targets")
@pytest.mark.parametrize(
    ("dtype", "kind", "reduction"),
    [(F32, "uint8", "mean"), (F32, "int64", "sample_mean"), (F32, "float", "mean"), (F64, "uint8", "none"), (F64, "int8", "sum")],
    ids=str,
)
def test_ignore_index_is_a_mask(row, arrays, dtype, rng, kind, reduction):
    z, _, *rest = arrays
    t, out = rng.integers(0, 2, z.shape), rng.random(z.shape) < 0.3
    out[1, 1] = True  # a whole channel, which is a region of its own for Dice
    ignored = {"uint8": 255, "int64": -100, "int8": -1, "float": 255.0}[kind]
    t[out] = ignored
    t = t.astype(dtype if kind == "float" else kind)
    got = all_of(row, z, t, *rest, ignore_index=ignored, **row.reduced(reduction))
    assert_same(got, all_of(row, z, np.where(out, 0, t).astype(t.dtype), *rest, mask=~out, **row.reduced(reduction)))
    assert not flat(row.loss.grad(z, t, *rest, ignore_index=ignored))[0][out].any()


def test_ignore_index_outside_the_range_of_the_targets(batch, rng):
    z, _ = batch
    t = rng.integers(0, 2, z.shape).astype(np.uint8)
    t[0] = 156  # -100 in eight bits
    assert fl.mse_loss(z, t, ignore_index=-100) == fl.mse_loss(z, t)


@pytest.mark.rows("has_targets")
def test_ignore_index_and_mask_together(row, arrays, rng):
    z, _, *rest = arrays
    t = rng.integers(0, 2, z.shape).astype(np.uint8)
    t[rng.random(z.shape) < 0.3] = 255
    mask = rng.random(z.shape) < 0.5
    got = all_of(row, z, t, *rest, mask=mask, ignore_index=255)
    assert_same(got, all_of(row, z, t, *rest, mask=mask & (t != 255)))


INTEGERS = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def assert_equals_its_float_copy(row, arrays, t, scale):
    """Assert that integers 0 and 1 give the same bits as a float copy, and all integers with `target_scale` as a scaled float copy."""
    z, _, *rest = arrays
    assert_same(all_of(row, z, t, *rest, target_scale=scale), all_of(row, z, t.astype(z.dtype) * z.dtype.type(scale), *rest))
    labels = (t & 1).astype(t.dtype)
    assert_same(all_of(row, z, labels, *rest), all_of(row, z, labels.astype(z.dtype), *rest))


@pytest.mark.rows("has_targets")
def test_a_uint8_batch_equals_its_float_copy_bit_by_bit(row, arrays, rng):
    assert_equals_its_float_copy(row, arrays, rng.integers(0, 256, arrays[1].shape).astype(np.uint8), 1 / 255)


@pytest.mark.parametrize(("dtype", "code"), [*((F32, code) for code in INTEGERS), *((F64, code) for code in ("uint8", "uint64"))], ids=str)
def test_integer_targets_equal_their_float_copy_bit_by_bit(batch, rng, code):
    t = rng.integers(0, 2 if code == "bool" else 120, batch[0].shape).astype(code)
    assert_equals_its_float_copy(LOSSES["binary_cross_entropy_with_logits"], batch, t, 1 / 119)


def test_extreme_integers_are_converted_not_wrapped():
    z = np.zeros(4, np.float64)
    for t in (np.array([0, 2**64 - 1, 2**63, 1], np.uint64), np.array([-(2**63), 2**63 - 1, -1, 0], np.int64)):
        np.testing.assert_array_equal(fl.mse_loss.grad(z, t, reduction="sum"), -2 * t.astype(np.float64))


@pytest.mark.rows("sums_elements")
def test_mixed_dtypes_compute_in_float64(row, arrays, dtype):
    first, second = arrays[0], arrays[1].astype(np.float32 if dtype == np.float64 else np.float64)
    wide = compute(row.loss, first.astype(np.float64), second.astype(np.float64))
    differentiated = [(first, second)[k] for k in row.gradients]
    stored_like = [first, *differentiated, *differentiated]
    for got, want, like in zip(compute(row.loss, first, second), wide, stored_like, strict=True):
        assert got.dtype == like.dtype
        np.testing.assert_array_equal(got, want.astype(like.dtype))


@pytest.mark.in_turn
@pytest.mark.rows("sums_elements")
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "sample_mean", "sample_sum", "none"])
def test_grad_output_is_the_chain_rule(row, arrays, dtype, rng, reduction):
    z, loss = arrays[0], row.loss
    shape = {"none": z.shape}.get(reduction, z.shape[:1] if reduction.startswith("sample") else ())
    count = {"mean": z.size, "batchmean": len(z), "sample_mean": z[0].size}.get(reduction, 1)
    for upstream in (0.37, np.float32(2.5), rng.normal(size=shape), rng.normal(size=shape).astype(np.float32)):
        factor = np.asarray(upstream, np.longdouble)
        factor = factor.reshape(-1, 1, 1, 1) if np.ndim(upstream) == 1 else factor
        for method in (loss.grad, loss.curvature, lambda *a, **k: loss.value_and_grad(*a, **k)[1]):
            scaled = flat(method(*arrays, reduction=reduction, grad_output=upstream))
            for got, plain in zip(scaled, flat(method(*arrays, reduction="sum")), strict=True):
                assert_scaled(got, plain.astype(np.longdouble), factor / count, dtype, "weight and scale")
    value, _ = loss.value_and_grad(*arrays, reduction="sum", grad_output=3.0)
    np.testing.assert_array_equal(value, loss(*arrays, reduction="sum"))


def test_grad_output_does_not_change_values(batch, rng):
    upstream = rng.normal(size=batch[0].shape)
    value, _ = fl.mse_loss.value_and_grad(*batch, reduction="none", grad_output=upstream)
    np.testing.assert_array_equal(value, fl.mse_loss(*batch, reduction="none"))


def test_out_receives_the_result(row, arrays):
    loss, buffers = row.loss, [np.empty_like(arrays[k]) for k in row.gradients]

    def assert_written(grads, want):
        assert all(grad is buffer for grad, buffer in zip(flat(grads), buffers, strict=True))
        assert_same(buffers, flat(want))
        for buffer in buffers:
            buffer[...] = 7

    for method in (loss.grad, loss.curvature) if row.has_curvature else (loss.grad,):
        assert_written(method(*arrays, out=row.out(buffers)), method(*arrays))
    if row.sums_elements and row.has_one_gradient:
        assert_written(loss(*arrays, reduction="none", out=buffers[0]), loss(*arrays, reduction="none"))
    for reduction in ("mean", "none"):
        value, grads = loss.value_and_grad(*arrays, **row.reduced(reduction), out=row.out(buffers))
        want, want_grads = loss.value_and_grad(*arrays, **row.reduced(reduction))
        assert_same(flat(value), flat(want))
        assert_written(grads, want_grads)


def test_in_place(row, arrays):
    want, want_grads = row.loss.value_and_grad(*arrays, **row.reduced("mean"))
    overwritten = [arrays[k] for k in row.gradients]
    value, grads = row.loss.value_and_grad(*arrays, **row.reduced("mean"), out=row.out(overwritten))
    assert all(grad is x for grad, x in zip(flat(grads), overwritten, strict=True))
    assert_same(flat(value, grads), flat(want, want_grads))


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
    with pytest.raises(ValueError, match=r"target\[.*\] is .*; accepted: targets in \[0, 1\]"):
        fl.binary_entropy(images | 2, validate=True)


@pytest.mark.rows("has_reductions")
def test_empty_input(row, dtype, device, rng):
    loss, empty = row.loss, row.draw(rng, dtype, (0, 3))
    for method in ("__call__", "grad", "value_and_grad", *["curvature"] * row.has_curvature):
        result = getattr(loss, method)(*empty, reduction="sum")
        value, grads = {"__call__": (result, ()), "value_and_grad": result}.get(method, (0.0, result))
        assert value == 0.0
        assert all(grad.shape == (0, 3) for grad in flat(grads))
        has_mean = method in ("__call__", "value_and_grad") and (row.is_sum or device == "cpu")  # a device would wait for Dice's
        with pytest.warns(RuntimeWarning, match="mean of no elements") if has_mean else nullcontext():
            result = getattr(loss, method)(*empty, reduction="mean")
        if method == "__call__":
            assert np.isnan(result)
    assert loss(*empty, reduction="sample_sum").shape == (0,)
    assert loss(*row.draw(rng, dtype, (2, 3, 0)), reduction="sample_sum").tolist() == [0.0, 0.0]


@warns_the_caller
@pytest.mark.parametrize("method", ["__call__", "value_and_grad"])
def test_a_mean_of_no_elements_warns_at_the_caller(row, method, rng):
    empty = row.draw(rng, np.float64, (0, 3))
    for reduction in ("mean", "batchmean"):
        with pytest.warns(RuntimeWarning, match="mean of no elements") as record:
            value, *_ = flat(getattr(row.loss, method)(*empty, **row.reduced(reduction)))
        assert np.isnan(np.ravel(value)[0])
        assert [warning.filename for warning in record] == [__file__] * (len(row.arrays) // 2)  # a warning for each mean


@warns_the_caller
def test_a_mean_of_no_entropies_warns_at_the_caller():
    with pytest.warns(RuntimeWarning, match="mean of no elements") as record:
        fl.binary_entropy(np.empty(0))
    assert [warning.filename for warning in record] == [__file__]


def test_a_constant_batch_sums_without_bias():
    for x in (0.1, 0.7, 1 / 3):
        z = np.full(1_000_000, x, np.float32)
        assert_close(fl.mse_loss(z, np.zeros_like(z)), np.float32(z[0] * z[0]), SUM[z.dtype])


@pytest.mark.rows("sums_elements")
def test_the_largest_logarithms_sum_without_overflow(row, dtype):
    """Logarithms are summed as the logarithm of a product. At z = t = 0, its factors have their largest value, 2."""
    z = np.zeros(100_000, dtype)
    want = row.loss(z, z, reduction="none").mean(dtype=np.float64)
    assert_close(row.loss(z, z, reduction="mean"), want, SUM[z.dtype])


def test_any_byte_but_0_is_true(rng):
    t = np.array([0, 1, 2, 255], np.uint8)
    z = np.zeros(4, np.float32)
    np.testing.assert_array_equal(fl.mse_loss(z, t.view(bool), reduction="none"), [0, 1, 1, 1])
    np.testing.assert_array_equal(
        fl.mse_loss(z + 1, t, mask=t.view(bool), reduction="none", ignore_index=7) == 0, [True, True, False, False]
    )


@pytest.mark.parametrize("ignored", [0, 1])
def test_ignored_truth_of_any_byte(ignored):
    t = np.array([0, 1, 2, 255], np.uint8)
    counts = (t != 0) != bool(ignored)
    grad = fl.mse_loss.grad(np.full(4, 3.0, np.float32), t.view(bool), reduction="sum", ignore_index=ignored)
    np.testing.assert_array_equal(grad != 0, counts)


def test_error_state_of_numpy_has_no_effect(batch):
    z, t = batch
    z[0, 0, 0, :2] = np.inf, -np.inf
    with np.errstate(all="raise"):
        LOSSES["mse_loss"].loss.value_and_grad(z, t, reduction="sample_mean", grad_output=np.finfo(np.float64).tiny)


def test_scalars_and_lists_are_converted_to_arrays():
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


def test_a_weight_does_not_change_the_count_of_a_masked_value(batch, rng):
    z, t = batch
    weight, mask = rng.random(z.shape), rng.random(z.shape) < 0.5
    assert_close(fl.mse_loss(z, t, weight, mask=mask), fl.mse_loss(z, t, weight, "sum", mask=mask) / mask.sum(), SUM[z.dtype])


def test_options_do_not_interact(batch, rng):
    """Compare calls with many options at once with NumPy."""
    z, t8 = batch[0], rng.integers(0, 256, batch[0].shape).astype(np.uint8)
    for use_weight, use_mask, ignored, smoothing in itertools.product([0, 1], [0, 1], [None, 255], [None, 0.1]):
        weight = rng.random((3, 1, 1)) if use_weight else None
        mask = rng.random((17, 13)) < 0.5 if use_mask else None
        value, grad = fl.binary_cross_entropy_with_logits.value_and_grad(
            z, t8, weight, mask=mask, ignore_index=ignored, target_scale=1 / 255, label_smoothing=smoothing, pos_weight=2.0, grad_output=3.0
        )
        counted = np.broadcast_to(True if mask is None else mask, z.shape) & (t8 != 255 if ignored else True)
        v, g = LOSSES["binary_cross_entropy_with_logits"].reference(
            z.astype(np.float64), t8 / 255, pos_weight=2.0, label_smoothing=smoothing or 0
        )
        w = np.broadcast_to(1 if weight is None else weight, z.shape) * counted
        assert_close(value, (v * w).sum() / counted.sum(), SUM[z.dtype])
        assert_close(grad, 3 * g * w / counted.sum(), 2 * SUM[z.dtype])
