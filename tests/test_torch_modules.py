"""Modules agree with those of `torch.nn` and with our functions, and `patch` can be undone."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import math
import pickle
import re
import threading
import warnings

import pytest

import fastloss as fl
from tests.test_threads import run_python
from tests.ulp import assert_tensor

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812
from torch.nn.functional import mse_loss as imported_before  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import fastloss.torch as ft  # noqa: E402
from fastloss.backends.torch.autograd import LossFunction  # noqa: E402
from fastloss.losses.table import LOSSES  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_left")

SHAPE = (4, 3, 5)
PER_CHANNEL, EACH = torch.tensor([0.25, 1.0, 3.5]).reshape(3, 1), torch.linspace(0, 3, math.prod(SHAPE)).reshape(SHAPE)
MASK = torch.arange(math.prod(SHAPE)).reshape(SHAPE) % 7 > 1
TORCH = {  # modules that PyTorch has too: its function, and options to construct modules with
    "BCEWithLogitsLoss": (
        "binary_cross_entropy_with_logits",
        [{}, {"weight": EACH}, {"pos_weight": PER_CHANNEL}, {"weight": PER_CHANNEL, "pos_weight": PER_CHANNEL}],
    ),
    "BCELoss": ("binary_cross_entropy", [{}, {"weight": PER_CHANNEL}]),
    "MSELoss": ("mse_loss", [{}]),
    "L1Loss": ("l1_loss", [{}]),
    "SmoothL1Loss": ("smooth_l1_loss", [{}, {"beta": 0.375}, {"beta": 0.0}]),
    "HuberLoss": ("huber_loss", [{}, {"delta": 0.5}]),
}
OWN = {row.module: (row.name, {}) for row in LOSSES.values() if row.module} | {  # losses PyTorch does not have, and options
    "LogCoshLoss": ("log_cosh_loss", {"ignore_index": 0.0}),
    "MSEWithLogitsLoss": ("mse_with_logits_loss", {"weight": PER_CHANNEL}),
    "SigmoidFocalLoss": ("sigmoid_focal_loss", {"alpha": 0.75, "gamma": 1.5}),
    "GaussianKLLoss": ("gaussian_kl_loss", {"mask": MASK}),
    "DiceWithLogitsLoss": ("dice_with_logits_loss", {"smooth": 1e-3, "per_channel": False}),
    "DiceBCEWithLogitsLoss": ("dice_bce_with_logits_loss", {"dice_weight": 0.5, "bce_weight": 2.0}),
}
FUNCTIONS = [function for function, _ in TORCH.values()]
MADE = [(name, options) for name, (_, made) in TORCH.items() for options in made]
KINDS = (ValueError, TypeError, AttributeError, RuntimeError)  # kinds of errors; PyTorch's NotImplementedError is a RuntimeError


def said(x):
    """Name a case by its options, a tensor by its shape."""
    return "-".join(f"{k}={getattr(v, 'shape', v)}" for k, v in x.items()) or "plain" if isinstance(x, dict) else None


def operands(name):
    """Return an input, which is a leaf, and a target with some zeros."""
    torch.manual_seed(0)
    z, t = 3 * torch.randn(SHAPE), torch.rand(SHAPE).where(MASK, 0)
    if name in OWN and LOSSES[OWN[name][0]].classes:
        t = torch.randint(0, SHAPE[1], (SHAPE[0], SHAPE[2]))
    return (z.sigmoid() if name in ("BCELoss", "binary_cross_entropy") else z).requires_grad_(), t


def compute(loss, z, *others, **options):
    """Return the value, and its gradient under an upstream gradient of distinct numbers."""
    value = loss(z, *others, **options)
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value, *torch.autograd.grad(value, z, upstream)


def assert_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert_tensor(a, b)


def is_ours(value):
    """Whether the autograd graph of a value contains one of our functions."""
    nodes = [value.grad_fn] if value.requires_grad else []
    while nodes:
        node = nodes.pop()
        if issubclass(getattr(type(node), "_forward_cls", object), LossFunction):
            return True
        nodes += [x for x, _ in node.next_functions if x is not None]
    return False


def kind_of_error(call):
    """Return the kind of the error that a call raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KINDS) as caught:
            call()
    return next(kind for kind in KINDS if isinstance(caught.value, kind))


def test_every_module_is_in_a_table():
    modules = {name for name in ft.__all__ if isinstance(getattr(ft, name), type)}
    elsewhere = {"CrossEntropyLoss", "VAELoss", "LinearLoss"}  # in test_torch_classes.py, below, and in test_linear_torch.py
    assert modules == {*TORCH, *OWN, *elsewhere}
    assert {name for name in ft.__all__ if hasattr(F, name)} - {"linear_cross_entropy"} == {*FUNCTIONS, "cross_entropy"}


