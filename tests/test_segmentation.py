"""Dice, alone and with cross-entropy: digits, groups, options, errors, memory."""

from __future__ import annotations

import itertools
import re
import tracemalloc

import numpy as np
import pytest

import fastloss as fl
from fastloss.core.checks import REDUCTIONS
from tests import oracle
from tests.devices import (
    has_the_hosts_arrays,
    is_about_the_host,
    is_long_on_the_stand_in,
    only_on,
    some,
    sums_in_another_order,
    warns_the_caller,
)
from tests.test_threads import run_python
from tests.ulp import DIFFERENCE, SUM, ULP, assert_close, assert_same, assert_ulp

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.alike("stand-in")]

DICE, BOTH = fl.dice_with_logits_loss, fl.dice_bce_with_logits_loss
BCE = fl.binary_cross_entropy_with_logits
GROUPS = [{"per_channel": c, "per_sample": s} for c, s in itertools.product([True, False], repeat=2)]
GROUP_NAMES = [f"{'channel' if g['per_channel'] else ''}{'sample' if g['per_sample'] else ''}" or "all" for g in GROUPS]
SHAPE = (2, 3, 5, 7)

by_groups = pytest.mark.parametrize("groups", GROUPS, ids=GROUP_NAMES)


@pytest.fixture
def scene(rng, dtype):
    """Return logits and soft targets of a batch that is small enough for the slow oracle."""
    return (2 * rng.standard_normal(SHAPE)).astype(dtype), rng.random(SHAPE).astype(dtype)


def assert_true(got, want, dtype):
    """Assert that losses and slopes are within the bounds around the oracle's values."""
    for quantity, x, (true, magnitude) in zip(("value", "slope"), got, want, strict=True):
        assert np.shape(x) == true.shape
        assert_ulp(x, true, magnitude, limit(quantity, dtype), dtype)


def limit(quantity, dtype):
    """Return the bound on an error, in ulp."""
    return ULP[f"dice_with_logits_loss, {np.dtype(dtype)}", quantity]


def losses_and_slopes(z, t, *args, **options):
    """Return the losses of the groups, and the gradient of their sum."""
    return DICE(z, t, *args, reduction="none", **options), DICE.grad(z, t, *args, reduction="sum", **options)


# --- digits ----------------------------------------------------------------------------------------------------------

LOGITS = {
    "usual": lambda rng, t: 3 * rng.standard_normal(t.shape),
    "100": lambda rng, t: rng.choice([-100.0, 100.0], t.shape),
    "10000": lambda rng, t: rng.choice([-1e4, 1e4], t.shape),
    "infinite": lambda rng, t: rng.choice([-np.inf, np.inf, 0.5], t.shape),
    "nearly perfect": lambda rng, t: np.where(t > 0.5, 1, -1) * rng.uniform(5, 20, t.shape),
    "all but perfect": lambda rng, t: np.where(t > 0.5, 1, -1) * rng.uniform(60, 80, t.shape),
    "perfect": lambda rng, t: np.where(t > 0.5, np.inf, -np.inf),
    "all wrong": lambda rng, t: np.where(t > 0.5, -1, 1) * rng.uniform(20, 80, t.shape),
    "tiny": lambda rng, t: rng.choice([-1, 1], t.shape) * 10 ** rng.uniform(-30, -1, t.shape),
}


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("logits", LOGITS)
def test_digits(logits, hard, dtype, rng):
    t = rng.random(SHAPE)
    t = (t < 0.5 if hard else t).astype(dtype)
    z = LOGITS[logits](rng, t).astype(dtype)
    assert_true(losses_and_slopes(z, t), oracle.dice_with_logits_loss(z, t), dtype)


def test_digits_of_large_groups(dtype, rng):
    """Groups of 65,536 elements, constant in each half, so that the oracle needs only two elements."""
    z, t = np.zeros((1, 2, 256, 256), dtype), np.zeros((1, 2, 256, 256), dtype)
    z[..., :128], z[..., 128:], t[..., :128] = 9.5, -11.25, 1
    want = oracle.dice_with_logits_loss(z[..., :1, 127:129], t[..., :1, 127:129], 32768)
    got = losses_and_slopes(z, t)
    assert_true((got[0], got[1][..., :1, 127:129] * dtype.type(32768)), want, dtype)


