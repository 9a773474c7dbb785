"""Losses that the library does not have, and formulas that cannot be one."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import pydoc
import re

import numpy as np
import pytest

import fastloss as fl
from fastloss import ops
from fastloss.formula import RESERVED
from fastloss.ops import exp, maximum, minimum, sqrt, where
from tests.devices import computes_nothing
from tests.ulp import DIFFERENCE, PRODUCT, SUM, assert_close, assert_ulp

pytestmark = pytest.mark.usefixtures("device")


@fl.elementwise_loss
def charbonnier(z, t, eps=1e-3):
    d = z - t
    v = sqrt(d * d + eps * eps)
    return v, d / v


@fl.elementwise_loss(bounds={"q": (0, 1)})
def pinball(z, t, q=0.5):
    """Quantile loss."""
    d = t - z
    return maximum(q * d, (q - 1) * d), where(d > 0, -q, 1 - q), 0.0


def test_a_loss_of_a_user_has_all_methods_and_options(batch, rng):
    z, t = batch
    d = z.astype(np.float64) - t
    v = np.sqrt(d**2 + 1e-4)
    value, grad = charbonnier.value_and_grad(z, t, eps=1e-2)
    assert_close(value, v.mean(), SUM[z.dtype])
    assert_close(grad, d / v / z.size, 2 * SUM[z.dtype])
    assert charbonnier(z, t, eps=1e-2) == value
    mask, weight, eps = rng.random(z.shape) < 0.5, rng.random((3, 1, 1)), rng.random((17, 13))
    v = np.sqrt(d**2 + eps**2)
    value, grad = charbonnier.value_and_grad(z, t, weight, "sample_sum", mask=mask, eps=eps, grad_output=np.arange(4.0))
    assert_close(value, (v * weight * mask).sum(axis=(1, 2, 3)), SUM[z.dtype])
    assert_close(grad, d / v * weight * mask * np.arange(4.0).reshape(-1, 1, 1, 1), 4 * SUM[z.dtype])
    assert charbonnier(z, (t * 255).astype(np.uint8), target_scale=1 / 255) > 0
    assert_close(charbonnier(z, t, mask=mask, eps=1e-2), np.sqrt(d**2 + 1e-4)[mask].mean(), SUM[z.dtype])
    overwritten = z.copy()
    charbonnier.grad(overwritten, t, out=overwritten)
    np.testing.assert_array_equal(overwritten, charbonnier.grad(z, t))


def test_curvature_is_there_if_the_formula_gives_it(batch):
    assert not pinball.curvature(*batch).any()
    with pytest.raises(NotImplementedError, match=re.escape("charbonnier has no curvature: its formula returns (value, slope)")):
        charbonnier.curvature(*batch)


def test_bounds():
    with pytest.raises(ValueError, match=re.escape("q is 1.5; accepted: from 0 to 1")):
        pinball(1.0, 0.0, q=1.5)
    assert pinball(1.0, 0.0, q=0.25) == 0.75


@computes_nothing
def test_a_loss_looks_like_a_function():
    assert pinball.__name__ == "pinball"
    assert pinball.__doc__.startswith("Quantile loss.\n\nArgs:\n    weight: array")
    assert list(inspect.signature(pinball).parameters)[:6] == ["input", "target", "weight", "reduction", "q", "mask"]
    assert repr(pinball).startswith("<loss pinball(input, target, weight=None, reduction='mean', *, q=0.5, mask=None")
    assert pickle.loads(pickle.dumps(pinball)) is pinball
    assert pickle.loads(pickle.dumps(fl.mse_loss)) is fl.mse_loss


def test_a_formula_is_also_plain_numpy(batch):
    z, t = (x.astype(np.float64) for x in batch)
    for loss in (fl.binary_cross_entropy_with_logits, fl.mse_loss, fl.mse_with_logits_loss, charbonnier, pinball):
        value, slope, *_ = loss.__wrapped__(z, t)
        assert_close(loss(z, t, reduction="none"), value, SUM[z.dtype])
        assert_close(loss.grad(z, t, reduction="sum"), slope, SUM[z.dtype])


@fl.elementwise_loss
def everything(z, t, a=2.0):
    """Use every function and operator of the vocabulary."""
    x = +abs(-z) + ops.abs(t) - 3 * z / (1 + t) + z**3 + z**1 + z**4
    x = x + exp(-abs(z)) + ops.log(1 + abs(z)) + ops.log1p(abs(z)) + sqrt(abs(z)) + ops.copysign(a, z) + ops.fma(z, t, a)
    x = x + minimum(z, t) + maximum(z, a) + where((z < t) & (z <= a) | ~(z > 0.5) & (z >= -1), 1.0, -1.0) + ops.add_log1p(z, exp(-abs(z)))
    x = x + where((z == t) | (z != 0.0), z, t) + 1 / (2 + abs(z)) + (5 - z)
    x = x + ops.expm1(t) + ops.pow(abs(z), t) + ops.polynomial(z, (1.0, -0.5, 0.25)) + ops.sigmoid(z) + ops.tanh(z)
    x = x + ops.quotient(z, 1 + abs(t))
    return x, x - z, x + z


def test_the_whole_vocabulary(batch):
    z, t = (x.astype(np.float64) for x in batch)
    for got, want in zip(
        (everything(z, t, reduction="none"), everything.grad(z, t, reduction="sum"), everything.curvature(z, t, reduction="sum")),
        everything.__wrapped__(z, t),
        strict=True,
    ):
        assert_close(got, want, SUM[z.dtype])


@pytest.mark.parametrize(("op", "function"), [(minimum, np.minimum), (maximum, np.maximum)])
def test_minimum_and_maximum_propagate_nan(op, function, dtype):
    loss = fl.elementwise_loss(lambda z, t: (op(z, t), 0.0))
    values = np.array([-np.inf, -1, -0.0, 0.0, 2, np.inf, np.nan], dtype)
    z, t = (x.ravel() for x in np.meshgrid(values, values))
    np.testing.assert_array_equal(loss(z, t, reduction="none"), function(z, t))


def branches(z, t):
    d = z - t
    return (d, 1.0) if d > 0 else (-d, -1.0)


def uses_math(z, t):
    return math.exp(z - t), 1.0


def uses_numpy(z, t):
    return np.exp(z - t), 1.0


def uses_numpy_where(z, t):
    return np.where(z > t, z, t), 1.0


def uses_max(z, t):
    return max(z - t, 0.0), 1.0


def uses_and(z, t):
    return where(z > 0 and t > 0, z, t), 1.0


def chained(z, t):
    return where(0 < z < 1, z, t), 1.0


def to_float(z, t):
    return float(z) - t, 1.0


def power(z, t):
    return (z - t) ** 0.5, 1.0


def array_method(z, t):
    return (z - t).sum(), 1.0


def mixes_an_array_in(z, t):
    return (z - t) * [1.0, 2.0], 1.0


def returns_one(z, t):
    return z - t


def indexes(z, t):
    return z[0] - t, 1.0


@computes_nothing
@pytest.mark.parametrize(
    ("function", "line", "message"),
    [
        (
            branches,
            "return (d, 1.0) if d > 0 else (-d, -1.0)",
            "cannot branch on an element (if, and, or, not, min, max); use ops.where, minimum, maximum, &, | or ~",
        ),
        (
            uses_math,
            "return math.exp(z - t), 1.0",
            "cannot convert an element to a number (float, int, math.*); use abs, add_log1p, copysign, exp,",
        ),
        (uses_numpy, "return np.exp(z - t), 1.0", "numpy.exp is not in the vocabulary of formulas; use abs, add_log1p, copysign, exp,"),
        (uses_numpy_where, "return np.where(z > t, z, t), 1.0", "numpy.where is not in the vocabulary"),
        (uses_max, "return max(z - t, 0.0), 1.0", "cannot branch on an element"),
        (uses_and, "return where(z > 0 and t > 0, z, t), 1.0", "cannot branch on an element"),
        (chained, "return where(0 < z < 1, z, t), 1.0", "cannot branch on an element"),
        (to_float, "return float(z) - t, 1.0", "cannot convert an element to a number"),
        (
            power,
            "return (z - t) ** 0.5, 1.0",
            "** accepts integer exponents from 1 to 16, not 0.5; use ops.sqrt, or ops.pow(x, y) for x >= 0",
        ),
        (
            array_method,
            "return (z - t).sum(), 1.0",
            "has no attribute 'sum'; a formula may use operators and fastloss.ops (abs, add_log1p,",
        ),
        (mixes_an_array_in, "return (z - t) * [1.0, 2.0], 1.0", "computes with elements and numbers, not with list"),
        (returns_one, "def returns_one(z, t):", "a formula must return (value, slope) or (value, slope, curvature)"),
        (indexes, "return z[0] - t, 1.0", "is not subscriptable; a formula may use operators"),
    ],
)
def test_errors_of_formulas_name_the_line(function, line, message):
    with pytest.raises(fl.FormulaError) as error:
        fl.elementwise_loss(function)
    assert isinstance(error.value, TypeError)
    assert str(error.value).startswith(f"{function.__name__} ({__file__}:")
    assert f"`{line}`" in str(error.value)
    assert message in str(error.value)


@computes_nothing
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z, t: ((z > t) * 2.0, 1.0), "a condition such as z > 0 is not a number; use ops.where(condition, 1.0, 0.0)"),
        (lambda z, t: (z > t, 1.0), "a condition such as z > 0 is not a number"),
        (lambda z, t: (where(z - t, z, t), 1.0), "take conditions such as z > 0, not numbers"),
        (lambda z, t: (where((z > 0) & t, z, t), 1.0), "take conditions such as z > 0, not numbers"),
        (lambda z, t, scale: (z * scale, 1.0), "the parameter scale has no default; accepted: a number, or None"),
        (lambda z, t, kind="l2": (z - t, 1.0), "the parameter kind has the default 'l2'; accepted: a number, or None"),
        (
            lambda z, t, mask=1.0: (z * mask, 1.0),
            "the parameter mask must be accepted as a keyword, and must not be named cross_curvature, curvature,",
        ),
        (lambda z, t, *rest: (z - t, 1.0), "must name each of its parameters; *args and **kwargs are not accepted"),
        (lambda z, t, **rest: (z - t, 1.0), "must name each of its parameters; *args and **kwargs are not accepted"),
        (lambda z, t, a=None, b=None: (z * (1 if a is None else a) + (z.real if a is None and b is not None else 0), 1.0), "'real'"),
        (np.subtract, "a formula must be a function (def or lambda), not <ufunc 'subtract'>"),
    ],
)
def test_bad_formulas_are_refused_by_the_decorator(function, message):
    with pytest.raises(fl.FormulaError, match=re.escape(message)):
        fl.elementwise_loss(function)


def test_names_of_arguments_do_not_matter(rng):
    a, b = rng.random(50), rng.random(50)
    plain = fl.elementwise_loss(lambda z, t, k=2.0: (z * k, t))
    renamed = fl.elementwise_loss(lambda k, z, t=2.0: (k * t, z))
    crossed = fl.elementwise_loss(lambda t, z, k=2.0: (t + z * k, z))
    scaled = fl.elementwise_loss(lambda z, t, scale=3.0: (scale * (z - t), scale))
    assert plain(a, b, k=5) == renamed(a, b, t=5)
    assert_close(crossed(a, b), (a + 2 * b).mean(), SUM[a.dtype])
    assert_close(scaled.grad(a, b, reduction="sum"), np.full(50, 3.0), SUM[a.dtype])


def test_names_that_look_like_numbers():
    one = np.ones(1)
    assert fl.elementwise_loss(lambda z, t, inf=2.0: (z * inf, 1.0))(one, one) == 2.0
    assert fl.elementwise_loss(lambda z, t, inf=2.0: (z * float("inf"), 1.0))(one, one) == np.inf


def test_add_log1p_does_not_change_its_argument(dtype, rng):
    def softplus(z, t):
        e = exp(z)
        return where(z < 0.0, ops.add_log1p(0.0, e), ops.log1p(e)), 1.0

    z = rng.normal(0, 3, 1000).astype(dtype)
    assert_close(fl.elementwise_loss(softplus)(z, z, reduction="none"), np.log1p(np.exp(z.astype(np.float64))), SUM[np.dtype(dtype)])


def test_numpy_numbers_in_formulas(rng):
    two, z = np.float64(2), rng.random(9)
    loss = fl.elementwise_loss(lambda z, t: (two * z + sqrt(4.0) / z - np.float32(1) + z ** np.int64(2), 1.0))
    assert_close(loss(z, z, reduction="none"), 2 * z + 2 / z - 1 + z**2, SUM[z.dtype])
    assert isinstance(sqrt(4.0), float)


@computes_nothing
def test_a_formula_returns_as_much_with_a_parameter_as_without():
    with pytest.raises(fl.FormulaError, match="a formula must return the same number of quantities with and without its parameters"):
        fl.elementwise_loss(lambda z, t, a=None: (z, 1.0, 2.0) if a is None else (z, a))


@computes_nothing
def test_bounds_of_an_unknown_parameter():
    with pytest.raises(ValueError, match="bounds are given for beta, which <lambda> does not have"):
        fl.elementwise_loss(bounds={"beta": (0, 1)})(lambda z, t: (z, 1.0))


@computes_nothing
def test_every_option_is_reserved():
    assert set(inspect.signature(fl.mse_loss).parameters) < RESERVED


@computes_nothing
def test_errors_name_the_line_of_a_helper():
    def helper(z):
        return z if z > 0 else -z

    with pytest.raises(fl.FormulaError, match=re.escape("`return z if z > 0 else -z`")):
        fl.elementwise_loss(lambda z, t: (helper(z - t), 1.0))


@computes_nothing
def test_a_formula_with_fewer_than_two_arguments_is_refused():
    with pytest.raises(fl.FormulaError, match="must take an element of the input, an element of the target"):
        fl.elementwise_loss(lambda z: (z, 1.0))


def test_formulas_with_different_constants_have_different_kernels(batch):
    z, t = np.abs(batch[0]), batch[1]
    for k in (1.0, 2.0, 3.0):
        loss = fl.elementwise_loss(lambda z, t, k=k: (k * z, 2.0))
        assert_close(loss(z, t, reduction="sum"), k * z.sum(dtype=np.float64), SUM[z.dtype])

    def constant(n):
        return fl.elementwise_loss(lambda z, t: (z * 0.0 + n, 2.0))

    assert [constant(n)(z, t) for n in (1.0, 2.0)] == [1.0, 2.0]


def test_slope_of_a_users_loss_against_its_value(rng):
    z, t, h = rng.normal(size=500), rng.normal(size=500), 1e-5
    slope = (charbonnier(z + h, t, reduction="none", eps=0.1) - charbonnier(z - h, t, reduction="none", eps=0.1)) / (2 * h)
    assert_close(charbonnier.grad(z, t, reduction="sum", eps=0.1), slope, DIFFERENCE)


def test_a_weight_of_a_third_is_rounded_once(rng):
    z = rng.normal(size=1000).astype(np.float32)
    got = charbonnier.grad(z, np.zeros_like(z), 1 / 3, "sum")
    plain = charbonnier.grad(z, np.zeros_like(z), reduction="sum").astype(np.longdouble)
    assert_ulp(got, plain / 3, plain / 3, PRODUCT["scale"], np.float32)


def test_a_parameter_at_its_default_is_a_constant():
    """The formula may compute with the number: here, a power that becomes a product."""

    @fl.elementwise_loss
    def power(z, t, gamma=2.0):
        return ops.pow(abs(z), gamma), where(gamma > 1.0, 1.0, 0.0)

    formula = power.definition.formula
    assert "pow" not in formula.trace(())
    assert "where" not in formula.trace(())
    assert "pow" in formula.trace(("gamma",))
    z = np.linspace(-3, 3, 50)
    assert_close(power(z, z, reduction="none"), z**2, SUM[z.dtype])
    assert_close(power(z, z, reduction="none", gamma=2), z**2, SUM[z.dtype])
    assert_close(power(z, z, reduction="none", gamma=None), z**2, SUM[z.dtype])
    assert_close(power(z, z, reduction="none", gamma=1.5), np.abs(z) ** 1.5, SUM[z.dtype])
    assert_close(power(z, z, reduction="none", gamma=np.full(50, 2.0)), z**2, SUM[z.dtype])
    assert (power.grad(z, z, reduction="sum", gamma=0.5) == 0).all()


def test_negligible_terms_of_a_polynomial_are_left_out(dtype):
    terms = (1.0, 1e-3, 1e-6, 1e-9, 1e-12, 1e-15, 1e-18)
    kept = fl.elementwise_loss(lambda z, t: (ops.polynomial(z, terms, 1.0), 0.0))
    whole = fl.elementwise_loss(lambda z, t: (ops.polynomial(z, terms), 0.0))
    z = np.linspace(-1, 1, 1001).astype(dtype)
    assert_ulp(kept(z, z, reduction="none"), whole(z, z, reduction="none"), 1.0, 1, dtype)
    far = np.full(3, 1e3, dtype)  # outside the range, where the omitted terms matter
    assert kept(far, far, reduction="none")[0] < 5 or dtype == np.float64
    assert_close(whole(far, far, reduction="none"), np.full(3, 7.0), SUM[np.dtype(dtype)])


OPERANDS = {"gaussian_kl_loss": ["mu", "logvar"], "vae_loss": ["reconstruction_logits", "images", "mu", "logvar"]}


@computes_nothing
def test_losses_of_the_library_are_objects_like_functions(row):
    loss, operands = row.loss, OPERANDS.get(row.name, ["input", "target"])
    assert getattr(fl, loss.__name__) is loss
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(loss, protocol)) is loss
    assert copy.deepcopy(loss) is loss
    assert row.name in repr(loss)
    assert "Source: " in inspect.getdoc(loss)
    assert inspect.getdoc(loss).splitlines()[0] in pydoc.render_doc(loss, renderer=pydoc.plaintext)
    assert list(inspect.signature(loss).parameters)[: len(operands)] == operands
    for method in ("grad", "value_and_grad"):
        assert inspect.getdoc(getattr(loss, method)).startswith("Return the ")
