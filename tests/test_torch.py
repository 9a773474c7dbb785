"""Losses of tensors: NumPy's results, autograd's rules, torch.compile, and which memory is read and written."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

import fastloss as fl
from fastloss.ops import sqrt
from tests.devices import needs_compiler
from tests.table import LOSSES
from tests.ulp import DIFFERENCE, PEER, assert_close

torch = pytest.importorskip("torch")

from functorch.compile import make_boxed_func  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.library import opcheck  # noqa: E402

import fastloss.torch as ft  # noqa: E402
from fastloss.backends.torch.backend import BACKEND  # noqa: E402
from fastloss.backends.torch.memory_views import to_array  # noqa: E402
from fastloss.cpu import memory  # noqa: E402

BCE = fl.binary_cross_entropy_with_logits
# losses of two tensors of one shape; the VAE loss and the losses of classes have their own tests
ALL = [name for name, case in LOSSES.items() if case.has_reductions and case.pairs_elements]
# losses whose operators differ: of elements, with two gradients, of regions, and of both
KINDS = ("binary_cross_entropy_with_logits", "gaussian_kl_loss", "dice_with_logits_loss", "dice_bce_with_logits_loss")
SHAPE = (4, 3, 5, 7)


@fl.elementwise_loss
def charbonnier(z, t, eps=1e-3):
    d = z - t
    v = sqrt(d * d + eps * eps)
    return v, d / v


@pytest.fixture(params=ALL)
def name(request):
    return request.param


@pytest.fixture
def loss(name):
    return getattr(fl, name)


def operands(name, dtype=None, shape=SHAPE, seed=0):
    """Return an input and a target, which are leaves that require gradients."""
    rng = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(shape, generator=rng, dtype=torch.float64)
    z = z.sigmoid() if name == "binary_cross_entropy" else z
    t = 0.05 + 0.9 * torch.rand(shape, generator=rng, dtype=torch.float64)
    return z.to(dtype or torch.float32).requires_grad_(), t.to(dtype or torch.float32).requires_grad_()


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def equal(tensor, array):
    np.testing.assert_array_equal(to_array(tensor), array, strict=True)


# values and gradients


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_are_those_of_arrays(name, loss, dtype):
    z, t = operands(name, getattr(torch, dtype))
    for reduction in LOSSES[name].reductions:
        value = loss(z, t, reduction=reduction)
        want = loss(to_array(z), to_array(t), reduction=reduction)
        equal(value, np.asarray(want, dtype))
        upstream = torch.ones_like(value)
        (grad,) = torch.autograd.grad(value, z, upstream)
        equal(grad, as_tuple(loss.grad(to_array(z), to_array(t), reduction=reduction))[0])


def test_methods_return_tensors(name, loss):
    z, t = operands(name)
    a, b = to_array(z), to_array(t)
    value, grads = loss.value_and_grad(z, t)
    want, want_grads = loss.value_and_grad(a, b)
    equal(value, np.asarray(want, np.float32))
    methods = [(grads, want_grads), (loss.grad(z, t), loss.grad(a, b))]
    if hasattr(loss, "curvature"):
        methods.append((loss.curvature(z, t), loss.curvature(a, b)))
    for got, wanted in methods:
        for x, y in zip(as_tuple(got), as_tuple(wanted), strict=True):
            equal(x, y)
            assert not x.requires_grad


@pytest.mark.parametrize(
    ("name", "reduction"), [(name, r) for name in ALL for r in (LOSSES[name].reductions if name in KINDS else ("mean",))]
)
def test_gradcheck(name, reduction):
    loss, (z, t) = getattr(fl, name), operands(name, torch.float64, (2, 2, 3))
    assert gradcheck(lambda z, t: loss(z, t, reduction=reduction), (z, t))
    assert gradgradcheck(lambda z, t: loss(z, t, reduction=reduction), (z, t))


OPTIONS = {
    "weight": {"weight": torch.linspace(0, 2, 3, dtype=torch.float64)},
    "mask": {"mask": torch.tensor([True, False, True])},
    "ignore_index": {"ignore_index": 0.5},
    "weight, mask": {"weight": torch.rand(2, 3, dtype=torch.float64), "mask": torch.tensor([[True, False], [True, True]])[..., None]},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "gaussian_kl_loss", "dice_bce_with_logits_loss"])
def test_gradcheck_with_options(name, loss, option):
    options = OPTIONS[option]
    if name == "gaussian_kl_loss" and "ignore_index" in options:
        with pytest.raises(TypeError, match="unknown option ignore_index"):
            loss(*operands(name, torch.float64, (2, 2, 3)), **options)
        return
    z, t = operands(name, torch.float64, (2, 2, 3))
    with torch.no_grad():
        t[0, 0, 1] = 0.5
    ignored = "ignore_index" in options
    arguments = (z, t.detach()) if ignored else (z, t)
    assert gradcheck(lambda z, t: loss(z, t, **options), arguments)
    assert gradgradcheck(lambda z, t: loss(z, t, **options), arguments)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("binary_cross_entropy_with_logits", {"pos_weight": 3.0, "label_smoothing": 0.1}),
        ("binary_cross_entropy_with_logits", {"pos_weight": torch.tensor([[0.5], [3.0]], dtype=torch.float64)}),
        ("smooth_l1_loss", {"beta": 0.3}),
        ("huber_loss", {"delta": 0.7}),
        ("sigmoid_focal_loss", {"alpha": -1, "gamma": 1.5}),
        ("sigmoid_focal_loss", {"alpha": 0.7, "gamma": 3}),
        ("dice_with_logits_loss", {"per_channel": False, "smooth": 0.5}),
        ("dice_with_logits_loss", {"per_sample": False}),
        ("dice_with_logits_loss", {"alpha": 0.3, "beta": 0.8, "smooth_denominator": 0.5}),
        ("dice_bce_with_logits_loss", {"per_channel": False, "per_sample": False, "bce_weight": 0.3}),
    ],
)
def test_gradcheck_with_parameters(name, parameters):
    loss, (z, t) = getattr(fl, name), operands(name, torch.float64, (2, 2, 3))
    assert gradcheck(lambda z, t: loss(z, t, **parameters), (z, t))
    assert gradgradcheck(lambda z, t: loss(z, t, **parameters), (z, t))


@pytest.mark.parametrize("reconstruction", ["bce", "mse"])
def test_gradcheck_of_the_objective_of_a_vae(reconstruction):
    z, t = operands("", torch.float64, (3, 2, 2))
    mu, logvar = operands("gaussian_kl_loss", torch.float64, (3, 2), seed=1)

    def total(*tensors):
        return fl.vae_loss(*tensors, reconstruction=reconstruction, beta=0.5).total

    assert gradcheck(total, (z, t, mu, logvar))
    assert gradgradcheck(total, (z, t, mu, logvar))
    value, grads = fl.vae_loss.value_and_grad(z, t, mu, logvar, reconstruction=reconstruction, beta=0.5)
    assert type(value) is fl.VAEValue
    for got, want in zip(grads, torch.autograd.grad(total(z, t, mu, logvar), (z, mu, logvar)), strict=True):
        assert_close(to_array(got), to_array(want), PEER[np.dtype(np.float64)])


# upstream gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", LOSSES["mse_loss"].reductions)
def test_upstream_gradients_follow_the_chain_rule(reduction, dtype, rng):
    z, t = operands("", dtype)
    value = BCE(z, t, reduction=reduction)
    upstream = torch.tensor(rng.random(value.shape)).to(dtype)
    (grad,) = torch.autograd.grad(value, z, upstream)
    wide = BCE.grad(*(to_array(x).astype(np.float64) for x in (z, t)), reduction=reduction, grad_output=to_array(upstream).astype(float))
    digits = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(dtype)
    if digits is None:
        assert_close(to_array(grad), wide, PEER[to_array(z).dtype])
    else:  # a single rounding: at most half an ulp
        assert (np.abs(to_array(grad).astype(float) - wide) <= digits * np.abs(wide) + np.finfo(np.float16).smallest_subnormal).all()


def test_a_scaled_loss_keeps_the_small_gradients_of_half_precision():
    z, t = torch.zeros(1 << 20, dtype=torch.float16, requires_grad=True), torch.ones(1 << 20, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        (BCE(z, t) * 2.0**16).backward()
    assert (z.grad == -(2.0**-5)).all()  # without the scale, -1/2 / 2**20 is a subnormal float16


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_retained_graph_gives_the_same_gradient_again(factor):
    z, t = operands("")
    value = factor * BCE(z, t)
    first = torch.autograd.grad(value, z, retain_graph=True)[0].clone()
    second = torch.autograd.grad(value, z, retain_graph=True)[0].clone()
    value.backward()
    assert torch.equal(first, second)
    assert torch.equal(first, z.grad)


@pytest.mark.parametrize("view", [lambda z: z, lambda z: z.view(-1)])
def test_changing_a_gradient_does_not_change_the_next(view):
    z, t = operands("")
    value = BCE(view(z), view(t).detach())
    value.backward(retain_graph=True)
    want, z.grad = z.grad.clone(), z.grad.mul_(0)
    value.backward(retain_graph=True)
    assert torch.equal(z.grad, want)
    torch.autograd.grad(value, z, retain_graph=True)[0].mul_(7)
    assert torch.equal(torch.autograd.grad(value, z)[0], want)


@pytest.mark.parametrize("reduction", ["mean", "sample_sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_batches_of_gradients(reduction, dtype):
    z, t = operands("", dtype, shape=(3, 2))
    value = BCE(z, t, reduction=reduction)
    upstream = torch.eye(max(value.numel(), 1), dtype=dtype).reshape(-1, *value.shape)
    (batched,) = torch.autograd.grad(value, z, upstream, is_grads_batched=True, retain_graph=True)
    for got, one in zip(batched, upstream, strict=True):
        assert torch.equal(got, torch.autograd.grad(value, z, one, retain_graph=True)[0])
    dice = fl.dice_with_logits_loss(z.reshape(1, 3, 2), t.reshape(1, 3, 2), reduction="none")
    with pytest.raises(NotImplementedError, match="dice_with_logits_loss with reduction 'none' accepts no batch of upstream gradients"):
        torch.autograd.grad(dice, z, torch.ones(2, *dice.shape, dtype=dtype), is_grads_batched=True)


def test_gradients_accumulate():
    z, t = operands("")
    for _ in range(3):
        BCE(z, t).backward()
    equal(z.grad / 3, (3 * BCE.grad(to_array(z), to_array(t)) / np.float32(3)))


def test_the_backward_pass_cannot_run_twice():
    z, t = operands("")
    value = BCE(z, t)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_no_graph_is_built_without_gradients(loss, name):
    z, t = (x.detach() for x in operands(name))
    assert loss(z, t).grad_fn is None
    with torch.no_grad():
        assert loss(z.requires_grad_(), t).grad_fn is None
    with torch.inference_mode():
        equal(loss(z, t), to_array(loss(z.detach(), t)))


def test_a_changed_input_raises_in_the_backward_pass():
    z, t = operands("")
    logits = 2 * z
    value = BCE(logits, t)
    with torch.no_grad():
        logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_backward_in_threads():
    z, t = operands("", shape=(200_000,))
    want = BCE.grad(to_array(z), to_array(t))
    found = []

    def work():
        found.append(torch.autograd.grad(BCE(z, t), z)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for grad in found:
        equal(grad, want)


def test_checkpointed():
    z, t = operands("")
    torch.utils.checkpoint.checkpoint(BCE, z, t, use_reentrant=False).backward()
    equal(z.grad, BCE.grad(to_array(z), to_array(t)))


# memory


def test_the_gradient_is_the_only_allocation():
    z, t = operands("", shape=(1 << 21,))
    t = t.detach()
    BCE(z, t).backward()
    z.grad = None
    before = len(memory._lent)
    tracemalloc.start()
    (value := BCE(z, t)).backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 16
    assert [len(block) for _, block in list(memory._lent.values())[before:]] == [z.nbytes]
    assert value.grad_fn is not None


def test_memory_of_large_gradients_is_reused():
    z, t = operands("", shape=(4, 3, 512, 400))
    t = t.detach()
    ft.empty_cache()

    def gradient(z):
        return torch.autograd.grad(BCE(z, t), z)[0]

    want = BCE.grad(to_array(z), to_array(t))
    first = gradient(z)
    other = gradient(z)  # while the first gradient is alive
    assert other.data_ptr() != first.data_ptr()
    part, place = first[1], first.data_ptr()
    del first
    assert gradient(z).data_ptr() not in (place, other.data_ptr())  # a view keeps the memory alive
    equal(part, want[1])
    del part
    again = gradient(z.detach().to(memory_format=torch.channels_last).requires_grad_())
    assert again.data_ptr() != other.data_ptr()
    assert again.is_contiguous(memory_format=torch.channels_last)
    for grad in (other, again):
        equal(grad, want)
    seen = set()
    del other, again, grad
    for _ in range(5):
        seen.add(gradient(z).data_ptr())
    assert len(seen) == 1
    assert len(memory._free) <= memory.MOST_FREE
    ft.empty_cache()
    assert not memory._free


def test_a_forked_child_writes_to_memory_of_its_own():
    code = """
