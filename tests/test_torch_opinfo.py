"""Run the samples of PyTorch's own tests through our losses of the same names and through `patch`."""

from __future__ import annotations

import contextlib
import sys
import types
import unittest

import numpy as np
import pytest

from tests.ulp import PEER, assert_tensor

torch = pytest.importorskip("torch")

import fastloss.torch as ft  # noqa: E402
from tests.test_torch_modules import is_ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_left")

NAMES = ("binary_cross_entropy_with_logits", "binary_cross_entropy", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
MODULES = ("BCEWithLogitsLoss", "BCELoss", "CrossEntropyLoss", "HuberLoss", "L1Loss", "MSELoss", "SmoothL1Loss")
WAYS = ("own", "patched")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPLEX = {"l1_loss": (torch.complex64, torch.complex128)}  # all dtypes of samples that fastloss does not support
PASSED_ON = {"smooth_l1_loss": ({"beta": 0},)}  # samples that `patch` leaves to PyTorch, by their options
BOTH = ("input", "target")


@pytest.fixture(scope="module")
def database():
    """Return the test database of PyTorch for each loss."""
    try:
        import expecttest  # noqa: F401
    except ImportError:  # PyTorch's module needs its TestCase, which is not used here
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.startswith("nn.functional.")}


@pytest.fixture(scope="module")
def modules(database):
    """Return the test database of PyTorch for each module."""
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls.__name__: info for info in module_db}


@contextlib.contextmanager
def function(way, name):
    """Return the function of a name: ours, or the one that `patch` installs."""
    with ft.patch() if way == "patched" else contextlib.nullcontext():
        yield getattr(torch.nn.functional if way == "patched" else ft, name)


def samples(op, dtype):
    """Return all of PyTorch's samples in float32; in other dtypes one of each kind, because each needs its own kernels."""
    found = list(op.reference_inputs("cpu", dtype, requires_grad=True))
    assert all(len(sample.args) == 1 and sample.args[0].requires_grad for sample in found)
    kinds = {(*x.kwargs, x.kwargs.get("reduction") == "none"): x for x in found}
    return found if dtype is torch.float32 else kinds.values()


def compute(loss, sample, differentiated):
    """Return the value, and its gradients under an upstream gradient of distinct numbers."""
    tensors = {"input": sample.input.detach(), "target": sample.args[0].detach()}
    leaves = [tensors[name].requires_grad_() for name in differentiated]
    value = loss(**tensors, **sample.kwargs)
    upstream = torch.linspace(-1, 2, value.numel()).reshape(value.shape).to(value.dtype)
    return value, *(torch.autograd.grad(value, leaves, upstream) if leaves else ())


# `patch` installs our own functions, so one dtype is enough for these alone
@pytest.mark.parametrize(("way", "dtype"), [("own", torch.float32), *(("patched", dtype) for dtype in DTYPES)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(database, way, name, dtype):
    for sample in samples(database[name], dtype):
        for differentiated in [(), BOTH] if dtype is torch.float32 else [BOTH]:
            wanted = compute(database[name].op, sample, differentiated)
            with function(way, name) as loss:
                got = compute(loss, sample, differentiated)
            for a, b in zip(got, wanted, strict=True):
                assert_tensor(a, b)
            if differentiated:
                is_passed_on = way == "patched" and sample.kwargs in PASSED_ON.get(name, ())
                assert is_ours(got[0]) != is_passed_on


@pytest.mark.filterwarnings("ignore:mean of no elements")
@pytest.mark.parametrize("name", MODULES)
def test_samples_of_modules(modules, name):
    info = modules[name]
    torch.manual_seed(0)
    found = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
    assert found
    for sample in found:
        results = []
        for kind in (getattr(ft, name), info.module_cls):
            z, t = (x.detach() for x in sample.forward_input.args)
            value = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)(z.requires_grad_(), t)
            upstream = torch.linspace(-1, 2, value.numel()).reshape(value.shape)
            results.append((value, *torch.autograd.grad(value, z, upstream)))
        (value, grad), (wanted, wanted_grad) = results
        assert is_ours(value)
        if wanted.isnan().any():  # all entries of a sample are ignored
            assert value.isnan().equal(wanted.isnan())
            continue
        assert_tensor(grad, wanted_grad)
        # a sum passes through 0 where probabilities are below 0, as in some samples; its error is relative to the largest term then
        terms = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs | {"reduction": "none"})(z, t)
        scale = max(terms.abs().max(), wanted.abs().max())
        assert (value - wanted).abs().max() <= PEER[np.dtype("f4")] * scale


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_of_supported_or_listed_dtypes(database, name):
    assert database[name].dtypes == {*DTYPES, *COMPLEX.get(name, ())}


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, dtypes in COMPLEX.items() for dtype in dtypes], ids=str)
def test_unsupported_samples(database, name, dtype):
    for sample in samples(database[name], dtype):
        with pytest.raises(TypeError, match=f"has dtype {str(dtype)[6:]}"):
            compute(getattr(ft, name), sample, BOTH)
        with function("patched", name) as loss:
            got = compute(loss, sample, BOTH)
        assert all(map(torch.equal, got, compute(database[name].op, sample, BOTH)))


@pytest.mark.filterwarnings("ignore:.*broadcast:UserWarning")
@pytest.mark.parametrize("name", ["l1_loss", "huber_loss"])
@pytest.mark.parametrize("way", WAYS)
def test_samples_of_errors(database, way, name):
    bad = list(database[name].error_inputs("cpu"))
    assert bad
    for x in bad:
        with function(way, name) as loss, pytest.raises(x.error_type, match=x.error_regex if way == "patched" else None):
            loss(x.sample_input.input, *x.sample_input.args, **x.sample_input.kwargs)