@pytest.mark.parametrize("name", TORCH)
def test_signatures_start_with_those_of_torch(name):
    def parameters(module):
        return [(x.name, x.kind, x.default) for x in inspect.signature(module).parameters.values()]

    *leading, last = parameters(getattr(ft, name))
    assert leading == parameters(getattr(torch.nn, name))
    assert last[1] is inspect.Parameter.VAR_KEYWORD
    function = TORCH[name][0]
    *leading, last = parameters(getattr(ft, function))
    assert leading == parameters(getattr(F, function))
    assert last[1] is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize(("name", "options"), MADE, ids=said)
def test_repr_type_and_attributes_match_torch(name, options):
    ours, theirs = (getattr(place, name)(**options, reduction="sum") for place in (ft, torch.nn))
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    assert vars(ours).keys() - vars(theirs).keys() == {"options"}
    assert {k: x for k, x in vars(ours).items() if not k.startswith("_") and k != "options"} == {
        k: x for k, x in vars(theirs).items() if not k.startswith("_")
    }


@pytest.mark.parametrize(("name", "options"), MADE, ids=said)
def test_results_match_torch(name, options):
    z, t = operands(name)
    for reduction in ("mean", "sum", "none"):
        ours, theirs = (getattr(place, name)(**options, reduction=reduction) for place in (ft, torch.nn))
        got = compute(ours, z, t)
        assert is_ours(got[0])
        assert_same(got, compute(theirs, z, t))
    ours.reduction = "mean"  # may be set after the construction too
    assert ours(z, t).shape == ()