import os, torch, fastloss as fl
z, t = torch.ones(1 << 22, requires_grad=True), torch.zeros(1 << 22)
grad = torch.autograd.grad(fl.mse_loss(z, t, reduction="sum"), z)[0]
if not (child := os.fork()):
    grad.numpy().fill(0)  # by NumPy: PyTorch would wait for OpenMP threads, which a child lacks
    os._exit(0)
os.waitpid(child, 0)
print(grad.sum().item() == 2 << 22)"""
    assert run(code) == "True\n"


def test_a_leaf_gets_the_gradient_without_a_copy():
    z, t = operands("", shape=(1 << 18,))
    seen = []
    z.register_hook(lambda grad: seen.append(grad.data_ptr()))
    BCE(z, t).backward()
    assert seen == [z.grad.data_ptr()]


def test_a_factor_is_multiplied_in_place_unless_the_graph_is_retained():
    z, t = operands("", shape=(1 << 18,))
    value = BCE(z, t)
    saved = value.grad_fn.saved_tensors[0].data_ptr()
    assert torch.autograd.grad(2 * value, z, retain_graph=True)[0].data_ptr() != saved
    assert torch.autograd.grad(2 * value, z)[0].data_ptr() == saved


def test_out_is_written_and_returned():
    z, t = operands("")
    out = torch.empty_like(z)
    version = out._version
    _, grad = BCE.value_and_grad(z, t, out=out)
    assert grad is out
    assert out._version > version
    equal(out, BCE.grad(to_array(z), to_array(t)))
    z = z.detach()
    want = BCE.grad(z, t)
    assert torch.equal(BCE.grad(z, t, out=z), want)
    with pytest.raises(RuntimeError, match="out is a leaf that requires a gradient"):
        BCE.grad(z, t, out=z.requires_grad_())


def test_out_is_a_pair_or_three(rng):
    mu, logvar = (x.detach() for x in operands("gaussian_kl_loss"))
    out = torch.empty_like(mu), torch.empty_like(mu)
    grads = fl.gaussian_kl_loss.grad(mu, logvar, out=out)
    assert all(x is y for x, y in zip(grads, out, strict=True))
    z, t = (x.detach() for x in operands(""))
    three = (torch.empty_like(z), *out)
    _, grads = fl.vae_loss.value_and_grad(z, t, mu, logvar, out=three)
    assert all(x is y for x, y in zip(grads, three, strict=True))
    with pytest.raises(RuntimeError, match=r"out\[0\] is a leaf that requires a gradient"):
        fl.vae_loss.grad(z, t, mu, logvar, out=(torch.empty_like(z, requires_grad=True), *out))


# inplace_grad


def test_the_gradient_overwrites_the_input():
    z, t = operands("", shape=(1 << 18,))
    want = BCE.grad(to_array(z), to_array(t))
    logits, seen = z + 0, []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    tracemalloc.start()
    BCE(logits, t.detach(), inplace_grad=True).backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 16
    assert seen == [logits.data_ptr()]
    equal(logits, want)
    equal(z.grad, want)


@pytest.mark.parametrize("name", ["mse_loss", "sigmoid_focal_loss", "dice_with_logits_loss", "dice_bce_with_logits_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_overwrites_the_input_of_any_loss(name, dtype):
    loss, (z, t) = getattr(fl, name), operands(name, dtype)
    for reduction in ("sum", "sample_mean"):
        (want,) = torch.autograd.grad(loss(z, t, reduction=reduction).sum() * 3, z)
        logits = z * 1
        value = loss(logits, t, reduction=reduction, inplace_grad=True)
        assert torch.equal(torch.autograd.grad(value.sum() * 3, z)[0], want)


def test_backward_functions_that_need_the_overwritten_input_raise():
    z, t = operands("")
    logits = z.exp()  # keeps its result for the backward pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        BCE(logits, t, inplace_grad=True).backward()
    logits = z * 1
    penalty = (logits**2).mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (BCE(logits, t, inplace_grad=True) + penalty).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_writing_to_an_overwritten_input_raises(dtype):
    z, t = operands("", dtype)
    logits = z * 1
    value = BCE(logits, t, inplace_grad=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    logits = z * 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (fl.mse_loss(logits, t, inplace_grad=True) + BCE(logits, t, inplace_grad=True)).backward()


def test_an_error_before_the_overwriting_leaves_the_input_usable():
    z, t = operands("")
    logits = z * 1
    penalty = (logits**2).sum()
    with pytest.raises(ValueError, match="accepted: targets in"):
        BCE(logits, t + 2, inplace_grad=True, validate=True)
    penalty.backward()


def test_whole_targets_are_refused_and_a_written_input_is_known_to_have_changed():
    leaf = torch.zeros(3, requires_grad=True)
    logits, images = leaf * 1, torch.tensor([0, 255, 1], dtype=torch.uint8)
    version = logits._version
    with pytest.raises(ValueError, match=re.escape("target[1] is 255; accepted: targets in [0, 1]")):
        BCE(logits, images)
    assert logits._version == version
    with pytest.raises(ValueError, match=re.escape("(the output has already been written)")):
        BCE(logits, images, inplace_grad=True)
    assert logits._version > version
    BCE(logits.detach(), images, target_scale=1 / 255)


@pytest.mark.parametrize("view", [lambda z: z, lambda z: z.view(-1), lambda z: z[:2], lambda z: z.detach().requires_grad_()])
def test_a_leaf_is_not_overwritten(view):
    z, t = operands("")
    before = z.detach().clone()
    with pytest.raises(RuntimeError, match="the input is a leaf that requires a gradient, or a view of one"):
        BCE(view(z), view(t).detach(), inplace_grad=True)
    assert torch.equal(z, before)


def test_an_input_without_a_gradient_is_not_overwritten():
    z, t = (x.detach() for x in operands(""))
    before = z.clone()
    BCE(z, t, inplace_grad=True)
    BCE(z, t.requires_grad_(), inplace_grad=True).backward()
    with torch.no_grad():
        BCE(z.requires_grad_(), t, inplace_grad=True)
    assert torch.equal(z, before)


def test_an_overwritten_input_has_no_second_derivative():
    z, t = operands("")
    with pytest.raises(RuntimeError, match="inplace_grad=True has overwritten the input"):
        torch.autograd.grad(BCE(z * 1, t, inplace_grad=True), z, create_graph=True)


def test_inplace_grad_is_an_option_of_values_with_one_gradient():
    z, t = operands("")
    with pytest.raises(ValueError, match="inplace_grad is an option of calls for the value alone"):
        BCE.grad(z, t, inplace_grad=True)
    with pytest.raises(TypeError, match="inplace_grad is not supported by gaussian_kl_loss, which has two gradients"):
        fl.gaussian_kl_loss(z * 1, t, inplace_grad=True)
    with pytest.raises(ValueError, match="several elements of the input, which inplace_grad=True overwrites, share memory"):
        BCE((z * 1)[:1].expand(SHAPE), t, inplace_grad=True)


# layouts, dtypes, autocast

VIEWS = {
    "transposed": lambda x: x.transpose(0, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand(SHAPE),
    "one element": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
    "one sample": lambda x: x[2:3],
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("other", ["same", "contiguous"])
def test_layouts(view, reduction, other):
    z, t = operands("", torch.float64)
    a, b = VIEWS[view](z), VIEWS[view](t)
    b = b.contiguous() if other == "contiguous" else b
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(a, b, reduction=reduction)
    ours = BCE(a, b, reduction=reduction)
    assert ours.shape == theirs.shape
    wants, gots = (torch.autograd.grad(value.sum(), (z, t), retain_graph=True) for value in (theirs, ours))
    for got, want in zip((ours, *gots), (theirs, *wants), strict=True):
        np.testing.assert_array_equal(torch.isnan(got), torch.isnan(want))
        assert_close(torch.nan_to_num(got).detach(), torch.nan_to_num(want).detach(), PEER[np.dtype(np.float64)])


def test_gradients_lie_in_memory_as_the_input_does():
    z, t = (VIEWS["channels last"](x.detach()) for x in operands(""))
    BCE(z.requires_grad_(), t).backward()
    assert z.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("target", [torch.uint8, torch.int64, torch.bool, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype, target):
    z, t = operands("", dtype)
    t = (t > 0.5).to(target)
    value = BCE(z, t)
    assert value.dtype == dtype
    value.backward()
    assert z.grad.dtype == dtype
    equal(z.grad, BCE.grad(to_array(z), to_array(t)))


def test_bytes_are_scaled():
    z, images = operands("")[0], torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    BCE(z, images, target_scale=1 / 255, reduction="batchmean").backward()
    equal(z.grad, BCE.grad(to_array(z), to_array(images), target_scale=1 / 255, reduction="batchmean"))


def test_the_gradient_by_a_wider_target_is_as_wide():
    z, _ = operands("", torch.float32)
    t = torch.rand(SHAPE, dtype=torch.float64, requires_grad=True)
    fl.mse_loss(z, t).backward()
    assert (z.grad.dtype, t.grad.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_autocast_halves_are_computed_in_float32(half, reduction):
    z, t = operands("", half)
    with torch.autocast("cpu", dtype=half):
        value = BCE(z, t, reduction=reduction)
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(z, t, reduction=reduction)
    assert value.dtype == theirs.dtype == torch.float32
    assert_close(value.detach(), theirs.detach(), PEER[np.dtype(np.float32)])
    value.sum().backward()
    assert z.grad.dtype == half
    assert BCE(z, t).dtype == half
    with torch.autocast("cpu", dtype=half):
        assert fl.vae_loss.value_and_grad(z, t, z, z)[0].total.dtype == torch.float32


# torch.compile


@pytest.mark.parametrize(
    ("name", "reduction", "view"),
    [*((name, "mean", "transposed") for name in ALL), *(("mse_loss", r, "expanded") for r in ("none", "sample_sum"))],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck reads .grad
def test_opcheck(name, reduction, view):
    loss, (z, t) = getattr(fl, name), (VIEWS[view](x.detach()).requires_grad_() for x in operands(name))
    weight = torch.rand(z.shape[-1])
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    utils += ["test_aot_dispatch_dynamic"] if name in KINDS or view == "expanded" else []  # `test_compiled` traces every loss
    opcheck(torch.ops.fastloss.loss.default, (loss.key, reduction, z, t, [weight], ["weight"], [], torch.float32), test_utils=utils)
    arguments = (loss.key, reduction, z, t, [weight], ["weight"], [], torch.float32, ["slope", "target_slope"])
    opcheck(torch.ops.fastloss.loss_and_slopes.default, arguments, test_utils=utils)
    upstream = torch.rand(loss(z, t, weight, reduction).shape, requires_grad=True)
    arguments = (loss.key, reduction, z, t, [weight], ["weight"], [], ["slope", "target_slope"], upstream)
    opcheck(torch.ops.fastloss.derivatives.default, arguments, test_utils=utils)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("name", "reduction"),
    [*((name, "mean") for name in ALL), *((name, r) for name in KINDS for r in ("none", "sample_mean") if r in LOSSES[name].reductions)],
)
def test_compiled(name, reduction):
    loss, (z, t) = getattr(fl, name), operands(name)

    def step(z, t, weight):
        logits = z * 1.0
        return (loss(logits, t, weight, reduction=reduction) * 2).sum()

    weight = torch.rand(SHAPE[1:])
    wants, gots = (torch.autograd.grad(f(z, t, weight), (z, t)) for f in (step, compiled(step)))
    for got, want in zip(gots, wants, strict=True):
        assert_close(got, want, PEER[np.dtype(np.float32)])


def operators_of(function):
    """Return the names of our operators that the forward and the backward pass of a compiled function call, and their other nodes."""
    seen = []

    def backend(graph, _):
        names = [node.target.__name__.partition(".")[0] for node in graph.graph.nodes if node.op == "call_function"]
        seen.append(names)
        return make_boxed_func(graph.forward)

    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))().backward()
    return seen


def test_compiled_code_makes_one_pass_and_multiplies_the_gradient_itself():
    z, t = operands("")
    forward, backward = operators_of(lambda: BCE(z * 2, t.detach()) * 3)
    assert forward.count("loss_and_slopes") == 1
    assert "derivatives" not in forward
    assert {"loss_and_slopes", "derivatives", "loss"}.isdisjoint(backward)
    assert "mul" in backward


def test_compiled_code_computes_gradients_of_16_bits_from_the_upstream_gradient():
    z, t = (x.detach().half().requires_grad_() for x in operands(""))
    forward, backward = operators_of(lambda: BCE(z, t))
    assert "loss" in forward
    assert "derivatives" in backward


def test_compiled_second_derivatives_of_the_operator():
    z, t = operands("", torch.float64, (2, 2, 3))
    arguments = BCE.key, "mean", z, t, [], [], [], torch.float64, ["slope", "target_slope"]

    def loss(z, t):
        return torch.ops.fastloss.loss_and_slopes(*arguments[:2], z, t, *arguments[4:])[0]

    assert gradcheck(loss, (z, t))
    assert gradgradcheck(loss, (z, t))


@pytest.mark.parametrize(
    "function",
    [
        lambda z, t, x: fl.smooth_l1_loss(z, t, beta=x),
        lambda z, t, x: ft.huber_loss(z, t, delta=x, reduction="sum"),
        lambda z, t, x: ft.sigmoid_focal_loss(z, t, gamma=x, reduction="mean"),
    ],
)
def test_a_changed_number_compiles_once_more_and_not_again(function):
    z, t = operands("")
    counter = CompileCounterWithBackend("aot_eager")
    changing = torch.compile(function, fullgraph=True, backend=counter)
    for x in (0.5, 0.25, 0.375, 0.75):
        got, want = (torch.autograd.grad(f(z, t, x), z)[0] for f in (changing, function))
        assert_close(got, want, PEER[np.dtype(np.float32)])
    assert counter.frame_count <= 2


@needs_compiler
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # of PyTorch 2.6
def test_compiled_by_inductor():
    z, t = operands("")
    module = ft.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 3.0]).reshape(3, 1, 1), label_smoothing=0.1)
    torch.compile(lambda z, t: module(3 * z.sigmoid(), t), fullgraph=True)(z, t).backward()
    got, z.grad = z.grad, None
    module(3 * z.sigmoid(), t).backward()
    assert_close(got, z.grad, PEER[np.dtype(np.float32)])


@pytest.mark.parametrize("loss", ["fastloss.torch.MSELoss()", "fastloss.mse_loss.grad"])
def test_compiled_before_any_other_call(loss):
    code = f"""
