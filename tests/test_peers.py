"""Compare value and gradient with PyTorch (through its autograd) and scikit-learn, also where these lose digits."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sklearn
from sklearn._loss import loss as sklearn_losses

import fastloss as fl
from bench.formulas import FORMULAS
from tests.table import LOSSES
from tests.ulp import PEER, PEER_ULP, assert_close, assert_ulp

SHAPE = (4, 3, 17, 13)
WEIGHT = np.linspace(0, 2, math.prod(SHAPE)).reshape(SHAPE)
PER_CHANNEL = np.array([0.25, 1.0, 3.5]).reshape(3, 1, 1)
INPUTS = [0.0, *(sign * x for x in (1e-30, 20.0, 90.0, 100.0, 1e4) for sign in (1, -1))]
PROBABILITIES = [0.0, 1.0, 1e-30, 1e-13, 1e-7, 1 - 1e-7, 0.5]
TARGETS = [0.0, 1.0, 0.25]
LOG_VARIANCES = [0.0, 1e-30, -1e-30, 20.0, -20.0, 80.0, -80.0, -100.0]  # exp overflows float32 at 88.7
MEAN, SUM, NONE = ({"reduction": r} for r in ("mean", "sum", "none"))
LEGACY = {"size_average", "reduce"}  # torch deprecates them


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def reduced(x, reduction):
    return x if reduction == "none" else getattr(x, reduction)()


def log_cosh(torch, input, target, reduction="mean"):
    d = input - target
    return reduced(torch.logaddexp(d, -d) - math.log(2), reduction)  # log((e**d + e**-d) / 2), because cosh overflows


def mse_with_logits(torch, input, target, reduction="mean"):
    return torch.nn.functional.mse_loss(input.sigmoid(), target, reduction=reduction)


def focal(torch, inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    """Compute the focal loss by torchvision 0.28's formula, with its signature."""
    p = torch.sigmoid(inputs)
    ce = torch.nn.functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * ((1 - p_t) ** gamma)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return reduced(loss, reduction)


def gaussian_kl(torch, mu, logvar, reduction="mean"):
    normal = torch.distributions.Normal
    return reduced(torch.distributions.kl_divergence(normal(mu, torch.exp(logvar / 2)), normal(0.0, 1.0)), reduction)


def dice(torch, input, target, reduction="mean", smooth=1.0, per_channel=True, per_sample=True):
    """Compute Dice by V-Net's formula as in MONAI, with the smoothing in numerator and denominator."""
    axes = (2, 3) if per_channel else (1, 2, 3)
    axes = axes if per_sample else (0, *axes)
    p = input.sigmoid()
    overlap, size = (p * target).sum(axes), (p + target).sum(axes)
    return reduced(1 - (2 * overlap + smooth) / (size + smooth), reduction)


def dice_bce(torch, input, target, reduction="mean", dice_weight=1.0, bce_weight=1.0):
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(input, target, reduction=reduction)
    return dice_weight * dice(torch, input, target, reduction) + bce_weight * entropy


def vae(torch, reconstruction_logits, images, mu, logvar, reconstruction="bce", beta=1.0):
    part = {"bce": torch.nn.functional.binary_cross_entropy_with_logits, "mse": functools.partial(mse_with_logits, torch)}[reconstruction]
    total = part(reconstruction_logits, images, reduction="sum") + beta * gaussian_kl(torch, mu, logvar, "sum")
    return total / len(images)


def formula_of_benchmarks(name):
    """Return the formula that the benchmarks give PyTorch for a loss, with a reduction."""

    def formula(torch, input, target, reduction="mean"):
        from bench.peers.with_torch import XP

        return reduced(FORMULAS[name](XP, input, target), reduction)

    return formula


@dataclass(frozen=True)
class Pair:
    """PyTorch's function of the same name as a loss, or a formula of PyTorch operations, with options to call both with."""

    formula: Callable[..., Any] | None = None
    options: tuple[dict[str, Any], ...] = ({},)
    operands: tuple[str, ...] = ("z", "t")  # all but "t" are differentiated
    reductions: tuple[dict[str, str], ...] = (MEAN, SUM, NONE)


