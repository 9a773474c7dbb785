"""Dice of class indices, alone and with cross-entropy: digits, the settings of other packages, regions, options, errors."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from ml_dtypes import bfloat16

import fastloss as fl
from tests.devices import is_about_the_host, is_long_on_the_stand_in
from tests.oracle import LONG, softmax
from tests.table import FLOATS
from tests.test_classes import ORDERS, SIDE_BY_SIDE, draw, side_by_side
from tests.ulp import DIFFERENCE, SUM, ULP, assert_close, assert_rounded, assert_ulp

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.alike("stand-in")]

DICE, BOTH, CE = fl.dice_softmax_loss, fl.dice_cross_entropy_loss, fl.cross_entropy
GROUPS = [{"per_channel": c, "per_sample": s} for c, s in itertools.product([True, False], repeat=2)]
KINDS = {
    "Dice": {},
    "Jaccard": {"alpha": 1.0, "beta": 1.0, "smooth": 1e-3},
    "Tversky": {"alpha": 0.3, "beta": 0.7, "smooth": 2.0, "smooth_denominator": 0.5},
    "squared": {"squared": True},
    "squared Tversky": {"squared": True, "alpha": 0.2, "beta": 0.9, "background": False},
}
SHAPE = (2, 5, 3, 7)

by_groups = pytest.mark.parametrize("groups", GROUPS, ids=["class of a sample", "class", "sample", "batch"])
by_kind = pytest.mark.parametrize("kind", KINDS)


def by_region(x, per_channel, per_sample, background=True):
    """Add up an array (N, entries, C) over regions, and keep its axes."""
    x = x.sum(axis=1, keepdims=True)
    x = x if per_channel else x[..., 0 if background else 1 :].sum(axis=2, keepdims=True)
    return x if per_sample else x.sum(axis=0, keepdims=True)


def oracle(
    z, t, *, smooth=1.0, smooth_denominator=None, alpha=0.5, beta=0.5, squared=False, background=True, per_channel=True, per_sample=True
):
    """Return the losses of regions from the textbook, the slopes of their sum with the classes last, and the magnitudes of both."""
    z, t = z.reshape(*z.shape[:2], -1).swapaxes(1, 2), t.reshape(len(t), -1)
    p, q, _ = softmax(z, -1, LONG)
    own = np.arange(z.shape[-1]) == t[..., None]
    miss, lack = (p * p, q * q) if squared else (p, q)
    groups = {"per_channel": per_channel, "per_sample": per_sample, "background": background}
    missed = by_region(np.where(own, 2 * np.longdouble(beta) * lack, 2 * np.longdouble(alpha) * miss), **groups)
    smooth, more = np.longdouble(smooth), np.longdouble(smooth if smooth_denominator is None else smooth_denominator)
    right = 2 * by_region(np.where(own, p, 0), **groups) + smooth
    size = missed + right + (more - smooth)
    loss, score = (missed + (more - smooth)) / size, right / size
    power = 2 if squared else 1
    slope_of_own = -(2 * np.longdouble(beta) * power * (q if squared else 1) * score + 2 * loss) / size
    slope_of_others = 2 * np.longdouble(alpha) * power * (p if squared else 1) * score / size
    by_p = np.where(own, slope_of_own, slope_of_others) * np.ones(z.shape)
    magnitude = np.maximum(missed, abs(more - smooth)) / size
    if not background:
        loss, by_p = loss.copy(), by_p.copy()
        by_p[..., 0] = 0
        if per_channel:
            loss[..., 0] = 0
    most = np.abs(by_p)
    if not squared and background:  # adding a number to all slopes by p changes nothing, and here keeps their differences exact
        by_p = by_p - slope_of_others.min(axis=-1, keepdims=True)
    besides = [[np.delete(p * x, c, axis=-1).sum(axis=-1) for c in range(z.shape[-1])] for x in (by_p, most)]
    without, most_without = (np.stack(x, axis=-1) for x in besides)
    shape = [n for n, kept in zip((loss.shape[0], loss.shape[2]), (per_sample, per_channel), strict=True) if kept]
    return (loss.reshape(shape), magnitude.reshape(shape)), (p * (by_p * q - without), p * np.maximum(most * q, most_without))


def assert_true(got, want, dtype):
    """Assert that losses and slopes are within the bounds around the oracle's values."""
    value, slope = got
    slope = slope.reshape(*slope.shape[:2], -1).swapaxes(1, 2)
    for quantity, x, (true, magnitude) in zip(("value", "slope"), (value, slope), want, strict=True):
        assert_ulp(x, true, np.maximum(magnitude, np.finfo(dtype).tiny), ULP["dice_softmax_loss", quantity], dtype)


