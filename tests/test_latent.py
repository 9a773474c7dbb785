"""The losses of a variational autoencoder: the divergence of its latents, and the whole objective."""

from __future__ import annotations

import inspect
import re

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests import oracle
from tests.devices import computes_nothing, has_the_hosts_arrays, is_about_the_host, some
from tests.ulp import DIFFERENCE, SUM, ULP, assert_close, assert_same, assert_ulp

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.alike("stand-in")]

KL, VAE = fl.gaussian_kl_loss, fl.vae_loss
INF, NAN = np.inf, np.nan
QUANTITIES = ("value", "slope", "target_slope", "curvature", "target_curvature")
SHAPE = (4, 3, 5)


@pytest.fixture
def latents(rng, dtype):
    return rng.standard_normal(SHAPE).astype(dtype), rng.standard_normal(SHAPE).astype(dtype)


def all_of(mu, logvar, *args, **options):
    """Return value, slopes and curvatures of every element, without a reduction."""
    value, slopes = KL.value_and_grad(mu, logvar, *args, **{"reduction": "none"} | options)
    return value, *slopes, *KL.curvature(mu, logvar, *args, **{"reduction": "sum"} | options)


def assert_true(got, want, dtypes, at):
    for quantity, x, true in zip(QUANTITIES, got, want, strict=True):
        dtype = dtypes[quantity.startswith("target")]
        assert x.dtype == dtype
        assert_ulp(x, true, true, ULP["gaussian_kl_loss", quantity], dtype, *at)


def dtypes_of(dtype, kind):
    other = np.dtype(np.float32 if dtype == np.float64 else np.float64)
    return (dtype, dtype) if kind == "alike" else (dtype, other)


# --- digits ----------------------------------------------------------------------------------------------------------

SIZES = [0.0, 1e-30, 1e-20, 1e-10, 1e-7, 1e-5, 1e-3, 0.1, 0.999, 1.0, 1.001, 1.749, 1.751, 2.0, 5.0, 20.0, 80.0]
LOGVARS = [sign * x for x in (*SIZES, 88.0, 110.0, 700.0, 746.0, 900.0, 1e4, INF) for sign in (1, -1)]


@pytest.mark.parametrize("kind", ["alike", "mixed"])
def test_edges(dtype, kind):
    of_mu, of_logvar = dtypes_of(dtype, kind)
    mu, logvar = (x.reshape(-1) for x in np.meshgrid([0.0, -0.0, *SIZES, -3.0, 1e15, INF], LOGVARS))
    mu, logvar = mu.astype(of_mu), logvar.astype(of_logvar)
    assert_true(all_of(mu, logvar), oracle.gaussian_kl_loss(mu, logvar), (of_mu, of_logvar), (mu, logvar))


@pytest.mark.parametrize("kind", ["alike", "mixed"])
def test_in_bulk(dtype, kind, rng):
    of_mu, of_logvar = dtypes_of(dtype, kind)
    small = rng.choice([-1, 1], 700) * 10 ** rng.uniform(-30, 0, 700)
    most = np.log(np.finfo(of_logvar).max) + 0.5
    logvar = np.concatenate([small, rng.uniform(-2, 3, 700), rng.uniform(-most, most, 700), rng.uniform(79, most, 700)]).astype(of_logvar)
    mu = (rng.choice([0, 1e-3, 1], logvar.size) * rng.standard_normal(logvar.size)).astype(of_mu)
    assert_true(all_of(mu, logvar), oracle.gaussian_kl_loss(mu, logvar), (of_mu, of_logvar), (mu, logvar))


@pytest.mark.parametrize(
    ("mu", "logvar", "want"),
    [
        (0, -INF, (INF, 0, -0.5, 1, 0)),
        (0, INF, (INF, 0, INF, 1, INF)),
        (-INF, 0, (INF, -INF, 0, 1, 0.5)),
        (INF, -INF, (INF, INF, -0.5, 1, 0)),
        (NAN, 0, (NAN, NAN, 0, 1, 0.5)),
        (0, NAN, (NAN, 0, NAN, 1, NAN)),
        (0, 0, (0, 0, 0, 1, 0.5)),
    ],
)
def test_limits(mu, logvar, want, dtype):
    got = np.concatenate(all_of(dtype.type([mu]), dtype.type([logvar])))
    np.testing.assert_array_equal(got, np.array(want, dtype))


