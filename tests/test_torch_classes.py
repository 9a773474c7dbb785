"""Losses of classes with tensors: PyTorch's own samples, autograd, torch.compile, the module, and `patch`."""

from __future__ import annotations

import numpy as np
import pytest

from tests import devices
from tests.devices import is_long_on_the_stand_in, only_on
from tests.ulp import assert_tensor

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812

import fastloss as fl  # noqa: E402
import fastloss.torch as ft  # noqa: E402
from fastloss.backends.torch import memory_views  # noqa: E402
from tests.cuda.tensors import place_of_tensors  # noqa: E402
from tests.test_torch_modules import is_ours  # noqa: E402
from tests.test_torch_opinfo import database, function  # noqa: E402, F401

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.usefixtures("device")]

SHAPE = (2, 5, 2, 4)
CASES = [
    (fl.cross_entropy, {}), (fl.cross_entropy, {"label_smoothing": 0.1}), (fl.focal_cross_entropy_loss, {}),
    (fl.focal_cross_entropy_loss, {"gamma": 0.5}),
]  # fmt: skip


@pytest.fixture(params=["cpu", "stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Return the device of the tensors, in the place of the fixture that carries arrays to a device."""
    if request.param == "cpu":
        return torch.device("cpu")
    return place_of_tensors(devices.array_module(request.param, monkeypatch), monkeypatch)


@pytest.fixture
def batch(device):
    """Return logits, class indices, class weights, a mask, and a weight for each pixel, in float64."""
    torch.manual_seed(0)
    z, t = 3 * torch.randn(SHAPE, dtype=torch.double), torch.randint(0, SHAPE[1], (SHAPE[0], *SHAPE[2:]))
    given = z, t, torch.rand(SHAPE[1]).double() + 0.1, torch.rand(t.shape) > 0.3, torch.rand(t.shape).double()
    z, *others = (x.to(device) for x in given)
    return z.requires_grad_(), *others


def derivatives(loss, z, *others, **options):
    """Return the value and the gradient under an upstream gradient of distinct numbers."""
    value = loss(z, *others, **options)
    upstream = torch.linspace(-1, 2, value.numel()).reshape(value.shape).to(value)
    return value, *torch.autograd.grad(value, z, upstream)


@pytest.mark.parametrize(("way", "dtype"), [("own", torch.float32), ("patched", torch.float32), ("own", torch.bfloat16)], ids=str)
def test_samples_of_torch(database, way, dtype, device):  # noqa: F811
    for sample in database["cross_entropy"].reference_inputs(device.type, dtype, requires_grad=True):
        z, t = sample.input.detach().requires_grad_(), sample.args[0].detach()
        want = derivatives(F.cross_entropy, z, t, **sample.kwargs)
        with function(way, "cross_entropy") as loss:
            got = derivatives(loss, z, t, **sample.kwargs)
        assert is_ours(got[0])
        for a, b in zip(got, want, strict=True):
            assert_tensor(a, b)


@is_long_on_the_stand_in
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean", "sample_mean", "sample_sum"])
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_first_and_second_derivatives(loss, options, reduction, batch):
    z, t, weight, mask, own = batch

    def call(z):
        return loss(z, t, weight, reduction, mask=mask, pixel_weight=own, ignore_index=1, **options)

    assert torch.autograd.gradcheck(call, (z,))
    assert torch.autograd.gradgradcheck(call, (z,))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probabilities(options, reduction, batch):
    z, _, weight, *_ = batch
    t = torch.rand(SHAPE).double().softmax(1)
    got = derivatives(ft.cross_entropy, z, t, weight, reduction=reduction, **options)
    for a, b in zip(got, derivatives(F.cross_entropy, z, t, weight, reduction=reduction, **options), strict=True):
        assert_tensor(a, b)
    assert torch.autograd.gradgradcheck(lambda z: fl.cross_entropy(z, t, weight, reduction, **options), (z,))
    assert not is_ours(ft.cross_entropy(z, t.requires_grad_()))
    with pytest.raises(NotImplementedError, match="has no target_slope"):
        fl.cross_entropy(z, t)


@only_on("cpu", reason="compiled code sees where the tensors really are")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_code(reduction, batch):
    z, t, weight, *_ = batch
    given = {"weight": weight, "label_smoothing": 0.1, "ignore_index": 2, "reduction": reduction}
    compiled = torch.compile(lambda z: ft.cross_entropy((z * 2).to(memory_format=torch.channels_last), t, **given), fullgraph=True)
    for a, b in zip(derivatives(compiled, z), derivatives(lambda z: F.cross_entropy(z * 2, t, **given), z), strict=True):
        assert_tensor(a, b)


def test_memory_orders_and_the_gradient_in_place(batch):
    z, t, *_ = batch
    x = z.detach().float().to(memory_format=torch.channels_last).requires_grad_()
    value, grad = derivatives(fl.cross_entropy, x, t.to(torch.uint8))
    assert grad.stride() == x.stride()
    logits = x * 1
    fl.cross_entropy(logits, t, inplace_grad=True).backward(value * 0 - 1)
    assert_tensor(x.grad, grad)


DICE_CASES = [
    {}, {"per_channel": False, "background": False}, {"per_sample": False, "zero_absent": True}, {"squared": True, "background": False},
    {"alpha": 0.3, "beta": 0.8, "smooth_denominator": 0.5, "per_channel": False, "per_sample": False},
]  # fmt: skip


by_dice_case = pytest.mark.parametrize("options", DICE_CASES, ids=str)
by_dice_loss = pytest.mark.parametrize("loss", [fl.dice_softmax_loss, fl.dice_cross_entropy_loss], ids=["Dice", "both"])


@only_on("stand-in", "gpu", reason="compares with the CPU")
@by_dice_case
@by_dice_loss
def test_derivatives_of_dice_on_a_device(loss, options, batch):
    weight = batch[2] if options.get("per_channel", True) else None
    found = []
    for z, t, w, mask, own in (batch, [x.detach().cpu().requires_grad_(x.requires_grad) for x in batch]):
        value = loss(z, t, None if weight is None else w, mask=mask, pixel_weight=own, ignore_index=1, **options)
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        found.append((value, first, *torch.autograd.grad((first * torch.arange(first.numel()).reshape(first.shape).to(first)).sum(), z)))
    for got, want in zip(*found, strict=True):
        assert got.device == batch[0].device
        assert_tensor(got.cpu(), want)


@only_on("cpu", reason="makes thousands of calls; results on a device are those on the CPU")
@by_dice_case
@by_dice_loss
def test_first_and_second_derivatives_of_dice(loss, options, batch):
    z, t, weight, mask, own = batch
    weight = weight if options.get("per_channel", True) else None
    for reduction in ("mean", "sample_sum" if options.get("per_sample", True) else "sum"):

        def call(z, reduction=reduction):
            return loss(z, t, weight, reduction, mask=mask, pixel_weight=own, ignore_index=1, **options)

        assert torch.autograd.gradcheck(call, (z,))
        assert torch.autograd.gradgradcheck(call, (z,))
    if loss is fl.dice_softmax_loss:
        assert torch.autograd.gradcheck(lambda z: loss(z, t, weight, "none", **options), (z,))


@only_on("cpu", reason="compiled code sees where the tensors really are")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_dice(reduction, batch):
    z, t, weight, *_ = batch
    given = {"weight": weight, "ignore_index": 2, "reduction": reduction, "background": False, "smooth": 1e-5}
    compiled = torch.compile(lambda z: fl.dice_softmax_loss(z * 2, t, **given), fullgraph=True)
    for a, b in zip(derivatives(compiled, z), derivatives(lambda z: fl.dice_softmax_loss(z * 2, t, **given), z), strict=True):
        assert_tensor(a, b)


@only_on("cpu", reason="computes nothing")
def test_an_accumulator_without_batches_takes_a_tensor_of_weights(device):
    with pytest.warns(RuntimeWarning, match="mean of no elements"):
        assert np.isnan(fl.Accumulator(fl.dice_softmax_loss, per_sample=False, weight=torch.ones(3)).compute())


def test_module(batch):
    z, t, weight, mask, _ = batch
    made = {"weight": weight, "ignore_index": 3, "label_smoothing": 0.25}
    module, same = ft.CrossEntropyLoss(**made, mask=mask), torch.nn.CrossEntropyLoss(**made, reduction="none")
    value = module(z, t)
    counted = mask & (t != 3)
    assert_tensor(value, same(z, t)[counted].sum() / weight[t[counted]].sum())
    assert list(module.state_dict()) == ["weight"]
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert module.options.keys() == {"mask"}
    with ft.patch():
        scripted = torch.jit.script(same)
        assert is_ours(same(z, t))
        assert not is_ours(scripted(z, t))


@pytest.mark.parametrize(
    ("call", "obstacle"),
    [
        (lambda z, t, w: F.cross_entropy(z, t.int()), "target has dtype torch.int32"),
        (lambda z, t, w: F.cross_entropy(z, t[:1]), "input and target have different shapes"),
        (lambda z, t, w: F.cross_entropy(z, z.softmax(1)), "target requires a gradient"),
        (lambda z, t, w: F.cross_entropy(z, t, w.requires_grad_()), "weight requires a gradient"),
        (lambda z, t, w: F.cross_entropy(z, t, w.float()), "weight has dtype torch.float32, and input torch.float64"),
        (lambda z, t, w: F.cross_entropy(z, t, w[:2]), "weight does not broadcast to the shape of input"),
        (lambda z, t, w: F.cross_entropy(z, t, label_smoothing=2.0), "label_smoothing is not a number from 0 to 1"),
        pytest.param(
            lambda z, t, w: F.cross_entropy(z.to("meta"), t.to("meta")), "input is on a device of type meta", marks=only_on("cpu", "gpu")
        ),
    ],
)
def test_patch_leaves_other_calls_to_torch(call, obstacle, batch):
    z, t, weight, *_ = batch
    with ft.patch() as patched:
        try:
            value = call(z, t, weight)
        except (RuntimeError, ValueError):  # PyTorch refuses the call too
            value = torch.zeros(())
        assert not is_ours(value)
    assert patched.calls()["cross_entropy"].by_torch == {obstacle: 1}


def test_errors_of_indices(batch):
    z, t, *_ = batch
    t[1, 0, 3] = 5
    if not memory_views.is_on_gpu(t):
        with pytest.raises(RuntimeError, match=r"target\[1, 0, 3\] is 5; accepted: class indices from 0 to 4, and ignore_index=-100"):
            ft.cross_entropy(z, t)
        return
    ft.cross_entropy(z, t)
    with pytest.raises(ValueError, match=r"target\[1, 0, 3\] is 5; accepted: .* from 0 to 4, and ignore_index \(found on the GPU"):
        fl.raise_deferred()


def test_errors(batch):
    z, t, *_ = batch
    with pytest.raises(TypeError, match=r"accepted: .*Tensor"):
        fl.cross_entropy(z, t.numpy())
    with pytest.raises(ValueError, match="ignore_index excludes class indices, and target has probabilities"):
        fl.cross_entropy(z, z.detach().softmax(1), ignore_index=3)
    logits = z * 1
    value = fl.cross_entropy(logits, t)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@only_on("cpu", reason="compares with the bits of NumPy arrays, which are computed on the CPU")
def test_arrays_and_tensors_agree(batch):
    z, t, weight, mask, own = batch
    arrays = [x.detach().numpy() for x in (z, t, weight)]
    options = {"mask": mask, "pixel_weight": own}
    value, grad = fl.cross_entropy.value_and_grad(*arrays, **{name: x.numpy() for name, x in options.items()})
    got = fl.cross_entropy.value_and_grad(z, t, weight, **options)
    assert got[0].item() == value
    np.testing.assert_array_equal(got[1].numpy(), grad)
