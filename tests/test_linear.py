"""Losses of the outputs of a linear layer, compared with the layer and the loss apart: every piece, option and reduction, and memory."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest

import fastloss as fl
from fastloss.core.layer import LinearCall
from tests import devices
from tests.ulp import MATRICES, SUM, assert_close

BCE, CE = fl.binary_cross_entropy_with_logits, fl.cross_entropy
PIECES = [8, 256, 1 << 20]  # bytes: an output at a time, some, all
SHAPES = {"samples": (7, 5), "row": (3, 5, 6), "image": (3, 5, 6, 4), "volume": (2, 5, 3, 4, 2)}
OUTPUTS = 11


@fl.elementwise_loss
def doubled_squares(z, t, factor=2.0):
    d = z - t
    return factor * d * d, 2.0 * factor * d


def apart(loss, x, w, t, b, **options):
    """Return the loss and the gradients of a layer whose outputs exist."""
    entries = np.moveaxis(x, 1, -1)
    outputs = np.ascontiguousarray(np.moveaxis(entries @ w.T + (0 if b is None else b), -1, 1))
    value, slopes = loss.value_and_grad(outputs, t, **options)
    slopes = np.moveaxis(slopes, 1, -1)
    rows = slopes.reshape(-1, slopes.shape[-1])
    by_weight = rows.T @ entries.reshape(len(rows), entries.shape[-1])
    return value, (np.moveaxis(slopes @ w, -1, 1), by_weight, None if b is None else rows.sum(axis=0))


def layer(rng, shape, dtype=np.float64, has_bias=True):
    """Return input, weight and bias of a layer."""
    x, w, b = rng.standard_normal(shape), rng.standard_normal((OUTPUTS, shape[1])), rng.standard_normal(OUTPUTS)
    return x.astype(dtype), w.astype(dtype), b.astype(dtype) if has_bias else None


def outputs_of(shape):
    """Return the shape of the outputs of a layer with an input of this shape."""
    return (shape[0], OUTPUTS, *shape[2:])


def assert_equal(got, want, tolerance):
    """Assert that a value and the gradients are close to others."""
    assert_close(got[0], want[0], tolerance)
    for a, b in zip(got[1], want[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, tolerance)


OPTIONS = {
    "none": lambda rng, shape: {},
    "weight": lambda rng, shape: {"weight": rng.random(shape)},
    "mask": lambda rng, shape: {"mask": rng.random(shape) < 0.6},
    "mask of places": lambda rng, shape: {"mask": rng.random(shape[2:] or 1) < 0.6},
    "weight of outputs": lambda rng, shape: {"pos_weight": rng.random((OUTPUTS, *[1] * len(shape[2:])))},
    "number": lambda rng, shape: {"pos_weight": 3.0, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_pieces_options_and_reductions(option, shape, piece, rng):
    shape = SHAPES[shape]
    x, w, b = layer(rng, shape)
    t, options = (rng.random(outputs_of(shape)) < 0.4).astype(np.uint8), OPTIONS[option](rng, outputs_of(shape))
    for reduction in ("mean", "sum", "batchmean", "sample_mean", "sample_sum"):
        upstream = rng.random(shape[0]) if reduction.startswith("sample") else 3.0
        want = apart(BCE, x, w, t, b, reduction=reduction, grad_output=upstream, **options)
        got = fl.linear(BCE, piece).value_and_grad(x, w, t, b, reduction=reduction, grad_output=upstream, **options)
        assert_equal(got, want, MATRICES[x.dtype])
        assert_close(fl.linear(BCE, piece)(x, w, t, b, reduction=reduction, **options), want[0], MATRICES[x.dtype])


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "ignore_index": 3}, {"weight": True}, {"pixel_weight": True}], ids=str)
def test_classes(options, shape, piece, rng):
    shape = SHAPES[shape]
    x, w, b = layer(rng, shape)
    t = rng.integers(0, OUTPUTS, (shape[0], *shape[2:])).astype(np.uint8)
    arrays = {"weight": rng.random(OUTPUTS), "pixel_weight": rng.random(t.shape)}
    options = {name: arrays[name] if value is True else value for name, value in options.items()}
    for reduction in ("mean", "sample_mean"):
        got = fl.linear(CE, piece).value_and_grad(x, w, t, b, reduction=reduction, **options)
        assert_equal(got, apart(CE, x, w, t, b, reduction=reduction, **options), MATRICES[x.dtype])


LOSSES = [fl.mse_loss, fl.sigmoid_focal_loss, fl.log_cosh_loss, doubled_squares, fl.focal_cross_entropy_loss]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_every_kind_of_loss(loss, dtype, rng):
    x, w, b = layer(rng, (70, 33), dtype, has_bias=False)
    t = rng.integers(0, OUTPUTS, 70) if "focal_cross" in loss.__name__ else rng.random((70, OUTPUTS)).astype(dtype)
    assert_equal(fl.linear(loss, 512).value_and_grad(x, w, t), apart(loss, x, w, t, b, reduction="mean"), MATRICES[dtype])


@pytest.mark.parametrize("order", ["contiguous", "transposed", "every second", "reversed"])
def test_memory_orders_of_what_is_read(order, rng):
    views = {
        "contiguous": lambda a: a, "transposed": lambda a: np.ascontiguousarray(a.T).T,
        "every second": lambda a: np.repeat(a, 2, -1)[..., ::2], "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    }  # fmt: skip
    for shape in SHAPES.values():
        x, w, b = layer(rng, shape)
        t = rng.random(outputs_of(shape))
        got = fl.linear(BCE, 256).value_and_grad(*map(views[order], (x, w, t, b)))
        assert_equal(got, apart(BCE, x, w, t, b), MATRICES[x.dtype])


def test_gradients_are_written_or_added_to_given_arrays(rng):
    x, w, b = layer(rng, SHAPES["image"])
    t = rng.random(outputs_of(x.shape))
    out = tuple(np.full_like(a, 7) for a in (x, w, b))
    _, got = fl.linear(BCE, 128).value_and_grad(x, w, t, b, out=out)
    want = fl.linear(BCE, 128).grad(x, w, t, b)
    for a, given, wanted in zip(got, out, want, strict=True):
        assert a is given
        np.testing.assert_array_equal(a, wanted)
    fl.linear(BCE, 128).grad(x, w, t, b, out=out, accumulate=True)
    for given, wanted in zip(out, want, strict=True):
        assert_close(given, 2 * wanted, SUM[x.dtype])


def test_the_largest_error_is_that_of_products_of_float32(rng):
    x, w, b = layer(rng, (300, 200), np.float32)
    t = rng.random((300, OUTPUTS)).astype(np.float32)
    true = apart(BCE, *(a.astype(np.float64) for a in (x, w, t, b)))[1]
    ours, plain = fl.linear(BCE, 4096).grad(x, w, t, b), apart(BCE, x, w, t, b)[1]
    for a, b, c in zip(ours, plain, true, strict=True):
        assert np.abs(a - c).max() <= 2 * np.abs(b - c).max()


def test_memory_does_not_depend_on_the_number_of_outputs(rng):
    x = rng.standard_normal((256, 16), dtype=np.float32)
    peaks = []
    for outputs in (20_000, 80_000):  # of 20 and 82 MB
        w, t = rng.standard_normal((outputs, 16), dtype=np.float32), np.zeros((256, outputs), np.uint8)
        out = np.empty_like(x), np.empty_like(w)
        fl.linear(BCE).grad(x, w, t, out=out)
        tracemalloc.start()
        fl.linear(BCE).grad(x, w, t, out=out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 12 << 20


@pytest.mark.parametrize("shape", [(0, 5), (7, 0), (0, 5, 4)])
def test_empty_arrays(shape):
    x, w = np.ones(shape), np.ones((OUTPUTS, shape[1]))
    t = np.zeros(outputs_of(shape))
    value, grads = fl.linear(BCE).value_and_grad(x, w, t, reduction="sum")
    want = apart(BCE, x, w, t, None, reduction="sum")
    assert_equal((value, grads), want, MATRICES[x.dtype])


def test_a_mean_over_no_elements_is_nan_and_has_no_slope(rng):
    x, w, b = layer(rng, (7, 5))
    nothing = np.zeros((7, OUTPUTS), bool)
    with pytest.warns(RuntimeWarning, match="mean of no elements"):
        value, grads = fl.linear(BCE).value_and_grad(x, w, np.zeros((7, OUTPUTS)), b, mask=nothing)
    assert np.isnan(value)
    assert not any(np.any(grad) for grad in grads)


def test_an_error_names_the_element_of_the_whole_target_and_writes_nothing(rng):
    x, w, b = layer(rng, (9, 5))
    t = np.zeros((9, OUTPUTS), np.uint8)
    t[6, 8] = 200
    out = tuple(np.full_like(a, 7) for a in (x, w, b))
    for given in ({}, {"out": out}):
        with pytest.raises(ValueError, match=r"target\[6, 8\] is 200; .* pass target_scale=1/255$"):
            fl.linear(BCE, 64).grad(x, w, t, b, **given)
    assert all(np.all(a == 7) for a in out)
    with pytest.raises(ValueError, match=r"target\[5\] is 11; accepted: class indices from 0 to 10"):
        fl.linear(CE, 64)(x, w, np.array([0, 1, 2, 3, 4, 11, 6, 7, 8]), b)


def arguments(**changed):
    """Return arguments of a call, some of them changed."""
    given = {"input": np.ones((4, 3)), "linear_weight": np.ones((2, 3)), "target": np.zeros((4, 2)), **changed}
    return [given.pop(name) for name in ("input", "linear_weight", "target")], given


WRONG = [
    ({"input": np.ones(3)}, r"input has shape \(3,\) and linear_weight \(2, 3\); accepted: \(N, K, ...\) and \(P, K\)"),
    ({"linear_weight": np.ones((3, 2))}, r"input has shape \(4, 3\) and linear_weight \(3, 2\); accepted: \(N, K, ...\) and \(P, K\)"),
    (
        {"linear_weight": np.ones((2, 3), np.float32)},
        "input has dtype float64 and linear_weight float32; accepted: the same, or float32 with 16 bits",
    ),
    ({"linear_bias": np.ones(3)}, r"linear_bias has shape \(3,\); accepted: \(2,\), a number for each row of linear_weight"),
    ({"target": np.zeros((4, 3))}, r"input has shape \(4, 2\) and target \(4, 3\)"),
    ({"reduction": "none"}, "reduction 'none' is not supported here; accepted: 'mean', 'sum', 'batchmean', 'sample_mean', 'sample_sum'"),
    ({"gamma": 2.0}, "unknown option gamma; accepted: pos_weight"),
    ({"out": np.ones((4, 3))}, "out must be 2 arrays, one for each gradient"),
    ({"out": (np.ones((4, 3)), np.ones((3, 2)))}, r"out\[1\] has shape \(3, 2\) and dtype float64; the result has shape \(2, 3\)"),
    ({"out": (np.ones((3, 4)).T, np.ones((2, 3)))}, r"out\[0\] has shape \(4, 3\) and strides .*; accepted: C-contiguous arrays"),
    ({"input": np.ones((4, 3), int)}, "input has dtype int64; accepted: float16, bfloat16, float32, float64"),
    ({"reduction": ""}, "reduction '' is unknown; accepted: 'mean'"),
    ({"accumulate": True}, "accumulate=True adds to the arrays that out passes, and out is None"),
]


@pytest.mark.parametrize(("changed", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_wrong_use(changed, said):
    operands, options = arguments(**changed)
    with pytest.raises((TypeError, ValueError), match=said):
        fl.linear(BCE).value_and_grad(*operands, **options)


def test_given_arrays_share_no_memory(rng):
    x, w, b = layer(rng, (7, 5))
    t, both = rng.random((7, OUTPUTS)), np.zeros((7 + OUTPUTS, 5))
    mask = np.ones((7, OUTPUTS))
    for out, name in (((x, w * 0, b * 0), "input"), ((x * 0, w, b * 0), "linear_weight"), ((both[:7], both[1:12], b * 0), r"out\[0\]")):
        with pytest.raises(ValueError, match=rf"shares memory with {name}; accepted: memory of its own"):
            fl.linear(BCE).grad(x, w, t, b, out=out)
    with pytest.raises(ValueError, match=r"out\[0\] shares memory with weight"):
        fl.linear(BCE).grad(x, w, t, b, mask, out=(mask.reshape(-1)[:35].reshape(7, 5), w * 0, b * 0))


def test_frameworks_that_are_not_supported():
    dask = pytest.importorskip("dask.array")
    x, w, t = dask.ones((4, 3)), np.ones((2, 3)), np.ones((4, 2))
    for call in (fl.linear(BCE), fl.linear(BCE).grad):
        with pytest.raises(TypeError, match="input is a Array of Dask; accepted: NumPy arrays, CuPy arrays, and tensors of PyTorch"):
            call(x, w, t)


def test_losses_that_need_all_outputs_are_refused():
    for loss in (fl.dice_with_logits_loss, fl.gaussian_kl_loss, fl.vae_loss, "mse"):
        with pytest.raises(TypeError, match=r"accepted: a loss with one value for each element or each entry, and one gradient"):
            fl.linear(loss)


@pytest.mark.parametrize("cp", ["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", ["samples", "image"])
def test_on_a_device(shape, cp, monkeypatch, rng):
    module = devices.array_module(cp, monkeypatch)
    x, w, b = layer(rng, SHAPES[shape])
    t, mask = rng.random(outputs_of(x.shape)), rng.random(outputs_of(x.shape)) < 0.7
    k = rng.integers(0, OUTPUTS, (len(x), *x.shape[2:])).astype(np.uint8)
    for loss, target, options in ((BCE, t, {"mask": mask}), (CE, k, {"ignore_index": 3})):
        for reduction in ("mean", "sample_mean"):
            on_device = {name: module.asarray(a) if np.ndim(a) else a for name, a in options.items()}
            call = fl.linear(loss, 256)
            value, gradient = call.value_and_grad(*map(module.asarray, (x, w, target, b)), reduction=reduction, **on_device)
            got = value.get(), [a.get() for a in gradient]
            assert_equal(got, call.value_and_grad(x, w, target, b, reduction=reduction, **options), MATRICES[x.dtype])


def test_it_can_be_compared_and_pickled():
    made = fl.linear(BCE)
    assert made == fl.linear(BCE) != fl.linear(CE)
    assert pickle.loads(pickle.dumps(made)) == made
    assert repr(made) == "<linear(binary_cross_entropy_with_logits)>"


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["16 bits", "with float32"])
def test_16_bits_are_computed_in_float32(half, is_mixed, rng):
    half = np.dtype(half if half == "float16" else pytest.importorskip("ml_dtypes").bfloat16)
    for shape in (SHAPES["samples"], SHAPES["image"]):
        x, w, b = layer(rng, shape, half)
        w, b = (w.astype(np.float32), b.astype(np.float32)) if is_mixed else (w, b)
        for t in ((rng.random(outputs_of(shape)) < 0.4).astype(np.uint8), rng.random(outputs_of(shape)).astype(half)):
            got = fl.linear(BCE, 256).value_and_grad(x, w, t, b)
            want = fl.linear(BCE, 256).value_and_grad(*(a.astype(np.float32) for a in (x, w)), t, b.astype(np.float32))
            assert got[0] == want[0]
            for a, wanted in zip(got[1], want[1], strict=True):
                assert a.dtype == np.float32
                np.testing.assert_array_equal(a, wanted)


def test_targets_that_nothing_refuses_are_not_read_twice(monkeypatch, rng):
    x, w, b = layer(rng, (7, 5))
    out, checked = tuple(np.empty_like(a) for a in (x, w, b)), []
    monkeypatch.setattr(LinearCall, "check_elements", lambda call: checked.append(call))
    for t, is_checked in (
        (rng.random((7, OUTPUTS)), False),
        (np.zeros((7, OUTPUTS), np.uint8), True),
        (np.zeros((7, OUTPUTS), bool), False),
    ):
        checked.clear()
        fl.linear(BCE).grad(x, w, t, b, out=out)
        assert bool(checked) == is_checked
        fl.linear(BCE).grad(x, w, t, b, out=out, validate=True)
        assert checked