@pytest.mark.parametrize("smooth", [0, 1e-5, 1, 1e6])
def test_smooth(scene, smooth):
    assert_true(losses_and_slopes(*scene, smooth=smooth), oracle.dice_with_logits_loss(*scene, smooth=smooth), scene[0].dtype)


TVERSKY = [{"alpha": 1, "beta": 1}, {"alpha": 0.3, "beta": 0.7, "smooth": 0.5}, {"alpha": 0, "beta": 2}, {"smooth_denominator": 0}]


@pytest.mark.parametrize("groups", [GROUPS[0], GROUPS[3]], ids=["channelsample", "all"])
@pytest.mark.parametrize("settings", TVERSKY, ids=["Jaccard", "Tversky", "only false negatives", "smooth_denominator"])
def test_tversky(scene, settings, groups):
    options = {**settings, **groups}
    assert_true(losses_and_slopes(*scene, **options), oracle.dice_with_logits_loss(*scene, **options), scene[0].dtype)


@pytest.mark.parametrize("logits", ["100", "infinite", "nearly perfect", "all wrong"])
def test_digits_of_tversky(logits, dtype, rng):
    t = (rng.random(SHAPE) < 0.5).astype(dtype)
    z, options = LOGITS[logits](rng, t).astype(dtype), {"alpha": 0.3, "beta": 0.7}
    assert_true(losses_and_slopes(z, t, **options), oracle.dice_with_logits_loss(z, t, **options), dtype)


def test_smooth_of_0_on_an_empty_channel(dtype):
    """For an empty channel, the loss is 1 for any logits, so the slope is 0 even where the predicted region is tiny."""
    for logit in (-5, -80, -90, -100):
        z, t = np.full((1, 1, 3), logit, dtype), np.zeros((1, 1, 3), dtype)
        value, grad = DICE.value_and_grad(z, t, smooth=0)
        assert value == 1.0
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("weight", [1e-300, 1e-45, 1e-30, 1e30, 1e200])
def test_regions_of_any_size_in_float64(scene, weight):
    """Without smoothing, a common weight of all elements has no effect."""
    z, t = (x.astype(np.float64) for x in scene)
    assert_true(losses_and_slopes(z, t, weight, smooth=0), oracle.dice_with_logits_loss(z, t, weight, smooth=0), z.dtype)


def test_the_slope_is_the_derivative(rng):
    z, t, h = rng.normal(0, 2, SHAPE), rng.random(SHAPE), 1e-6
    weight, upstream = rng.random(SHAPE), rng.normal(size=SHAPE[:1])
    for loss in (DICE, BOTH):
        options = {"weight": weight, "reduction": "sample_mean", "mask": rng.random(SHAPE) < 0.8}
        grad = loss.grad(z, t, grad_output=upstream, **options)
        for at in [(0, 0, 0, 0), (1, 2, 4, 6), (1, 0, 2, 3), (0, 1, 3, 3)]:
            up, down = z.copy(), z.copy()
            up[at] += h
            down[at] -= h
            slope = np.dot(loss(up, t, **options) - loss(down, t, **options), upstream) / (2 * h)
            assert abs(grad[at] - slope) <= DIFFERENCE * np.abs(grad).max()


# --- groups and reductions -------------------------------------------------------------------------------------------


@pytest.mark.first
@by_groups
def test_groups(scene, groups):
    assert_true(losses_and_slopes(*scene, **groups), oracle.dice_with_logits_loss(*scene, **groups), scene[0].dtype)


def shape_of(groups):
    return {"channelsample": (2, 3), "sample": (2,), "channel": (3,), "all": ()}[GROUP_NAMES[GROUPS.index(groups)]]


def reductions(groups):
    return [r for r in REDUCTIONS if groups["per_sample"] or not r.startswith("sample")]


REDUCED = [pytest.param(g, r, id=f"{name}-{r}") for g, name in zip(GROUPS, GROUP_NAMES, strict=True) for r in reductions(g)]