# --- digits ----------------------------------------------------------------------------------------------------------

LOGITS = {
    "usual": lambda rng, t: 3 * rng.standard_normal(SHAPE),
    "far": lambda rng, t: 30 * rng.standard_normal(SHAPE),
    "nearly perfect": lambda rng, t: rng.uniform(5, 20) * (np.arange(5)[:, None, None] == t[:, None]) + rng.standard_normal(SHAPE),
    "all wrong": lambda rng, t: 20 * (np.arange(5)[:, None, None] == (t[:, None] + 1) % 5) + rng.standard_normal(SHAPE),
    "equal": lambda rng, t: np.zeros(SHAPE),
    "infinite": lambda rng, t: np.where(np.arange(5)[:, None, None] == rng.integers(0, 5, (2, 1, 3, 7)), np.inf, 1.0),
}


@by_kind
@pytest.mark.parametrize("logits", LOGITS)
def test_every_digit_in_extended_precision(logits, kind, dtype, rng):
    t = rng.integers(0, 5, (2, 3, 7)).astype(np.uint8)
    z = LOGITS[logits](rng, t).astype(dtype)
    finite = np.where(np.isinf(z), 2.0**120, z)
    got = DICE(z, t, reduction="none", **KINDS[kind]), DICE.grad(z, t, reduction="sum", **KINDS[kind])
    assert_true(got, oracle(finite, t, **KINDS[kind]), dtype)


def test_one_region_keeps_the_tails(dtype, rng):
    """With equal slopes of all classes, differences of these vanish, so that even tiny gradients have all digits."""
    t = rng.integers(0, 5, (2, 3, 7))
    z = LOGITS["all wrong"](rng, t).astype(dtype)
    options = {"per_channel": False, "per_sample": False}
    value, (slope, _) = oracle(z, t, **options)
    assert_true(DICE.value_and_grad(z, t, **options), (value, (slope, np.abs(slope))), dtype)


@pytest.mark.parametrize("shape", [(2, 2, 40), (2, 150, 40), (2, 1000, 40), (30, 1000)], ids=str)
def test_many_classes(shape, dtype, rng):
    z, t = draw(rng, shape, dtype)
    z[:, 5::7] = z[:1, -1:]  # equal logits, of which some are the largest
    assert_true((DICE(z, t, reduction="none"), DICE.grad(z, t, reduction="sum")), oracle(z, t), dtype)


def test_large_regions(dtype, rng):
    """Sums over 65,536 pixels with the same few logits."""
    z, t = draw(rng, (1, 3, 2), dtype)
    many = [np.repeat(x, 32768, axis=-1) for x in (z, t)]
    grad = DICE.grad(*many, reduction="sum")[..., ::32768] * dtype.type(32768)
    assert_true((DICE(*many, reduction="none"), grad), oracle(z, t, smooth=1 / 32768), dtype)


@is_long_on_the_stand_in
@by_groups
@by_kind
def test_the_slope_is_the_derivative(kind, groups, rng):
    z, t = draw(rng, SHAPE, np.float64)
    options = {**KINDS[kind], **groups, "pixel_weight": rng.random(t.shape), "mask": rng.random(t.shape) < 0.8}
    options |= {"weight": rng.random(5)} if groups["per_channel"] else {}
    for loss in (DICE, BOTH):
        grad, h = loss.grad(z, t, **options), 1e-6
        for at in [(0, 0, 0, 0), (1, 2, 2, 6), (1, 4, 1, 3)]:
            up, down = z.copy(), z.copy()
            up[at] += h
            down[at] -= h
            slope = (loss(up, t, **options) - loss(down, t, **options)) / (2 * h)
            assert abs(grad[at] - slope) <= DIFFERENCE * np.abs(grad).max()


