"""Run cases: make their arrays and rows, check what each row computes, time all in turn; collect it in a dictionary for JSON."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import psutil

import fastloss as fl
from fastloss.bench import machine, measure, ours, peers, start
from fastloss.bench.batch import Batch
from fastloss.bench.cases import BCE, FORMAT, MSE, Case
from fastloss.bench.ours import OURS
from fastloss.bench.row import Expected, Row, WrongError

LARGE = 16 << 20  # bytes of logits from which memory is measured
FRUGAL = ("fastloss", "limit")  # rows that need no more than a gradient
GREEDY = 8  # multiples of the logits that others may need, buffers included
Say = Callable[[str], Any]


@dataclass
class Suite:
    """What is measured with how many threads, against which peers, and what came of it."""

    threads: int
    peers: list[str]
    say: Say  # is told, in a line, what is left out
    results: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        fl.set_num_threads(self.threads)
        self.results = {
            "format": FORMAT,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine.description(self.threads),
            "cases": [],
            "threads": [],
            "left_out": [],
        }

    def leave_out(self, what: str) -> None:
        """Note and say that something is not measured."""
        if what not in self.results["left_out"]:
            self.results["left_out"].append(what)
            self.say(what)

    def rows(self, batch: Batch) -> Iterable[Row]:
        """Yield the rows of a case."""
        yield from ours.rows(batch)
        yield from ours.limit_rows(batch, self.threads)
        yield from ours.numpy_rows(batch)
        for peer in self.peers:
            if not self.fits(peer, batch):
                continue
            try:
                yield from peers.rows(peer, batch, self.threads)
            except Exception as error:  # whatever another library raises, the others are measured
                self.leave_out(f"{peer} is left out of {batch.case}: {first_line(error)}")

    def checked(self, batch: Batch, rows: Iterable[Row]) -> list[tuple[Row, dict[str, float]]]:
        """Return the rows that compute what they should, with their errors; each has run once then."""
        expected = Expected(batch)
        kept = []
        for row in rows:
            try:
                kept.append((row, expected.errors(row)))
            except Exception as error:
                if row.name.startswith("fastloss"):
                    raise
                said = str(error) if isinstance(error, WrongError) else first_line(error)
                self.leave_out(f"{row.name} is left out of {batch.case}: {said}")
        return kept

    def run(self, case: Case, budget: float, names: Sequence[str] | None = None) -> None:
        """Measure a case, times in turn and the memory of each row; or the times alone of rows of some names."""
        batch = Batch(case)
        chosen = (row for row in self.rows(batch) if (names is None or row.name in names) and self.fits(row.name, batch))
        rows = self.checked(batch, chosen)
        if not any(row.name in OURS for row, _ in rows):
            return
        times = measure.measure([row for row, _ in rows], budget)
        entry: dict[str, Any] = asdict(case) | {"shape": case.shape, "rows": []}
        for row, errors in rows:
            extra = measure.extra_memory(row) if row.read and not names and batch.arrays[0].nbytes >= LARGE else None
            entry["rows"].append({"name": row.name, "seconds": times[row.name], "errors": errors, "extra_bytes": extra})
        self.results["cases"].append(entry)

    def fits(self, name: str, batch: Batch) -> bool:
        """Whether there is memory for a row, or for all of a peer's."""
        free = 0.9 * psutil.virtual_memory().available / 2**30
        needed = (1 if name.startswith(FRUGAL) else GREEDY) * batch.arrays[0].nbytes / 2**30
        if needed > free:
            self.leave_out(f"{name} is left out of {batch.case}: it may need {needed:.1f} GiB of memory, and {free:.1f} are free")
        return bool(needed <= free)

    def scale(self, budget: float) -> None:
        """Measure BCE and MSE on 1 to all threads, in turn."""
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
            self.results["threads"].append(asdict(batch.case) | {"shape": batch.case.shape, "rows": entries})

    def start(self, rounds: int, peers: Sequence[str]) -> None:
        """Measure what a process pays before its first result."""
        times, compiled = start.measure(peers, rounds)
        self.results["start"] = [{"name": name, "seconds": seconds} for name, seconds in times.items()]
        self.results["kernels_compiled"] = compiled


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