@pytest.mark.parametrize(("groups", "reduction"), REDUCED)
def test_reductions(scene, rng, groups, reduction):
    losses, slope = losses_and_slopes(*scene, **groups)
    by_sample = losses.reshape(2, -1) if groups["per_sample"] else None
    want = {
        "mean": lambda: losses.mean(),
        "sum": lambda: losses.sum(),
        "none": lambda: losses,
        "batchmean": lambda: losses.sum() / 2,
        "sample_mean": lambda: by_sample.mean(axis=1),
        "sample_sum": lambda: by_sample.sum(axis=1),
    }[reduction]()
    value, grad = DICE.value_and_grad(*scene, reduction=reduction, **groups)
    assert np.shape(value) == np.shape(want)
    assert value.dtype == np.float64
    assert_close(value, want, SUM[np.dtype(np.float64)])
    assert grad.dtype == scene[0].dtype
    assert_same((value, grad), (DICE(*scene, reduction=reduction, **groups), DICE.grad(*scene, reduction=reduction, **groups)))
    count = {"mean": losses.size, "batchmean": 2, "sample_mean": losses.size // 2}.get(reduction, 1)
    allowed = 2 * limit("slope", grad.dtype)
    magnitude = oracle.dice_with_logits_loss(*scene, **groups)[1][1] / count
    assert_ulp(grad, slope / np.longdouble(count), magnitude, allowed, grad.dtype)
    for upstream in (0.37, np.float32(-2.5), rng.normal(size=np.shape(value))):
        factor = np.asarray(upstream)
        if factor.ndim:
            factor = factor.reshape((1, 3, 1, 1) if factor.shape == (3,) else factor.shape + (1,) * (4 - factor.ndim))
        got = DICE.grad(*scene, reduction=reduction, grad_output=upstream, **groups)
        assert_ulp(got, grad * np.longdouble(1) * factor, magnitude * abs(factor), allowed, grad.dtype)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 1), (2, 3), (1, 1, 1), (1, 1, 1000), (1, 1, 1, 1, 2), (4, 1, 3, 1)])
def test_ranks(shape, dtype, rng):
    z, t = np.asarray(rng.normal(size=shape), dtype), np.asarray(rng.random(shape), dtype)
    for groups, needed in zip(GROUPS, (2, 2, 1, 0), strict=True):
        if len(shape) >= needed:
            assert_true(losses_and_slopes(z, t, **groups), oracle.dice_with_logits_loss(z, t, **groups), dtype)


@is_about_the_host
def test_zero_dimensional_arrays():
    """Run in a separate process, because a failure once ended the process."""
    code = """
import fastloss as fl
print(*fl.dice_with_logits_loss.value_and_grad(0.0, 1.0, per_channel=False, per_sample=False))"""
    assert_close([float(x) for x in run_python(code).split()], [0.2, -0.12], SUM[np.dtype(np.float64)])


@is_long_on_the_stand_in
def test_many_small_groups(rng, dtype):
    z, t = rng.normal(size=(5000, 3, 2, 2)).astype(dtype), rng.random((5000, 3, 2, 2)).astype(dtype)
    losses, slope = losses_and_slopes(z, t)
    for part in (slice(0, 3), slice(4997, 5000)):
        assert_true((losses[part], slope[part]), oracle.dice_with_logits_loss(z[part], t[part]), dtype)
    assert_close(DICE(z, t), losses.mean(), SUM[np.dtype(np.float64)])


# --- weights, masks, targets -----------------------------------------------------------------------------------------

WEIGHTS = {"full": SHAPE, "per channel": (3, 1, 1), "per sample": (2, 1, 1, 1), "per pixel": (5, 7), "number": ()}


@pytest.mark.parametrize("shape", WEIGHTS)
def test_weight(scene, rng, shape):
    weight = rng.uniform(0, 3, WEIGHTS[shape]).astype(scene[0].dtype)
    for groups in GROUPS:
        want = oracle.dice_with_logits_loss(*scene, weight=weight, **groups)
        assert_true(losses_and_slopes(*scene, weight, **groups), want, scene[0].dtype)


