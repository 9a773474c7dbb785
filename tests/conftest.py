"""Fixtures that several test files use."""

from __future__ import annotations

import os

# before PyTorch comes: OpenMP's threads wait spinning, and with two workers of pytest on two cores take them from each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest

from tests.table import LOSSES


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


@pytest.fixture
def batch(request, rng, dtype):
    """Inputs, logits unless the loss takes probabilities, and soft targets of a small batch of images, with a ragged size."""
    shape = (4, 3, 17, 13)
    z, t = 3 * rng.standard_normal(shape), rng.random(shape)
    if "name" in request.fixturenames and LOSSES[request.getfixturevalue("name")].domain == "probabilities":
        z = 1 / (1 + np.exp(-z))
    return z.astype(dtype), t.astype(dtype)
