"""Fixtures that several test files use."""

from __future__ import annotations

import os

# before PyTorch comes: OpenMP's threads wait spinning, and with two workers of pytest on two cores take them from each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest

from tests.table import LOSSES

HANGING = 300  # seconds, after which a test is a failure with a name


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout: of pytest-timeout, which is not installed")


def pytest_ignore_collect(collection_path, config):
    """Leave the others alone where a GPU's tests are asked for: what they import need not be there."""
    is_for_gpu = config.getoption("markexpr") == "gpu"
    return True if is_for_gpu and collection_path.suffix == ".py" and collection_path.parent.name != "cuda" else None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(HANGING))


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
