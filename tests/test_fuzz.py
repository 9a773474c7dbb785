"""Random calls of every loss, compared with the oracle: values, gradients and sums within the promised errors.

Calls with tensors are compared with those of arrays, bit by bit.
`python -m pytest tests/test_fuzz.py` takes 2,500 examples.
FASTLOSS_FUZZ=1000000 takes a million, and draws other ones in every run.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import finfo

import fastloss as fl
from tests import oracle
from tests.table import FLOATS, HALVES, LOSSES
from tests.test_latent import PARTS
from tests.test_layouts import lay_out, views
from tests.test_segmentation import GROUPS, assert_true, losses_and_slopes, reductions
from tests.ulp import HALF, HALF_SUM, PRODUCT, SMOOTHED, SUM, ULP, assert_close, assert_rounded, assert_same, flat, half_unit

try:
    from fastloss.backends.torch.memory_views import to_array, to_tensor
except ImportError:  # PyTorch is optional
    to_array = to_tensor = None

LONG_RUN = int(os.environ.get("FASTLOSS_FUZZ", "0"))
EXAMPLES = LONG_RUN or 2_500
SUMS = [row for row in LOSSES.values() if row.sums_elements]  # losses that are sums over elements
CLASSES = [row for row in LOSSES.values() if row.sums_pixels]
POKES = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-20, 1.0, -1.0, 15.9, -88.5, 104.0, 745.5, np.nan]  # of logits and of differences
BEYOND = [1e4, -1e18, 1e30, np.inf, -np.inf]  # where the loss is defined there, and the oracle too
# `images`: uint8 targets, a scale, and an ignored value; `tensors`: the call is made with tensors too
OPTIONS = ((), ("weight", "tensors"), ("mask", "grad_output"), ("weight", "mask", "images"))
CLASS_OPTIONS = (("pixel_weight", "tensors"), ("mask", "grad_output"), ("weight", "mask", "ignored"))

fuzz = settings(
    max_examples=-(-EXAMPLES // (len(SUMS) + len(CLASSES) + 2)),
    deadline=None,
    derandomize=not LONG_RUN,
    print_blob=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def arithmetic(dtype):
    """Return the dtype in which a loss of arrays of this dtype is computed."""
    return np.dtype(np.float32) if dtype in HALVES else dtype


def chosen(names, **options):
    """Return the options that have one of the names."""
    return {name: x for name, x in options.items() if name in names}


# --- sums over elements -----------------------------------------------------------------------------------------------


def operands(row, rng, dtype, shape, pokes, names):
    """Return an input with a few special numbers, and a target: hard, soft, or whole numbers to be divided by 255."""
    z, t = row.draw(rng, dtype, shape)
    for at, value in pokes:
        if "probabilities" in row.arrays:
            value = abs(value) if abs(value) <= 1 or np.isnan(value) else 0.5
        with np.errstate(over="ignore"):
            value = np.asarray(value, dtype)
        if row.name != "charbonnier_loss" or np.isfinite(value):
            z.flat[at % z.size] = value
    if "images" in names:
        return z, rng.integers(0, 256, shape).astype(np.uint8)
    return z, np.where(rng.random(shape) < 0.3, rng.random(shape) < 0.5, t).astype(dtype) if row.has_targets else t


def spacing(x, dtype):
    """Return a unit in the last place of numbers, in extended precision."""
    if dtype in HALVES:
        return half_unit(np.where(np.isfinite(x), x, 0), dtype)
    with np.errstate(over="ignore"):
        return np.spacing(np.minimum(np.abs(x), np.finfo(dtype).max).astype(dtype)).astype(np.longdouble)


def expected(row, z, t, parameters, dtype):
    """Return the value and the slopes of every element, each with how far the loss may be from it before it is stored."""
    wide = arithmetic(dtype)
    if row.name == "gaussian_kl_loss":
        wanted = oracle.gaussian_kl_loss(z, t)[:3]
        limits = [HALF if dtype in HALVES else ULP[row.name, quantity] for quantity in ("value", "slope", "target_slope")]
        return [(want, limit * spacing(want, dtype)) for want, limit in zip(wanted, limits, strict=True)]
    name = row.name + (", pos_weight" if "pos_weight" in parameters else "")
    with np.errstate(all="ignore"):
        wanted = row.oracle(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG, **parameters)
    found = []
    for quantity, (want, magnitude) in zip(("value", "slope"), wanted, strict=False):
        limit = HALF if dtype in HALVES else np.where((t == 0) | (t == 1), *ULP[name, quantity])
        with np.errstate(all="ignore"):
            magnitude = np.where(np.isinf(z), abs(want), magnitude)  # the oracle's own is NaN for an infinite difference
            allowed = np.where(limit == 0, 0, limit * spacing(magnitude, dtype))
            if "label_smoothing" in parameters:  # the smoothed target is rounded
                allowed = allowed + SMOOTHED[wide] * (np.minimum(abs(z), np.finfo(wide).max) if quantity == "value" else 1)
        want = np.where(np.isnan(z), np.nan, want)
        found.append((np.where(np.abs(want) > np.finfo(wide).max, np.copysign(np.inf, want), want), allowed))
    return found


def assert_within(got, want, allowed, largest, told):
    """Assert that numbers are as close as allowed. Infinities and NaN must be equal, except next to the largest number."""
    with np.errstate(all="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.abs(got - want) <= allowed)
        same |= np.isinf(got) & (np.abs(want) + allowed >= largest) & (np.sign(got) == np.sign(want))
    worst = np.argmin(same)
    assert np.all(same), f"{told}: got {np.ravel(got)[worst]!r}, want {np.ravel(want)[worst]!r} within {np.ravel(allowed)[worst]!r}"


def check(row, dtype, shape, seed, pokes, names, parameters, reduction, layouts):
    """Compare the value and the gradients of one call with the oracle."""
    rng, wide = np.random.default_rng(seed), arithmetic(dtype)
    z, t = operands(row, rng, dtype, shape, pokes, names)
    w = rng.choice([0.0, 0.25, 1.0, 3.0], shape).astype(dtype) if "weight" in names else np.ones(shape, dtype)
    counted = rng.random(shape) < 0.7 if "mask" in names else np.ones(shape, bool)
    counted.flat[0] = True
    options = {"reduction": reduction, **parameters, **chosen(names, weight=w, mask=counted)}
    if "images" in names:
        t.flat[0] = 8
        options |= {"target_scale": 1 / 255, "ignore_index": 7}
        counted = counted & (t != 7)
    upstream = rng.choice([0.5, -2.0, 100.0]) if "grad_output" in names else 1.0
    count = {"mean": counted.sum(), "sample_mean": counted.sum(axis=tuple(range(1, len(shape))), keepdims=True)}.get(reduction, 1)
    if np.any(count == 0):
        return
    value, *grads = plain = call(row, (z, t), options, upstream)
    if layouts:  # sums depend on the layout, which decides the order of additions
        value, *slopes = call(row, [lay_out(x, *layout) for x, layout in zip((z, t), layouts, strict=True)], options, upstream)
        assert_same(slopes, grads)
    if "tensors" in names and to_tensor:
        assert_same(call_with_tensors(row, (z, t), options), [np.asarray(plain[0], dtype), *plain[1:]])
    true = t.astype(wide) * wide.type(1 / 255) if "images" in names else t.astype(wide)
    (want, allowed), *slopes = expected(row, z.astype(wide), true, parameters, dtype)
    told = f"{row.name}, {dtype}, {', '.join(names)}, {reduction}, {parameters}"
    factor = np.longdouble(upstream) * w.astype(wide) / count
    assert_slopes(grads, slopes, factor, counted, dtype, told)
    assert_value(value, want, allowed, w.astype(wide), counted, count, reduction, dtype, told)


def call(row, operands, options, upstream):
    """Return the value and the gradients, from one pass, after comparing them with those of two passes."""
    value, grads = row.loss.value_and_grad(*operands, **options, grad_output=upstream)
    alone = row.loss.grad(*operands, **options, grad_output=upstream)
    assert_same(flat(alone), flat(grads))
    apart = row.loss(*operands, **options)
    if options["reduction"] == "none":
        assert_same([apart], [value])
    return apart, *flat(grads)


def call_with_tensors(row, operands, options):
    """Return the value and the gradients as arrays, from a call with tensors and autograd."""
    tensors = [to_tensor(x) for x in operands]
    inputs = [tensors[k].requires_grad_() for k in row.gradients]
    value = row.loss(*tensors, **{name: to_tensor(x) if np.ndim(x) else x for name, x in options.items()})
    value.sum().backward()
    return [to_array(x) for x in (value.detach(), *(x.grad for x in inputs))]


def stored(x, room, rounding, dtype):
    """Return how far from x a number may be that is x up to an error, multiplied by factors that round, and stored."""
    room = room + rounding * spacing(np.abs(x) + room, arithmetic(dtype))
    return room + spacing(np.abs(x) + room, dtype) / 2 if dtype in HALVES else room


def largest(dtype):
    """Return the largest number of a dtype."""
    return float(finfo(dtype).max)


def assert_slopes(grads, slopes, factor, counted, dtype, told):
    """Assert that gradients are the slopes times a factor where an element counts, and 0 elsewhere."""
    with np.errstate(all="ignore"):
        for grad, (want, allowed) in zip(grads, slopes, strict=True):
            slope = np.where(counted, want * factor, 0)
            room = np.where(counted, stored(slope, np.abs(factor) * allowed, PRODUCT["weight and scale"], dtype), 0)
            assert_within(grad, slope, room, largest(dtype), f"slope of {told}")


def assert_value(value, want, allowed, w, counted, count, reduction, dtype, told):
    """Assert that a value is the reduction of the elements' values times their weights."""
    with np.errstate(all="ignore"):
        each = np.where(counted, want * w, 0)
        if reduction == "none":
            room = np.where(counted, stored(each, allowed * w, PRODUCT["weight"], dtype), 0)
            assert_within(value, each, room, largest(dtype), f"value of {told}")
            return
        axes = tuple(range(1, each.ndim)) if reduction.startswith("sample") else None
        room = HALF_SUM * np.abs(each) if dtype in HALVES else np.where(counted, allowed * w, 0) + SUM[dtype] * np.abs(each)
        room = room.sum(axis=axes) / np.squeeze(count)
        # blocks are summed in the arithmetic's own type
        most = largest(arithmetic(dtype)) / w.size
        assert_within(value, each.sum(axis=axes) / np.squeeze(count), room, most, f"value of {told}")


