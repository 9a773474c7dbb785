"""Which calls `fastloss.torch` leaves to PyTorch's kernels, and that nobody sees the difference."""

from __future__ import annotations

import pytest

from tests.ulp import assert_tensor

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812

import fastloss.torch as ft  # noqa: E402
from fastloss.torch.functional import LEFT_BELOW  # noqa: E402
from tests.test_torch_modules import is_ours  # noqa: E402

NAMES = tuple(LEFT_BELOW)
PARAMETERS = {"smooth_l1_loss": {"beta": 0.375}, "huber_loss": {"delta": 0.375}}


def operands(count=1000, dtype=torch.float32):
    """Return an input, which is a leaf, and a target that equals some of its elements."""
    torch.manual_seed(0)
    z, t = 3 * torch.randn(count, dtype=torch.float32), torch.rand(count)
    t[::5] = z[::5]
    return z.to(dtype).requires_grad_(), t.to(dtype)


def derivatives(function, z, t, **options):
    """Return a value and its gradient under an upstream gradient of distinct numbers."""
    value = function(z, t, **options)
    return value, *torch.autograd.grad(value, z, torch.linspace(-1, 2, len(z), dtype=z.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_small_batches_without_a_reduction(name, dtype):
    z, t = operands(dtype=dtype)
    for options in ({}, PARAMETERS.get(name, {})):
        got = derivatives(getattr(ft, name), z, t, reduction="none", **options)
        assert not is_ours(got[0])
        for a, b in zip(got, derivatives(getattr(F, name), z, t, reduction="none", **options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_deprecated_argument_and_patch(name):
    z, t = operands()
    if name != "huber_loss":
        with pytest.warns(UserWarning, match="reduce"):
            assert not is_ours(getattr(ft, name)(z, t, reduce=False))
    with ft.patch():
        assert not is_ours(getattr(F, name)(z, t, reduction="none"))
        assert is_ours(getattr(F, name)(z, t))


@pytest.mark.parametrize("name", NAMES)
def test_large_batches_are_not_left(name):
    z, t = operands(LEFT_BELOW[name] // 4)
    assert is_ours(getattr(ft, name)(z, t, reduction="none"))
    assert not is_ours(getattr(ft, name)(z[:-1], t[:-1], reduction="none"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_left(name):
    function, (z, t) = getattr(ft, name), operands()
    calls = [
        lambda: function(z, t),
        lambda: function(z, t, reduction="sum"),
        lambda: function(z, t, reduction="none", mask=t > 0.5),
        lambda: function(z.bfloat16(), t.bfloat16(), reduction="none"),
    ]
    if name != "smooth_l1_loss":
        calls.append(lambda: function(z, t, reduction="none", weight=torch.ones_like(t)))
    assert [is_ours(call()) for call in calls] == [True] * len(calls)


def test_smooth_l1_with_a_beta_of_0_has_a_slope_of_0_at_0():
    z, t = operands()
    _, slope = derivatives(ft.smooth_l1_loss, z, t, reduction="none", beta=0.0)
    assert not slope[::5].any()  # PyTorch's kernel returns -1 there
    assert_tensor(slope, derivatives(F.smooth_l1_loss, z, t, reduction="none", beta=0.0)[1])


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_gets_operators_that_the_compiler_can_fuse(name):
    found = []

    def backend(module, _):
        found.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    z, t = operands(LEFT_BELOW[name] // 4)
    torch.compile(lambda: getattr(ft, name)(z, t, reduction="none").mean(), backend=backend, fullgraph=True)()
    assert not any("fastloss" in target for target in found), found
