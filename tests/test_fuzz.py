"""Random calls of the elementwise losses, compared with the oracle: values, gradients and sums within the promised errors.

`python -m pytest -m exhaustive tests/test_fuzz.py` takes 10,000 examples.
FASTLOSS_FUZZ=1000000 takes a million, and draws other ones in every run.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.table import LOSSES
from tests.test_layouts import lay_out, views
from tests.ulp import PRODUCT, SUM, ULP

LONG_RUN = int(os.environ.get("FASTLOSS_FUZZ", "0"))
EXAMPLES = LONG_RUN or 10_000
ROWS = [row for row in LOSSES.values() if row.is_elementwise]
POKES = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-20, 1.0, -1.0, 15.9, -88.5, 104.0, 745.5, np.nan]  # of logits and of differences
BEYOND = [1e4, -1e18, 1e30, np.inf, -np.inf]  # where the loss is defined there, and the oracle too
PLAIN = (tuple(range(4)), [1] * 4, [0] * 4)  # the layout of a contiguous array
OPTIONS = ((), ("weight",), ("mask", "grad_output"), ("weight", "mask", "whole"))  # `whole`: uint8 targets, a scale, an ignored value

fuzz = settings(
    max_examples=-(-EXAMPLES // len(ROWS)),
    deadline=None,
    derandomize=not LONG_RUN,
    print_blob=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def operands(row, rng, dtype, shape, pokes, whole):
    """Return an input with a few special numbers, and a target: hard, soft, or whole numbers to be divided by 255."""
    z, t = row.draw(rng, dtype, shape)
    for at, value in pokes:
        if "probabilities" in row.arrays:
            value = abs(value) if abs(value) <= 1 or np.isnan(value) else 0.5
        if row.name not in ("charbonnier_loss",) or np.isfinite(value):
            z.flat[at % z.size] = value
    if whole:
        return z, rng.integers(0, 256, shape).astype(np.uint8)
    return z, np.where(rng.random(shape) < 0.3, rng.random(shape) < 0.5, t).astype(dtype)


def spacing(x, dtype):
    """Return a unit in the last place of numbers, in extended precision."""
    with np.errstate(over="ignore"):
        return np.spacing(np.minimum(np.abs(x), np.finfo(dtype).max).astype(dtype)).astype(np.longdouble)


def expected(row, quantity, z, t, parameters, dtype):
    """Return a quantity of every element, and how far the loss may be from it."""
    name = row.name + (", pos_weight" if "pos_weight" in parameters else "")
    limit = np.where((t == 0) | (t == 1), *ULP[name, ("value", "slope")[quantity]])
    with np.errstate(all="ignore"):
        want, magnitude = row.oracle(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG, **parameters)[quantity]
        magnitude = np.where(np.isinf(z), abs(want), magnitude)  # the oracle's own is NaN for an infinite difference
        allowed = np.where(limit == 0, 0, limit * spacing(magnitude, dtype))
    want = np.where(np.isnan(z), np.nan, want)
    return np.where(np.abs(want) > np.finfo(dtype).max, np.copysign(np.inf, want), want), allowed


def assert_within(got, want, allowed, largest, told):
    """Assert that numbers are as close as allowed. Infinities and NaN must be equal, except next to the largest number."""
    with np.errstate(all="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want)) | (np.abs(got - want) <= allowed)
        same |= np.isinf(got) & (np.abs(want) + allowed >= largest) & (np.sign(got) == np.sign(want))
    worst = np.argmin(same)
    assert np.all(same), f"{told}: got {np.ravel(got)[worst]!r}, want {np.ravel(want)[worst]!r} within {np.ravel(allowed)[worst]!r}"


def check(row, dtype, shape, seed, pokes, names, parameters, reduction, layouts):
    """Compare the value and the gradient of one call with the oracle."""
    rng, largest = np.random.default_rng(seed), np.finfo(dtype).max
    z, t = operands(row, rng, dtype, shape, pokes, "whole" in names)
    w = rng.choice([0.0, 0.25, 1.0, 3.0], shape).astype(dtype) if "weight" in names else np.ones(shape, dtype)
    counted = rng.random(shape) < 0.7 if "mask" in names else np.ones(shape, bool)
    counted.flat[0] = True
    upstream = rng.choice([0.5, -2.0, 100.0]) if "grad_output" in names else 1.0
    options = {"reduction": reduction, **parameters, **({"weight": w} if "weight" in names else {})}
    options |= {"mask": counted} if "mask" in names else {}
    options |= {"target_scale": 1 / 255, "ignore_index": 7} if "whole" in names else {}
    if "whole" in names:
        t.flat[0] = 8
        counted = counted & (t != 7)
    true = t.astype(dtype) * dtype.type(1 / 255) if "whole" in names else t
    count = {"mean": counted.sum(), "sample_mean": counted.sum(axis=tuple(range(1, len(shape))), keepdims=True)}.get(reduction, 1)
    if np.any(count == 0):
        return
    a, b = (lay_out(x, *layout) for x, layout in zip((z, t), layouts, strict=True))
    value = row.loss(a, b, **options)
    also, grad = row.loss.value_and_grad(a, b, **options, grad_output=upstream)
    np.testing.assert_array_equal(row.loss.grad(a, b, **options, grad_output=upstream), grad)
    told = f"{row.name}, {dtype}, {', '.join(names)}, {reduction}, {parameters}"
    want, allowed = expected(row, 1, z, true, parameters, dtype)
    with np.errstate(all="ignore"):
        factor = np.longdouble(upstream) * w / count
        slope = np.where(counted, want * factor, 0)
        room = np.abs(factor) * allowed
        room = np.where(counted, room + PRODUCT["weight and scale"] * spacing(np.abs(slope) + room, dtype), 0)
        assert_within(grad, slope, room, largest, f"slope of {told}")
        want, allowed = expected(row, 0, z, true, parameters, dtype)
        each, room = np.where(counted, want * w, 0), np.where(counted, allowed * w, 0)
        if reduction == "none":
            room = np.where(counted, room + PRODUCT["weight"] * spacing(np.abs(each) + room, dtype), 0)
            np.testing.assert_array_equal(also, value)
        else:
            axes = tuple(range(1, len(shape))) if reduction.startswith("sample") else None
            room = (room.sum(axis=axes) + SUM[dtype] * np.abs(each).sum(axis=axes)) / np.squeeze(count)
            each = each.sum(axis=axes) / np.squeeze(count)
            largest = largest / w.size  # blocks are summed in the arithmetic's own type
            assert_within(also, value, room, largest, f"value of {told}")
        assert_within(value, each, room, largest, f"value of {told}")


def parameters_of(row):
    """Return the settings of a loss at which its errors are promised."""
    return [*row.settings, *([{"pos_weight": 2.5}] if row.name == "binary_cross_entropy_with_logits" else [])]


def kinds(row):
    """Return kinds of calls: dtype, options, reduction and parameters. A normal run takes few, because each compiles its kernels."""
    dtypes, reductions, parameters = [np.dtype(np.float32), np.dtype(np.float64)], ["none", "mean", "sample_mean"], parameters_of(row)
    if LONG_RUN:
        return list(itertools.product(dtypes, OPTIONS, reductions, parameters))
    first = ROWS.index(row)
    return [(dtypes[(first + k) % 2], OPTIONS[k], reductions[k % 3], parameters[k % len(parameters)]) for k in range(len(OPTIONS))]


@pytest.mark.exhaustive
@pytest.mark.timeout(0 if LONG_RUN else 300)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_random_calls(case):
    special = POKES + (BEYOND if case.name != "sigmoid_focal_loss" else [])

    @fuzz
    @given(data=st.data(), seed=st.integers(0, 2**32), kind=st.sampled_from(kinds(case)))
    def calls(data, seed, kind):
        shape, layouts = (2, 1, 1, 70), [PLAIN, PLAIN]
        if LONG_RUN:
            shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4)))
            layouts = [data.draw(views()) for _ in range(2)]
        pokes = data.draw(st.lists(st.tuples(st.integers(0, 139), st.sampled_from(special)), max_size=4))
        dtype, names, reduction, parameters = kind
        check(case, dtype, shape, seed, pokes, names, parameters, reduction, layouts)

    calls()
