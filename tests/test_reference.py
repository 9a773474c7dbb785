"""The NumPy reference that users and benchmarks compare with agrees with the textbook, and with the kernels."""

from __future__ import annotations

import numpy as np
import pytest

import fastloss as fl
from fastloss import reference
from tests import oracle
from tests.table import LOSSES
from tests.ulp import NUMPY, SUM, assert_close


@pytest.mark.rows("is_elementwise")
def test_reference_agrees_with_the_oracle(row, arrays):
    z, t = arrays
    (value, _), (slope, _), _ = row.oracle(z.astype(np.longdouble), t.astype(np.longdouble), oracle.LONG)
    got_value, got_slope = row.reference(z, t)
    assert_close(got_value, value, NUMPY[z.dtype])
    assert_close(got_slope, slope, NUMPY[z.dtype])
    mean, grad = reference.value_and_grad(row.reference, z, t)
    want, want_grad = row.loss.value_and_grad(z, t, reduction="mean")
    assert_close(mean, want, NUMPY[z.dtype])
    assert_close(grad, want_grad, NUMPY[z.dtype])


@pytest.mark.parametrize(("name", "parameters"), [
    ("cross_entropy", {}), ("cross_entropy", {"label_smoothing": 0.1}), ("focal_cross_entropy_loss", {"gamma": 0.5}),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(4, 3, 17, 13), (64, 10), (7,)], ids=str)
def test_reference_of_classes(name, parameters, shape, rng, dtype):
    row = LOSSES[name]
    z, t = row.draw(rng, dtype, shape)
    (value, _), (slope, _), *_ = row.oracle(z, t, oracle.LONG, **parameters)
    for got, want in zip(row.reference(z, t, **parameters), (value, slope), strict=True):
        assert_close(got, want, NUMPY[dtype])
    for got, want in zip(reference.value_and_grad(row.reference, z, t, **parameters), (value.mean(), slope / value.size), strict=True):
        assert_close(got, want, NUMPY[dtype])


@pytest.mark.parametrize("name", ["dice_softmax_loss", "dice_cross_entropy_loss"])
def test_reference_of_regions_agrees_with_the_kernels(name, rng, dtype):
    row = LOSSES[name]
    z, t = row.draw(rng, dtype, (4, 3, 17, 13))
    for got, want in zip(row.reference(z, t), row.loss.value_and_grad(z, t), strict=True):
        assert_close(got, want, NUMPY[dtype])


def test_reference_entropy(batch):
    t = batch[1]
    t.flat[:2] = 0, 1
    assert_close(reference.binary_entropy(t), fl.binary_entropy(t, reduction="none"), NUMPY[t.dtype])
    assert_close(reference.binary_entropy(t).mean(dtype=np.float64), fl.binary_entropy(t), SUM[t.dtype])
