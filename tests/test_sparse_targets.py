"""Sparse targets of `fastloss.linear`: every format, dtype and option, compared with the same targets as a dense array; and memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import fastloss as fl
from tests import devices
from tests.test_linear import BCE, CE, OUTPUTS, PIECES, assert_equal, layer
from tests.ulp import MATRICES

sparse = pytest.importorskip("scipy.sparse")


def targets(rng, samples=7, dtype=np.uint8, outputs=OUTPUTS):
    """Return sparse targets in compressed rows, of which some rows have no value."""
    dense = (rng.random((samples, outputs)) < 0.3) * rng.random((samples, outputs)) if np.dtype(dtype).kind == "f" else None
    dense = rng.random((samples, outputs)) < 0.3 if dense is None else dense
    dense[2] = 0
    return sparse.csr_array(dense.astype(dtype))


OPTIONS = {
    "none": lambda rng: {},
    "weight": lambda rng: {"weight": rng.random((7, OUTPUTS))},
    "mask": lambda rng: {"mask": rng.random((7, OUTPUTS)) < 0.6},
    "mask of labels": lambda rng: {"mask": rng.random(OUTPUTS) < 0.6},
    "weight of labels": lambda rng: {"pos_weight": rng.random(OUTPUTS), "label_smoothing": 0.1},
}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sample_mean"])
def test_pieces_and_options(reduction, option, piece, rng):
    x, w, b = layer(rng, (7, 5))
    t, options = targets(rng), OPTIONS[option](rng)
    got = fl.linear(BCE, piece).value_and_grad(x, w, t, b, reduction=reduction, **options)
    assert_equal(got, fl.linear(BCE, piece).value_and_grad(x, w, t.toarray(), b, reduction=reduction, **options), MATRICES[x.dtype])


@pytest.mark.parametrize("given", ["bool", "uint8", "int8", "int32", "int64", "float32", "float64"])
def test_dtypes(given, dtype, rng):
    x, w, b = layer(rng, (7, 5), dtype)
    t = targets(rng, dtype=given)
    got, want = (fl.linear(BCE, 64).value_and_grad(x, w, a, b) for a in (t, t.toarray()))
    assert_equal(got, want, MATRICES[dtype])


def test_small_integers_are_stored_in_a_byte(rng):
    x, w, _ = layer(rng, (7, 5))
    t = (targets(rng, dtype=np.int64) * 255).tocsr()
    t.data[::2] = 100
    got, want = (fl.linear(BCE, 64).value_and_grad(x, w, a, target_scale=1 / 255) for a in (t, t.toarray().astype(np.uint8)))
    assert_equal(got, want, MATRICES[x.dtype])


@pytest.mark.parametrize("form", ["csr_matrix", "csr_array", "csc_matrix", "coo_array", "lil_matrix", "dok_array"])
def test_formats_of_scipy(form, rng):
    x, w, b = layer(rng, (7, 5))
    t = targets(rng)
    assert_equal(
        fl.linear(BCE, 64).value_and_grad(x, w, getattr(sparse, form)(t), b), fl.linear(BCE, 64).value_and_grad(x, w, t.toarray(), b), 0
    )


def test_unsorted_columns(rng):
    x, w, b = layer(rng, (7, 5))
    t = targets(rng)
    turned = t.copy()
    for first, end in zip(t.indptr[:-1], t.indptr[1:], strict=True):
        turned.indices[first:end] = t.indices[first:end][::-1]
    assert_equal(fl.linear(BCE, 64).value_and_grad(x, w, turned, b), fl.linear(BCE, 64).value_and_grad(x, w, t, b), 0)


def test_no_value_at_all(rng):
    x, w, b = layer(rng, (7, 5))
    t = sparse.csr_array((7, OUTPUTS), dtype=np.uint8)
    assert_equal(fl.linear(BCE, 64).value_and_grad(x, w, t, b), fl.linear(BCE, 64).value_and_grad(x, w, t.toarray(), b), 0)


def test_probabilities_of_classes(rng):
    x, w, b = layer(rng, (7, 5))
    t = targets(rng, dtype=np.float64)
    for given in (t, (t > 0).astype(np.int64)):
        got, want = (fl.linear(CE, 64).value_and_grad(x, w, a, b) for a in (given, given.toarray().astype(np.float64)))
        assert_equal(got, want, MATRICES[x.dtype])


def test_memory_is_that_of_a_piece(rng):
    x, w = rng.standard_normal((256, 16), dtype=np.float32), rng.standard_normal((200_000, 16), dtype=np.float32)
    t = sparse.random_array((256, 200_000), density=1e-4, format="csr", dtype=np.float32, rng=rng)
    out = np.empty_like(x), np.empty_like(w)
    fl.linear(BCE).grad(x, w, t, out=out)
    tracemalloc.start()
    fl.linear(BCE).grad(x, w, t, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # a dense target has 205 MB


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_tensors(layout, rng):
    torch = pytest.importorskip("torch")
    x, w, b = (torch.from_numpy(a).requires_grad_() for a in layer(rng, (7, 5)))
    dense = targets(rng).toarray()
    t = getattr(torch.from_numpy(dense), "to_sparse" if layout == "coo" else f"to_sparse_{layout}")()
    want = torch.autograd.grad(fl.linear(BCE, 64)(x, w, torch.from_numpy(dense), b), (x, w, b))
    for given in (t, sparse.csr_array(dense)):
        got = torch.autograd.grad(fl.linear(BCE, 64)(x, w, given, b), (x, w, b))
        assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))
        assert torch.equal(fl.linear(BCE, 64).value_and_grad(x, w, given, b)[1].input, want[0])
    with pytest.raises(NotImplementedError, match="target requires a gradient"):
        fl.linear(BCE)(x, w, t.double().requires_grad_(), b)


class DeviceMatrix:
    """A sparse matrix with arrays of a device."""

    def __init__(self, matrix, asarray):
        coo = matrix.tocoo()
        self.shape = matrix.shape
        self.row, self.col, self.data = map(asarray, (coo.row, coo.col, coo.data))

    def tocoo(self):
        return self


@pytest.mark.parametrize("cp", ["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_on_a_device(cp, monkeypatch, rng):
    module = devices.array_module(cp, monkeypatch)
    x, w, b = layer(rng, (7, 5))
    for t in (targets(rng), targets(rng, dtype=np.int64)):
        value, gradient = fl.linear(BCE, 64).value_and_grad(
            *map(module.asarray, (x, w)), DeviceMatrix(t, module.asarray), module.asarray(b)
        )
        got = value.get(), [a.get() for a in gradient]
        assert_equal(got, fl.linear(BCE, 64).value_and_grad(x, w, t, b), MATRICES[x.dtype])
    with pytest.raises(TypeError, match=r"has arrays of numpy.ndarray, and the input is one of cupy.ndarray; accepted: the same"):
        fl.linear(BCE)(module.asarray(x), module.asarray(w), t)


def changed(t, **parts):
    """Return sparse targets of which some arrays are replaced."""
    made = t.copy()
    for name, x in parts.items():
        setattr(made, name, x)
    return made


def test_errors(rng):
    x, w, b = layer(rng, (7, 5))
    t = targets(rng)
    out = tuple(np.full_like(a, 7) for a in (x, w, b))
    data = t.data.copy()
    data[-1] = 200
    row, column = 6, t.indices[-1]
    shifted, below = DeviceMatrix(t, np.asarray), DeviceMatrix(t, np.asarray)
    shifted.col, below.row = shifted.col + 3, below.row - 1
    wrong = [
        (changed(t, data=data), rf"target\[{row}, {column}\] is 200; accepted: targets in \[0, 1\]; .* pass target_scale=1/255$"),
        (
            changed(t, data=np.where(data == 200, 400, data.astype(np.int64))),
            rf"target\[{row}, {column}\] is 400; accepted: targets in \[0, 1\]",
        ),
        (
            shifted,
            rf"target has column indices from {3 + t.indices.min()} to {3 + t.indices.max()}; accepted: 0 to 10, the columns of its shape",
        ),
        (below, "target has row indices from -1 to 5; accepted: 0 to 6, the rows of its shape"),
        (changed(t, indices=np.zeros_like(t.indices)), r"target has several values at one place; accepted: one; target.sum_duplicates"),
        (t[:6], r"a sparse target has shape \(6, 11\); accepted: \(7, 11\), for an input \(N, K\)"),
    ]
    for target, said in wrong:
        for given in ({}, {"out": out}):
            with pytest.raises(ValueError, match=said):
                fl.linear(BCE, 64).grad(x, w, target, b, **given)
    assert all(np.all(a == 7) for a in out)
    with pytest.raises(TypeError, match="ignore_index is not supported with a sparse target; accepted: mask"):
        fl.linear(BCE)(x, w, t, b, ignore_index=0)
    with pytest.raises(ValueError, match=r"a sparse target has shape \(7, 11\); accepted: \(7, 11\), for an input \(N, K\)"):
        fl.linear(BCE)(x[..., np.newaxis], w, t, b)


def test_masked_values_are_not_refused(rng):
    x, w, b = layer(rng, (7, 5))
    t = targets(rng)
    dense = t.toarray()
    t.data[3] = 200
    row, column = (places[3] for places in t.nonzero())
    mask = np.ones((7, OUTPUTS), bool)
    mask[row, column] = False
    out = tuple(np.empty_like(a) for a in (x, w, b))
    got = fl.linear(BCE, 64).value_and_grad(x, w, t, b, mask=mask, out=out)
    assert_equal(got, fl.linear(BCE, 64).value_and_grad(x, w, dense, b, mask=mask), MATRICES[x.dtype])
