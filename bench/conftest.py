"""The settings of the benchmarks under pytest: all threads, every installed peer, and results that do not name the machine."""

from __future__ import annotations

import pytest

from bench import cases, machine, peers
from bench.suite import Suite


@pytest.fixture(scope="session")
def suite():
    return Suite(machine.cpus(), peers.load()[0], print)


def pytest_generate_tests(metafunc):
    """Parametrize a test with the cases of record; without times, with the same cases on few elements."""
    if "case" in metafunc.fixturenames:
        table, config = cases.table(), metafunc.config
        is_timed = not (config.getoption("benchmark_disable") or hasattr(config, "workerinput"))  # pytest-xdist has workers
        metafunc.parametrize("case", table if is_timed else cases.unique([case.tiny for case in table]), ids=str)


def pytest_report_header(config):
    """Report the peers that are left out because they are not installed."""
    return peers.load()[1]


def pytest_benchmark_update_machine_info(config, machine_info):
    """Replace the description of the machine with one that does not name it."""
    machine_info.clear()
    machine_info.update(machine.description(machine.cpus()))


def pytest_benchmark_update_commit_info(config, commit_info):
    """Remove times and the names of branch and project."""
    for name in ("author_time", "branch", "project", "time"):
        commit_info.pop(name, None)