def test_finite_up_to_the_largest_number(dtype):
    """The halves of the formula do not overflow before the quantity does."""
    most = np.finfo(dtype).max
    logvar = np.log(most) + dtype.type(0.25)
    mu = np.sqrt(most) * dtype.type(1.25)
    for at in ((dtype.type([0]), np.array([logvar])), (np.array([mu]), dtype.type([0]))):
        assert_true(all_of(*at), oracle.gaussian_kl_loss(*at), (dtype, dtype), at)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_results_beside_float64_are_rounded_once(half, rng):
    mu, logvar = rng.normal(size=300).astype(half), rng.normal(size=300).astype(half)
    wide = logvar.astype(np.float64)
    value, slope, _, _, _ = all_of(mu, wide)
    assert_same((value, slope), [x.astype(half) for x in all_of(mu.astype(np.float64), wide)[:2]])


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grad", "curvature"])
def test_out_of_two_dtypes(rng, dtype, method):
    mu, logvar = (rng.standard_normal(SHAPE).astype(d) for d in dtypes_of(dtype, "mixed"))
    want = getattr(KL, method)(mu, logvar)
    buffers = np.full_like(mu, 7), np.full_like(logvar, 7)
    got = getattr(KL, method)(mu, logvar, out=buffers)
    assert all(a is b for a, b in zip(got, buffers, strict=True))
    assert_same(got, want)
    value = KL(mu, logvar)
    again = getattr(KL, method)(mu, logvar, out=[mu, logvar])
    assert again[0] is mu
    assert again[1] is logvar
    assert_same(again, want)
    mu[...], logvar[...] = 0, 0
    assert value > KL.value_and_grad(mu, logvar, out=(mu, logvar))[0] == 0.0


def test_out_in_place_for_one_of_two_gradients(latents):
    mu, logvar = latents
    value, want = KL.value_and_grad(mu, logvar, reduction="none")
    buffer = np.empty_like(mu)
    again, got = KL.value_and_grad(mu.copy(), logvar, reduction="none", out=(buffer, logvar))
    assert got[0] is buffer
    assert got[1] is logvar
    assert_same([again, *got], [value, *want])


def test_views(latents):
    mu, logvar = latents
    want = all_of(mu, logvar)
    backwards = [np.ascontiguousarray(x.T[::-1])[::-1].T for x in latents]
    assert_same(all_of(*backwards), want)
    assert_same(all_of(backwards[0], logvar), want)


def test_empty_input():
    empty = np.empty((0, 3))
    assert KL(empty, empty, reduction="sum") == 0.0
    assert [x.shape for x in KL.grad(empty, empty)] == [(0, 3), (0, 3)]


def test_zero_dimensional_arrays():
    value, slopes = KL.value_and_grad(3.0, 0.0)
    assert value == 4.5
    assert [float(x) for x in slopes] == [3.0, 0.0]


# --- errors of the divergence ----------------------------------------------------------------------------------------