@pytest.mark.parametrize(("name", "options"), [x for x in MADE if x[0].startswith("BCE")], ids=said)
def test_state_matches_torch(name, options):
    z, t = operands(name)
    ours, theirs = (getattr(place, name)(**copy.deepcopy(options)) for place in (ft, torch.nn))
    assert list(ours.state_dict()) == list(theirs.state_dict()) == [k for k in ("weight", "pos_weight") if k in options]
    other = {k: x + 1 for k, x in options.items()}
    theirs.load_state_dict(getattr(ft, name)(**other).state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_same(compute(ours, z, t), compute(getattr(torch.nn, name)(**other), z, t))
    ours.to(torch.float64)
    assert all(x.dtype is torch.float64 for x in ours.buffers())
    theirs.to(torch.float64)
    z, t = z.detach().double().requires_grad_(), t.double()
    assert_same(compute(ours, z, t), compute(theirs, z, t))


@pytest.mark.parametrize("name", [name for name in TORCH if name != "HuberLoss"])
def test_reductions_of_torch_0_4(name):
    z, t = operands(name)
    for legacy in ({"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            ours = getattr(ft, name)(**legacy)
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            theirs = getattr(torch.nn, name)(**legacy)
        assert ours.reduction == theirs.reduction
        want = compute(theirs, z, t)
        assert_same(compute(ours, z, t), want)
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            assert_same(compute(getattr(ft, TORCH[name][0]), z, t, **legacy), want)


def bad(*names, case, arguments=lambda z, t: (z, t), **options):
    """Return a parameter of a test for each module, with options or arguments that PyTorch refuses."""
    return [pytest.param(name, options, arguments, id=f"{name}: {case}") for name in names or TORCH]


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        *bad(case="unknown reduction", reduction="average"),
        *bad(case="no target", arguments=lambda z, t: (z,)),
        *bad(case="None as target", arguments=lambda z, t: (z, None)),
        *bad(case="number as target", arguments=lambda z, t: (z, 0.5)),
        *bad(case="array as target", arguments=lambda z, t: (z, t.numpy())),
        *bad(case="three tensors", arguments=lambda z, t: (z, t, t)),
        *bad(case="another shape", arguments=lambda z, t: (z, t[:, :2])),
        *bad("BCELoss", "BCEWithLogitsLoss", case="shape that would broadcast", arguments=lambda z, t: (z, t[:1])),
        *bad("BCELoss", "BCEWithLogitsLoss", case="short weight", weight=torch.ones(2, 1)),
        *bad("BCELoss", "BCEWithLogitsLoss", case="large weight", weight=torch.ones(2, *SHAPE)),
        *bad("BCEWithLogitsLoss", case="short pos_weight", pos_weight=torch.ones(2, 1)),
        *bad("BCELoss", case="input above 1", arguments=lambda z, t: (z + 1, t)),
        *bad("BCELoss", case="target above 1", arguments=lambda z, t: (z, t + 1)),
        *bad("BCELoss", case="input NaN", arguments=lambda z, t: (z * math.nan, t)),
        *bad("HuberLoss", case="delta 0", delta=0.0),
        *bad("HuberLoss", case="delta below 0", delta=-1.0),
        *bad("HuberLoss", case="delta NaN", delta=math.nan),
        *bad("HuberLoss", case="delta no number", delta="1"),
        *bad("SmoothL1Loss", case="beta below 0", beta=-1.0),
        *bad("SmoothL1Loss", case="beta NaN", beta=math.nan),
        *bad("SmoothL1Loss", case="beta no number", beta="1"),
        *bad("SmoothL1Loss", case="beta None", beta=None),
        *bad(case="target on another device", arguments=lambda z, t: (z, t.to("meta"))),
        *bad(case="integers", arguments=lambda z, t: (z.int(), t.int())),
        *bad(case="sparse", arguments=lambda z, t: (z.to_sparse(), t)),
    ],
)  # fmt: skip
def test_errors_have_the_types_of_torch(name, options, arguments):
    z, t = operands(name)
    given = arguments(z.detach(), t)
    theirs = kind_of_error(lambda: getattr(torch.nn, name)(**options)(*given))
    assert kind_of_error(lambda: getattr(ft, name)(**options)(*given)) is theirs


def duplicates(module):
    return copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(("name", "options"), [*MADE, *((name, options) for name, (_, options) in OWN.items())], ids=said)
def test_copies(name, options):
    module = getattr(ft, name)(**options)
    z, t = operands(name)
    for other in duplicates(module):
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert all(map(torch.equal, compute(other, z, t), compute(module, z, t)))


@pytest.mark.parametrize("name", TORCH)
def test_options_at_construction_and_at_the_call(name):
    z, t = operands(name)
    images = (255 * t).to(torch.uint8)
    module = getattr(ft, name)(reduction="sample_sum", target_scale=1 / 255)
    assert repr(module) == f"{name}(target_scale={1 / 255})"
    for options in ({}, {"mask": MASK, "reduction": "mean"}):
        want = compute(getattr(fl, TORCH[name][0]), z, images, **{"reduction": "sample_sum", "target_scale": 1 / 255, **options})
        assert all(map(torch.equal, compute(module, z, images, **options), want))
    without = compute(getattr(ft, name)(reduction="sample_sum"), z, t)
    assert all(map(torch.equal, compute(module, z, t, target_scale=None), without))
    with pytest.raises(TypeError, match="unknown option wieght"):
        getattr(ft, name)(wieght=EACH)(z, t)


@pytest.mark.parametrize("name", OWN)
def test_modules_without_a_counterpart_match_functions(name):
    (z, t), (function, options) = operands(name), OWN[name]
    function = getattr(fl, function)
    assert inspect.signature(getattr(ft, name)).parameters["reduction"].default == "mean"
    for reduction in ("mean", "sum", "batchmean", "sample_mean"):
        want = compute(function, z, t, reduction=reduction, **options)
        assert all(map(torch.equal, compute(getattr(ft, name)(reduction, **options), z, t), want))
        assert all(map(torch.equal, compute(getattr(ft, name)(reduction), z, t, **options), want))
    assert torch.equal(getattr(ft, name)()(z, t), function(z, t, reduction="mean"))
    assert re.findall(r"(\w+)=", repr(getattr(ft, name)(**options))) == list(options)
    assert not getattr(ft, name)().state_dict()


def test_vae_module_matches_its_function():
    (z, t), mu, logvar = operands("VAELoss"), torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    for options in ({}, {"reconstruction": "mse", "beta": 4.0}, {"beta": 0.5, "mask": MASK}):
        want = fl.vae_loss(z, t, mu, logvar, **options)
        wanted_grads = torch.autograd.grad(want.total, (z, mu, logvar))
        for got in (ft.VAELoss(**options)(z, t, mu, logvar), ft.VAELoss()(z, t, mu, logvar, **options)):
            assert isinstance(got, fl.VAEValue)
            assert all(map(torch.equal, got, want))
            assert all(map(torch.equal, torch.autograd.grad(got.total, (z, mu, logvar)), wanted_grads))
    assert repr(ft.VAELoss("mse", beta=2.0)) == "VAELoss(reconstruction='mse', beta=2.0)"
    for other in duplicates(ft.VAELoss("mse")):
        assert torch.equal(other(z, t, mu, logvar).total, fl.vae_loss(z, t, mu, logvar, reconstruction="mse").total)


class Marked(torch.Tensor):
    """A subclass of Tensor."""


@pytest.fixture(autouse=True)
def untouched():
    """Check that a test leaves `torch.nn.functional` as it found it."""
    before = {name: getattr(F, name) for name in FUNCTIONS}
    yield
    after = {name: getattr(F, name) for name in FUNCTIONS}
    for name, function in before.items():
        setattr(F, name, function)
    assert after == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_patched_functions_by_position_and_by_name(name):
    z, t = operands(name)
    original, legacy = getattr(F, name), () if name == "huber_loss" else (None, None)
    calls = [
        lambda f, z: f(z, t),
        lambda f, z: f(z, target=t, reduction="sum"),
        lambda f, z: f(target=t, input=z, reduction="none"),
        lambda f, z: f(z, t, *(None,) * name.startswith("binary"), *legacy, "sum"),
    ]
    if "weight" in inspect.signature(original).parameters:
        calls += [lambda f, z: f(z, t, weight=EACH), lambda f, z: f(z, t, weight=EACH, reduction="none")]
    with ft.patch():
        assert getattr(F, name) is not original
        assert (getattr(F, name).__name__, inspect.signature(getattr(F, name))) == (name, inspect.signature(original))
        for call in calls:
            got = compute(lambda z, call=call: call(getattr(F, name), z), z)
            assert is_ours(got[0])
            assert_same(got, compute(lambda z, call=call: call(original, z), z))


@pytest.mark.parametrize(("name", "options"), MADE, ids=said)
def test_patched_modules_are_ours(name, options):
    z, t = operands(name)
    made_before = getattr(torch.nn, name)(**options)
    want = compute(made_before, z, t)
    assert not is_ours(want[0])
    with ft.patch():
        for module in (made_before, getattr(torch.nn, name)(**options)):
            got = compute(module, z, t)
            assert is_ours(got[0]) == (options != {"beta": 0.0})  # with beta = 0, PyTorch computes its own L1 loss
            assert_same(got, want)
    assert not is_ours(made_before(z, t))


def test_patch_ends_with_its_block_or_by_undo():
    originals = [getattr(F, name) for name in FUNCTIONS]

    def patched():
        return [getattr(F, name) is not original for name, original in zip(FUNCTIONS, originals, strict=True)]

    with ft.patch():
        assert all(patched())
        with ft.patch() as inner:
            assert is_ours(F.mse_loss(*operands("mse_loss")))
            inner.undo()
            assert all(patched())  # the outer patch is still active
        assert all(patched())
    assert not any(patched())
    patch = ft.patch()
    with ft.patch():
        pass
    assert all(patched())
    patch.undo()
    assert not any(patched())
    with ft.patch():
        patch.undo()  # a second undo has no effect
        assert all(patched())
    first, second = ft.patch(), ft.patch()
    with pytest.raises(RuntimeError, match="undone in the reverse order"):
        first.undo()
    assert all(patched())
    second.undo()
    assert all(patched())
    first.undo()
    assert not any(patched())
    with pytest.raises(ZeroDivisionError), ft.patch():
        1 / all(patched()) / 0
    assert not any(patched())


def test_patch_affects_all_threads_but_not_names_imported_before():
    found = []
    with ft.patch():
        thread = threading.Thread(target=lambda: found.append(F.mse_loss(*operands("mse_loss"))))
        thread.start()
        thread.join()
        assert not is_ours(imported_before(*operands("mse_loss")))
    assert is_ours(*found)


def negated(x):
    """Return -x as a lazily negated tensor."""
    return torch.complex(x, x).conj().imag


def assert_identical(got, want):
    assert (type(got), got.dtype, got.shape, got.device) == (type(want), want.dtype, want.shape, want.device)
    assert got.is_meta or torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:.*broadcast:UserWarning", "ignore:reduction='elementwise_mean':UserWarning")
@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param(name, call, id=f"{name}: {case}")
        for case, names, call in [
            ("float64 target", FUNCTIONS[2:5], lambda f, z, t: f(z, t.double())),
            ("float64 input", FUNCTIONS[2:5], lambda f, z, t: f(z.double(), t)),
            ("bfloat16 target", FUNCTIONS[2:5], lambda f, z, t: f(z, t.bfloat16())),
            ("integer target", FUNCTIONS[2:5], lambda f, z, t: f(z, (9 * t).int())),
            ("integer input", ["mse_loss", "smooth_l1_loss"], lambda f, z, t: f(z.int(), t)),
            ("float64 target", ["huber_loss"], lambda f, z, t: f(z.detach(), t.double())),  # PyTorch has no gradient here
            ("complex input", ["l1_loss"], lambda f, z, t: f(z.cfloat(), t.cfloat())),
            ("target of another shape", FUNCTIONS[2:], lambda f, z, t: f(z, t[:1])),
            ("weight that requires a gradient", ["mse_loss", "l1_loss", "huber_loss"], lambda f, z, t: f(z, t, weight=z)),
            ("integer weight", FUNCTIONS[:4], lambda f, z, t: f(z, t, weight=(9 * t).int())),
            ("float64 weight", FUNCTIONS[:4], lambda f, z, t: f(z, t, weight=t.double(), reduction="none")),
            ("float64 weight", ["huber_loss"], lambda f, z, t: f(z, t, weight=t.double())),
            ("float64 pos_weight", FUNCTIONS[:1], lambda f, z, t: f(z, t, pos_weight=t.double())),
            ("meta", FUNCTIONS, lambda f, z, t: f(z.to("meta"), t.to("meta"))),
            ("subclass as input", FUNCTIONS, lambda f, z, t: f(z.as_subclass(Marked), t)),
            ("subclass as target", FUNCTIONS, lambda f, z, t: f(z, t.as_subclass(Marked))),
            ("lazily negated target", FUNCTIONS, lambda f, z, t: f(z, negated(-t))),
            ("beta 0", ["smooth_l1_loss"], lambda f, z, t: f(z, t, beta=0)),
            ("the old name of a reduction", FUNCTIONS, lambda f, z, t: f(z, t, reduction="elementwise_mean")),
        ]
        for name in names
    ],
)
def test_patch_passes_unsupported_calls_to_torch(name, call):
    z, t = operands(name)
    want = call(getattr(F, name), z, t)
    with ft.patch():
        got = call(getattr(F, name), z, t)
    assert not is_ours(got)
    assert_identical(got, want)
    if want.requires_grad and not want.is_meta:
        try:
            (slope,) = torch.autograd.grad(want.sum(), z)
        except RuntimeError as error:  # PyTorch 2.6 has no gradient of mse_loss for two dtypes
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                torch.autograd.grad(got.sum(), z)
        else:
            assert_identical(torch.autograd.grad(got.sum(), z)[0], slope)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("mse_loss", lambda f, z, t: f(z)),
        ("mse_loss", lambda f, z, t: f(z, t, reduction="batchmean")),
        ("mse_loss", lambda f, z, t: f(z, t, None, None, "mean", None, None)),
        ("mse_loss", lambda f, z, t: f(z, t, weight=EACH[0])),
        ("mse_loss", lambda f, z, t: f(z.to_sparse(), t)),
        ("l1_loss", lambda f, z, t: f(z, t.int() > 0)),
        ("huber_loss", lambda f, z, t: f(z, t, delta=torch.tensor(-0.5))),
        ("binary_cross_entropy", lambda f, z, t: f(z, t.double())),
        ("binary_cross_entropy", lambda f, z, t: f(z, t, weight=EACH[0, :2])),
        ("binary_cross_entropy_with_logits", lambda f, z, t: f(z, t.bool())),
        ("binary_cross_entropy", lambda f, z, t: f(t, t, weight=z)),
        ("binary_cross_entropy_with_logits", lambda f, z, t: f(t, t, weight=z)),
        ("binary_cross_entropy_with_logits", lambda f, z, t: f(t, t, pos_weight=z)),
        ("binary_cross_entropy_with_logits", lambda f, z, t: f(z, t, "sum")),
        ("mse_loss", lambda f, z, t: f(z, t, validate=False)),
        ("huber_loss", lambda f, z, t: f(z, t, delta=None)),
        ("huber_loss", lambda f, z, t: f(z, t, delta=EACH + 1)),
        ("binary_cross_entropy_with_logits", lambda f, z, t: f(z, t, weight=2.0)),
    ],
)
def test_errors_under_patch_have_the_types_of_torch(name, call):
    z, t = operands(name)
    want = kind_of_error(lambda: call(getattr(F, name), z, t))
    with ft.patch():
        assert kind_of_error(lambda: call(getattr(F, name), z, t)) is want