# --- pixels with several classes --------------------------------------------------------------------------------------


def check_classes(row, dtype, shape, seed, pokes, names, parameters, reduction, layouts):
    """Compare the value and the gradient of one call with the oracle."""
    rng = np.random.default_rng(seed)
    z, t = row.draw(rng, dtype, shape)
    for at, value in pokes:
        z.flat[at % z.size] = value
    weight, own, counted, options = options_of_classes(rng, t, shape[1], names, dtype)
    options |= {"reduction": reduction, **parameters}
    upstream = rng.choice([0.5, -2.0, 100.0]) if "grad_output" in names else 1.0
    along = {"mean": None, "sample_mean": tuple(range(1, t.ndim))}
    shares = np.where(counted, weight[t], 0)  # of the pixels in the number that a mean divides by
    count = shares.sum(axis=along[reduction], keepdims=True) if reduction in along else np.ones((1,) * t.ndim)
    if np.any(count == 0):
        return
    value, grad = call(row, (z, t), options, upstream)
    if "tensors" in names and to_tensor:
        assert_same(call_with_tensors(row, (z, t), options), [np.asarray(value, dtype), grad])
    if layouts:
        value, slope = call(row, (lay_out(z, *layouts), t), options, upstream)
        assert_same([slope], [grad])
    told = f"{row.name}, {dtype}, {', '.join(names)}, {reduction}, {parameters}"
    (want, allowed), slopes = expected_of_classes(row, z.astype(arithmetic(dtype)), t, {"weight": weight, **parameters}, dtype)
    factor = np.broadcast_to(np.longdouble(upstream) * own / count, t.shape)
    assert_slopes([grad], [slopes], np.expand_dims(factor, 1), np.expand_dims(counted, 1), dtype, told)
    assert_value(value, want, allowed, own, counted, count, reduction, dtype, told)