@pytest.mark.parametrize("shape", ["full", "per channel", "per pixel"])
def test_mask(scene, rng, shape):
    z, t = scene
    mask = rng.random(WEIGHTS[shape]) < 0.6
    inside = np.broadcast_to(mask, SHAPE)
    for groups in GROUPS:
        want = oracle.dice_with_logits_loss(z, t, weight=inside, **groups)
        assert_true(losses_and_slopes(np.where(inside, z, np.nan), t, mask=mask, **groups), want, z.dtype)


@sums_in_another_order
def test_mixed_dtypes_compute_in_float64(scene):
    z, t = scene
    other = t.astype(np.float32 if z.dtype == np.float64 else np.float64)
    value, grad = DICE.value_and_grad(z, other)
    want = DICE.value_and_grad(z.astype(np.float64), other.astype(np.float64))
    assert_same((value, grad), (want[0], want[1].astype(z.dtype)))


# --- with cross-entropy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "reduction"), [case for case in REDUCED if "none" not in case.values])
def test_dice_and_cross_entropy_add_up(scene, rng, groups, reduction):
    z, t = scene
    options = {"weight": rng.random((3, 1, 1)), "mask": rng.random(SHAPE) < 0.7, "reduction": reduction}
    shape = (2,) if reduction.startswith("sample") else ()
    parts = (
        DICE.value_and_grad(z, t, **options, **groups, grad_output=np.full(shape, 3.0)),
        BCE.value_and_grad(z, t, **options, grad_output=np.full(shape, 3.0)),
    )
    for dice, bce in ((1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)):
        got = BOTH.value_and_grad(z, t, **options, **groups, dice_weight=dice, bce_weight=bce, grad_output=np.full(shape, 3.0))
        for a, of_dice, of_bce in zip(got, *parts, strict=True):
            assert_close(a, dice * of_dice.astype(np.float64) + bce * of_bce.astype(np.float64), 2 * SUM[z.dtype])
        assert_same(got[:1], [BOTH(z, t, **options, **groups, dice_weight=dice, bce_weight=bce)])


def test_each_part_has_its_own_reduction(scene):
    """The sum is the mean Dice loss of the channels plus the mean cross-entropy of the elements."""
    (dice, _), _ = oracle.dice_with_logits_loss(*scene)
    (entropy, _), _, _ = oracle.binary_cross_entropy_with_logits(*(x.astype(np.longdouble) for x in scene), oracle.LONG)
    assert_close(BOTH(*scene), dice.mean() + entropy.mean(), SUM[scene[0].dtype])


def test_two_parts_of_weight_0_keep_the_shape(scene):
    value, grad = BOTH.value_and_grad(*scene, reduction="sample_mean", dice_weight=0, bce_weight=0)
    assert value.tolist() == [0.0, 0.0]
    assert not grad.any()


def test_a_part_of_weight_0_does_not_count():
    infinite, zeros = np.full((1, 1, 2), np.inf), np.zeros((1, 1, 2))
    assert BOTH(infinite, zeros, bce_weight=0) == DICE(infinite, zeros)
    value, grad = BOTH.value_and_grad(-infinite, zeros, dice_weight=0, smooth=0)
    assert value == 0.0
    assert grad.tolist() == [[[0.0, 0.0]]]


# --- NaN, infinity, and empty regions --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DICE, BOTH])
def test_one_nan_spoils_the_value_and_its_own_group(scene, loss):
    z, t = scene
    want = loss.value_and_grad(z, t, reduction="sample_sum")
    z[1, 2, 3, 4] = np.nan
    value, grad = loss.value_and_grad(z, t, reduction="sample_sum")
    assert np.isnan(value).tolist() == [False, True]
    assert np.isnan(loss(z, t))
    assert np.isnan(grad[1, 2]).all()
    grad[1, 2] = want[1][1, 2]
    assert_same((value[0], grad), (want[0][0], want[1]))


@pytest.mark.parametrize("smooth", [0, 1])
def test_groups_without_elements_do_not_count(scene, smooth):
    z, t = scene
    mask = np.ones(SHAPE, bool)
    mask[0, 1] = False
    losses, slope = losses_and_slopes(z, t, smooth=smooth)
    losses[0, 1] = slope[0, 1] = 0
    assert_same(losses_and_slopes(z, t, mask=mask, smooth=smooth), (losses, slope))
    value, grad = DICE.value_and_grad(z, t, mask=mask, smooth=smooth)
    assert_close(value, losses.sum() / 5, SUM[np.dtype(np.float64)])
    assert_close(grad, slope / 5, SUM[z.dtype])
    for reduction, want in (
        ("sample_mean", losses.sum(axis=1) / [2, 3]),
        ("sample_sum", losses.sum(axis=1)),
        ("batchmean", losses.sum() / 2),
    ):
        assert_close(DICE(z, t, mask=mask, smooth=smooth, reduction=reduction), want, SUM[np.dtype(np.float64)])


