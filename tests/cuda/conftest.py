"""Run every test of this folder on a device: a GPU with `-m gpu`, otherwise the stand-in for one."""

from __future__ import annotations

import pytest

from tests import devices


@pytest.fixture(autouse=True, params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cp(request, monkeypatch):
    """Return CuPy, or the stand-in for it."""
    return devices.array_module(request.param, monkeypatch)