MU, LOGVAR = np.full((2, 3), 0.5, np.float32), np.full((2, 3), 0.25, np.float32)
READ_ONLY = np.full((2, 3), 7, np.float32)
READ_ONLY.flags.writeable = False
CASES = {
    "shapes": (ValueError, "mu has shape (2, 3) and logvar (3,); they must be equal", (MU, LOGVAR[0]), {}),
    "integer mu": (TypeError, "mu has dtype int64; accepted: float16, bfloat16, float32, float64", (MU.astype(np.int64), LOGVAR), {}),
    "bool logvar": (TypeError, "logvar has dtype bool; accepted: float16, bfloat16, float32, float64", (MU, LOGVAR > 0), {}),
    "masked array": (TypeError, "logvar is a masked array, whose mask would be lost", (MU, np.ma.array(LOGVAR)), {}),
    "byte order of mu": (TypeError, "mu has non-native byte order (>f4)", (MU.astype(">f4"), LOGVAR), {}),
    "byte order of logvar": (TypeError, "logvar has non-native byte order (>f4)", (MU, LOGVAR.astype(">f4")), {}),
    "weight shape": (ValueError, "weight has shape (2,), which does not broadcast", (MU, LOGVAR, np.ones(2)), {}),
    "mask dtype": (TypeError, "mask has dtype float64; accepted: bool", (MU, LOGVAR), {"mask": np.ones(3)}),
    "reduction": (ValueError, "reduction 'avg' is unknown; accepted: 'mean', 'sum', 'none'", (MU, LOGVAR), {"reduction": "avg"}),
    "option": (TypeError, "unknown option ignore_index; accepted: weight, reduction, mask", (MU, LOGVAR), {"ignore_index": 1}),
}
OUT_CASES = {
    "one array": (TypeError, "out must be 2 arrays, one for each gradient, not ndarray", lambda a, b: a),
    "three arrays": (TypeError, "out must be 2 arrays, one for each gradient, not tuple", lambda a, b: (a, b, a)),
    "None": (TypeError, "out[1] must be a numpy.ndarray, not NoneType", lambda a, b: (a, None)),
    "read-only": (ValueError, "out[1] is read-only", lambda a, b: (a, READ_ONLY)),
    "dtype": (
        ValueError,
        "has shape (2, 3) and dtype float64; the result has shape (2, 3) and dtype float32",
        lambda a, b: (a, np.zeros((2, 3))),
    ),
    "shape": (ValueError, "has shape (3,) and dtype float32; the result has shape (2, 3) and dtype float32", lambda a, b: (a, b[0])),
    "broadcast": (
        ValueError,
        "several elements of out",
        lambda a, b: (a, np.lib.stride_tricks.as_strided(np.zeros(3, np.float32), (2, 3), (0, 4))),
    ),
    "twice": (ValueError, "out[1] shares memory with out[0]", lambda a, b: (a, a)),
    "twice, as views": (ValueError, "shares memory with out[0]", lambda a, b: (a, a[:])),
    "overlap": (ValueError, "shares memory with out[0]", lambda a, b: (a, a[::-1])),
}
OVERLAPS = {
    "swapped": ("logvar", lambda mu, logvar, other: (logvar, mu)),
    "mu twice": ("mu", lambda mu, logvar, other: (other, mu)),
    "logvar twice": ("logvar", lambda mu, logvar, other: (logvar, other)),
    "mu backwards": ("mu", lambda mu, logvar, other: (mu[::-1], other)),
    "logvar backwards": ("logvar", lambda mu, logvar, other: (other, logvar[::-1])),
    "views swapped": ("logvar", lambda mu, logvar, other: (logvar[:], mu[:])),
    "mu for logvar, a view": ("mu", lambda mu, logvar, other: (other, mu[:])),
}


@pytest.mark.parametrize("case", some(CASES, has_the_hosts_arrays, "masked array"))
def test_bad_latents(case):
    error, message, args, options = CASES[case]
    out = np.full_like(MU, 7), np.full_like(MU, 7)
    for call in (KL, KL.grad, KL.value_and_grad, KL.curvature, lambda *a, **k: KL.grad(*a, **k, out=out)):
        with pytest.raises(error, match=re.escape(message)):
            call(*args, **options)
    assert (np.array(out) == 7).all()


@pytest.mark.parametrize("case", some(OUT_CASES, has_the_hosts_arrays, "None", "read-only"))
def test_bad_out(case):
    error, message, out_of = OUT_CASES[case]
    a, b = np.full_like(MU, 7), np.full_like(MU, 7)
    for call in (KL.grad, KL.value_and_grad, KL.curvature):
        with pytest.raises(error, match=re.escape(message)):
            call(MU, LOGVAR, out=out_of(a, b))
        assert (np.array([a, b]) == 7).all()


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_out(case):
    name, out_of = OVERLAPS[case]
    mu, logvar, other = MU.copy(), LOGVAR.copy(), np.full_like(MU, 7)
    with pytest.raises(ValueError, match=rf"shares memory with {name}; accepted: memory of its own, or out=\(mu, logvar\) itself"):
        KL.grad(mu, logvar, out=out_of(mu, logvar, other))
    assert_same((mu, logvar, other), (MU, LOGVAR, np.full_like(MU, 7)))


def test_one_array_for_mu_and_logvar():
    mu, other = MU.copy(), np.full_like(MU, 7)
    assert_same(KL.grad(mu, mu), KL.grad(MU, MU.copy()))
    with pytest.raises(ValueError, match="shares memory with logvar"):
        KL.grad(mu, mu, out=(mu, other))
    assert_same((mu, other), (MU, np.full_like(MU, 7)))


def test_out_over_a_weight():
    weight, mask = np.ones_like(MU), np.ones(MU.shape, bool)
    for k in (0, 1):
        out = [np.full_like(MU, 7)] * 2
        out[k] = weight
        with pytest.raises(ValueError, match="shares memory with weight"):
            KL.grad(MU, LOGVAR, weight, mask=mask, out=tuple(out))
        assert (weight == 1).all()
        assert (out[1 - k] == 7).all()


