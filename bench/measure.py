"""Time the rows of a case in turn, and what memory each needs.

In every round each row runs once, in an order drawn anew, so that a machine that drifts does so for all, and no row always
runs behind the one that leaves the caches best or worst. Before a row runs, the process has to be quiet: the threads of OpenMP
spin for up to 8 ms behind their own call, and would take the cores from whoever comes next. A short row is then called once
untimed, because memory and cores that were idle need a millisecond to be at their speed again, and are at it in a training
loop.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.row import Row

QUIET = 2e-3  # seconds in which a process has to use next to no time of a core
PATIENCE = 50  # such spans; something that never rests is measured as well as can be
SHORT = 2e-3  # seconds of repeated calls that a round of a short row takes
SLOW = 20e-3  # seconds; a row that takes longer runs in every third round
LEAST, MOST = 9, 41  # rounds


def settle() -> None:
    """Wait until no thread of the process is busy."""
    for _ in range(PATIENCE):
        used = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - used < QUIET / 5:
            return


def calls_of(row: Row) -> tuple[int, float]:
    """Return how many calls make a round, and about how long that takes."""
    once = timed(row, 1)
    if once < SLOW:
        once = min(once, timed(row, 1), timed(row, 1))
    calls = 1 if row.before else max(1, int(SHORT / once))
    return calls, once * calls


def timed(row: Row, calls: int) -> float:
    """Return the seconds of a call, from several."""
    if row.before:
        row.before()
    begin = time.perf_counter()
    for _ in range(calls):
        row.run()
    seconds = time.perf_counter() - begin
    if row.restore:
        row.restore()
    return seconds / calls


def measure(rows: list[Row], budget: float) -> dict[str, list[float]]:
    """Return the seconds of a call of every row in every round that it ran in, within about `budget` seconds."""
    rng = np.random.default_rng(0)
    calls = {row.name: calls_of(row) for row in rows}
    slow = {name for name, (_, seconds) in calls.items() if seconds > SLOW}
    a_round = sum(seconds / 3 if name in slow else 2 * QUIET + 2 * seconds for name, (_, seconds) in calls.items())
    rounds = int(np.clip(budget / a_round, LEAST, MOST))
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    with no_garbage_collection():
        for k in range(rounds):
            for j in rng.permutation(len(rows)):
                row = rows[j]
                if row.name in slow and k % 3:
                    continue
                settle()
                if row.name not in slow:
                    timed(row, 1)
                times[row.name].append(timed(row, calls[row.name][0]))
    return {name: [float(f"{s:.4g}") for s in seconds] for name, seconds in times.items()}  # more digits say nothing


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python from searching for garbage in the middle of a call."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_memory(row: Row) -> int | None:
    """Return by how many bytes a call raises the memory of the process at its peak; None where the system does not say.

    What the process has resident, not what libraries count: so it holds for NumPy, PyTorch and XLA alike. It is exact to some
    hundred KiB, and so of no use for small arrays.
    """
    if not PEAK.exists():
        return None
    row.run()  # whatever a library keeps for good, it has now
    if row.release:
        row.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, or the call would be given it unseen
    PEAK.write_text("5")  # proc(5): the peak begins anew
    before = resident("VmRSS")
    row.run()
    peak = resident("VmHWM")
    if row.restore:
        row.restore()
    return max(0, peak - before)


def resident(field: str) -> int:
    """Return a number of bytes from the process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