# --- the losses of other packages, from their published formulas -------------------------------------------------------


def softmax_and_one_hot(z, t):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True), np.moveaxis(np.eye(z.shape[1])[t], -1, 1)


def monai(z, t, *, include_background=True, squared_pred=False, jaccard=False, batch=False, smooth_nr=1e-5, smooth_dr=1e-5, weight=None):
    """Compute monai.losses.DiceLoss(to_onehot_y=True, softmax=True)."""
    p, y = (x[:, 0 if include_background else 1 :] for x in softmax_and_one_hot(z, t))
    axes = (0, 2, 3) if batch else (2, 3)
    intersection, ground, predicted = (p * y).sum(axes), (y * y if squared_pred else y).sum(axes), (p * p if squared_pred else p).sum(axes)
    denominator = ground + predicted
    if jaccard:
        denominator = 2 * (denominator - intersection)
    f = 1 - (2 * intersection + smooth_nr) / (denominator + smooth_dr)
    return (f if weight is None else f * weight).mean()


def monai_tversky(z, t, alpha, beta, smooth=1e-5):
    """Compute monai.losses.TverskyLoss(to_onehot_y=True, softmax=True)."""
    p, y = softmax_and_one_hot(z, t)
    tp, fp, fn = ((x * w).sum((2, 3)) for x, w in ((p, y), (p, 1 - y), (1 - p, y)))
    return (1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)).mean()


def nnunet(z, t, batch_dice, smooth=1e-5):
    """Compute MemoryEfficientSoftDiceLoss(softmax, do_bg=False) of nnU-Net."""
    p, y = (x[:, 1:] for x in softmax_and_one_hot(z, t))
    intersect, predicted, ground = ((a * b).sum((2, 3)) for a, b in ((p, y), (p, 1), (y, 1)))
    if batch_dice:
        intersect, predicted, ground = (x.sum(0) for x in (intersect, predicted, ground))
    return -((2 * intersect + smooth) / np.maximum(ground + predicted + smooth, 1e-8)).mean()


def smp(z, t, kind, smooth=0.0, alpha=0.5, beta=0.5, eps=1e-7):
    """Compute the DiceLoss, JaccardLoss and TverskyLoss of segmentation_models_pytorch in mode "multiclass"."""
    p, y = softmax_and_one_hot(z, t)
    axes = (0, 2, 3)
    tp, fp, fn = ((a * b).sum(axes) for a, b in ((p, y), (p, 1 - y), (1 - p, y)))
    scores = {
        "dice": (2 * tp + smooth) / np.maximum(2 * tp + fp + fn + smooth, eps),
        "jaccard": (tp + smooth) / np.maximum(tp + fp + fn + smooth, eps),
        "tversky": (tp + smooth) / np.maximum(tp + alpha * fp + beta * fn + smooth, eps),
    }
    return ((1 - scores[kind]) * (y.sum(axes) > 0)).mean()


WEIGHT = np.array([0.5, 1.0, 2.0, 0.0, 3.0])
MONAI, SMP = {"smooth": 1e-5}, {"smooth": 0.0, "per_sample": False, "zero_absent": True}
PUBLISHED = {
    "MONAI": (monai, {}, MONAI),
    "MONAI without background": (monai, {"include_background": False}, {**MONAI, "background": False}),
    "MONAI, squared": (monai, {"squared_pred": True}, {**MONAI, "squared": True}),
    "MONAI, Jaccard": (monai, {"jaccard": True}, {**MONAI, "alpha": 1, "beta": 1}),
    "MONAI, squared Jaccard": (monai, {"jaccard": True, "squared_pred": True}, {**MONAI, "alpha": 1, "beta": 1, "squared": True}),
    "MONAI, batch": (monai, {"batch": True}, {**MONAI, "per_sample": False}),
    "MONAI, smoothing": (monai, {"smooth_nr": 0.0, "smooth_dr": 1.0}, {"smooth": 0.0, "smooth_denominator": 1.0}),
    "MONAI, weights": (monai, {"weight": WEIGHT}, {**MONAI, "weight": WEIGHT}),
    "MONAI, Tversky": (monai_tversky, {"alpha": 0.3, "beta": 0.7}, {"smooth": 2e-5, "alpha": 0.3, "beta": 0.7}),
    "nnU-Net": (nnunet, {"batch_dice": False}, {**MONAI, "background": False}),
    "nnU-Net, batch": (nnunet, {"batch_dice": True}, {**MONAI, "background": False, "per_sample": False}),
    "smp": (smp, {"kind": "dice"}, SMP),
    "smp, smoothing": (smp, {"kind": "dice", "smooth": 3.0}, {**SMP, "smooth": 3.0}),
    "smp, Jaccard": (smp, {"kind": "jaccard", "smooth": 2.0}, {**SMP, "smooth": 4.0, "alpha": 1, "beta": 1}),
    "smp, Tversky": (smp, {"kind": "tversky", "alpha": 0.3, "beta": 0.7}, {**SMP, "alpha": 0.3, "beta": 0.7}),
}