@warns_the_caller
@pytest.mark.parametrize("loss", [DICE, BOTH])
def test_all_masked(scene, loss):
    nothing = np.zeros((3, 1, 1), bool)
    with pytest.warns(RuntimeWarning, match="mean of no elements"):
        value, grad = loss.value_and_grad(*scene, mask=nothing)
    assert np.isnan(value)
    assert not grad.any()
    for smooth in (0, 1):
        value, grad = loss.value_and_grad(*scene, mask=nothing, reduction="sum", smooth=smooth)
        assert value == 0.0
        assert not grad.any()


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
@by_groups
def test_empty_input(shape, groups, dtype):
    empty = np.empty(shape, dtype)
    losses, grad = DICE.value_and_grad(empty, empty, reduction="none", **groups)
    expected = (shape[0],) * groups["per_sample"] + (shape[1],) * groups["per_channel"]
    assert losses.shape == expected
    assert not losses.any()
    assert grad.shape == shape
    assert DICE(empty, empty, reduction="sum", **groups) == 0.0
    assert BOTH(empty, empty, reduction="sum", **groups) == 0.0


@pytest.mark.filterwarnings("ignore:mean of no elements:RuntimeWarning")
def test_error_state_of_numpy_has_no_effect():
    t = np.zeros((2, 1, 2))
    with np.errstate(all="raise"):
        for z in (t - 700, t + np.inf, t + np.nan):
            for loss in (DICE, BOTH):
                loss.value_and_grad(z, t, smooth=1e20)
                loss.value_and_grad(z, t, smooth=0, reduction="sum")


# --- memory ----------------------------------------------------------------------------------------------------------