PAIRS = {name: Pair(formula_of_benchmarks(name)) for name, row in LOSSES.items() if row.is_elementwise} | {
    "binary_cross_entropy_with_logits": Pair(
        options=({}, {"pos_weight": PER_CHANNEL}, {"weight": WEIGHT}, {"weight": PER_CHANNEL, "pos_weight": PER_CHANNEL[::-1]})
    ),
    "binary_cross_entropy": Pair(options=({}, {"weight": PER_CHANNEL}), operands=("p", "t")),
    "mse_loss": Pair(),
    "l1_loss": Pair(),
    "smooth_l1_loss": Pair(options=({}, {"beta": 0}, {"beta": 0.375}, {"beta": 1e3})),
    "huber_loss": Pair(options=({}, {"delta": 1e-3}, {"delta": 2.5}, {"weight": WEIGHT})),
    "log_cosh_loss": Pair(log_cosh),
    "mse_with_logits_loss": Pair(mse_with_logits),
    "sigmoid_focal_loss": Pair(focal, options=({}, {"alpha": -1, "gamma": 0}, {"alpha": 0.75, "gamma": 1.5})),
    "gaussian_kl_loss": Pair(gaussian_kl, operands=("mu", "logvar")),
    "dice_with_logits_loss": Pair(
        dice,
        options=(
            {},
            {"smooth": 0},
            {"per_channel": False, "smooth": 1e-5},
            {"per_sample": False},
            {"per_channel": False, "per_sample": False},
        ),
    ),
    "dice_bce_with_logits_loss": Pair(dice_bce, options=({}, {"dice_weight": 0.5, "bce_weight": 2.0}), reductions=(MEAN, SUM)),
    "vae_loss": Pair(vae, options=({}, {"reconstruction": "mse", "beta": 4.0}), operands=("z", "t", "mu", "logvar"), reductions=({},)),
}
OPTIONS = [(name, options) for name, pair in PAIRS.items() for options in pair.options]
CASES = [(name, {**options, **r}) for name, options in OPTIONS for r in PAIRS[name].reductions]
EXTREMES = [(name, {**options, **PAIRS[name].reductions[-1]}) for name, options in OPTIONS if "p" not in PAIRS[name].operands]


def said(x):
    """Name a case by its options, an array by its shape."""
    return "-".join(f"{k}={np.shape(v) or v}" for k, v in x.items()) or "plain" if isinstance(x, dict) else x


def peer(torch, name):
    formula = PAIRS[name].formula
    return functools.partial(formula, torch) if formula else getattr(torch.nn.functional, name)


def cast(x, dtype):
    return x.astype(dtype) if isinstance(x, np.ndarray) else x


def random_operands(rng):
    z, t, mu, logvar = 3 * rng.standard_normal(SHAPE), rng.random(SHAPE), rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
    return {"z": z, "p": 1 / (1 + np.exp(-z)), "t": t, "mu": mu, "logvar": logvar}


def extreme_operands():
    """Return every extreme input with every target, repeated so that each lies in several samples and channels."""
    (z, t), (mu, logvar) = (grid(*x) for x in ((INPUTS, TARGETS), (INPUTS, LOG_VARIANCES)))
    return {"z": z, "t": t, "mu": mu, "logvar": logvar}


def grid(inputs, targets):
    return (np.resize(x, SHAPE) for x in np.array(list(itertools.product(inputs, targets))).T)


def ours(name, operands, dtype, options):
    """Return fastloss's value and gradients."""
    arrays, options = ({k: cast(x, dtype) for k, x in given.items()} for given in (operands, options))
    value, grad = getattr(fl, name).value_and_grad(*(arrays[k] for k in PAIRS[name].operands), **options)
    return [getattr(value, "total", value), *(grad if isinstance(grad, tuple) else [grad])]


def theirs(torch, name, operands, dtype, options, compute=None):
    """Return PyTorch's value and gradients for operands rounded to `dtype`, computed in `compute` if it is given."""

    def tensor(x, differentiated=False):
        return torch.tensor(cast(cast(x, dtype), compute or dtype), requires_grad=differentiated) if isinstance(x, np.ndarray) else x

    tensors = [tensor(operands[k], k != "t") for k in PAIRS[name].operands]
    value = peer(torch, name)(*tensors, **{k: tensor(x) for k, x in options.items()})
    return [value.detach().numpy(), *(x.numpy() for x in torch.autograd.grad(value.sum(), [x for x in tensors if x.requires_grad]))]


def resolved(quantity, *operands):
    """Return the smallest magnitude that a float64 peer can resolve, because its values are differences of larger terms."""
    return 1 + sum(map(np.abs, operands)) if quantity == 0 else 1