def test_the_divergence_alone_has_no_grad_output_and_no_out():
    with pytest.raises(ValueError, match="grad_output scales a gradient, and the value alone has none"):
        KL(MU, LOGVAR, grad_output=2.0)
    with pytest.raises(ValueError, match="out takes the two gradients, and the value alone has none"):
        KL(MU, LOGVAR, reduction="none", out=(MU, LOGVAR))


# --- the objective ---------------------------------------------------------------------------------------------------

PARTS = {"bce": fl.binary_cross_entropy_with_logits, "mse": fl.mse_with_logits_loss}
ORACLES = {"bce": oracle.binary_cross_entropy_with_logits, "mse": oracle.mse_with_logits_loss}


@pytest.fixture
def autoencoder(rng, dtype):
    """Return reconstruction, images, mu and logvar of a small batch."""
    arrays = 2 * rng.standard_normal((4, 1, 6, 5)), rng.random((4, 1, 6, 5)), rng.standard_normal((4, 3)), rng.standard_normal((4, 3))
    return [x.astype(dtype) for x in arrays]


@pytest.mark.first
@pytest.mark.parametrize("beta", [0, 0.5, 4])
@pytest.mark.parametrize("reconstruction", PARTS)
def test_the_objective_is_the_textbooks(autoencoder, reconstruction, beta):
    z, t, mu, logvar = autoencoder
    value = VAE(*autoencoder, reconstruction=reconstruction, beta=beta)
    assert isinstance(value, fl.VAEValue)
    assert all(type(part) is np.float64 for part in value)
    (images, _), _, _ = ORACLES[reconstruction](z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG)
    divergence = oracle.gaussian_kl_loss(mu, logvar)[0]
    assert_close(value.reconstruction, images.sum() / 4, SUM[z.dtype])
    assert_close(value.divergence, divergence.sum() / 4, SUM[z.dtype])
    assert_close(value.total, (images.sum() + beta * divergence.sum()) / 4, SUM[z.dtype])
    again, _ = VAE.value_and_grad(*autoencoder, reconstruction=reconstruction, beta=beta)
    assert again == value


@pytest.mark.parametrize("beta", [0, 0.5, 4])
@pytest.mark.parametrize("reconstruction", PARTS)
def test_gradients_are_those_of_the_parts(autoencoder, reconstruction, beta):
    z, t, mu, logvar = autoencoder
    for upstream in (1.0, -0.3):
        got = VAE.grad(*autoencoder, reconstruction=reconstruction, beta=beta, grad_output=upstream)
        assert isinstance(got, fl.VAEGradient)
        images = PARTS[reconstruction].grad(z, t, reduction="batchmean", grad_output=upstream)
        latents = KL.grad(mu, logvar, reduction="batchmean", grad_output=upstream * beta)
        assert_same(got, (images, *latents))
        assert [x.dtype for x in got] == [z.dtype] * 3
    assert_same(got, VAE.value_and_grad(*autoencoder, reconstruction=reconstruction, beta=beta, grad_output=upstream)[1])


def test_the_gradients_are_derivatives(rng):
    arrays = [rng.normal(size=(3, 8)), rng.random((3, 8)), rng.normal(size=(3, 2)), rng.normal(size=(3, 2))]
    grads, h = VAE.grad(*arrays, beta=1.5, reconstruction="mse"), 1e-6
    for k, grad in zip((0, 2, 3), grads, strict=True):
        up, down = [x.copy() for x in arrays], [x.copy() for x in arrays]
        up[k][1, 1] += h
        down[k][1, 1] -= h
        slope = (VAE(*up, beta=1.5, reconstruction="mse").total - VAE(*down, beta=1.5, reconstruction="mse").total) / (2 * h)
        assert abs(grad[1, 1] - slope) <= DIFFERENCE * np.abs(grad).max()


@pytest.mark.parametrize("logvar", [INF, NAN])
def test_beta_0_ignores_the_latents(autoencoder, logvar):
    autoencoder[3][...] = logvar
    value, grad = VAE.value_and_grad(*autoencoder, beta=0)
    assert value.total == value.reconstruction
    assert not grad.mu.any()
    assert not grad.logvar.any()