def options_of_classes(rng, t, classes, names, dtype):
    """Return the weights of classes and of pixels, which pixels count, and the options of a call that say so."""
    weight = rng.choice([0.25, 1.0, 3.0], classes) if "weight" in names else np.ones(classes)
    own = rng.choice([0.0, 0.25, 1.0, 3.0], t.shape) if "pixel_weight" in names else np.ones(t.shape)
    counted = rng.random(t.shape) < 0.7 if "mask" in names else np.ones(t.shape, bool)
    counted.flat[0] = True
    options = chosen(names, weight=weight.astype(dtype), pixel_weight=own.astype(dtype), mask=counted)
    if "ignored" in names:
        options["ignore_index"] = int(t.flat[-1])
        counted = counted & (t != t.flat[-1])
    return weight, own, counted, options


def expected_of_classes(row, z, t, parameters, dtype):
    """Return the value of every pixel and the slopes, each with how far the loss may be from it before it is stored."""
    name = row.name + (", label_smoothing" if "label_smoothing" in parameters else "")
    found = []
    for quantity, (want, magnitude) in zip(("value", "slope"), row.oracle(z, t, oracle.LONG, **parameters), strict=False):
        limit = HALF if dtype in HALVES else ULP[name, quantity]
        lost = np.finfo(arithmetic(dtype)).tiny  # factors below the smallest normal number have lost digits
        found.append((want, limit * spacing(magnitude, dtype) + lost))
    return found