@is_long_on_the_stand_in
@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_other_packages(name, rng):
    loss, arguments, options = PUBLISHED[name]
    z, t = draw(rng, (3, 5, 6, 7), np.float64)
    t[t == 2] = 1  # one class is absent
    want = loss(z, t, **arguments) + name.startswith("nnU-Net")
    assert_close(DICE(z, t, **options), want, 10 * SUM[np.dtype(np.float64)])


# --- relations -------------------------------------------------------------------------------------------------------


@is_long_on_the_stand_in
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "beta": 0.7}], ids=["Dice", "Tversky"])
def test_two_classes_are_the_sigmoid_of_the_difference(options, dtype, rng):
    z, t = draw(rng, (3, 2, 5, 7), dtype)
    z[:, 0] = 0  # so that the difference is exact
    value, grad = DICE.value_and_grad(z, t, background=False, **options)
    want, slope = fl.dice_with_logits_loss.value_and_grad(z[:, 1:], t[:, None].astype(dtype), **options)
    assert_close(value, want, SUM[np.dtype(dtype)])
    assert_close(grad[:, 1:], slope, 2 * SUM[np.dtype(dtype)])
    assert_close(-grad[:, :1], slope, 2 * SUM[np.dtype(dtype)])


@is_long_on_the_stand_in
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "sample_mean", "sample_sum"])
def test_dice_and_cross_entropy_add_up(reduction, dtype, rng):
    z, t = draw(rng, SHAPE, dtype)
    weight, options = rng.random(5).astype(dtype), {"reduction": reduction, "ignore_index": 1, "pixel_weight": rng.random(t.shape)}
    value, grad = BOTH.value_and_grad(z, t, weight, dice_weight=0.7, ce_weight=1.5, **options)
    parts = [loss.value_and_grad(z, t, weight, **options) for loss in (DICE, CE)]
    assert_close(value, 0.7 * parts[0][0] + 1.5 * parts[1][0], SUM[np.dtype(dtype)])
    assert_close(grad, 0.7 * parts[0][1] + 1.5 * parts[1][1], 2 * SUM[np.dtype(dtype)])
    assert_close(BOTH(z, t, weight, dice_weight=0, **options), parts[1][0], SUM[np.dtype(dtype)])
    assert_close(BOTH.grad(z, t, weight, dice_weight=0, **options), parts[1][1], SUM[np.dtype(dtype)])
    assert_close(BOTH.grad(z, t, weight, ce_weight=0, **options), parts[0][1], SUM[np.dtype(dtype)])


@is_long_on_the_stand_in
@by_groups
def test_reductions(groups, rng):
    z, t = draw(rng, SHAPE, np.float64)
    each, tolerance = DICE(z, t, reduction="none", **groups), SUM[np.dtype(np.float64)]
    reduced = {"mean": each.mean(), "sum": each.sum(), "batchmean": each.sum() / 2}
    if groups["per_sample"]:
        flat = each.reshape(2, -1)
        reduced |= {"sample_mean": flat.mean(axis=1), "sample_sum": flat.sum(axis=1)}
    for reduction, want in reduced.items():
        assert_close(DICE(z, t, reduction=reduction, **groups), want, tolerance)
    upstream = rng.standard_normal(each.shape)
    grad = DICE.grad(z, t, reduction="none", grad_output=upstream, **groups)
    parts = [upstream[k] * DICE.grad(z, t, reduction="none", grad_output=np.eye(each.size)[i].reshape(each.shape), **groups)
             for i, k in enumerate(np.ndindex(each.shape))]  # fmt: skip
    assert_close(grad, sum(parts), tolerance)
    if groups["per_sample"]:
        upstream = rng.standard_normal(2)
        grad = DICE.grad(z, t, reduction="sample_sum", grad_output=upstream, **groups)
        spread = np.broadcast_to(upstream.reshape(2, *[1] * (each.ndim - 1)), each.shape)
        assert_close(grad, DICE.grad(z, t, reduction="none", grad_output=spread, **groups), tolerance)