@pytest.mark.parametrize("reconstruction", PARTS)
def test_options_apply_to_the_images(autoencoder, rng, reconstruction):
    z, _, mu, logvar = autoencoder
    images, mask, weight = rng.integers(0, 256, z.shape).astype(np.uint8), rng.random(z.shape) < 0.6, rng.random((6, 5))
    options = {"weight": weight, "mask": mask, "target_scale": 1 / 255, "ignore_index": 255, "validate": True}
    value, grad = VAE.value_and_grad(z, images, mu, logvar, reconstruction=reconstruction, beta=2, **options)
    part = PARTS[reconstruction].value_and_grad(z, images, reduction="batchmean", **options)
    assert (value.reconstruction, value.divergence) == (part[0], KL(mu, logvar, reduction="batchmean"))
    assert value.total == value.reconstruction + 2 * value.divergence
    assert_same(grad, (part[1], *KL.grad(mu, logvar, reduction="batchmean", grad_output=2)))
    assert not grad.reconstruction_logits[~mask].any()
    assert VAE(z, images, mu, logvar, reconstruction=reconstruction, beta=2, **options) == value


def test_latents_of_another_dtype_and_rank(autoencoder):
    z, t, mu, logvar = autoencoder
    narrow = mu.astype(np.float16)[:, :, None]
    wide = logvar.astype(np.float64)[:, :, None]
    grad = VAE.grad(z, t, narrow, wide)
    assert [x.dtype for x in grad] == [z.dtype, np.float16, np.float64]
    assert [x.shape for x in grad] == [z.shape, (4, 3, 1), (4, 3, 1)]


# --- errors of the objective -----------------------------------------------------------------------------------------

VAE_CASES = {
    "reconstruction": (ValueError, "reconstruction is 'l1'; accepted: 'bce', 'mse'", {"reconstruction": "l1"}),
    "reconstruction type": ((TypeError, ValueError), "reconstruction is ['bce']; accepted: 'bce', 'mse'", {"reconstruction": ["bce"]}),
    "beta": (ValueError, "beta is -0.5; accepted: 0 or more", {"beta": -0.5}),
    "beta NaN": (ValueError, "beta is nan; accepted: 0 or more", {"beta": NAN}),
    "beta type": (TypeError, "beta must be a number, not 'x'", {"beta": "x"}),
    "option": (TypeError, "unknown option betta; accepted: ", {"betta": 1}),
    "reduction": (TypeError, "reduction", {"reduction": "sum"}),
    "batch of latents": (
        ValueError,
        "reconstruction_logits has shape (2, 6) and mu (3, 2); their first axes, the batch, must be equal",
        {"mu": np.zeros((3, 2), np.float32), "logvar": np.zeros((3, 2), np.float32)},
    ),
    "no batch": (ValueError, "and mu (); their first axes", {"mu": np.float32(0), "logvar": np.float32(0)}),
    "latents": (ValueError, "mu has shape (2, 3) and logvar (2, 2); they must be equal", {"logvar": np.zeros((2, 2), np.float32)}),
    "integer mu": (TypeError, "mu has dtype int64; accepted: float16", {"mu": np.zeros((2, 3), np.int64)}),
    "images": (ValueError, "input has shape (2, 6) and target (2, 5)", {"images": np.zeros((2, 5), np.float32)}),
    "image out of range": (
        ValueError,
        "target[1, 5] is 2.0; accepted: targets in [0, 1]",
        {"images": np.float32([[0] * 6, [0] * 5 + [2]]), "validate": True},
    ),
    "weight": (ValueError, "weight has shape (5,), which does not broadcast", {"weight": np.ones(5)}),
    "mask": (TypeError, "mask has dtype int64; accepted: bool", {"mask": np.ones(6, np.int64)}),
}
VAE_OUT_CASES = {
    "one array": (TypeError, "out must be 3 arrays, one for each gradient, not ndarray", lambda a, b, c: a),
    "two arrays": (TypeError, "out must be 3 arrays, one for each gradient, not tuple", lambda a, b, c: (a, b)),
    "None": (TypeError, "out[1] must be a numpy.ndarray, not NoneType", lambda a, b, c: (a, None, c)),
    "read-only": (ValueError, "out[2] is read-only", lambda a, b, c: (a, b, READ_ONLY)),
    "dtype of the latents": (ValueError, "out[1] has shape (2, 3) and dtype float64", lambda a, b, c: (a, np.zeros((2, 3)), c)),
    "shape of the latents": (ValueError, "out[2] has shape (3,) and dtype float32", lambda a, b, c: (a, b, c[0])),
    "shape of the logits": (ValueError, "has shape (2, 5) and dtype float32", lambda a, b, c: (a[:, :5], b, c)),
    "twice": (ValueError, "out[2] shares memory with out[1]", lambda a, b, c: (a, b, b)),
    "overlap": (ValueError, "out[1] shares memory with out[0]", lambda a, b, c: (a, a[:, :3], c)),
    "broadcast": (
        ValueError,
        "several elements of out",
        lambda a, b, c: (a, np.lib.stride_tricks.as_strided(np.zeros(3, np.float32), (2, 3), (0, 4)), c),
    ),
}