def test_every_loss_has_a_peer():
    assert PAIRS.keys() == {name for name, row in LOSSES.items() if row.pairs_elements}  # for losses of classes, see test_torch_classes.py


@pytest.mark.parametrize(("name", "options"), CASES, ids=said)
def test_torch_in_the_same_dtype(torch, rng, dtype, name, options):
    operands = random_operands(rng)
    for got, want in zip(ours(name, operands, dtype, options), theirs(torch, name, operands, dtype, options), strict=True):
        assert_close(got, want, PEER[dtype])


@pytest.mark.parametrize(("name", "options"), EXTREMES, ids=said)
def test_torch_in_float64_at_extremes(torch, dtype, name, options):
    operands = extreme_operands()
    want = theirs(torch, name, operands, dtype, options, np.float64)
    rounding = np.finfo(np.float64).eps / np.finfo(dtype).eps
    elementwise = want[0].shape == SHAPE
    for quantity, (a, b) in enumerate(zip(ours(name, operands, dtype, options), want, strict=True)):
        least = rounding * resolved(quantity, *(operands[k] for k in PAIRS[name].operands if elementwise))
        assert_ulp(a, b, np.maximum(np.abs(b), least), PEER_ULP, dtype, *(operands[k] for k in PAIRS[name].operands if elementwise))


def test_probabilities_are_clamped_as_in_torch(torch, dtype):
    p, t = (cast(x, dtype) for x in grid(PROBABILITIES, TARGETS))
    operands = {"p": p, "t": t}
    value, slope = theirs(torch, "binary_cross_entropy", operands, dtype, NONE)
    slope = slope * np.where(p * (1 - p) < 1e-12, np.float64(np.float32(1e-12)) / 1e-12, 1)  # torch's 1e-12 is a float32 in float64 too
    for got, want in zip(ours("binary_cross_entropy", operands, dtype, NONE), (value, slope), strict=True):
        assert_ulp(got, want, want, PEER_ULP, dtype, p, t)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
def test_weighted_means_where_torch_divides_by_the_sum_of_weights(torch, rng, dtype, name):
    """PyTorch 2.13 divides by the sum of weights for these two losses, and by the number of elements for others, as fastloss does."""
    operands = random_operands(rng)
    for reduction, ratio in ((MEAN, WEIGHT.mean()), (SUM, 1), (NONE, 1)):
        options = {"weight": WEIGHT} | reduction
        for got, want in zip(ours(name, operands, dtype, options), theirs(torch, name, operands, dtype, options), strict=True):
            assert_close(got, want * ratio, PEER[dtype])


def s(z):
    """Return the sigmoid of -z."""
    return 1 / (1 + math.exp(z))


def only(version, has):
    """Skip a test of one version of a peer if another version is installed."""
    if has.partition("+")[0] != version:
        pytest.skip(f"measured on {version}, not {has}")


LOST = [  # inputs at which torch's float32 value (0) or slope (1) is wrong, with its result and the true one
    ("binary_cross_entropy_with_logits", -16, 0, {}, 0, 0.0, math.log1p(math.exp(-16))),
    ("binary_cross_entropy_with_logits", -90, 0, {}, 0, 0.0, math.exp(-90)),
    ("binary_cross_entropy_with_logits", 16, 1, {}, 1, -(2.0**-23), -s(16)),
    ("binary_cross_entropy_with_logits", 20, 1, {}, 1, 0.0, -s(20)),
    ("binary_cross_entropy_with_logits", 90, 1, {}, 1, 0.0, -s(90)),
    ("binary_cross_entropy_with_logits", math.inf, 1, {}, 0, math.nan, 0.0),
    ("binary_cross_entropy_with_logits", -math.inf, 0, {}, 0, math.nan, 0.0),
    ("binary_cross_entropy_with_logits", -math.inf, 1, {}, 0, math.nan, math.inf),
    ("mse_with_logits_loss", 20, 1, {}, 0, 0.0, s(20) ** 2),
    ("mse_with_logits_loss", 20, 0, {}, 1, 0.0, 2 * s(20) * s(-20) ** 2),
    ("sigmoid_focal_loss", 20, 1, {}, 0, 0.0, 0.25 * s(20) ** 2 * math.log1p(math.exp(-20))),
    ("sigmoid_focal_loss", 20, 1, {"alpha": -1, "gamma": 0.5}, 1, math.nan, -1.5 * s(20) ** 1.5),
    ("l1_loss", math.nan, 0, {}, 1, 0.0, math.nan),
    ("gaussian_kl_loss", 0, 1e-8, {}, 0, 0.0, 0.25e-16),
    ("dice_with_logits_loss", [20, -20], [1, 0], {}, 0, 0.0, 2 * s(20) / 3),
]


