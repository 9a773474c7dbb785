"""Rows: what is timed, and what it is timed against in the same rounds."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median, quantiles

import psutil
import pytest

import fastloss as fl

THREADS = 2
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A call, and the call it is compared with: A B A B, so that a machine that drifts does so for both."""

    name: str
    run: Call
    against: str
    other: Call
    must: float | None = None  # the largest ratio run / other that is accepted, or the least other / run where `faster`
    aim: float | None = None
    faster: bool = False
    restore: Call | None = None  # what a round undoes, untimed
    calls: int = 1  # in one round, for calls too short to time alone
    must_us: float | None = None
    aim_us: float | None = None
    must_extra_ms: float | None = None  # that `run` may take longer than `other`


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    fl.set_num_threads(THREADS)


@pytest.fixture
def measure(benchmark, request):
    """Time a row's two calls in turn, and note medians, quartiles and ratio beside pytest-benchmark's own figures."""

    def run(row: Row) -> None:
        others: list[float] = []

        def several(call):
            for _ in range(row.calls):
                call()

        def setup():
            begin = time.perf_counter()
            several(row.other)
            others.append(time.perf_counter() - begin)
            if row.restore:
                row.restore()

        rounds = 1 if request.config.getoption("benchmark_disable") else 41
        benchmark.group = row.against
        benchmark.pedantic(several, args=(row.run,), setup=setup, rounds=rounds, warmup_rounds=3 if rounds > 1 else 0)
        if rounds > 1:
            benchmark.extra_info.update(summary(row, benchmark.stats.stats.data, others[-rounds:]))

    return run


def summary(row: Row, times: list[float], others: list[float]) -> dict[str, object]:
    """Return what a report needs of a row."""
    mine, other = median(times) / row.calls, median(others) / row.calls
    return {
        "row": row.name,
        "against": row.against,
        "ms": mine * 1e3,
        "quartiles_ms": [q / row.calls * 1e3 for q in quantiles(times)],
        "other_ms": other * 1e3,
        "other_quartiles_ms": [q / row.calls * 1e3 for q in quantiles(others)],
        "ratio": other / mine if row.faster else mine / other,
        "faster": row.faster,
        "must": row.must,
        "aim": row.aim,
        "must_us": row.must_us,
        "aim_us": row.aim_us,
        "must_extra_ms": row.must_extra_ms,
    }


def pytest_benchmark_update_machine_info(config, machine_info):
    """Say what a reader has to know of the machine, and not its name."""
    machine_info.pop("node", None)
    machine_info.update(
        threads=THREADS,
        cores=psutil.cpu_count(logical=False),
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: version(name) for name in ("fastloss", "numpy", "numba", "llvmlite")} | {"python": platform.python_version()},
    )


def pytest_benchmark_update_commit_info(config, commit_info):
    """Keep the commit, drop the branch and project names."""
    for name in ("author_time", "branch", "project", "time"):
        commit_info.pop(name, None)
