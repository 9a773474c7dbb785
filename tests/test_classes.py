"""Losses of class indices: against definitions in extended precision, PyTorch's, and their relations."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
from ml_dtypes import bfloat16

import fastloss as fl
from fastloss.cpu.abi import LEAST_BLOCK
from tests import oracle
from tests.devices import is_about_the_host, only_on, some
from tests.table import FLOATS
from tests.ulp import QUANTITIES, SUM, ULP, assert_close, ulp_error

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.alike("stand-in")]

CE, FOCAL = fl.cross_entropy, fl.focal_cross_entropy_loss
REDUCTIONS = ("mean", "sum", "none", "batchmean", "sample_mean", "sample_sum")
CASES = (
    (CE, {}, "cross_entropy"),
    (CE, {"label_smoothing": 0.1}, "cross_entropy, label_smoothing"),
    (FOCAL, {}, "focal_cross_entropy_loss"),
    (FOCAL, {"gamma": 0.5}, "focal_cross_entropy_loss"),
)
SHAPES = {
    "pixels": (3, 5, 7, 11), "one pixel": (2, 19, 1), "samples": (300, 10), "one sample": (5,), "volume": (2, 3, 4, 5, 6),
    "many classes": (7, 1000), "two classes": (4, 2, 33), "one class": (4, 1, 9), "a long row": (1, 19, 2000), "short rows": (70, 4, 3),
}  # fmt: skip


def last(x):
    """Move the classes to the end."""
    return np.moveaxis(x, min(1, x.ndim - 1), -1)


def of_entries(loss, z, t, **options):
    """Return the values, the slopes and, if the loss has them, the curvatures."""
    value, grad = loss.value_and_grad(z, t, reduction="none", **options)
    return value, grad, *([loss.curvature(z, t, reduction="none", **options)] if hasattr(loss, "curvature") else [])


def draw(rng, shape, dtype=np.float32, targets=np.uint8, scale=3.0):
    """Return logits and class indices."""
    classes, entries = (shape[1], (shape[0], *shape[2:])) if len(shape) > 1 else (shape[0], ())
    targets = targets if classes <= np.iinfo(targets).max else np.int64
    return (scale * rng.standard_normal(shape)).astype(dtype), rng.integers(0, classes, entries).astype(targets)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 5, 19, 150, 1000])
@pytest.mark.parametrize(("loss", "options", "name"), CASES)
def test_every_digit_in_extended_precision(loss, options, name, classes, scale, dtype, rng):
    z, t = draw(rng, (4, classes, 300 if classes < 1000 else 50), dtype, scale=scale)
    results, wanted = of_entries(loss, z, t, **options), getattr(oracle, loss.__name__)(z, t, oracle.LONG, **options)
    for quantity, got, (true, magnitude) in zip(QUANTITIES[: len(wanted)], results, wanted, strict=True):
        assert ulp_error(got, true, magnitude, dtype)[magnitude > np.finfo(dtype).tiny].max() <= ULP[name, quantity]


@pytest.mark.parametrize("classes", [3, 4, 6])
@pytest.mark.parametrize("entries", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_largest_error_of_many_entries(entries, classes, dtype, rng):
    for part in range(max(1, entries // 500_000)):
        z, t = draw(rng, (min(entries, 500_000), classes), dtype, scale=1.0 + part % 4)
        for quantity, got, (true, magnitude) in zip(QUANTITIES, of_entries(CE, z, t), oracle.cross_entropy(z, t, oracle.LONG), strict=True):
            assert ulp_error(got, true, magnitude, dtype).max() <= ULP["cross_entropy", quantity]


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_of_every_shape(case, reduction, dtype, rng):
    z, t = draw(rng, SHAPES[case], dtype)
    is_large = t[:1].size > 9 if t.ndim else False  # so that no mean is one of no entries
    weight, ignored = rng.uniform(0.5, 2, z.shape[min(1, z.ndim - 1)]).astype(dtype), 1 if is_large else -100
    mask, own = rng.random(t.shape) < (0.8 if is_large else 1.0), rng.uniform(0.5, 2, t.shape).astype(dtype)
    if not t.shape and reduction not in ("mean", "sum", "none"):
        with pytest.raises(ValueError, match="needs a first axis"):
            CE(z, t, reduction=reduction)
        return
    counted = mask & (t != ignored)
    divisors = np.where(counted, weight[t], 0).astype(np.longdouble)
    (values, _), (slopes, _), (curvatures, _) = oracle.cross_entropy(z, t, oracle.LONG, weight)
    values = np.where(counted, values * own, 0)
    along = tuple(range(1, t.ndim)) if reduction.startswith("sample") else None
    divisor = {"mean": divisors.sum(axis=along), "sample_mean": divisors.sum(axis=along), "batchmean": len(z)}.get(reduction, 1)
    want = (values if reduction == "none" else values.sum(axis=along)) / divisor
    factor = np.reshape(divisor, np.shape(divisor) + (1,) * (t.ndim - np.ndim(divisor)))
    want_slopes, want_curvatures = (np.where(counted[..., None], last(x) * (own / factor)[..., None], 0) for x in (slopes, curvatures))
    options = {"ignore_index": ignored, "mask": mask, "pixel_weight": own, "reduction": reduction}
    value, grad = CE.value_and_grad(z, t, weight, **options)
    assert_close(value, want, SUM[np.dtype(dtype)])
    assert_close(last(grad), want_slopes, SUM[np.dtype(dtype)])
    assert_close(last(CE.curvature(z, t, weight, **options)), want_curvatures, SUM[np.dtype(dtype)])
    np.testing.assert_array_equal(CE.grad(z, t, weight, **options), grad)
    np.testing.assert_array_equal(CE(z, t, weight, **options), value)


def test_calls_of_one_kind_and_of_others(rng):
    """The first call of a kind prepares the pass of all, whatever their numbers are."""
    z, t = draw(rng, (40, 5))
    weight = rng.uniform(0.5, 2, 5).astype(np.float32)
    calls = [
        (loss, options | {"reduction": reduction})
        for reduction in ("mean", "sum", "none", "sample_sum")
        for loss, options in [
            (CE, {}), (CE, {"label_smoothing": 0.1}), (CE, {"label_smoothing": 0.3}), (CE, {"ignore_index": 1}), (CE, {"ignore_index": 2}),
            (CE, {"weight": weight}), (CE, {"mask": t != 3}), (CE, {"pixel_weight": rng.random(40)}), (FOCAL, {}), (FOCAL, {"gamma": 1.5}),
            (FOCAL, {"gamma": 3.0}), (FOCAL, {"gamma": 2.0}),
        ]
    ]  # fmt: skip
    for _ in range(2):
        for loss, options in calls:
            for order in (np.ascontiguousarray, np.asfortranarray):
                given = order(z)
                want = loss.value_and_grad(given.view(Other), t, **options)  # of a subclass, for which no pass is prepared
                for out in (None, np.empty_like(given)):
                    got = loss.value_and_grad(given, t, **options, **({} if out is None else {"out": out}))
                    np.testing.assert_array_equal(got[0], want[0])
                    np.testing.assert_array_equal(got[1], want[1])


class Other(np.ndarray):
    """An array of another class."""


ORDERS = {
    "classes last": lambda z: np.moveaxis(np.moveaxis(z, 1, -1).copy(), -1, 1),
    "samples last": np.asfortranarray,
    "classes reversed": lambda z: z[:, ::-1].copy()[:, ::-1],
    "rows reversed": lambda z: z[..., ::-1].copy()[..., ::-1],
    "every other": lambda z: np.repeat(z, 2, axis=-1)[..., ::2],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(3, 5, 9, 40), (130, 7, 3)])
def test_any_memory_order(order, shape, dtype, rng):
    z, t = draw(rng, shape, dtype)
    want = CE.value_and_grad(z, t, reduction="sample_sum")
    given = ORDERS[order](z)
    value, grad = CE.value_and_grad(given, t, reduction="sample_sum", out=ORDERS[order](np.empty_like(z)))
    assert_close(value, want[0], SUM[np.dtype(dtype)])
    np.testing.assert_array_equal(grad, want[1])
    in_place = CE.grad(given, t, reduction="sample_sum", out=given)
    assert in_place.base is given or in_place is given or np.shares_memory(in_place, given)
    np.testing.assert_array_equal(given, want[1])


# numbers of classes and entries that are computed in tiles where classes lie side by side: of none, of several, of several and a rest
SIDE_BY_SIDE = list(itertools.product((1, 2, 3, 7, 8, 9, 16, 19, 33, 150), (1, 7, 16, 17, LEAST_BLOCK + 3)))
VIEWS = {  # of memory with a row for each entry
    "whole": lambda rows: rows,
    "some classes": lambda rows: rows[:, 2:],
    "every other entry, reversed": lambda rows: rows[::-2],
}


def side_by_side(z, view="whole"):
    """Return a copy of an array of one sample, in memory in which the classes of an entry lie side by side."""
    _, classes, entries = z.shape
    rows = VIEWS[view](np.empty((entries * (2 if "other" in view else 1), classes + (2 if "some" in view else 0)), z.dtype))
    rows[...] = z[0].T
    return rows.T[np.newaxis]


@is_about_the_host
@pytest.mark.parametrize(
    ("case", "view"), [("indices", "every other entry, reversed"), ("options", "whole"), ("probabilities", "some classes")]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_classes_side_by_side_change_no_digit(case, view, dtype, rng):
    for classes, entries in SIDE_BY_SIDE:
        z, t = draw(rng, (1, classes, entries), dtype)
        options = {"label_smoothing": 0.1, "weight": rng.random(classes), "mask": t % 3 != 1} if case == "options" else {}
        targets = [t, t]
        if case == "probabilities":
            y = np.moveaxis(rng.dirichlet(np.ones(classes), (1, entries)), -1, 1).astype(dtype)
            targets = [y, side_by_side(y, view)]
        value, grad = CE.value_and_grad(z, targets[0], reduction="none", **options)
        given = side_by_side(z, view)
        curvature = CE.curvature(given, targets[1], reduction="none", out=side_by_side(z, view), **options)
        np.testing.assert_array_equal(curvature, CE.curvature(z, targets[0], reduction="none", **options))
        for target, out in ((targets[1], side_by_side(z, view)), (targets[0], np.empty_like(z)), (targets[1], given)):
            got, slopes = CE.value_and_grad(given, target, reduction="none", out=out, **options)
            np.testing.assert_array_equal(got, value)
            np.testing.assert_array_equal(slopes, grad)


@pytest.mark.parametrize("targets", [np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.int64, bool])
def test_indices_of_any_integer_type(targets, rng):
    z, t = draw(rng, (3, 2 if targets is bool else 7, 50))
    np.testing.assert_array_equal(CE.grad(z, t.astype(targets)), CE.grad(z, t))


@pytest.mark.parametrize("half", [np.float16, bfloat16])
def test_16_bits_are_rounded_once(half, rng):
    z, t = draw(rng, (3, 5, 200), half)
    value, grad = CE.value_and_grad(z, t)
    want, exact = CE.value_and_grad(z.astype(np.float32), t)
    assert value == want
    np.testing.assert_array_equal(grad, exact.astype(half))


def test_infinite_logits_have_the_limits(dtype):
    inf, nan = np.inf, np.nan
    z = np.array([[-inf, 0, 1], [inf, 0, 1], [inf, inf, 0], [-inf, -inf, -inf], [nan, 0, 1], [-inf, -inf, 2]], dtype)
    t = np.array([0, 0, 0, 0, 1, 2])
    value, grad = CE.value_and_grad(z, t, reduction="none")
    np.testing.assert_array_equal(value, [inf, 0, nan, nan, nan, 0])
    p = 1 / (1 + math.exp(-1))
    wanted = np.array([[-1, 1 - p, p], [0, 0, 0], [nan] * 3, [nan] * 3, [nan] * 3, [0, 0, 0]], dtype)
    np.testing.assert_array_equal(np.isnan(grad), np.isnan(wanted))
    assert_close(np.nan_to_num(grad), np.nan_to_num(wanted), SUM[np.dtype(dtype)])
    others = CE.value_and_grad(z, np.array([1, 1, 2, 1, 0, 0]), reduction="none")
    np.testing.assert_array_equal(others[0][[1, 5]], [inf, inf])
    np.testing.assert_array_equal(others[1][[1, 5]], [[1, -1, 0], [-1, 0, 1]])
    curvature = CE.curvature(z, t, reduction="sum")
    np.testing.assert_array_equal(np.isnan(curvature), np.isnan(wanted))
    assert_close(curvature[0], [0, p * (1 - p), p * (1 - p)], SUM[np.dtype(dtype)])
    assert not curvature[[1, 5]].any()
    mask = np.isfinite(value)
    assert np.isfinite(CE.grad(z, t, mask=mask)).all()


@pytest.mark.parametrize("gap", [20.0, 60.0, 80.0])
def test_saturated_logits_keep_their_digits(gap, dtype):
    z = np.array([[gap, 0.0, 0.5]], dtype)
    value, grad = CE.value_and_grad(z, [0])
    rest = math.exp(-gap) + math.exp(0.5 - gap)
    assert_close(value, math.log1p(rest), SUM[np.dtype(dtype)])
    p = np.array([[-rest, math.exp(-gap), math.exp(0.5 - gap)]]) / (1 + rest)
    assert_close(grad, p, SUM[np.dtype(dtype)])
    assert_close(CE.curvature(z, [0]), np.abs(p) * np.abs([p[0, 0] + 1, *(1 - p[0, 1:])]), SUM[np.dtype(dtype)])


def test_two_classes_are_the_sigmoid_losses_of_the_difference(dtype, rng):
    z, t = draw(rng, (50, 2, 40), dtype)
    difference = z[:, 1] - z[:, 0]
    z = np.stack([np.zeros_like(difference), difference], axis=1)
    assert_close(CE(z, t), fl.binary_cross_entropy_with_logits(difference, t), SUM[np.dtype(dtype)])
    curvature = fl.binary_cross_entropy_with_logits.curvature(difference, t)
    assert_close(CE.curvature(z, t), np.stack([curvature] * 2, axis=1), SUM[np.dtype(dtype)])
    focal = fl.sigmoid_focal_loss(difference, t, alpha=-1, gamma=1.5, reduction="mean")
    assert_close(FOCAL(z, t, gamma=1.5), focal, SUM[np.dtype(dtype)])


def test_two_classes_with_equal_logits(dtype):
    value, grad = CE.value_and_grad(np.array([[1.5, 1.5, -60.0]], dtype), [1])
    assert_close(value, math.log(2), SUM[np.dtype(dtype)])
    assert_close(grad, [[0.5, -0.5, math.exp(-61.5) / 2]], SUM[np.dtype(dtype)])


def test_relations(dtype, rng):
    z, t = draw(rng, (4, 6, 300), dtype)
    weight, mask = rng.random(6).astype(dtype), t != 3
    np.testing.assert_array_equal(FOCAL.grad(z, t, weight, gamma=0), CE.grad(z, t, weight))
    np.testing.assert_array_equal(CE.grad(z, t, weight, ignore_index=3), CE.grad(z, t, weight, mask=mask))
    np.testing.assert_array_equal(CE.grad(z, t, weight, mask=mask), CE.grad(z, np.where(mask, t, 255), weight, ignore_index=255))
    own = mask.astype(dtype)
    np.testing.assert_array_equal(CE.grad(z, t, reduction="sum", pixel_weight=own), CE.grad(z, t, reduction="sum", mask=mask))
    assert CE(z, t, ignore_index=3) == CE(z, t, mask=mask)
    value, grad = CE.value_and_grad(z, t, weight)
    own = CE.curvature(z, t, weight, "sum", mask=mask, out=np.empty_like(z))
    np.testing.assert_array_equal(own, CE.curvature(z, np.eye(6, dtype=dtype)[t].swapaxes(1, 2), weight, "sum", mask=mask))
    total = weight[t].sum(dtype=np.float64)
    assert_close(value, CE(z, t, weight, "sum") / total, SUM[np.dtype(dtype)])
    assert_close(grad, CE.grad(z, t, weight, "sum") / total, SUM[np.dtype(dtype)])


@is_about_the_host
def test_threads_and_batches_do_not_change_a_bit(rng):
    z, t = draw(rng, (6, 19, 90, 70))
    before = fl.get_num_threads()
    results = []
    for count in (1, 2, 3):
        fl.set_num_threads(count)
        results.append((CE(z, t), *CE.value_and_grad(z, t, reduction="sample_sum")))
    fl.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, want)
    weight = rng.random(19).astype(np.float32)
    totals = [fl.Accumulator(CE, ignore_index=4, weight=weight) for _ in range(2)]
    for total, cuts in zip(totals, ([0, 6], [0, 1, 4, 6]), strict=True):
        for a, b in itertools.pairwise(cuts):
            total.update(z[a:b], t[a:b])
    assert totals[0].compute() == totals[1].compute()
    assert_close(totals[0].compute(), CE(z, t, weight, ignore_index=4), SUM[np.dtype(np.float32)])


@pytest.mark.parametrize("length", [1, 15, 16, 17, LEAST_BLOCK, LEAST_BLOCK + 1, 1000])
def test_nothing_outside_the_gradient_is_written(length, dtype, rng):
    z, t = draw(rng, (2, 150, length), dtype)
    fenced = np.full((2, 150, length + 40), 7, dtype)
    CE.grad(z, t, reduction="sum", out=fenced[:, :, 20 : 20 + length])
    np.testing.assert_array_equal(fenced[:, :, 20 : 20 + length], CE.grad(z, t, reduction="sum"))
    fenced[:, :, 20 : 20 + length] = 7
    assert (fenced == 7).all()


def test_grad_output_is_the_chain_rule(dtype, rng):
    z, t = draw(rng, (3, 5, 20), dtype)
    upstream = rng.random(t.shape)
    slopes = CE.grad(z, t, reduction="sum")
    assert_close(CE.grad(z, t, reduction="none", grad_output=upstream), slopes * upstream[:, None], SUM[np.dtype(dtype)])
    per_sample = rng.random(3)
    got = CE.grad(z, t, reduction="sample_sum", grad_output=per_sample)
    assert_close(got, slopes * per_sample[:, None, None], SUM[np.dtype(dtype)])
    np.testing.assert_array_equal(CE.grad(z, t, reduction="sum", grad_output=2.0), 2 * slopes)


def test_empty_and_excluded_batches(device):
    def warns():  # a device does not tell the host how many entries count
        return pytest.warns(RuntimeWarning, match="mean of no elements") if device == "cpu" else contextlib.nullcontext()

    assert CE(np.zeros((0, 3)), np.zeros(0, int), reduction="sum") == 0
    with warns():
        assert math.isnan(CE(np.zeros((0, 3)), np.zeros(0, int)))
    with warns():
        value, grad = CE.value_and_grad(np.ones((2, 3)), np.full(2, -100))
    assert math.isnan(value)
    assert not grad.any()


Z, T = np.zeros((2, 3, 4), np.float32), np.zeros((2, 4), np.int64)
WRONG = {
    "a class too many": (ValueError, r"target\[1, 2\] is 3; accepted: class indices from 0 to 2, and ignore_index=-100",
        lambda: CE(Z, np.where(np.arange(8).reshape(2, 4) == 6, 3, 0))),
    "a negative class": (ValueError, r"target\[0, 0\] is -1", lambda: CE.grad(Z, T - 1)),
    "written": (ValueError, r"already been written", lambda: CE.grad(Z, T + 9, out=Z.copy())),
    "shape": (ValueError, r"target \(2, 5\); accepted as targets: class indices, .* shape \(2, 4\); probabilities, .* shape \(2, 3, 4\)",
        lambda: CE(Z, np.zeros((2, 5), int))),
    "fractions": (ValueError, r"target \(2, 4\); accepted as targets: class indices, of an integer dtype", lambda: CE(Z, T.astype(float))),
    "probabilities": (TypeError, "target has a floating-point dtype; accepted: class indices, of an integer dtype", lambda: FOCAL(Z, Z)),
    "weights": (ValueError, r"weight has shape \(4,\); accepted: \(3,\), a weight for each class", lambda: CE(Z, T, np.ones(4))),
    "weights of pixels": (ValueError, r"weight has shape \(4, 3\); accepted: \(3,\)", lambda: CE(Z, T, np.ones((4, 3)))),
    "mask of classes": (ValueError, r"mask has shape \(2, 3, 4\), which does not broadcast to the target's shape \(2, 4\)",
        lambda: CE(Z, T, mask=Z == 0)),
    "a number as weight": (ValueError, r"weight has shape \(\); accepted: \(3,\)", lambda: CE(Z, T, 2.0)),
    "ignored probabilities": (ValueError, "ignore_index excludes class indices", lambda: CE(Z, Z, ignore_index=1)),
    "smoothing": (ValueError, "label_smoothing is 1.5; accepted: from 0 to 1", lambda: CE(Z, T, label_smoothing=1.5)),
    "gamma": (ValueError, "gamma is -1; accepted: 0 or more", lambda: FOCAL(Z, T, gamma=-1)),
    "option": (TypeError, "unknown option beta", lambda: CE(Z, T, beta=1)),
    "no axis": (ValueError, r"input has shape \(\); accepted: \(N, C, ...\)", lambda: CE(np.float32(1), 0)),
    "out": (ValueError, "the value is none", lambda: CE(Z, T, out=Z.copy())),
    "small out": (ValueError, r"out has shape", lambda: CE.grad(Z, T, out=np.empty((2, 4, 3), np.float32))),
    "overlap": (ValueError, "out shares memory with input", lambda: CE.grad(Z[:, :, :3], T[:, :3], out=Z[:, :, 1:])),
    "curvature of a target": (NotImplementedError, "has no target_slope", lambda: CE.require("target_slope")),
}  # fmt: skip


tells_the_host = only_on("cpu", reason="computes nothing, or expects the first bad index at once: a device names any of them later")
OF_THE_HOST = ("a class too many", "a negative class", "written", "curvature of a target")


@pytest.mark.parametrize("case", some(list(WRONG), tells_the_host, *OF_THE_HOST))
def test_wrong_use(case):
    error, message, make = WRONG[case]
    with pytest.raises(error, match=message):
        make()