VIEWS = {
    "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "Fortran": np.asfortranarray,
    "backwards": lambda x: np.ascontiguousarray(x[::-1, ::-1, :, ::-1])[::-1, ::-1, :, ::-1],
    "every other": lambda x: np.repeat(np.repeat(x, 2, 1), 2, 3)[:, ::2, :, ::2],
    "every other sample": lambda x: np.repeat(x, 2, 0)[::2],  # rows hold several groups
    "samples last": lambda x: np.ascontiguousarray(x.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(scene, view):
    z, t = (VIEWS[view](x) for x in scene)
    np.testing.assert_array_equal(z, scene[0])
    for groups in GROUPS:
        want = oracle.dice_with_logits_loss(*scene, **groups)
        assert_true(losses_and_slopes(z, t, **groups), want, z.dtype)
        if view == "channels last":
            assert_true(losses_and_slopes(z, scene[1], **groups), want, z.dtype)
    value, grad = DICE.value_and_grad(z, t)
    assert DICE.value_and_grad(z, t, out=z)[0] == value
    np.testing.assert_array_equal(z, grad)


@is_about_the_host
@by_groups
def test_any_number_of_threads_gives_the_same_bits(rng, groups):
    z, t = rng.normal(0, 3, (2, 3, 190, 301)).astype(np.float32), rng.random((2, 3, 190, 301)).astype(np.float32)
    before, results = fl.get_num_threads(), []
    try:
        for threads in (1, 3):
            fl.set_num_threads(threads)
            results.append([x for loss in (DICE, BOTH) for x in loss.value_and_grad(z, t, **groups)])
    finally:
        fl.set_num_threads(before)
    assert_same(*results)


@is_about_the_host
@pytest.mark.parametrize("loss", [DICE, BOTH])
def test_with_out_nothing_large_is_allocated(rng, loss):
    z = rng.normal(0, 3, (4, 3, 256, 256)).astype(np.float32)
    images = rng.integers(0, 256, z.shape).astype(np.uint8)
    out, weight = np.empty_like(z), rng.random((3, 1, 1))
    options = {"target_scale": 1 / 255, "mask": images > 10, "ignore_index": 255, "validate": True, "out": out}
    for groups in GROUPS:
        loss.value_and_grad(z, images, weight, **options, **groups)
        tracemalloc.start()
        loss.value_and_grad(z, images, weight, **options, **groups)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


# --- errors ----------------------------------------------------------------------------------------------------------

Z, T = np.full((2, 3, 4), 0.5, np.float32), np.full((2, 3, 4), 0.25, np.float32)
READ_ONLY = np.zeros_like(Z)
READ_ONLY.flags.writeable = False
SETTINGS = "smooth, smooth_denominator, alpha, beta, per_channel, per_sample"

CASES = {
    "smooth negative": (ValueError, "smooth is -1; accepted: 0 or more", (Z, T), {"smooth": -1}),
    "smooth NaN": (ValueError, "smooth is nan; accepted: 0 or more", (Z, T), {"smooth": float("nan")}),
    "smooth type": (TypeError, "smooth must be a number, not 'much'", (Z, T), {"smooth": "much"}),
    "reduction": (ValueError, "reduction 'avg' is unknown; accepted: 'mean', 'sum'", (Z, T), {"reduction": "avg"}),
    "reduction type": (ValueError, "reduction ['mean'] is unknown; accepted: 'mean'", (Z, T), {"reduction": ["mean"]}),
    "sample_mean of a batch in one": (
        ValueError,
        "reduction 'sample_mean' is not supported here; accepted: 'mean', 'sum',",
        (Z, T),
        {"reduction": "sample_mean", "per_sample": False},
    ),
    "sample_sum of a batch in one": (
        ValueError,
        "reduction 'sample_sum' is not supported here; accepted: 'mean', 'sum',",
        (Z, T),
        {"reduction": "sample_sum", "per_sample": False, "per_channel": False},
    ),
    "one axis": (
        ValueError,
        "input has shape (4,); it needs two leading axes, samples and channels; or pass per_channel=False",
        (Z[0, 0], T[0, 0]),
        {},
    ),
    "no axis": (ValueError, "input has shape (); it needs a first axis; or pass per_sample=False", (0.5, 1.0), {"per_channel": False}),
    "shapes": (ValueError, "input has shape (2, 3, 4) and target (3, 4); they must be equal", (Z, T[0]), {}),
    "weight shape": (ValueError, "weight has shape (2,), which does not broadcast", (Z, T, np.ones(2)), {}),
    "mask dtype": (TypeError, "mask has dtype uint8; accepted: bool", (Z, T), {"mask": np.ones(4, np.uint8)}),
    "integer input": (TypeError, "input has dtype int64; accepted: float16, bfloat16, float32, float64", (Z.astype(np.int64), T), {}),
    "complex target": (TypeError, "target has dtype complex128; accepted: float16", (Z, T.astype(complex)), {}),
    "target_scale on floats": (ValueError, "target_scale multiplies integer targets", (Z, T), {"target_scale": 0.5}),
    "option": (TypeError, f"unknown option smoth; accepted: {SETTINGS}", (Z, T), {"smoth": 1}),
}
BOTH_CASES = {
    "none": (ValueError, "reduction 'none' is not supported here; accepted: 'mean', 'sum', 'batchmean'", (Z, T), {"reduction": "none"}),
    "dice_weight": (ValueError, "dice_weight is -0.5; accepted: 0 or more", (Z, T), {"dice_weight": -0.5}),
    "bce_weight": (ValueError, "bce_weight is -1; accepted: 0 or more", (Z, T), {"bce_weight": -1}),
    "option": (TypeError, f"unknown option pos_weight; accepted: {SETTINGS}, dice_weight, bce_weight", (Z, T), {"pos_weight": 1}),
}
GRADIENT_CASES = {
    "out read-only": (ValueError, "out is read-only", {"out": READ_ONLY}),
    "out type": (TypeError, "out must be a numpy.ndarray, not list", {"out": [0.0]}),
    "out dtype": (
        ValueError,
        "out has shape (2, 3, 4) and dtype float64; the result has shape (2, 3, 4) and dtype float32",
        {"out": np.zeros(Z.shape)},
    ),
    "out shape": (
        ValueError,
        "out has shape (2, 3) and dtype float32; the result has shape (2, 3, 4)",
        {"out": np.zeros((2, 3), np.float32)},
    ),
    "out broadcast": (
        ValueError,
        "several elements of out share memory",
        {"out": np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), Z.shape, (0, 0, 4))},
    ),
    "grad_output shape": (
        ValueError,
        "grad_output has shape (2,); with reduction 'mean' the loss has shape ()",
        {"grad_output": np.ones(2)},
    ),
    "grad_output per sample": (
        ValueError,
        "grad_output has shape (2, 3); with reduction 'sample_sum' the loss has shape (2,)",
        {"grad_output": np.ones((2, 3)), "reduction": "sample_sum"},
    ),
    "grad_output type": (TypeError, "grad_output must be a number, not 'x'", {"grad_output": "x"}),
    "grad_output dtype": (TypeError, "grad_output has dtype complex128", {"grad_output": np.ones(2, complex), "reduction": "sample_sum"}),
}
BAD = [(DICE, case) for case in CASES.values()] + [(BOTH, case) for case in (CASES | BOTH_CASES).values()]
BAD_NAMES = [*(f"dice, {name}" for name in CASES), *(f"both, {name}" for name in CASES | BOTH_CASES)]