@by_groups
def test_excluded_pixels_do_not_count(groups, dtype, rng):
    z, t = draw(rng, SHAPE, dtype)
    masked = t.copy()
    masked[:, 1] = 200
    z[:, :, 1] = np.nan
    mask = np.arange(3)[:, None] != 1
    for loss in (DICE, BOTH):
        value, grad = loss.value_and_grad(np.delete(z, 1, axis=2), np.delete(t, 1, axis=1), **groups)
        for options in ({"ignore_index": 200}, {"mask": mask}, {"mask": mask, "ignore_index": 200}):
            got, slope = loss.value_and_grad(z, masked if "ignore_index" in options else t, **options, **groups)
            assert_close(got, value, SUM[np.dtype(dtype)])
            assert_close(np.delete(slope, 1, axis=2), grad, SUM[np.dtype(dtype)])
            assert not slope[:, :, 1].any()


def test_a_sample_without_pixels_does_not_count(rng):
    z, t = draw(rng, SHAPE, np.float64)
    t[0] = 9
    value, grad = DICE.value_and_grad(z, t, ignore_index=9)
    want, slope = DICE.value_and_grad(z[1:], t[1:])
    assert value == want
    np.testing.assert_array_equal(grad[1:], slope)
    assert not grad[0].any()


@pytest.mark.parametrize("order", ORDERS)
def test_memory_orders(order, dtype, rng):
    z, t = draw(rng, (3, 4, 9, 11), dtype)
    view = ORDERS[order](z)
    np.testing.assert_array_equal(view, z)
    for loss in (DICE, BOTH):
        value, grad = loss.value_and_grad(view, t)
        want, slope = loss.value_and_grad(z, t)
        assert_close(value, want, SUM[np.dtype(dtype)])
        assert_close(grad, slope, SUM[np.dtype(dtype)])


@is_about_the_host
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_classes_side_by_side_change_no_digit(dtype, rng):
    for (classes, entries), loss in itertools.product(SIDE_BY_SIDE, (DICE, BOTH)):
        z, t = draw(rng, (1, classes, entries), dtype)
        want, slope = loss.value_and_grad(z, t)
        given = side_by_side(z)
        value, grad = loss.value_and_grad(given, t, out=given)
        assert value == want
        np.testing.assert_array_equal(grad, slope)