@pytest.mark.parametrize("which", ["input", "target", "weight"])
@pytest.mark.parametrize("weight", [None, EACH], ids=["plain", "weighted"])
def test_tensors_that_are_negated_lazily(which, weight):
    z, t = operands("mse_loss")

    def call(loss, z):
        given = {"input": z, "target": t, "weight": weight}
        return loss(**given | ({} if given[which] is None else {which: negated(-given[which])}))

    assert_same(*(compute(lambda z, f=f: call(f, z), z) for f in (ft.mse_loss, F.mse_loss)))


def test_an_upstream_gradient_that_is_negated_lazily():
    z, t = operands("mse_loss")
    grads = [torch.autograd.grad(f(z, t, reduction="none"), z, negated(EACH))[0] for f in (ft.mse_loss, F.mse_loss)]
    assert_tensor(*grads)
    with pytest.raises(TypeError, match="out is negated lazily"):
        fl.mse_loss.grad(z.detach(), t, out=negated(EACH))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_code_uses_new_inputs(name):
    z, t = (x.detach() for x in operands(name))
    with ft.patch():
        traced = torch.jit.trace(lambda z, t: getattr(F, name)(z, t), (z, t))
    assert_tensor(traced(z / 2, t), getattr(F, name)(z / 2, t))


class Training(torch.nn.Module):
    """A user's module with a criterion of `torch.nn`, which also calls a function by name."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, z, t):
        return self.criterion(z, t) + F.l1_loss(z, t, reduction="sum")


def script_bce(z, t):
    return F.binary_cross_entropy(z, t, reduction="sum")


def script_bce_with_logits(z, t):
    return F.binary_cross_entropy_with_logits(z, t, pos_weight=t)


def script_huber(z, t):
    return torch.nn.functional.huber_loss(z, t, delta=0.5)


def script_l1(z, t):
    return F.l1_loss(z, t)


def script_mse(z, t):
    return F.mse_loss(z, t, reduction="none")


def script_smooth_l1(z, t):
    return F.smooth_l1_loss(z, t, beta=0.25)


SCRIPTED = {  # a function for each name, because torch.jit compiles a function's text
    "binary_cross_entropy": script_bce,
    "binary_cross_entropy_with_logits": script_bce_with_logits,
    "huber_loss": script_huber,
    "l1_loss": script_l1,
    "mse_loss": script_mse,
    "smooth_l1_loss": script_smooth_l1,
}


@pytest.mark.parametrize("patches", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_scripted_functions_are_those_of_torch(name, patches):
    (z, t), function = operands(name), SCRIPTED[name]
    want = function(z, t)
    with contextlib.ExitStack() as stack:
        for _ in range(patches):
            stack.enter_context(ft.patch())
        scripted = torch.jit.script(function), torch.jit.script(getattr(F, name))
        got = scripted[0](z, t)
        assert is_ours(function(z, t))  # eager calls are still served
    assert not is_ours(got)
    assert_identical(got, want)
    assert_identical(scripted[1](z, t), getattr(F, name)(z, t))


@pytest.mark.parametrize(("name", "options"), MADE, ids=said)
def test_scripted_modules_are_those_of_torch(name, options):
    z, t = operands(name)
    module = getattr(torch.nn, name)(**options)
    want = module(z, t), Training(module)(z, t)
    with ft.patch():
        scripted = torch.jit.script(module), torch.jit.script(Training(module))
        for got, wanted in zip([f(z, t) for f in scripted], want, strict=True):
            assert not is_ours(got)
            assert_identical(got, wanted)
        assert is_ours(module(z, t)) == (options != {"beta": 0.0})


OTHER_SHAPE = "^Using a target size|^input has shape"
NONE_COUNTS = "^mean of no elements"


@pytest.mark.parametrize(
    ("call", "patches", "message"),
    [
        pytest.param(call, patches, message, id=f"{case}, {patches} patches")
        for case, call, patched, message in [
            ("function of fastloss.torch", lambda z, t: ft.mse_loss(z, t[:1]), False, OTHER_SHAPE),
            ("module of fastloss.torch", lambda z, t: ft.MSELoss()(z, t[:1]), False, OTHER_SHAPE),
            ("function", lambda z, t: F.mse_loss(z, t[:1]), True, OTHER_SHAPE),
            ("function, weighted", lambda z, t: F.huber_loss(z[:1], t, weight=t[:1]), True, OTHER_SHAPE),
            ("function, subclass", lambda z, t: F.l1_loss(z.as_subclass(Marked), t[:1]), True, OTHER_SHAPE),
            ("module", lambda z, t: torch.nn.SmoothL1Loss()(z, t[:1]), True, OTHER_SHAPE),
            ("function of a masked mean", lambda z, t: ft.mse_loss(z, t, mask=MASK & ~MASK), False, NONE_COUNTS),
            ("module of a masked mean", lambda z, t: ft.HuberLoss(mask=MASK & ~MASK)(z, t), False, NONE_COUNTS),
            ("masked mean without a gradient", lambda z, t: ft.HuberLoss()(z.detach(), t, mask=MASK & ~MASK), False, NONE_COUNTS),
        ]
        for patches in ([1, 2] if patched else [0])
    ],
)
def test_warnings_name_the_users_line(call, patches, message):
    z, t = operands("mse_loss")
    with contextlib.ExitStack() as stack:
        for _ in range(patches):
            stack.enter_context(ft.patch())
        with pytest.warns(match=message) as caught:
            call(z, t)
    assert [(x.filename, x.lineno) for x in caught] == [(__file__, call.__code__.co_firstlineno)]


def in_forward_mode(z, t):
    with torch.autograd.forward_ad.dual_level():
        return F.mse_loss(z, t)


def under_a_dispatch_mode(z, t):
    with FlopCounterMode(display=False):
        return F.mse_loss(z, t)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning", "ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("call", "obstacle"),
    [
        (lambda z, t: F.mse_loss(z, t[:1]), "input and target have different shapes"),
        (lambda z, t: F.mse_loss(z, t.half()), "target has dtype torch.float16, and ml_dtypes is not installed"),
        (lambda z, t: F.mse_loss(z.cfloat(), t.cfloat()), "input has dtype torch.complex64"),
        (lambda z, t: F.mse_loss(z, t.double()), "target has dtype torch.float64, and input torch.float32"),
        (lambda z, t: F.mse_loss(z, t, weight=t.double(), reduction="none"), "weight has dtype torch.float64, and input torch.float32"),
        (lambda z, t: F.mse_loss(z, t, None, None, "mean", z), "weight requires a gradient"),
        (lambda z, t: F.mse_loss(z, t, weight=EACH[0, :, :2]), "weight does not broadcast to the shape of input"),
        (lambda z, t: F.mse_loss(z.as_subclass(Marked), t), "input is a Marked, a subclass of torch.Tensor"),
        (lambda z, t: F.mse_loss(z, t.numpy()), "target is a ndarray, not a torch.Tensor"),
        (lambda z, t: F.mse_loss(z, t.to_sparse()), "target has layout torch.sparse_coo"),
        (lambda z, t: F.mse_loss(z.to("meta"), t.to("meta")), "input is on a device of type meta"),
        (lambda z, t: F.mse_loss(z, negated(-t)), "target is negated lazily"),
        (lambda z, t: F.mse_loss(z, t, reduction="average"), "reduction is 'average'"),
        (lambda z, t: F.mse_loss(z, t, reduction=None), "reduction is not a string"),
        (lambda z, t: F.mse_loss(z, t, delta=1.0), "delta is not an argument of PyTorch's function"),
        (lambda z, t: F.huber_loss(z, t, delta=-1), "delta is not a number above 0"),
        (lambda z, t: torch.func.grad(F.mse_loss)(z.detach(), t), "under a transform of torch.func"),
        (lambda z, t: torch.jit.trace(lambda z: F.mse_loss(z, t), z.detach(), check_trace=False), "under torch.jit.trace"),
        (in_forward_mode, "under forward-mode differentiation"),
        (under_a_dispatch_mode, "under a TorchDispatchMode"),
    ],
)
def test_calls_that_go_to_torch_are_counted_by_their_obstacle(call, obstacle, monkeypatch):
    z, t = operands("mse_loss")
    if "ml_dtypes" in obstacle:
        monkeypatch.setattr(importlib.import_module("fastloss.torch.obstacles"), "DTYPES", (torch.float32, torch.float64))
    with ft.patch() as patched:
        for _ in range(3):
            with contextlib.suppress(*KINDS):
                call(z, t)
        F.mse_loss(z, t)
    calls = patched.calls()
    assert [x.by_torch for x in calls.values() if x.by_torch] == [{obstacle: 3}]
    assert (calls["mse_loss"].by_fastloss, calls["l1_loss"].by_fastloss) == (1, 0)


def test_calls_of_several_threads_are_counted():
    def run():
        for _ in range(200):
            F.l1_loss(z, t)
            F.l1_loss(z, t.double())

    z, t = operands("l1_loss")
    with ft.patch() as patched:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = patched.calls()["l1_loss"]
        F.l1_loss(z, t)
    assert (before.by_fastloss, sum(before.by_torch.values())) == (800, 800)  # a copy, which later calls do not change
    assert patched.calls()["l1_loss"].by_fastloss == 801


REPORT = """\
calls under fastloss.torch.patch()
function                             fastloss    PyTorch  reason
binary_cross_entropy                        0          1  weight requires a gradient
mse_loss                                1,001          2  input is a Marked, a subclass of torch.Tensor
                                                       1  target has dtype torch.float64, and input torch.float32