import torch, {loss.rpartition(".")[0].removesuffix(".mse_loss")}
z, t = torch.ones(3), torch.zeros(3)
f = torch.compile(lambda z, t: {loss}(z, t), fullgraph=True, backend="eager")
print(f(z, t).sum().item())"""
    assert run(code) == ("2.0\n" if loss.endswith("grad") else "1.0\n")


def test_compiled_once_for_any_length():
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph

    function = torch.compile(lambda z, t: BCE(z, t), fullgraph=True, dynamic=True, backend=backend)
    for n in (3, 5, 9):
        z, t = operands("", shape=(n, 4))
        assert torch.equal(function(z, t), BCE(z, t))
    assert len(frames) == 1


def test_compiled_methods_objectives_and_own_losses():
    z, t = (x.detach() for x in operands(""))
    mu, logvar = (x.detach() for x in operands("gaussian_kl_loss", shape=(4, 6)))
    functions = {
        "value_and_grad": lambda: BCE.value_and_grad(z, t, reduction="sum", grad_output=2.0)[1],
        "grad": lambda: fl.gaussian_kl_loss.grad(mu, logvar, reduction="none", grad_output=mu)[1],
        "curvature": lambda: fl.log_cosh_loss.curvature(z, t),
        "vae_loss": lambda: fl.vae_loss(z, t, mu, logvar, beta=0.5).total,
        "binary_entropy": lambda: fl.binary_entropy(t),
        "charbonnier": lambda: charbonnier(z, t, eps=0.1, mask=t > 0.5),
        "module": lambda: ft.VAELoss(beta=2.0)(z, t, mu, logvar).divergence,
    }
    for function in functions.values():
        assert_close(compiled(function)(), function(), PEER[np.dtype(np.float32)])


def test_inplace_grad_is_ignored_by_the_compiler(rng):
    z, t = operands("")
    compiled(lambda: BCE(z * 1, t, inplace_grad=True))().backward()
    equal(z.grad, BCE.grad(to_array(z), to_array(t)))


def test_bad_arguments_raise_while_compiling():
    z, t = operands("")
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="unknown option gamma"):
        compiled(lambda: BCE(z, t, gamma=2))()
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=r"input has shape \(4, 3, 5, 7\) and target \(2, 3, 5, 7\)"):
        compiled(lambda: BCE(z, t[:2]))()


def test_formulas_of_the_same_name_have_different_keys():
    losses = [fl.elementwise_loss(lambda z, t, k=k: (k * z - t, k)) for k in (2.0, 3.0)]
    z, t = operands("")
    assert losses[0].key != losses[1].key
    for loss in losses:
        assert torch.equal(compiled(loss)(z, t.detach()), loss(z, t.detach()))


def test_losses_with_and_without_validation_have_different_keys():
    def square(z, t):
        return (z - t) * (z - t), 2 * (z - t)

    checking, plain = fl.elementwise_loss(probabilities=("target",))(square), fl.elementwise_loss(square)
    z, t = operands("")
    assert checking.key != plain.key
    assert compiled(lambda: plain(z, t.detach() + 2, validate=True))() > 0
    with pytest.raises(ValueError, match="accepted: targets in"):
        compiled(lambda: checking(z, t.detach() + 2, validate=True))()


def test_traced():
    z, t = (x.detach() for x in operands(""))
    for pre_dispatch in (False, True):
        graph = make_fx(lambda z, t: BCE(z, t), pre_dispatch=pre_dispatch)(z, t)
        assert torch.equal(graph(t, z.sigmoid()), BCE(t, z.sigmoid()))


def test_the_default_device_does_not_move_the_value():
    z, t = (x.detach() for x in operands(""))
    with torch.device("meta"):
        assert BCE(z, t).device.type == "cpu"


def test_tensors_without_memory():
    z, t = operands("")
    value = BCE(z.to("meta"), t.to("meta"), reduction="none")
    assert (value.device.type, value.shape) == ("meta", z.shape)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert BCE(torch.empty(SHAPE), torch.empty(SHAPE)).shape == ()


# refused calls


@pytest.mark.filterwarnings("ignore:.*jit.trace")  # deprecated by newer versions of PyTorch
def test_other_derivatives_are_refused():
    z, t = operands("")
    for transform in (torch.func.grad, torch.func.vmap, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=r"fastloss does not support torch\.func"):
            transform(lambda z: BCE(z, z.detach()))(z.detach())
    with pytest.raises(NotImplementedError, match=r"fastloss does not support torch\.func"):
        torch.func.jvp(lambda z: BCE(z, t), (z,), (t,))
    with pytest.raises(NotImplementedError, match=r"fastloss does not support torch\.func"):
        torch.jit.trace(lambda z: BCE(z, t), z)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z.detach(), t)
        with pytest.raises(NotImplementedError, match=r"fastloss does not support torch\.func"):
            BCE(dual, t)
        assert BCE(z, t).grad_fn is not None
    (grad,) = torch.autograd.grad(BCE(z, t), z, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives of a loss are not supported"):
        second.sum().backward()


def test_derivatives_that_a_formula_lacks_are_refused():
    z, t = operands("")
    charbonnier(z, t.detach()).backward()
    equal(z.grad, charbonnier.grad(to_array(z), to_array(t)))
    with pytest.raises(NotImplementedError, match=r"charbonnier has no target_slope: its formula returns \(value, slope\)"):
        charbonnier(z, t)
    (grad,) = torch.autograd.grad(charbonnier(z, t.detach()), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="charbonnier has no curvature"):
        grad.sum().backward()
    with pytest.raises(
        NotImplementedError, match=r"target requires a gradient, but this function is not differentiable; pass target.detach\(\)"
    ):
        fl.binary_entropy(t)


@pytest.mark.parametrize("option", ["weight", "pos_weight"])
def test_gradients_by_options_are_refused(option):
    z, t = operands("")
    weight = torch.rand(7, requires_grad=True)
    with pytest.raises(NotImplementedError, match=rf"^{option} requires a gradient.* pass {option}.detach\(\)$"):
        BCE(z, t, **{option: weight})
    BCE(z, t, **{option: weight.detach()}).backward()


def test_bad_arguments():
    z, t = operands("")
    cases = [
        (
            TypeError,
            r"target is a numpy.ndarray, but the input is a tensor; accepted: torch.Tensor; pass torch.as_tensor\(target\)$",
            (z, to_array(t)),
            {},
        ),
        (TypeError, "weight is a numpy.ndarray", (z, t), {"weight": np.ones(7)}),
        (TypeError, "mask is a builtins.list", (z, t), {"mask": [True] * 7}),
        (TypeError, r"target is a torch.Tensor; accepted: .*; pass target.numpy\(force=True\), or", (to_array(z), t), {}),
        (TypeError, "input has layout torch.sparse_coo; accepted: torch.strided", (z.detach().to_sparse(), t), {}),
        (TypeError, "input has dtype int64; accepted: float16", (t.long(), t), {}),
        (TypeError, "input has dtype complex64", (z.detach() * 1j, t), {}),
        (ValueError, r"input has shape \(4, 3, 5, 7\) and target \(2, 3, 5, 7\)", (z, t[:2]), {}),
        (ValueError, "out is not supported in a call for the value of tensors", (z, t), {"out": z, "reduction": "none"}),
        (ValueError, "reduction 'median' is unknown", (z, t), {"reduction": "median"}),
        (ValueError, "target is on meta, but the input is on cpu; accepted: tensors on one device", (z, t.to("meta")), {}),
        (TypeError, "unknown option gamma", (z, t), {"gamma": 2}),
    ]
    for kind, message, arguments, options in cases:
        with pytest.raises(kind, match=message):
            BCE(*arguments, **options)


def test_unsupported_device_is_refused(monkeypatch):
    class Elsewhere(torch.Tensor):
        is_cpu = False
        device = torch.device("xpu:0")

    z, t = (x.detach() for x in operands(""))
    with pytest.raises(NotImplementedError, match=r"^target is on xpu:0; accepted: tensors on the CPU or on a CUDA device$"):
        BCE(z, t.as_subclass(Elsewhere))


def test_tensors_on_a_gpu_without_cupy_are_refused_with_the_name_of_the_extra(monkeypatch):
    z, t = (x.detach() for x in operands(""))
    for name in [name for name in sys.modules if name.startswith(("fastloss.cuda", "fastloss.backends.torch.gpu"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("fastloss.backends.torch.")]:
        monkeypatch.setattr(sys.modules[name], "is_on_gpu", lambda x: True, raising=False)
    monkeypatch.delattr(sys.modules["fastloss.backends.torch"], "gpu", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(BACKEND, "bound", {})
    with pytest.raises(ImportError, match=r"GPU need CuPy, .*; pip install 'fastloss\[cuda13\]', or 'fastloss\[cuda12\]'"):
        BCE(z, t)


@pytest.mark.filterwarnings("ignore:mean of no elements:RuntimeWarning")
def test_calls_that_repeat_with_every_element_masked():
    z, t = (x.detach() for x in operands(""))
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    for _ in range(3):
        value = BCE(z, t, mask=mask)
        assert value.isnan()
        assert value.shape == ()
        leaf = z.clone().requires_grad_()
        value = BCE(leaf, t, mask=mask)
        value.backward()
        assert value.isnan()
        assert not leaf.grad.count_nonzero()


# processes


def test_a_patch_before_the_first_compilation_of_a_process_serves_compiled_code():
    code = """