@is_long_on_the_stand_in
@pytest.mark.parametrize("targets", [np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_indices_of_any_integer_type_give_the_same_bits(targets, rng):
    z, t = draw(rng, SHAPE)
    want, slope = BOTH.value_and_grad(z, t)
    value, grad = BOTH.value_and_grad(z, t.astype(targets))
    assert value == want
    np.testing.assert_array_equal(grad, slope)


@is_about_the_host
def test_threads_and_batches_do_not_change_bits(rng):
    z, t = draw(rng, (5, 19, 40, 50))
    threads, found = fl.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            fl.set_num_threads(count)
            found.append(BOTH.value_and_grad(z, t, reduction="sample_mean"))
    finally:
        fl.set_num_threads(threads)
    for value, grad in found[1:]:
        np.testing.assert_array_equal(value, found[0][0])
        np.testing.assert_array_equal(grad, found[0][1])
    np.testing.assert_array_equal(DICE(z, t, reduction="none")[2:4], DICE(z[2:4], t[2:4], reduction="none"))


@pytest.mark.parametrize("shape", [(3, 2, 7), (2, 5), (2, 1000, 3), (1, 19, 2000), (70, 4, 3), (2, 3, 4, 5, 6)])
def test_in_place_and_out(shape, dtype, rng):
    z, t = draw(rng, shape, dtype)
    for loss in (DICE, BOTH):
        value, grad = loss.value_and_grad(z, t)
        out, own = np.full_like(z, np.nan), z.copy()
        got = loss.value_and_grad(z, t, out=out), loss.value_and_grad(own, t, out=own)
        assert got[0][0] == got[1][0] == value
        np.testing.assert_array_equal(out, grad)
        np.testing.assert_array_equal(own, grad)


@pytest.mark.parametrize("half", [np.float16, bfloat16])
def test_sixteen_bits(half, rng):
    z, t = draw(rng, (2, 5, 16, 16))
    z = z.astype(half)
    for loss in (DICE, BOTH):
        value, grad = loss.value_and_grad(z, t, reduction="sum")
        want, slope = loss.value_and_grad(z.astype(np.float32), t, reduction="sum")
        assert grad.dtype == half
        assert_close(value, want, SUM[np.dtype(np.float32)])
        assert_rounded(grad, slope)


@is_about_the_host
def test_no_temporaries(rng):
    z, t = draw(rng, (2, 19, 128, 128))
    BOTH.grad(z, t, out=np.empty_like(z))
    out = np.empty_like(z)
    tracemalloc.start()
    BOTH.value_and_grad(z, t, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < z.nbytes / 2


@is_about_the_host
@by_groups
@pytest.mark.parametrize("loss", [DICE, BOTH], ids=["Dice", "both"])
def test_an_accumulator_of_parts(loss, groups, rng):
    z, t = draw(rng, (7, 5, 3, 4), np.float64)
    options = {**groups, "ignore_index": 1} | ({"weight": rng.random(5)} if groups["per_channel"] else {})
    parts = []
    for cuts in ([0, 7], [0, 2, 3, 7]):
        parts.append(fl.Accumulator(loss, **options))
        for first, end in itertools.pairwise(cuts):
            parts[-1].update(z[first:end], t[first:end])
    assert parts[0].compute() == parts[1].compute()
    assert_close(parts[0].compute(), loss(z, t, **options), SUM[np.dtype(np.float64)])


@is_about_the_host
def test_an_accumulator_refuses_other_classes(rng):
    total = fl.Accumulator(DICE, per_sample=False)
    total.update(*draw(rng, (2, 5, 3)))
    with pytest.raises(ValueError, match="the batch has 4 channels; those before had 5"):
        total.update(*draw(rng, (2, 4, 3)))


# --- errors ----------------------------------------------------------------------------------------------------------

Z, T = np.zeros((2, 3, 4), np.float32), np.zeros((2, 4), np.uint8)
CASES = {
    "one axis": (ValueError, r"input has shape \(3,\); accepted: \(N, C, ...\)", (Z[0, :, 0], np.uint8(0)), {}),
    "one-hot": (TypeError, "target has a floating-point dtype; accepted: class indices", (Z, Z), {}),
    "index": (ValueError, r"target\[1, 2\] is 7; accepted: class indices from 0 to 2", (Z, 7 * (np.arange(8).reshape(2, 4) == 6)), {}),
    "weight": (ValueError, r"weight has shape \(4,\); accepted: \(3,\)", (Z, T), {"weight": np.ones(4)}),
    "weight of joined classes": (ValueError, "accepted: pixel_weight", (Z, T), {"weight": np.ones(3), "per_channel": False}),
    "alpha": (ValueError, "alpha is -1; accepted: 0 or more", (Z, T), {"alpha": -1}),
    "flag": (TypeError, "squared must be True or False, not 1", (Z, T), {"squared": 1}),
    "option": (TypeError, "unknown option label_smoothing; accepted: smooth, ", (Z, T), {"label_smoothing": 0.1}),
    "out": (ValueError, r"out has shape \(2, 4\)", (Z, T), {"out": np.zeros((2, 4), np.float32)}),
}  # fmt: skip


@is_about_the_host
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    kind, message, operands, options = CASES[case]
    for loss in (DICE, BOTH):
        with pytest.raises(kind, match=message):
            loss.grad(*operands, **options)


@is_about_the_host
def test_no_value_of_each_pixel(rng):
    with pytest.raises(ValueError, match="reduction 'none' is not supported here"):
        BOTH(Z, T, reduction="none")
