"""Losses of linear layers of tensors: autograd, torch.compile, autocast, and the functions and the module of `fastloss.torch`."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import fastloss as fl  # noqa: E402
import fastloss.torch as ft  # noqa: E402
from fastloss.backends.torch import layer as torch_layer  # noqa: E402
from fastloss.backends.torch.backend import TorchBackend  # noqa: E402
from fastloss.core.products import Products  # noqa: E402
from tests.test_linear import BCE, CE, OUTPUTS, SHAPES, assert_equal, layer, outputs_of  # noqa: E402
from tests.ulp import MATRICES, assert_close  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_compiled_code")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def no_compiled_code():
    """Forget what torch.compile has compiled: it compiles a function only so many times."""
    yield
    torch.compiler.reset()


def tensors(rng, shape, dtype=torch.float64):
    """Return input, weight and bias of a layer, which require gradients, and a target of zeros and ones."""
    x, w, b = (torch.tensor(a, dtype=dtype, requires_grad=True) for a in layer(rng, shape))
    return x, w, b, torch.from_numpy((rng.random(outputs_of(shape)) < 0.4).astype(np.uint8))


def gradients(value, *leaves, upstream=None):
    """Return the gradients of a value as arrays of float64."""
    return [x.double().numpy() for x in torch.autograd.grad(value, leaves, upstream)]


def assert_alike(ours, theirs, dtype, tolerances=MATRICES):
    """Assert that arrays are close to others."""
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerances[np.dtype(dtype)])


def test_autograd_and_second_derivatives():
    rng = np.random.default_rng(1)
    for shape in (SHAPES["samples"], (2, 3, 2, 2)):
        x, w, b = (torch.tensor(a, requires_grad=True) for a in layer(rng, shape))
        t, k = torch.tensor(rng.random(outputs_of(shape))), torch.tensor(rng.integers(0, OUTPUTS, (shape[0], *shape[2:])))
        for reduction in ("mean", "sample_sum"):
            assert torch.autograd.gradcheck(lambda *a: fl.linear(BCE, 256)(*a[:2], t, a[2], reduction=reduction), (x, w, b))  # noqa: B023
            assert torch.autograd.gradcheck(lambda *a: fl.linear(CE, 256)(*a[:2], k, a[2], reduction=reduction), (x, w, b))  # noqa: B023
    value = fl.linear(BCE, 64)(x, w.detach(), t)
    with pytest.raises(NotImplementedError, match=r"no second derivatives; accepted: the layer and the loss one after the other"):
        torch.autograd.grad(value, x, create_graph=True)


def test_tensors_are_arrays_and_only_the_needed_gradients_are_computed(monkeypatch, rng):
    x, w, b = layer(rng, (70, 33), np.float32)
    t = rng.random((70, OUTPUTS)).astype(np.float32)
    tensors = [torch.from_numpy(a) for a in (x, w, t, b)]
    assert_equal(fl.linear(BCE, 512).value_and_grad(*tensors), fl.linear(BCE, 512).value_and_grad(x, w, t, b), MATRICES[x.dtype])
    out = tuple(torch.zeros_like(a) for a in (tensors[0], tensors[1], tensors[3]))
    got = fl.linear(BCE, 512).grad(*tensors, out=out, accumulate=True)
    assert all(a is given for a, given in zip(got, out, strict=True))
    counted = []
    counting = Products(*(lambda *a, f=f: counted.append(0) or f(*a) for f in torch_layer.PRODUCTS))
    monkeypatch.setattr(torch_layer, "PRODUCTS", counting)
    x, w, t, b = tensors
    for needed, products in (((), 1), ((x,), 2), ((w,), 2), ((x, w), 3), ((x, w, b), 4)):
        for a in (x, w, b):
            a.requires_grad_(any(a is other for other in needed))
        counted.clear()
        value = fl.linear(BCE, 3072)(x, w, t, b)
        assert len(counted) == 2 * products  # in two pieces
        assert value.requires_grad == bool(needed)
    with torch.no_grad():
        counted.clear()
        assert not fl.linear(BCE, 3072)(x, w, t, b).requires_grad
        assert len(counted) == 2
    with pytest.raises(NotImplementedError, match="target requires a gradient"):
        fl.linear(BCE)(x, w, t.requires_grad_(), b)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_that_fit_into_a_piece_exist(shape, monkeypatch, rng):
    x, w, b, t = tensors(rng, SHAPES[shape])
    for reduction in ("mean", "sample_sum"):
        upstream = torch.tensor(rng.random(() if reduction == "mean" else len(x)))
        pair = [fl.linear(BCE, piece)(x, w, t, b, reduction=reduction, label_smoothing=0.1) for piece in (256, 8 << 20)]
        assert_alike(*(gradients(value, x, w, b, upstream=upstream) for value in pair), "float64")
    monkeypatch.setattr(TorchBackend, "compute_layer", general)
    fl.linear(BCE)(x, w, t, b)
    given = {"input": x, "linear_weight": w, "linear_bias": b, "target": t}
    wrong = {"linear_bias": b.float()}, {"linear_bias": b[:3]}, {"linear_weight": w[:, :3]}, {"linear_weight": w.half()}
    for unusual in (*wrong, {"target": t.double().to_sparse() if t.dim() == 2 else None}, {"inplace_grad": True}):
        with pytest.raises(GeneralError):  # whose errors are not those of PyTorch's layer
            fl.linear(BCE)(**{**given, **unusual})


class GeneralError(Exception):
    """The general way is taken, in which outputs do not exist."""


def general(*_):
    raise GeneralError


@pytest.mark.parametrize("reduction", ["mean", "sample_sum"])
@pytest.mark.parametrize("shape", ["samples", "image"])
def test_compiled_code_computes_the_same(shape, reduction, rng):
    x, w, b, t = tensors(rng, SHAPES[shape])
    mask, upstream = torch.from_numpy(rng.random(t.shape) < 0.6), torch.tensor(rng.random(() if reduction == "mean" else len(x)))

    def call(x, w, b):
        return fl.linear(BCE, 256)(2.0 * x, w, t, b, reduction=reduction, mask=mask, label_smoothing=0.1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    value = compiled(x, w, b)
    assert value.dtype is torch.float64
    assert_alike([value.detach().numpy()], [call(x, w, b).detach().numpy()], "float64")
    assert_alike(gradients(value, x, w, b, upstream=upstream), gradients(call(x, w, b), x, w, b, upstream=upstream), "float64")
    assert_alike(
        gradients(compiled(x, w.detach(), None), x, upstream=upstream), gradients(call(x, w, None), x, upstream=upstream), "float64"
    )
    with torch.no_grad():
        assert not compiled(x, w, b).requires_grad


def test_a_changed_number_compiles_once_more_and_not_again(rng):
    x, w, b, t = tensors(rng, (7, 5))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda factor: fl.linear(BCE, 256)(x, w, t, b, pos_weight=factor), fullgraph=True, backend=counter)
    for factor in (1.5, 2.5, 3.5, 4.5):
        want = fl.linear(BCE, 256)(x, w, t, b, pos_weight=factor)
        assert_alike([compiled(factor).detach().numpy()], [want.detach().numpy()], "float64")
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("reduction", ["mean", "sample_mean"])
def test_the_operator_declares_what_it_returns(reduction, dtype, rng):
    x, w, b, t = tensors(rng, SHAPES["image"], dtype)
    wanted = [reduction == "mean"] * 3
    arguments = BCE.key, reduction, 256, x, w, b, t, [torch.rand(t.shape)], ["weight", "validate"], [1.0], torch.float32, wanted, None
    torch.library.opcheck(torch.ops.fastloss.linear_loss, arguments)


def test_compiled_code_refuses_what_it_cannot_compute(rng):
    x, w, b, t = tensors(rng, (7, 5))
    with pytest.raises(NotImplementedError, match=r"sparse target is not supported in compiled code; accepted: a call under torch"):
        torch.compile(lambda: fl.linear(BCE)(x, w, t.to_sparse(), b), backend="eager")()
    with pytest.raises(NotImplementedError, match=r"does not support torch\.func's transforms"):
        torch.func.grad(lambda x: fl.linear(BCE)(x, w, t, b))(x)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_16_bits_are_scaled_before_they_are_rounded(dtype, rng):
    x, w, b, t = tensors(rng, (64, 5), dtype)
    x, scale = x.detach().mul_(1e-3).requires_grad_(), 2.0**15
    value = fl.linear(BCE)(x, w, t, b)
    assert value.dtype is dtype
    got = torch.autograd.grad(value, (x, w, b), torch.tensor(scale, dtype=dtype))
    assert [a.dtype for a in got] == [dtype] * 3
    wide = [a.detach().double().requires_grad_() for a in (x, w, b)]
    want = torch.autograd.grad(F.binary_cross_entropy_with_logits(F.linear(*wide), t.double()) * scale, wide)
    for a, b in zip(got, want, strict=True):
        assert ((a.double() - b).abs() <= torch.finfo(dtype).eps * b.abs() + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_mixes_dtypes_and_returns_float32(dtype, rng):
    x, w, b, t = tensors(rng, (7, 5), torch.float32)
    with torch.autocast("cpu", dtype):
        features = F.linear(x, torch.eye(5))
        assert features.dtype is dtype
        value = fl.linear(BCE)(features, w, t, b)
    assert value.dtype is torch.float32
    got = gradients(value, features, w, b)
    wide = features.detach().float().requires_grad_()
    want = gradients(F.binary_cross_entropy_with_logits(F.linear(wide, w, b), t.float()), wide, w, b)
    assert_alike(got[1:], want[1:], "float32")
    assert np.abs(got[0] - want[0]).max() <= torch.finfo(dtype).eps * np.abs(want[0]).max()


FUNCTIONS = {
    "binary_cross_entropy_with_logits": ({"pos_weight": True}, F.binary_cross_entropy_with_logits),
    "mse_loss": ({"weight": True}, F.mse_loss),
    "sigmoid_focal_loss": ({"gamma": 1.5, "alpha": 0.3}, ft.sigmoid_focal_loss),
    "cross_entropy": ({"weight": True, "label_smoothing": 0.1, "ignore_index": 3}, F.cross_entropy),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_the_layer_and_the_loss(name, reduction, rng):
    options, loss = FUNCTIONS[name]
    x, w, b, t = tensors(rng, (7, 5))
    labels, float_t = torch.from_numpy(rng.integers(0, OUTPUTS, 7)), t.double()
    target = labels if name == "cross_entropy" else float_t
    factors = {"pos_weight": OUTPUTS, "weight": OUTPUTS if name == "cross_entropy" else t.shape}
    given = {key: torch.tensor(rng.random(factors[key])) if value is True else value for key, value in options.items()}
    ours = getattr(ft, f"linear_{name}")(x, w, target, linear_bias=b, reduction=reduction, **given)
    theirs = loss(F.linear(x, w, b), target, reduction=reduction, **given)
    assert_close(ours.item(), theirs.item(), MATRICES[np.dtype("float64")])
    assert_alike(gradients(ours, x, w, b), gradients(theirs, x, w, b), "float64")
    if hasattr(F, f"linear_{name}"):
        neighbour = getattr(F, f"linear_{name}")(x, w, target, linear_bias=b, reduction=reduction, **given)
        assert_close(ours.item(), neighbour.item(), MATRICES[np.dtype("float64")])


def test_a_weighted_mean_of_squares_needs_weights_of_the_targets_shape(rng):
    x, w, _, t = tensors(rng, (7, 5))
    with pytest.raises(ValueError, match=r"target has shape \(7, 11\) and weight \(11,\); they must be equal"):
        ft.linear_mse_loss(x, w, t.double(), weight=torch.ones(OUTPUTS))
    with pytest.raises(TypeError, match=r"mask cannot be combined with a weighted mean here; use fastloss\.mse_loss"):
        ft.linear_mse_loss(x, w, t.double(), weight=torch.ones(t.shape), mask=t > 0)


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_is_the_layer_and_the_loss(bias, rng):
    layers = torch.nn.Linear(5, OUTPUTS, bias), torch.nn.Conv1d(5, OUTPUTS, 1, bias=bias), torch.nn.Conv2d(5, OUTPUTS, (1, 1), bias=bias)
    for made, shape in zip(layers, ((7, 5), (3, 5, 6), (3, 5, 6, 4)), strict=True):
        x, _, _, t = tensors(rng, shape, torch.float32)
        module = ft.LinearLoss(BCE, made, reduction="sum", label_smoothing=0.1)
        leaves = x, *made.parameters()
        theirs = BCE(made(x), t, reduction="sum", label_smoothing=0.1)
        ours = module(x, t)
        assert_alike(gradients(ours, *leaves), gradients(theirs, *leaves), "float32")
        assert torch.equal(ours, torch.compile(module, fullgraph=True, backend="aot_eager")(x, t))


def test_the_module_holds_its_tensors(rng):
    x, _, _, t = tensors(rng, (7, 5))
    module = ft.LinearLoss(BCE, torch.nn.Linear(5, OUTPUTS), pos_weight=torch.full((OUTPUTS,), 3.0), validate=True)
    assert list(module.state_dict()) == ["pos_weight", "layer.weight", "layer.bias"]
    assert repr(module).startswith("LinearLoss(\n  binary_cross_entropy_with_logits, reduction='mean', validate=True\n  (layer): Linear(")
    module = module.double()
    assert module(x, t).dtype is torch.float64
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, t), module(x, t))


def test_the_module_refuses_other_layers(rng):
    for wrong, said in (
        (torch.nn.Conv2d(3, 4, 3), r"layer is Conv2d\(3, 4, kernel_size=\(3, 3\).*; accepted: a kernel of one pixel, stride 1"),
        (torch.nn.Conv2d(4, 4, 1, groups=2), "accepted: a kernel of one pixel, stride 1, no padding, and one group"),
        (torch.nn.Conv1d(4, 4, 1, padding=1), "accepted: a kernel of one pixel"),
        (torch.nn.ReLU(), "layer is a ReLU; accepted: Linear, or Conv1d, Conv2d or Conv3d with a kernel of one pixel"),
    ):
        with pytest.raises(TypeError, match=said):
            ft.LinearLoss(BCE, wrong)
    with pytest.raises(ValueError, match=r"input has shape \(2, 7, 5\); accepted with a Linear layer: \(N, K\); pass input.flatten"):
        ft.LinearLoss(BCE, torch.nn.Linear(5, 4))(torch.ones(2, 7, 5), torch.ones(2, 7, 4))
