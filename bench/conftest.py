"""What the benchmarks run with: all threads, every peer that is installed, and no name of the machine in their results."""

from __future__ import annotations

import pytest

from bench import machine, peers
from bench.suite import Suite


@pytest.fixture(scope="session")
def suite():
    return Suite(machine.cpus(), peers.load()[0], print)


def pytest_report_header(config):
    """Say which peers are not compared with."""
    return peers.load()[1]


def pytest_benchmark_update_machine_info(config, machine_info):
    """Say what a reader has to know of the machine."""
    machine_info.clear()
    machine_info.update(machine.description(machine.cpus()))


def pytest_benchmark_update_commit_info(config, commit_info):
    """Keep the commit, drop the branch and project names."""
    for name in ("author_time", "branch", "project", "time"):
        commit_info.pop(name, None)