@pytest.mark.parametrize(("name", "z", "t", "options", "quantity", "lost", "true"), LOST)
def test_where_torch_loses_accuracy_in_float32(torch, name, z, t, options, quantity, lost, true):
    only("2.13.0", torch.__version__)
    operands = {name: np.reshape(x, (1, 1, -1, 1)).astype(float) for name, x in zip(PAIRS[name].operands, (z, t), strict=True)}
    options = NONE | options
    torch_has = theirs(torch, name, operands, np.float32, options)[quantity]
    np.testing.assert_array_equal(torch_has, np.full_like(torch_has, lost))
    we_have = ours(name, operands, np.float32, options)[quantity]
    assert_ulp(we_have, np.full_like(we_have, true, float), true, PEER_ULP, np.dtype(np.float32))


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if not pair.formula or pair.formula is focal])
def test_names_and_defaults_are_torch_s(torch, name):
    renamed = {"inputs": "input", "targets": "target"}  # only in torchvision
    torch_has = {renamed.get(k, k): x.default for k, x in inspect.signature(peer(torch, name)).parameters.items() if k not in LEGACY}
    we_have = {k: x.default for k, x in inspect.signature(getattr(fl, name)).parameters.items()}
    assert {k: we_have.get(k, "missing") for k in torch_has} == torch_has
    if name.startswith("binary_cross_entropy"):  # the order of arguments differs for other losses
        assert list(we_have)[: len(torch_has)] == list(torch_has)


SKLEARN = [  # losses with scikit-learn's counterpart, its options, and its value divided by ours
    ("binary_cross_entropy_with_logits", "HalfBinomialLoss", {}, 1),
    ("mse_loss", "HalfSquaredError", {}, 0.5),
    ("l1_loss", "AbsoluteError", {}, 1),
    ("huber_loss", "HuberLoss", {"delta": 1.5}, 1),
]


def of_sklearn(kind, z, t, weight=None, **options):
    """Return scikit-learn's value and gradient of every element, in float64."""
    return getattr(sklearn_losses, kind)(**options).loss_gradient(t.ravel(), z.ravel(), None if weight is None else weight.ravel())


@pytest.mark.parametrize("where", ["random", "extreme"])
@pytest.mark.parametrize(("name", "kind", "options", "part"), SKLEARN)
def test_sklearn(rng, name, kind, options, part, where):
    operands = random_operands(rng) if where == "random" else extreme_operands()
    z, t = operands["z"], operands["t"]
    got = ours(name, operands, np.float64, NONE | {"weight": WEIGHT} | options)
    for quantity, (a, b) in enumerate(zip(got, of_sklearn(kind, z, t, WEIGHT, **options), strict=True)):
        want = b.reshape(SHAPE) / part
        at = (z != t) | (kind != "AbsoluteError")  # where z = t, its slope is -1
        assert_ulp(a[at], want[at], np.maximum(np.abs(want), resolved(quantity, z, t))[at], PEER_ULP, np.float64, z[at], t[at])


@pytest.mark.parametrize(
    ("name", "kind", "z", "t", "quantity", "lost", "true"),
    [
        ("binary_cross_entropy_with_logits", "HalfBinomialLoss", math.inf, 1, 0, math.nan, 0.0),
        ("l1_loss", "AbsoluteError", 1, 1, 1, -1, 0.0),
        ("l1_loss", "AbsoluteError", math.nan, 1, 1, -1, math.nan),
        ("huber_loss", "HuberLoss", math.nan, 1, 1, -1, math.nan),
    ],
)
def test_where_sklearn_loses_accuracy(name, kind, z, t, quantity, lost, true):
    only("1.9.1", sklearn.__version__)
    operands = {"z": np.full(1, z, float), "t": np.full(1, t, float)}
    options = {"delta": 1.0} if kind == "HuberLoss" else {}
    np.testing.assert_array_equal(of_sklearn(kind, *operands.values(), **options)[quantity], [lost])
    assert_ulp(ours(name, operands, np.float64, NONE)[quantity], [true], true, PEER_ULP, np.float64)