# --- regions and parts ------------------------------------------------------------------------------------------------


def check_regions(dtype, shape, seed, pokes, groups, names, smooth):
    """Compare Dice losses and their slopes with the oracle, and Dice with cross-entropy with the sum of the parts."""
    rng, wide = np.random.default_rng(seed), arithmetic(dtype)
    z, t = (x.astype(wide) for x in operands(LOSSES["dice_with_logits_loss"], rng, dtype, shape, pokes, ()))
    w = rng.choice([0.25, 1.0, 3.0], shape).astype(wide) if "weight" in names else np.ones(shape, wide)
    counted = rng.random(shape) < 0.7 if "mask" in names else np.ones(shape, bool)
    counted[..., 0] = True  # an element of every region
    options = {**groups, "weight": w, "mask": counted}
    got = losses_and_slopes(z, t, smooth=smooth, **options)
    assert_true(got, oracle.dice_with_logits_loss(np.where(counted, z, 0), t, w * counted, smooth, **groups), wide)
    if dtype != wide:
        loss, slope = losses_and_slopes(z.astype(dtype), t.astype(dtype), smooth=smooth, **options)
        np.testing.assert_allclose(loss, got[0], rtol=HALF_SUM)
        assert_rounded(slope, got[1])
    check_sum_of_parts(z, t, options, smooth, rng)


def check_sum_of_parts(z, t, options, smooth, rng):
    """Compare Dice with cross-entropy with its two parts."""
    of_dice, of_entropy = rng.choice([0.0, 0.5, 1.0, 3.0], 2)
    reduction = rng.choice([name for name in reductions(options) if name != "none"])
    entropy = fl.binary_cross_entropy_with_logits
    dice = fl.dice_with_logits_loss.value_and_grad(z, t, smooth=smooth, reduction=reduction, **options)
    plain = entropy.value_and_grad(z, t, options["weight"], mask=options["mask"], reduction=reduction)
    weights = {"dice_weight": of_dice, "bce_weight": of_entropy}
    both = fl.dice_bce_with_logits_loss.value_and_grad(z, t, smooth=smooth, reduction=reduction, **options, **weights)
    for got, a, b in zip(both, dice, plain, strict=True):
        assert_close(got, of_dice * np.asarray(a, np.float64) + of_entropy * np.asarray(b, np.float64), 2 * SUM[z.dtype])


def check_objective(dtype, shape, seed, pokes, names, reconstruction, beta):
    """Compare the objective of a variational autoencoder with its parts, bit by bit."""
    rng, row = np.random.default_rng(seed), LOSSES["vae_loss"]
    z, t, mu, logvar = row.draw(rng, dtype, shape)
    for at, value in pokes:
        z.flat[at % z.size] = value if abs(value) <= 88 else 0
    options = chosen(names, weight=rng.random(shape).astype(dtype), mask=rng.random(shape) < 0.7)
    images, of_images = PARTS[reconstruction].value_and_grad(z, t, reduction="batchmean", **options)
    divergence = fl.gaussian_kl_loss(mu, logvar, reduction="batchmean")
    of_latents = fl.gaussian_kl_loss.grad(mu, logvar, reduction="batchmean", grad_output=beta)
    value, grads = fl.vae_loss.value_and_grad(z, t, mu, logvar, reconstruction=reconstruction, beta=beta, **options)
    assert_same(value, (images + beta * divergence, images, divergence))
    assert_same(grads, (of_images, *of_latents))


# --- examples ---------------------------------------------------------------------------------------------------------


