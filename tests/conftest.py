"""Shared fixtures, the devices that tests run on, and the selection of tests where a package or a compiler is missing."""

from __future__ import annotations

import os
from collections import defaultdict

# This must be set before PyTorch is imported. By default, waiting OpenMP threads spin, and slow down the other worker of pytest.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest

from tests import devices
from tests.cuda import proxy
from tests.table import LOSSES

SHAPE = (4, 3, 17, 13)
HANGING = 300  # seconds after which a test is stopped and fails
ON_DEVICES = 'usefixtures("device")'  # occurs in every file whose tests run on the CPU and on devices
REMEDIES = {  # messages by the reason for which pytest skips tests
    "could not import 'torch'": "PyTorch is not installed; to run them: pip install -e '.[test-torch]'",
    devices.NO_COMPILER: f"{devices.NO_COMPILER}, which the stand-in for a GPU needs; to run them: install one, and name it in CXX",
}


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout: of pytest-timeout, which is not installed")


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu`, ignore files without tests for a GPU, because packages that they import may not be installed."""
    if not asks_for_gpu(config) or collection_path.suffix != ".py":
        return None
    return None if collection_path.parent.name == "cuda" or ON_DEVICES in collection_path.read_text() else True


def pytest_generate_tests(metafunc):
    """Parametrize a test that takes a `row` with the losses that have every quality named by its marks `rows`."""
    if "row" in metafunc.fixturenames:
        needed = [quality for mark in metafunc.definition.iter_markers("rows") for quality in mark.args]
        rows = [case for case in LOSSES.values() if all(getattr(case, quality) for quality in needed)]
        metafunc.parametrize("row", rows, ids=str)


@pytest.hookimpl(tryfirst=True)  # runs before pytest selects tests by marks, because it sets marks
def pytest_collection_modifyitems(config, items):
    """Leave out tests that make no sense on their device, and tests on a GPU unless `-m` names it."""
    has_gpu, selected, left_out = asks_for_gpu(config), [], []
    for item in items:
        device = device_of(item)
        has_meaning = all(device in mark.args for mark in item.iter_markers("only_on"))
        (selected if has_meaning and (has_gpu or device != "gpu") else left_out).append(item)
        if (mark := left_out_by(item, device)) is not None:
            item.add_marker(mark)
        if device == "stand-in":
            item.add_marker(devices.needs_compiler)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(HANGING))
    leave_out_of_turn(selected)
    items[:] = selected
    config.hook.pytest_deselected(items=left_out)


def asks_for_gpu(config):
    """Return whether `-m` selects tests on a GPU: "gpu", or "gpu and first"."""
    return config.getoption("markexpr").partition(" ")[0] == "gpu"


def device_of(item):
    """Return the device that a test runs on: "cpu", "stand-in" or "gpu"."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("device", params.get("cp", "cpu"))


def left_out_by(item, device):
    """Return the mark by which the test command leaves out a test: long on its device, or one of many similar tests and not a sample.

    Of tests that are similar on every device, those on the stand-in for a GPU take the longest, because each compiles a kernel with
    the C++ compiler, and show the least, because formulas and the loop are the same for all of them.
    """
    if any(device in mark.args for mark in item.iter_markers("long_on")):
        return pytest.mark.slow
    alike = [mark.args for mark in item.iter_markers("alike")]
    if not alike or is_sample(item.callspec.params):
        return None
    if () in alike:
        return pytest.mark.exhaustive if device == "stand-in" else pytest.mark.slow
    return pytest.mark.slow if any(device in args for args in alike) else None


def leave_out_of_turn(items):
    """Of the slow cases of a test with the mark `in_turn`, leave each loss in each dtype one, and not the same one to all."""
    groups = defaultdict(list)
    for item in items:
        if item.get_closest_marker("in_turn") and item.get_closest_marker("slow"):
            params = item.callspec.params
            groups[item.originalname, params["row"].name, str(params["dtype"])].append(item)
    for (_, name, dtype), cases in groups.items():
        turn = list(LOSSES).index(name) + (dtype == "float64")
        for k, item in enumerate(cases):
            if k != turn % len(cases):
                item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
                item.add_marker(pytest.mark.exhaustive)


def is_sample(params):
    """Return whether a test is a sample of many similar ones, judged by its loss and dtype, or by its dtype alone."""
    dtypes = params["row"].samples if "row" in params else ["float32"]
    return str(params["dtype"]) in dtypes if "dtype" in params else bool(dtypes)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # runs after pytest has written its summary
def pytest_sessionfinish(session):
    """Report how many tests were skipped for want of a package or compiler, and how to run them."""
    result = yield
    if (reporter := session.config.pluginmanager.get_plugin("terminalreporter")) is not None:
        reports = reporter.stats.get("skipped", [])
        for reason, remedy in REMEDIES.items():
            if found := [report for report in reports if reason in str(report.longrepr)]:
                reporter.write_line(f"{counted(found)} skipped: {remedy}")
    return result


def counted(reports):
    """Return the numbers of tests and of whole files in reports, as text."""
    numbers = {
        "test": sum(isinstance(report, pytest.TestReport) for report in reports),
        "test file": len({report.nodeid for report in reports if isinstance(report, pytest.CollectReport)}),
    }
    return " and ".join(f"{number:,} {what}{'s' * (number > 1)}" for what, number in numbers.items() if number)


@pytest.fixture(params=["cpu", "stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Run a test on the CPU, and again on a GPU or the stand-in for one, where every call of a loss is computed on the device.

    On a device, a test that calls no loss fails, because it does not test the device.
    """
    if request.param == "cpu":
        yield request.param
        return
    carrier = proxy.Carrier(devices.array_module(request.param, monkeypatch))
    for kind, name in proxy.methods():
        monkeypatch.setattr(kind, name, carrier.carry(vars(kind)[name]))
    yield request.param
    assert carrier.calls, "nothing was computed on the device"


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture(params=[np.dtype(np.float32), np.dtype(np.float64)], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def arrays(row, rng, dtype):
    """Return operands of a row's loss for a small batch of images with odd sizes."""
    return row.draw(rng, dtype, SHAPE)


@pytest.fixture
def batch(rng, dtype):
    """Return logits and soft targets of a small batch of images with odd sizes."""
    return LOSSES["mse_loss"].draw(rng, dtype, SHAPE)


@pytest.fixture
def nothing_left(monkeypatch):
    """Let fastloss compute what `fastloss.torch` would leave to PyTorch's kernels, except in compiled code."""
    functional = pytest.importorskip("fastloss.torch").functional
    monkeypatch.setattr(functional, "LEFT_BELOW", dict.fromkeys(functional.LEFT_BELOW, 0))