smooth_l1_loss                              1          0
"""


def test_report(capsys):
    (z, t), nothing = operands("mse_loss"), "calls under fastloss.torch.patch(): none"
    with ft.patch(report=True) as patched:
        assert patched.report() == nothing
        for _ in range(1001):
            F.mse_loss(z, t)
        F.mse_loss(z, t.double())
        for _ in range(2):
            F.mse_loss(z.as_subclass(Marked), t)
        torch.nn.SmoothL1Loss()(z, t)
        with pytest.raises(RuntimeError):
            F.binary_cross_entropy(t, t, weight=z)
        assert patched.report() + "\n" == REPORT
        assert capsys.readouterr() == ("", "")
    assert capsys.readouterr() == ("", REPORT)
    patched.undo()
    assert capsys.readouterr() == ("", "")
    with ft.patch() as silent:
        pass
    assert silent.report() == nothing
    assert capsys.readouterr() == ("", "")


def test_report_of_a_patch_that_ends_with_the_process():
    code = """
import sys, torch, fastloss.torch as ft
sys.stderr = sys.stdout
ft.patch(report=True)
torch.nn.MSELoss()(torch.ones(3), torch.zeros(3))
ft.patch(report=True).undo()
print("last line")"""
    title, head, row = "calls under fastloss.torch.patch()", "function fastloss PyTorch reason", "mse_loss 1 0"
    assert [" ".join(line.split()) for line in run_python(code).splitlines()] == [f"{title}: none", "last line", title, head, row]


def gradient_after(functions, name, reduction, dtype, changed):
    """Return the gradient of a loss whose operand has been changed between forward and backward, or the error's class."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.rand(4, 5, generator=generator).to(dtype).requires_grad_()
    logits = leaf * 0.9
    with torch.inference_mode(changed == "made in inference mode"):
        target = torch.rand(4, 5, generator=generator).to(dtype)
    try:
        value = getattr(functions, name)(logits, target, reduction=reduction)
        with torch.no_grad():
            {"input": logits, "target": target}.get(changed, torch.ones(1)).mul_(0.5)
        value.sum().backward()
    except RuntimeError as error:
        return type(error)
    return leaf.grad