def parameters_of(row):
    """Return the settings of a loss at which its errors are promised."""
    more = {
        "binary_cross_entropy_with_logits": [{"pos_weight": 2.5}, {"label_smoothing": 0.1}],
        "cross_entropy": [{"label_smoothing": 0.1}],
    }
    return [*row.settings, *more.get(row.name, [])]


def kinds(row):
    """Return kinds of calls: dtype, options, reduction and parameters. A normal run takes few, because each compiles its kernels."""
    options = CLASS_OPTIONS if row.has_classes else [names for names in OPTIONS if row.has_targets or "images" not in names]
    reductions, parameters = ["none", "mean", "sample_mean"], parameters_of(row)
    if LONG_RUN:
        return list(itertools.product(FLOATS, options, reductions, parameters))
    first = [*SUMS, *CLASSES].index(row)
    return [(FLOATS[(first + k) % 4], names, reductions[k % 3], parameters[k % len(parameters)]) for k, names in enumerate(options)]


def pokes(special):
    """Draw some elements and special numbers to put there."""
    return st.lists(st.tuples(st.integers(0, 139), st.sampled_from(special)), max_size=4)


def shapes(usual=(2, 1, 1, 70)):
    """Draw the shape of a batch. A normal run takes one, because numbers of regions and strides are compiled in."""
    return st.lists(st.integers(1, 9), min_size=4, max_size=4).map(tuple) if LONG_RUN else st.just(usual)


in_parts = pytest.mark.timeout(0 if LONG_RUN else 300)


@in_parts
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums_over_elements(case):
    is_plain = case.name in ("sigmoid_focal_loss", "gaussian_kl_loss")  # whose oracle knows no infinities
    special = [x for x in POKES if not (np.isnan(x) and case.name == "gaussian_kl_loss")] + (BEYOND if not is_plain else [])

    @fuzz
    @given(data=st.data(), shape=shapes(), seed=st.integers(0, 2**32), poked=pokes(special), kind=st.sampled_from(kinds(case)))
    def calls(data, shape, seed, poked, kind):
        dtype, names, reduction, parameters = kind
        layouts = [data.draw(views()) for _ in range(2)] if LONG_RUN else []
        check(case, dtype, shape, seed, poked, names, parameters, reduction, layouts)

    calls()


@in_parts
@pytest.mark.parametrize("case", CLASSES, ids=str)
def test_sums_over_pixels(case):
    special = [x for x in POKES if not np.isnan(x)]

    @fuzz
    @given(data=st.data(), shape=shapes((3, 5, 1, 9)), seed=st.integers(0, 2**32), poked=pokes(special), kind=st.sampled_from(kinds(case)))
    def calls(data, shape, seed, poked, kind):
        dtype, names, reduction, parameters = kind
        layouts = data.draw(views()) if LONG_RUN else []
        check_classes(case, dtype, shape, seed, poked, names, parameters, reduction, layouts)

    calls()


@in_parts
def test_regions():
    kinds = (
        itertools.product(FLOATS, GROUPS, ((), ("weight", "mask")))
        if LONG_RUN
        else zip(FLOATS, GROUPS, [("weight", "mask"), ()] * 2, strict=True)
    )

    @fuzz
    @given(shape=shapes(), seed=st.integers(0, 2**32), poked=pokes([0.0, 1e-20, 15.9, -88.5, 104.0]), kind=st.sampled_from(list(kinds)),
           smooth=st.sampled_from([1e-5, 1.0, 3.0]))  # fmt: skip
    def calls(shape, seed, poked, kind, smooth):
        dtype, groups, names = kind
        check_regions(dtype, shape, seed, poked, groups, names, smooth)

    calls()


@in_parts
def test_objectives():
    kinds = itertools.product(FLOATS, OPTIONS[:3], ("bce", "mse")) if LONG_RUN else zip(FLOATS, OPTIONS, ("bce", "mse") * 2, strict=True)

    @fuzz
    @given(shape=shapes(), seed=st.integers(0, 2**32), poked=pokes(POKES[:-1]), kind=st.sampled_from(list(kinds)),
           beta=st.sampled_from([0.0, 0.5, 4.0]))  # fmt: skip
    def calls(shape, seed, poked, kind, beta):
        dtype, names, reconstruction = kind
        check_objective(dtype, shape, seed, poked, names, reconstruction, beta)

    calls()