@pytest.mark.parametrize(("loss", "case"), BAD, ids=BAD_NAMES)
def test_bad_input(loss, case):
    error, message, args, options = case
    out = np.full(np.shape(args[0]), 7, np.float32)
    for call in (loss, loss.grad, loss.value_and_grad, lambda *a, **k: loss.grad(*a, **k, out=out)):
        with pytest.raises(error, match=re.escape(message)):
            call(*args, **options)
    assert (out == 7).all()


@pytest.mark.parametrize("case", some(GRADIENT_CASES, has_the_hosts_arrays, "out read-only", "out type"))
def test_bad_input_of_gradients(case):
    error, message, options = GRADIENT_CASES[case]
    for loss, method in itertools.product((DICE, BOTH), ("grad", "value_and_grad")):
        out = np.full_like(Z, 7)
        with pytest.raises(error, match=re.escape(message)):
            getattr(loss, method)(Z, T, **{"out": out} | options)
        assert (out == 7).all()


def test_the_value_has_no_grad_output_and_no_out():
    with pytest.raises(ValueError, match="grad_output scales a gradient, and the value alone has none"):
        DICE(Z, T, grad_output=2.0)
    with pytest.raises(ValueError, match="out takes the gradient, and the value alone has none"):
        DICE(Z, T, reduction="none", out=np.zeros((2, 3)))


@only_on("cpu", reason="a device may name any of several bad targets; test_device.py tests a single one")
@pytest.mark.parametrize("bad", [-0.01, 1.01, np.nan])
@pytest.mark.parametrize("loss", [DICE, BOTH])
def test_validate_names_the_first_bad_target(scene, loss, bad):
    z, t = scene
    t[1, 0, 2, 3] = t[1, 1, 0, 0] = bad
    before = z.copy()
    message = re.escape(f"target[1, 0, 2, 3] is {t[1, 0, 2, 3]!s}; accepted: targets in [0, 1]") + "$"
    for call in (loss, loss.grad, lambda *a, **k: loss.value_and_grad(*a, **k, out=z)):
        with pytest.raises(ValueError, match=message):
            call(z, t, validate=True)
    np.testing.assert_array_equal(z, before)
    mask = np.ones(SHAPE, bool)
    mask[1, :2] = False
    assert loss(z, t, mask=mask, validate=True) == loss(z, t, mask=mask)


@only_on("cpu", reason="a device may name any of several bad targets; test_device.py tests a single one")
def test_validate_hints_at_target_scale(scene):
    z, t = scene[0], np.full(SHAPE, 200, np.uint8)
    with pytest.raises(
        ValueError, match=re.escape("target[0, 0, 0, 0] is 200; accepted: targets in [0, 1]; for images stored as whole numbers")
    ):
        DICE(z, t, validate=True)
    assert DICE(z, t, validate=True, target_scale=1 / 255) == DICE(z, t, target_scale=1 / 255)
