"""Measure the time and the memory of the rows of a case.

In every round each row is timed once, in random order. A drift of the machine's speed therefore affects all rows, and each row
finds the caches in the state that different rows left. A row starts when all threads of the process are idle, because OpenMP
threads spin for up to 8 ms after their own call and would take cores from the next row. A short row is then called once untimed:
after idling, memory and cores need a millisecond to reach the speed that they have in a training loop.
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

QUIET = 2e-3  # seconds; the process is idle if it uses less than a fifth of a core for so long
PATIENCE = 50  # spans of QUIET to wait; after that a row is timed although threads are busy
SHORT = 2e-3  # seconds of calls of a row in a round; a row that takes longer is called once
SLOW = 20e-3  # seconds; a row that takes longer is timed only in every third round
LEAST, MOST = 9, 41  # bounds of the number of rounds


def settle() -> None:
    """Wait until the threads of the process are idle."""
    for _ in range(PATIENCE):
        used = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - used < QUIET / 5:
            return


def calls_of(row: Row) -> tuple[int, float]:
    """Return the number of calls of a row in a round, and about how many seconds they take."""
    once = timed(row, 1)
    if once < SLOW:
        once = min(once, timed(row, 1), timed(row, 1))
    calls = 1 if row.before else max(1, int(SHORT / once))
    return calls, once * calls


def timed(row: Row, calls: int) -> float:
    """Return the mean seconds of several calls."""
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
    """Return the seconds of a call of each row, in each round in which it was timed. This takes about `budget` seconds."""
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
    return {name: [float(f"{s:.4g}") for s in seconds] for name, seconds in times.items()}  # further digits are noise


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection, which could otherwise start during a call."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_memory(row: Row) -> int | None:
    """Return the number of bytes by which a call raises the peak memory of the process, or None if the system does not report it.

    This is resident memory and not the count of a library, so that NumPy, PyTorch and XLA are measured alike. Its error is some
    hundred KiB, so it is meaningless for small arrays.
    """
    if not PEAK.exists():
        return None
    row.run()  # the first call allocates what the library never frees
    if row.release:
        row.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system; the call would otherwise reuse it unnoticed
    PEAK.write_text("5")  # resets the peak, see proc(5)
    before = resident("VmRSS")
    row.run()
    peak = resident("VmHWM")
    if row.restore:
        row.restore()
    return max(0, peak - before)


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
