"""Value, slope and curvature against the textbook: in 60 digits at the edges, in extended precision in bulk."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest

import fastloss as fl
from fastloss import ops
from tests import oracle
from tests.devices import computes_nothing
from tests.table import LOSSES
from tests.ulp import DIFFERENCE, QUANTITIES, ULP, assert_close, assert_ulp, compute, flat

pytestmark = pytest.mark.usefixtures("device")

EDGES = [
    0.0,
    1e-45,
    1e-38,
    1e-20,
    1e-7,
    0.5,
    1.0,
    5.0,
    10.0,
    15.9,
    16.0,
    17.0,
    20.0,
    36.7,
    87.3,
    88.0,
    88.7,
    89.0,
    100.0,
    103.0,
    103.9,
    104.0,
    105.0,
    700.0,
    709.0,
    745.0,
    746.0,
    800.0,
]
PROBABILITIES = [0.0, 1e-45, 1e-38, 1e-30, 1e-13, 1e-12, 1e-7, 0.1, 0.5, 0.75, 0.9, 0.999, 0.9999999, 1.0]
TARGETS = [0.0, 1.0, 0.5, 0.25, 1 / 255, 254 / 255, 1e-20]
CLASS_EDGES = [0.0] + [sign * x for x in (1e-7, 1.0, 17.0, 88.0, 745.0) for sign in (1, -1)]  # logits relative to that of a third class


def edge_points(row, dtype):
    """Return every combination of targets and inputs at which a formula changes its behaviour."""
    logits = [sign * x for x in EDGES for sign in (1, -1)] + [-0.0, np.finfo(dtype).tiny]
    inputs = PROBABILITIES if "probabilities" in row.arrays else logits
    z, t = np.array(list(itertools.product(inputs, TARGETS))).astype(dtype).T
    return np.ascontiguousarray(z), np.ascontiguousarray(t)


def bulk_points(row, rng, dtype, hard):
    n = 100_000
    z = [rng.normal(0, 3, n), rng.uniform(-120, 120, n), rng.choice([-1, 1], n) * 10 ** rng.uniform(-30, 0, n), rng.uniform(-800, 800, n)]
    if "probabilities" in row.arrays:
        z = [1 / (1 + np.exp(-z[0])), rng.random(n), 10 ** rng.uniform(-37, 0, n), 1 - 10 ** rng.uniform(-7, 0, n)]
    z = np.concatenate(z).astype(dtype)
    t = rng.random(z.size)
    return z, (t < 0.5 if hard else t).astype(dtype)


def exactly(function, z, t, **parameters):
    """Evaluate the oracle in 60 digits, element by element."""
    rows = [function(mpmath.mpf(float(a)), mpmath.mpf(float(b)), oracle.MP, **parameters) for a, b in zip(z, t, strict=True)]
    return [tuple(np.array([_long(row[q][k]) for row in rows]) for k in (0, 1)) for q in range(3)]


def _long(x):
    """Round 60 digits to extended precision, as the sum of a leading and a trailing float64."""
    if not mpmath.isfinite(x):
        return np.longdouble(float(x))
    scale = 0 if x == 0 else int(mpmath.floor(mpmath.log(abs(x), 2)))
    mantissa = mpmath.ldexp(x, -scale)
    head = float(mantissa)
    return np.ldexp(np.longdouble(head) + np.longdouble(float(mantissa - head)), scale)


def limits(name, quantity, t):
    hard, soft = ULP[name, quantity]
    return np.where((t == 0) | (t == 1), hard, soft)


def within_reach(name, quantity, z, dtype):
    """Mark where the bound holds. The focal loss multiplies the lost digits of a subnormal number by |z|: at t = 1/2 of p (1 - p) / 16."""
    focal_curvature = name == "sigmoid_focal_loss" and quantity == "curvature"
    return np.abs(z) < (-np.log(16 * np.finfo(dtype).tiny) if focal_curvature else np.inf)


@computes_nothing
@pytest.mark.rows("is_sum")
def test_ulp_table_has_every_loss(row):
    assert all((row.name, quantity) in ULP for quantity in QUANTITIES[: 3 if row.has_curvature else 2])


@pytest.mark.rows("is_elementwise")
def test_edges_in_60_digits(row, dtype):
    z, t = edge_points(row, dtype)
    for parameters in row.settings:
        want = exactly(row.oracle, z, t, **parameters)
        for quantity, got, (true, magnitude) in zip(QUANTITIES, compute(row.loss, z, t, **parameters), want, strict=True):
            for limit in set(ULP[row.name, quantity]):
                at = (limits(row.name, quantity, t) == limit) & within_reach(row.name, quantity, z, dtype)
                assert_ulp(got[at], true[at], magnitude[at], limit, dtype, z[at], t[at])


@pytest.mark.first
@pytest.mark.alike("stand-in")
@pytest.mark.rows("is_elementwise")
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_bulk_in_extended_precision(row, dtype, hard, rng):
    z, t = bulk_points(row, rng, dtype, hard)
    for parameters in row.settings:
        with np.errstate(all="ignore"):
            want = row.oracle(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG, **parameters)
        for quantity, got, (true, magnitude) in zip(QUANTITIES, compute(row.loss, z, t, **parameters), want, strict=True):
            at = within_reach(row.name, quantity, z, dtype)
            assert_ulp(got[at], true[at], magnitude[at], ULP[row.name, quantity][not hard], dtype, z[at], t[at])


@pytest.mark.rows("sums_pixels")
def test_edges_of_three_classes_in_60_digits(row, dtype):
    """Results above the subnormal numbers; results below are products of factors that have lost digits."""
    first, second, t = np.array(list(itertools.product(CLASS_EDGES, CLASS_EDGES, range(3)))).T
    z = np.stack([first, second, np.zeros_like(first)], axis=1).astype(dtype)
    for parameters in row.settings:
        value, slope = row.loss.value_and_grad(z, t.astype(np.uint8), reduction="none", **parameters)
        want = row.oracle(z, t, oracle.ARRAYS, **parameters)
        for quantity, got, (true, magnitude) in zip(QUANTITIES, (value, slope), want, strict=False):
            true, magnitude = (np.vectorize(_long, [np.longdouble])(x) for x in (true, magnitude))
            at = magnitude > np.finfo(dtype).tiny
            assert_ulp(got[at], true[at], magnitude[at], ULP[row.name, quantity], dtype)


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_pos_weight_in_extended_precision(dtype, hard, rng):
    z, t = bulk_points(LOSSES["binary_cross_entropy_with_logits"], rng, dtype, hard)
    weight = 2.5
    with np.errstate(all="ignore"):
        want = oracle.binary_cross_entropy_with_logits(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG, pos_weight=weight)
    got = compute(fl.binary_cross_entropy_with_logits, z, t, pos_weight=weight)
    for quantity, g, (true, magnitude) in zip(QUANTITIES, got, want, strict=True):
        assert_ulp(g, true, magnitude, ULP["binary_cross_entropy_with_logits, pos_weight", quantity][not hard], dtype, z, t)


@pytest.mark.parametrize("pos_weight", [None, 1e-3, 2.5, 1e4])
def test_entropy(dtype, rng, pos_weight):
    t = np.concatenate([[0.0, 1.0, 0.5, 1e-30], rng.random(100_000), 10 ** rng.uniform(-33, 0, 100_000)]).astype(dtype)
    factor, bound = 1.0 if pos_weight is None else pos_weight, ULP["binary_entropy", "value"][1]
    with np.errstate(all="ignore"):
        want = oracle.binary_entropy(t.astype(np.longdouble), oracle.LONG, np.longdouble(factor))
    assert_ulp(fl.binary_entropy(t, reduction="none", pos_weight=pos_weight), want, want, bound, dtype, t)
    exact = [_long(oracle.binary_entropy(mpmath.mpf(float(x)), oracle.MP, mpmath.mpf(factor))) for x in t[:50]]
    assert_ulp(fl.binary_entropy(t[:50], reduction="none", pos_weight=pos_weight), exact, exact, bound, dtype, t[:50])


@pytest.mark.parametrize(("alpha", "z", "t", "value", "slope"), [
    (0, np.inf, 0, np.inf, 1), (0, -np.inf, 1, 0, 0), (1, np.inf, 0, 0, 0), (1, -np.inf, 1, np.inf, -1), (0, np.nan, 1, np.nan, np.nan),
])  # fmt: skip
def test_a_focal_loss_of_one_class_at_infinity(alpha, z, t, value, slope, dtype):
    given = dtype.type([z]), dtype.type([t])
    np.testing.assert_array_equal(fl.sigmoid_focal_loss(*given, alpha=alpha), value)
    np.testing.assert_array_equal(fl.sigmoid_focal_loss.grad(*given, alpha=alpha), slope)


@pytest.mark.parametrize("beta", [0.3, 0.7, 1.9])
def test_both_roundings_of_the_slope_of_smooth_l1(beta, dtype, rng):
    z, t = (rng.uniform(-1, 1, 200_000).astype(dtype) for _ in range(2))
    want = oracle.smooth_l1_loss(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG, beta=np.longdouble(dtype.type(beta)))[1]
    got = fl.smooth_l1_loss.grad(z, t, reduction="sum", beta=float(dtype.type(beta)))
    assert_ulp(got, *want, ULP["smooth_l1_loss", "slope"][1], dtype, z, t)


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("name", "z", "t", "value", "slope", "curvature"),
    [
        ("binary_cross_entropy_with_logits", INF, 1, 0, 0, 0),
        ("binary_cross_entropy_with_logits", INF, 0, INF, 1, 0),
        ("binary_cross_entropy_with_logits", INF, 0.25, INF, 0.75, 0),
        ("binary_cross_entropy_with_logits", -INF, 0, 0, 0, 0),
        ("binary_cross_entropy_with_logits", -INF, 1, INF, -1, 0),
        ("binary_cross_entropy_with_logits", -INF, 0.25, INF, -0.25, 0),
        ("binary_cross_entropy_with_logits", NAN, 0, NAN, NAN, NAN),
        ("binary_cross_entropy_with_logits", NAN, 1, NAN, NAN, NAN),
        ("binary_cross_entropy_with_logits", 0, NAN, NAN, NAN, 0.25),
        ("mse_with_logits_loss", INF, 1, 0, 0, 0),
        ("mse_with_logits_loss", INF, 0, 1, 0, 0),
        ("mse_with_logits_loss", -INF, 0.25, 0.0625, 0, 0),
        ("mse_with_logits_loss", NAN, 0, NAN, NAN, NAN),
        ("mse_loss", INF, 0, INF, INF, 2),
        ("mse_loss", -INF, 0, INF, -INF, 2),
        ("mse_loss", INF, INF, NAN, NAN, 2),
        ("mse_loss", NAN, 0, NAN, NAN, 2),
    ],
)
def test_infinite_logits_have_the_limit(name, z, t, value, slope, curvature, dtype):
    got = compute(LOSSES[name].loss, dtype.type([z]), dtype.type([t]))
    np.testing.assert_array_equal(np.concatenate(got), dtype.type([value, slope, curvature]))
    if name == "binary_cross_entropy_with_logits" and not np.isnan(t):
        np.testing.assert_array_equal(LOSSES[name].loss(dtype.type([z]), dtype.type([t])), value)
        weighted = compute(LOSSES[name].loss, dtype.type([z]), dtype.type([t]), pos_weight=1.0)
        np.testing.assert_array_equal(np.concatenate(weighted), dtype.type([value, slope, curvature]))


def test_infinities_in_large_sums(dtype):
    z, t = np.zeros(200_000, dtype), np.zeros(200_000, dtype)
    first = fl.elementwise_loss(lambda z, t: (z, 1.0))
    z[0] = np.inf
    assert first(z, t) == np.inf
    z[-1] = -np.inf
    assert np.isnan(first(z, t))
    assert fl.mse_loss(z, t) == np.inf
    z[...] = np.finfo(dtype).max
    if dtype == np.float64:
        assert first(z, t, reduction="sum") == np.inf


@pytest.mark.rows("is_local")
def test_one_nan_spoils_the_gradient_of_its_own_entry_and_the_value(row, arrays):
    for spoilt in row.gradients:
        given = [x.copy() for x in arrays]
        place = (1, 2, 3, 4)[: given[spoilt].ndim]
        own = [list(place)] if row.pairs_elements else [[1, k, *place[2:]] for k in range(given[spoilt].shape[1])]
        given[spoilt][place] = np.nan
        value, grads = row.loss.value_and_grad(*given, **row.reduced("sum"))
        assert np.isnan(flat(value)[0])
        for k, grad in zip(row.gradients, flat(grads), strict=True):
            assert np.argwhere(np.isnan(grad)).tolist() == (own if k == spoilt else [])


@pytest.mark.rows("sums_elements")
def test_slope_and_curvature_are_derivatives(row, rng):
    loss, arrays, h = row.loss, [rng.normal(0, 3, 2000), rng.random(2000)], 1e-7
    if "probabilities" in row.arrays:
        arrays[0] = rng.uniform(0.01, 0.99, 2000)
    distance = np.abs(arrays[0] - arrays[1])
    smooth = np.abs(distance - (row.name != "l1_loss")) > h  # away from the kinks of the absolute losses
    arrays = [x[smooth] for x in arrays]
    for at, k in enumerate(row.gradients):
        step = [h * (k == n) for n in range(2)]
        up, down = ([x + sign * d for x, d in zip(arrays, step, strict=True)] for sign in (1, -1))
        slope = (loss(*up, reduction="none") - loss(*down, reduction="none")) / (2 * h)
        assert_close(flat(loss.grad(*arrays, reduction="sum"))[at], slope, DIFFERENCE)
        curvature = (flat(loss.grad(*up, reduction="sum"))[at] - flat(loss.grad(*down, reduction="sum"))[at]) / (2 * h)
        assert_close(flat(loss.curvature(*arrays, reduction="sum"))[at], curvature, DIFFERENCE)


def sigmoid_of(x):
    return np.where(x > 0, 1, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x)))


FUNCTIONS = {"exp": np.exp, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sigmoid": sigmoid_of, "tanh": np.tanh}
FUNCTION_LOSSES = {
    "exp": fl.elementwise_loss(lambda z, t: (ops.exp(z), t)),
    "expm1": fl.elementwise_loss(lambda z, t: (ops.expm1(z), t)),
    "log": fl.elementwise_loss(lambda z, t: (ops.log(z), t)),
    "log1p": fl.elementwise_loss(lambda z, t: (ops.log1p(z), t)),
    "sigmoid": fl.elementwise_loss(lambda z, t: (ops.sigmoid(z), t)),
    "tanh": fl.elementwise_loss(lambda z, t: (ops.tanh(z), t)),
}
FUNCTION_OF_NEGATIVE = {
    "exp": fl.elementwise_loss(lambda z, t: (ops.exp(-abs(z)), t)),
    "expm1": fl.elementwise_loss(lambda z, t: (ops.expm1(-abs(z)), t)),
    "sigmoid": fl.elementwise_loss(lambda z, t: (ops.sigmoid(-abs(z)), t)),
}
quotient_loss = fl.elementwise_loss(lambda z, t: (ops.quotient(z, t), t))
power_loss = fl.elementwise_loss(lambda z, t: (ops.pow(z, t), t))


def numbers_of_every_size(dtype, rng):
    info = np.finfo(dtype)
    sizes = 10.0 ** rng.uniform(np.log10(info.smallest_subnormal), np.log10(info.max), 200_000)
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, info.max, info.tiny, info.smallest_subnormal, -0.5, 2.0, 0.5**0.5]
    usual = [rng.uniform(-1, 3, 200_000), rng.uniform(-110, 90, 100_000), rng.uniform(-750, 710, 100_000)]
    return np.concatenate([sizes, -sizes, *usual, special]).astype(dtype)


@pytest.mark.first
@pytest.mark.alike("stand-in")
@pytest.mark.parametrize("name", FUNCTION_LOSSES)
def test_functions_of_the_vocabulary(name, dtype, rng):
    x = numbers_of_every_size(dtype, rng)
    for losses, at in ((FUNCTION_LOSSES, x), (FUNCTION_OF_NEGATIVE, -np.abs(x))):
        if name in losses:
            with np.errstate(all="ignore"):
                want = FUNCTIONS[name](at.astype(np.longdouble))
            assert_ulp(losses[name](at, at, reduction="none"), want, want, ULP[name, "value"], dtype, at)


def test_powers(dtype, rng):
    x = np.abs(numbers_of_every_size(dtype, rng))
    x = np.concatenate([x, rng.random(100_000), 1 - rng.random(100_000) * 1e-3]).astype(dtype)
    y = np.where(rng.random(x.size) < 0.2, rng.integers(-3, 4, x.size), rng.uniform(-3, 6, x.size)).astype(dtype)
    with np.errstate(all="ignore"):
        want = np.power(x.astype(np.longdouble), y.astype(np.longdouble))
    want[np.isnan(x) & (y == 0)] = 1
    assert_ulp(power_loss(x, y, reduction="none"), want, want, ULP["pow", "value"], dtype, x, y)
    below = power_loss(dtype.type([-1, -np.inf, -1e-30, 0.5, np.nan, 2]), dtype.type([2, 2, 0.5, np.nan, 1, 0]), reduction="none")
    np.testing.assert_array_equal(below, [np.nan, np.nan, np.nan, np.nan, np.nan, 1])


@pytest.mark.first
def test_quotients(dtype, rng):
    x, y = numbers_of_every_size(dtype, rng), np.abs(numbers_of_every_size(dtype, rng))
    rng.shuffle(x)
    with np.errstate(all="ignore"):
        want = x.astype(np.longdouble) / y
        chosen = (np.abs(x) <= 2.0**60) & (y > 0) & (y <= 2.0**60) & (np.abs(want) < np.finfo(dtype).max)
    x, y, want = x[chosen], y[chosen], want[chosen]
    assert np.sum(y < np.finfo(dtype).tiny) > 1000  # subnormal divisors
    assert_ulp(quotient_loss(x, y, reduction="none"), want, want, ULP["quotient", "value"], dtype, x, y)