def small_autoencoder():
    """Return reconstruction, images, mu and logvar of a tiny batch, by name."""
    return {
        k: np.full(s, 0.5, np.float32)
        for k, s in (("reconstruction_logits", (2, 6)), ("images", (2, 6)), ("mu", (2, 3)), ("logvar", (2, 3)))
    }


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("case", VAE_CASES)
def test_bad_input_of_the_objective(case, in_place):
    error, message, changes = VAE_CASES[case]
    given = small_autoencoder() | changes
    buffers = [given[k] if in_place else np.full_like(given[k], 7) for k in ("reconstruction_logits", "mu", "logvar")]
    before = [x.copy() for x in buffers]
    for call in (VAE, VAE.grad, VAE.value_and_grad):
        with pytest.raises(error, match=re.escape(message)):
            call(**given)
    with pytest.raises(error):  # any message, because the buffer of a number is an error too
        VAE.grad(**given, out=buffers)
    assert_same(buffers, before)


@pytest.mark.parametrize("case", some(VAE_OUT_CASES, has_the_hosts_arrays, "None", "read-only"))
def test_bad_out_of_the_objective(case):
    error, message, out_of = VAE_OUT_CASES[case]
    given = small_autoencoder()
    buffers = [np.full_like(given[k], 7) for k in ("reconstruction_logits", "mu", "logvar")]
    for call in (VAE.grad, VAE.value_and_grad):
        with pytest.raises(error, match=re.escape(message)):
            call(**given, out=out_of(*buffers))
        assert all((x == 7).all() for x in buffers)


VAE_READS = ("reconstruction_logits", "mu", "logvar", "images", "weight")  # the first three have gradients


@pytest.mark.parametrize(("k", "other"), [(k, other) for k in range(3) for n, other in enumerate(VAE_READS) if n != k])
def test_out_that_overlaps_another_operand_is_refused(k, other):
    """A gradient may overwrite its own operand and no other array."""
    given = {
        name: np.full((2, 3), 0.25 + n, np.float32) for n, name in enumerate(("reconstruction_logits", "images", "mu", "logvar", "weight"))
    }
    before = {name: x.copy() for name, x in given.items()}
    out = [np.full((2, 3), 7, np.float32) for _ in range(3)]
    out[k] = given[other]
    with pytest.raises(ValueError, match="shares memory with"):
        VAE.grad(**given, out=out)
    assert_same(given.values(), before.values())


def test_the_objective_alone_has_no_grad_output_and_no_out():
    with pytest.raises(ValueError, match="grad_output scales a gradient, and the value alone has none"):
        VAE(**small_autoencoder(), grad_output=2.0)
    with pytest.raises((TypeError, ValueError), match=r"use grad or value_and_grad|unknown option out"):
        VAE(**small_autoencoder(), out=tuple(np.zeros(3, np.float32) for _ in range(3)))


@is_about_the_host
def test_numpy_set_to_raise_changes_nothing(autoencoder):
    with np.errstate(all="raise"):
        assert VAE(*autoencoder, beta=np.finfo(np.float64).max).total == INF
        autoencoder[3][0, 0] = INF
        assert VAE.value_and_grad(*autoencoder)[0].total == INF


# --- their signatures -------------------------------------------------------------------------------------------------


@computes_nothing
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (fl.dice_bce_with_logits_loss, ["smooth", "per_channel", "per_sample", "dice_weight", "bce_weight", "mask", "out", "validate"]),
        (KL, ["mask", "grad_output", "out"]),
        (VAE, ["reconstruction", "beta"]),
    ],
)
def test_the_signature_names_the_options(loss, options):
    assert set(options) <= set(inspect.signature(loss).parameters)
