"""`Suite`: make the arrays and rows of cases, check the results of the rows, time them, and record the times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import psutil

import fastloss as fl
from bench import machine, measure, ours, peers, startup_time
from bench.batch import Batch
from bench.cases import BCE, MSE, Case
from bench.ours import OURS
from bench.record import Record
from bench.row import Row, expected

LARGE = 16 << 20  # bytes of logits; the memory of smaller cases is not measured
FRUGAL = ("fastloss", "limit")  # rows that allocate at most a gradient
MOST_MEMORY = 8  # multiples of the logits that other rows may allocate, buffers included


class Suite:
    """A number of threads, the peers to compare with, and the record of all measurements."""

    def __init__(self, threads: int, peers: list[str], say: Callable[[str], Any]) -> None:
        fl.set_num_threads(threads)
        self.threads, self.peers = threads, peers
        self.record = Record(machine.description(threads), say)

    def rows(self, batch: Batch) -> Iterable[Row]:
        """Yield the rows of a case: those of fastloss, the limits, NumPy and the peers."""
        yield from ours.rows(batch)
        yield from ours.limit_rows(batch, self.threads)
        yield from ours.numpy_rows(batch)
        for peer in self.peers:
            if self.fits(peer, batch):
                yield from self.record.attempt(peer, batch.case, partial(peers.rows, peer, batch, self.threads))

    def run(self, case: Case, budget: float, names: Sequence[str] | None = None) -> None:
        """Check and time the rows of a case, and measure their memory. Given `names`, only time the rows with these names."""
        batch = Batch(case)
        chosen = (row for row in self.rows(batch) if (names is None or row.name in names) and self.fits(row.name, batch))
        rows = self.record.check(case, chosen, expected(batch))
        if not any(row.name in OURS for row, _ in rows):
            return
        times = measure.measure([row for row, _ in rows], budget)
        measures_memory = not names and batch.arrays[0].nbytes >= LARGE
        extra = {row.name: measure.extra_memory(row) for row, _ in rows if row.read and measures_memory}
        self.record.add(case, rows, times, extra)

    def fits(self, name: str, batch: Batch) -> bool:
        """Whether there is enough free memory for a row, or for all rows of a peer. If not, leave it out."""
        free = 0.9 * psutil.virtual_memory().available / 2**30
        needed = (1 if name.startswith(FRUGAL) else MOST_MEMORY) * batch.arrays[0].nbytes / 2**30
        if needed > free:
            self.record.leave_out(f"{name} is left out of {batch.case}: it may need {needed:.1f} GiB of memory, and {free:.1f} are free")
        return bool(needed <= free)

    def scale(self, budget: float) -> None:
        """Time BCE and MSE on every number of threads from 1 on."""
        for loss in (BCE, MSE):
            batch = Batch(Case(loss))
            rows = {}
            for threads in range(1, self.threads + 1):
                for row in (ours.rows(batch)[0], ours.limit_rows(batch, threads)[0]):
                    name = f"{row.name} on {threads}"
                    rows[name] = threads, replace(row, name=name, before=partial(fl.set_num_threads, threads))
            times = measure.measure([row for _, row in rows.values()], budget)
            fl.set_num_threads(self.threads)
            entries = [{"name": name.partition(" on ")[0], "threads": rows[name][0], "seconds": t} for name, t in times.items()]
            self.record.content["threads"].append(asdict(batch.case) | {"shape": batch.case.shape, "rows": entries})

    def start(self, rounds: int, peers: Sequence[str]) -> None:
        """Time whole processes up to their first result."""
        times, compiled = startup_time.measure(peers, rounds)
        self.record.content["start"] = [{"name": name, "seconds": seconds} for name, seconds in times.items()]
        self.record.content["kernels_compiled"] = compiled