import torch, fastloss.torch as ft
from functorch.compile import make_boxed_func
ft.patch()
from torch._dynamo.backends.common import aot_autograd
names = []
def compiler(graph, _):
    names.extend(str(node.target) for node in graph.graph.nodes)
    return make_boxed_func(graph.forward)
x, t = torch.rand(9, requires_grad=True), torch.rand(9)
backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
torch.compile(lambda: torch.nn.functional.mse_loss(x * 2, t), backend=backend, fullgraph=True)().backward()
torch.compile(lambda: torch.nn.BCEWithLogitsLoss()(x * 2, t), backend=backend, fullgraph=True)().backward()
print(names.count("fastloss.loss_and_slopes.default"))"""
    assert run(code).strip() == "2"


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_calls_with_arrays_do_not_import_torch():
    assert run("import sys, fastloss as fl; fl.mse_loss([1.0], [2.0]); print('torch' in sys.modules)") == "False\n"


def test_tensors_work_without_importing_fastloss_torch():
    assert run("import torch, fastloss as fl; z = torch.ones(3, requires_grad=True); print(fl.mse_loss(z, 0 * z).item())") == "1.0\n"


def test_workers_release_tensors_before_exit():
    """A worker that frees a tensor while Python exits would abort the process."""
    code = """
import torch, numpy as np, fastloss as fl
z, t = np.ones((2, 1 << 23), np.float32)
for _ in range(3):
    fl.mse_loss.grad(z, t, out=torch.empty(z.shape).numpy())"""
    for _ in range(3):
        run(code)


def test_a_graph_is_freed():
    z, t = operands("", shape=(1 << 16,))
    gc.collect()
    gc.disable()  # the graph must be freed without the collector, so it may hold no cycle
    try:
        tracemalloc.start()
        for _ in range(20):
            BCE(z, t)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < z.nbytes


def test_numerical_derivative_of_the_slope_by_the_target(name, loss):
    """Check float32 slopes, for which gradcheck lacks digits, against those of float64 arrays."""
    wide, narrow = (operands(name, dtype) for dtype in (torch.float64, torch.float32))
    grads = [torch.autograd.grad(loss(z, t, reduction="sum"), (z, t)) for z, t in (wide, narrow)]
    for want, got in zip(*grads, strict=True):
        assert_close(got, want, DIFFERENCE * 30)