@pytest.mark.parametrize("changed", ["input", "target", "made in inference mode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operands_may_change_where_pytorch_lets_them(name, reduction, dtype, changed):
    got, want = (gradient_after(functions, name, reduction, dtype, changed) for functions in (ft, F))
    if isinstance(want, torch.Tensor):
        assert_tensor(got, want)
    else:
        assert got is want
    assert isinstance(want, torch.Tensor) == (name == "l1_loss")


def test_l1_saves_one_array_and_frees_its_operands():
    leaf, target = torch.rand(1000, requires_grad=True), torch.rand(1000)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ft.l1_loss(leaf, target).backward()
    assert [x.shape for x in saved] == [(1000,)]


def test_second_derivatives_of_l1_need_its_operands_unchanged():
    leaf, target = torch.rand(10, dtype=torch.float64, requires_grad=True), torch.rand(10, dtype=torch.float64)
    (grad,) = torch.autograd.grad(ft.l1_loss(leaf, target, reduction="sum"), leaf, create_graph=True)
    assert torch.autograd.grad(grad.sum(), leaf)[0].count_nonzero() == 0
    value = ft.l1_loss(leaf, target)
    target.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place since the loss was computed"):
        torch.autograd.grad(value, leaf, create_graph=True)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "binary_cross_entropy_with_logits"])
def test_the_node_in_the_graph_has_the_losss_name(name):
    value = getattr(ft, name)(torch.rand(5, requires_grad=True), torch.rand(5))
    assert type(value.grad_fn).__name__ == {
        "mse_loss": "MseLossBackward", "l1_loss": "L1LossBackward",
        "binary_cross_entropy_with_logits": "BinaryCrossEntropyWithLogitsBackward",
    }[name]  # fmt: skip
    with torch.profiler.profile() as profile:
        value.backward()
    assert any(type(value.grad_fn).__name__ in event.key for event in profile.key_averages())


@pytest.mark.parametrize("options", [{}, {"ignore_index": 0.5}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_l1_in_16_bits_are_rounded_once(reduction, options):
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(300, generator=generator).half().requires_grad_()
    target = (torch.rand(300, generator=generator) * 4).round().half() / 4
    upstream = torch.tensor(1234.5) if reduction != "none" else torch.rand(300, generator=generator)
    value = fl.l1_loss(leaf, target, reduction=reduction, **options)
    (got,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    want = fl.l1_loss.grad(leaf, target, reduction=reduction, grad_output=upstream.to(value.dtype), **options)
    assert torch.equal(got, want)
