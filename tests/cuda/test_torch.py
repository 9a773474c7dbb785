"""CUDA tensors are computed on PyTorch's stream and in PyTorch's memory, with the results of the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import fastloss as fl
from tests.devices import asks_the_stand_in
from tests.table import LOSSES
from tests.ulp import PEER, SUM, assert_close

torch = pytest.importorskip("torch")

from tests.cuda.tensors import ASK_WHERE_TENSORS_ARE, STREAM, place_of_tensors  # noqa: E402

BCE = fl.binary_cross_entropy_with_logits
NAMES = [name for name, case in LOSSES.items() if case.has_reductions and case.pairs_elements]


@pytest.fixture
def device(cp, monkeypatch):
    """Return the device of the tensors."""
    return place_of_tensors(cp, monkeypatch)


def operands(name, dtype=torch.float32, shape=(4, 3, 7, 9)):
    rng = torch.Generator().manual_seed(7)
    z, t = 3 * torch.randn(shape, generator=rng), torch.rand(shape, generator=rng)
    z = z.sigmoid() if name == "binary_cross_entropy" else z
    return z.to(dtype), t.to(dtype)


def on(device, *given):
    """Return copies of tensors on the device that require gradients."""
    return [x.to(device).clone().requires_grad_() for x in given]


def close(got, want, dtype=None):
    got, want = got.detach().double().cpu().numpy(), np.asarray(want.detach().double() if isinstance(want, torch.Tensor) else want)
    assert_close(got, want, PEER[np.dtype(dtype or np.float32)])


def on_host(monkeypatch, compute):
    """Compute without the patches of `device`."""
    with monkeypatch.context() as patched:
        for module in ASK_WHERE_TENSORS_ARE:
            patched.setattr(module, "is_on_gpu", lambda x: x.is_cuda)
        return compute()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sample_mean"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients(device, monkeypatch, name, reduction):
    loss, options = getattr(fl, name), LOSSES[name].reduced(reduction)

    def differentiate(place):
        z, t = on(place, *operands(name))
        value = loss(z, t, **options)
        upstream = torch.linspace(0.5, 2, value.numel(), device=place).reshape(value.shape)
        return value, *torch.autograd.grad(value, (z, t), upstream)

    got, want = differentiate(device), on_host(monkeypatch, lambda: differentiate("cpu"))
    for x, y in zip(got, want, strict=True):
        assert (x.dtype, x.shape, x.device.type) == (y.dtype, y.shape, device.type)
        close(x, y)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean", "sample_mean", "sample_sum"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_losses_of_classes(device, monkeypatch, order, reduction):
    rng = torch.Generator().manual_seed(1)
    logits, target = 3 * torch.randn((4, 5, 7, 9), generator=rng), torch.randint(0, 5, (4, 7, 9), generator=rng)
    weight, mask, own = torch.rand(5, generator=rng), torch.rand(4, 1, 9, generator=rng) < 0.8, torch.rand(4, 7, 9, generator=rng)

    def differentiate(place):
        (z,) = on(place, logits.contiguous(memory_format=order))
        options = {"weight": weight.to(place), "mask": mask.to(place), "pixel_weight": own.to(place), "ignore_index": 2}
        value = fl.cross_entropy(z, target.to(place), reduction=reduction, label_smoothing=0.1, **options)
        upstream = torch.linspace(0.5, 2, value.numel(), device=place).reshape(value.shape)
        focal, grad = fl.focal_cross_entropy_loss.value_and_grad(z.detach(), target.to(place), reduction=reduction, **options)
        return value, focal, grad, *torch.autograd.grad(value, z, upstream)

    for x, y in zip(differentiate(device), on_host(monkeypatch, lambda: differentiate("cpu")), strict=True):
        assert (x.dtype, x.shape, x.stride(), x.device.type) == (y.dtype, y.shape, y.stride(), device.type)
        close(x, y)


@pytest.mark.first
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(device, monkeypatch, dtype):
    def differentiate(place):
        z, t = on(place, *operands("", dtype))
        value = BCE(z, t.detach(), reduction="mean")
        (value * 1024).backward()
        return value, z.grad

    for x, y in zip(differentiate(device), on_host(monkeypatch, lambda: differentiate("cpu")), strict=True):
        assert x.dtype is dtype
        close(x, y, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_upstream_gradients(cp, device, factor, retain_graph):
    (z,), (_, t) = on(device, operands("")[0]), operands("")
    t = t.to(device)
    value = BCE(z, t)
    before = getattr(cp, "waits", 0)
    first = torch.autograd.grad(value, z, torch.tensor(factor, device=device), retain_graph=retain_graph)[0].clone()
    assert getattr(cp, "waits", 0) == before
    close(first, factor * BCE.grad(z.detach(), t))
    if retain_graph:
        close(torch.autograd.grad(value, z)[0], BCE.grad(z.detach(), t))


@asks_the_stand_in
def test_stream_and_memory(cp, device):
    z, t = on(device, *operands(""))
    del cp.launches[:], cp.streams[:]
    BCE(z, t.detach()).backward()
    assert cp.launches == ["fastloss_binary_cross_entropy_with_logits", "fastloss_rescale"]
    assert set(cp.streams) == {STREAM}
    assert cp.current.stream.ptr == 0
    assert cp.current.allocator is None


@pytest.mark.first
def test_options(device, monkeypatch):
    mask = torch.rand(4, 1, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = torch.linspace(0.1, 2, 3)[:, None, None]

    def differentiate(place):
        z, t = on(place, *operands(""))
        options = {"mask": mask.to(place), "weight": weight.to(place), "pos_weight": torch.tensor(2.5, device=place)}
        value = BCE(z, t.detach(), **options)
        value.backward()
        return value, z.grad, BCE.grad(z.detach(), t.detach(), **options), BCE.curvature(z.detach(), t.detach(), **options)

    for x, y in zip(differentiate(device), on_host(monkeypatch, lambda: differentiate("cpu")), strict=True):
        close(x, y)


@pytest.mark.first
def test_in_place_and_out(device):
    (z,), (_, t) = on(device, operands("")[0]), operands("")
    t = t.to(device)
    want = BCE.grad(z.detach(), t)
    out = torch.empty_like(want)
    assert BCE.grad(z.detach(), t, out=out) is out
    close(out, want)
    x = z * 1.0
    address = x.data_ptr()
    (grad,) = torch.autograd.grad(BCE(x, t, inplace_grad=True), x)
    assert grad.data_ptr() == address
    close(grad, want)


@pytest.mark.first
def test_second_derivatives(device):
    z, t = on(device, *operands("", torch.float64, (2, 3)))
    assert torch.autograd.gradcheck(lambda z, t: BCE(z, t), (z, t))
    assert torch.autograd.gradgradcheck(lambda z, t: BCE(z, t), (z, t))


@pytest.mark.first
def test_a_variational_autoencoder(device, monkeypatch):
    def compute(place):
        z, t = (x.to(place) for x in operands(""))
        value, grads = fl.vae_loss.value_and_grad(z, t, z[:, :, 0, 0], t[:, :, 0, 0], beta=0.5)
        outs = tuple(torch.empty_like(x) for x in grads)
        again = fl.vae_loss.value_and_grad(z, t, z[:, :, 0, 0], t[:, :, 0, 0], beta=0.5, out=outs)[1]
        assert all(x is y for x, y in zip(again, outs, strict=True))
        return *value, *grads, *outs

    for x, y in zip(compute(device), on_host(monkeypatch, lambda: compute("cpu")), strict=True):
        assert (x.dtype, x.device.type) == (torch.float32, device.type)
        close(x, y)


@pytest.mark.first
def test_modules_and_patch(device, monkeypatch):
    z, t = (x.to(device) for x in operands(""))
    module = fl.torch.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)).to(device)
    want = torch.nn.functional.binary_cross_entropy_with_logits(z, t, pos_weight=torch.tensor(2.0, device=device))
    close(module(z, t), want)
    with fl.torch.patch():
        close(torch.nn.functional.binary_cross_entropy_with_logits(z, t), BCE(z, t))


@pytest.mark.first
def test_layouts(device):
    z, t = (x.to(device) for x in operands("", shape=(4, 3, 8, 10)))
    want = fl.mse_loss.grad(z, t)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (z, t)]
    grad = fl.mse_loss.grad(*last)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    close(grad, want)
    close(fl.mse_loss.grad(z[..., 1::2], t[..., 1::2], reduction="sum"), 2 * (z - t)[..., 1::2])
    value = fl.mse_loss(z.expand(4, 3, 8, 10)[:, :1].expand(4, 3, 8, 10), t)
    assert_close(float(value), float(((z[:, :1] - t) ** 2).mean()), SUM[np.dtype(np.float32)])
    assert torch.isnan(fl.mse_loss(z[:0], t[:0]))


def test_errors_of_targets_are_deferred(device):
    z, t = (x.to(device) for x in operands(""))
    t[1, 2, 3, 4] = 2.0
    BCE(z.requires_grad_(), t, validate=True).backward()
    with pytest.raises(ValueError, match=r"target\[1, 2, 3, 4\] is 2.0"):
        fl.raise_deferred()


def test_two_devices(device):
    z, t = (x.to(device) for x in operands(""))
    with pytest.raises(ValueError, match=f"target is on meta, but the input is on {z.device}; accepted: tensors on one device"):
        BCE(z, t.to("meta"))
