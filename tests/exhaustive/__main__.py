"""The command `python -m tests.exhaustive`. The exit status is 1 if an error is larger than promised."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import fastloss as fl
from fastloss.cpu import features
from tests.exhaustive import PATHS, beside_bound
from tests.exhaustive.sweeps import SWEEPS, Sweep, work_on
from tests.test_cpu_state import TARGETS
from tests.ulp import QUANTITIES

BLOCK, LEAST = 1 << 20, 1 << 10  # pairs of a block; smaller blocks if not all are computed, but not smaller than this
VARIABLES: dict[str, dict[str, str]] = {  # by code path: environment variables that leave out the instructions of the better ones
    "AVX-512": {}, "AVX2": TARGETS["AVX2"], "none": TARGETS["no AVX"],
}  # fmt: skip
NEEDS = {"AVX-512": "avx512f", "AVX2": "avx2"}
OWN_PATHS = [path for path in PATHS if path not in NEEDS or features.has(NEEDS[path])]  # those of this CPU


@dataclass
class Outcome:
    """The largest errors of a sweep on a code path, and how much of the sweep was computed."""

    sweep: Sweep
    path: str
    worst: Any  # see `sweeps.Worst`
    seconds: float = 0.0
    pairs: int = 0

    @property
    def is_kept(self) -> bool:
        """Whether the promised bounds hold."""
        return all(error <= bound for error, bound in zip(self.worst[:, 0], self.sweep.bounds, strict=False))

    def cells(self) -> list[str]:
        """Return the cells of a row of a table."""
        shown = [
            beside_bound(error, bound) + (f"\nat {z:.9g}, {t:.9g}" if error else "")
            for (error, z, t), bound in zip(self.worst, self.sweep.bounds, strict=False)
        ]
        return [self.sweep.name, self.path, f"{self.pairs:,}", *shown, *[""] * (len(QUANTITIES) - len(shown))]


HEADER = ("formula", "code path", "pairs", *QUANTITIES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parser().parse_args(arguments)
    console = Console()
    chosen = [s for s in SWEEPS if not options.only or s.name in options.only]
    if unknown := sorted(set(options.only or ()) - {s.name for s in SWEEPS}):
        console.print(f"there is no sweep {', '.join(unknown)}; accepted:", *(f"  {s.name}" for s in SWEEPS), sep="\n", style="red")
        return 2
    table, are_kept = Table(*HEADER, show_lines=True), True
    for outcome in run(chosen, options.paths, options.every, options.processes, console):
        table.add_row(*outcome.cells(), style="" if outcome.is_kept else "red")
        are_kept &= outcome.is_kept
        if options.json:
            add_record(options.json, as_record(outcome, options.every))
    console.print(table)
    return 0 if are_kept else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser("python -m tests.exhaustive", description="Compare formulas with float64 at every argument.")
    made.add_argument("--only", nargs="+", metavar="NAME", help="the sweeps with these names")
    made.add_argument("--paths", nargs="+", choices=OWN_PATHS, default=OWN_PATHS, help="code paths (default: all that the CPU has)")
    made.add_argument("--every", type=int, default=1, metavar="N", help="take one block of N, and not all (default: 1)")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that compute (default: one a CPU)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write each outcome to a file, in place of one of the same sweep")
    return made


def run(sweeps: Sequence[Sweep], paths: Sequence[str], every: int, processes: int, console: Console) -> Iterator[Outcome]:
    """Run sweeps on code paths. Those whose results do not depend on the path run on the first alone."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        for path in paths:
            chosen = [sweep for sweep in sweeps if sweep.every_path or path == paths[0]]
            with processes_for(VARIABLES[path], processes) as pool:
                for sweep in chosen:
                    yield run_one(sweep, path, every, pool, progress)


@contextmanager
def processes_for(environment: dict[str, str], processes: int) -> Iterator[ProcessPoolExecutor]:
    """Yield processes that compute for a code path, each on one thread."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=fl.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_one(sweep: Sweep, path: str, every: int, pool: ProcessPoolExecutor, progress: Progress) -> Outcome:
    """Run one sweep on one code path."""
    blocks = sweep.blocks(max(LEAST // len(sweep.targets), BLOCK // every // len(sweep.targets), 1), every)
    task = progress.add_task(f"{sweep.name}, {path}", total=len(blocks))
    start, outcome = perf_counter(), None
    for future in as_completed([pool.submit(work_on, SWEEPS.index(sweep), *block) for block in blocks]):
        found = future.result()
        if outcome is None:
            outcome = Outcome(sweep, path, found)
        larger = found[:, 0] > outcome.worst[:, 0]
        outcome.worst[larger] = found[larger]
        progress.update(task, advance=1)
    assert outcome is not None
    outcome.seconds, outcome.pairs = perf_counter() - start, sum(stop - at for at, stop in blocks) * len(sweep.targets)
    return outcome


def as_record(outcome: Outcome, every: int) -> dict[str, Any]:
    """Return an outcome as a record for a JSON file."""
    errors = {
        name: {"error": round(float(row[0]), 4), "bound": bound, "input": float(row[1]), "target": float(row[2])}
        for name, row, bound in zip(QUANTITIES, outcome.worst, outcome.sweep.bounds, strict=False)
    }
    return {
        "formula": outcome.sweep.name, "code path": outcome.path, "pairs": outcome.pairs, "every": every,
        "minutes": round(outcome.seconds / 60, 1), "errors": errors,
    }  # fmt: skip


def add_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record to a file, after those of other formulas and code paths."""
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    others = [other for other in records if any(other[key] != record[key] for key in ("formula", "code path"))]
    file.write_text(json.dumps([*others, record], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
