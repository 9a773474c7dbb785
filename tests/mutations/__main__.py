"""The command `python -m tests.mutations`.

The exit status is 1 if a mutation survives without an explanation, or if one is killed although its entry explains why it cannot be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.mutations import cpu, cuda
from tests.mutations.mutation import Mutation, StaleMutationError
from tests.mutations.trial import ROOT, Copy, Outcome, TrialError

MUTATIONS: tuple[Mutation, ...] = (*cpu.MUTATIONS, *cuda.MUTATIONS)
STYLES = {"killed": "green", "timeout": "yellow", "survived": "red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parser().parse_args(arguments)
    console = Console()
    try:
        chosen = choose(options.side, options.only)
        for mutation in chosen:
            mutation.check(ROOT / "fastloss")
        if options.list:
            console.print(table_of_mutations(chosen))
            return 0
        start = perf_counter()
        outcomes = run(chosen, options.timeout, console)
    except (StaleMutationError, TrialError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    console.print(table_of_outcomes(outcomes))
    console.print(f"{summary(outcomes)} in {(perf_counter() - start) / 60:.1f} min")
    if options.json:
        options.json.write_text(json.dumps([as_record(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    return 0 if all(outcome.is_expected for outcome in outcomes) else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser("python -m tests.mutations", description="Break the package in many ways, and run the tests on each.")
    made.add_argument("--side", choices=("cpu", "cuda", "all"), default="all", help="the mutations of one machine (default: all)")
    made.add_argument("--only", nargs="+", metavar="NAME", help="the mutations with these names")
    made.add_argument("--list", action="store_true", help="show the mutations, and run nothing")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes to a file")
    made.add_argument("--timeout", type=float, default=180.0, help="seconds after which a mutation that hangs is stopped (default: 180)")
    return made


def choose(side: str, names: Sequence[str] | None) -> list[Mutation]:
    """Return the mutations of a side, or those of them with some names."""
    chosen = [mutation for mutation in MUTATIONS if side in ("all", mutation.side)]
    if names is None:
        return chosen
    if unknown := sorted(set(names) - {mutation.name for mutation in chosen}):
        raise StaleMutationError(f"there is no mutation {', '.join(unknown)}; --list shows the names")
    return [mutation for mutation in chosen if mutation.name in names]


def run(mutations: Sequence[Mutation], timeout: float, console: Console) -> list[Outcome]:
    """Run the tests on the unchanged code, and then on each mutation."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        task = progress.add_task("unchanged code", total=len(mutations) + 1)
        copy = Copy(Path(folder))
        copy.check_unchanged(mutations, 10 * timeout)
        for mutation in mutations:
            progress.update(task, advance=1, description=mutation.name)
            outcomes.append(outcome := copy.try_mutation(mutation, timeout))
            if not outcome.is_expected:
                progress.console.print(f"{mutation.name}: {outcome.verdict} {outcome.detail}", style="red", markup=False)
        progress.update(task, advance=1)
    return outcomes


def table_of_mutations(mutations: Sequence[Mutation]) -> Table:
    """Return a table of mutations: their names, files, and what they break."""
    table = Table("name", "side", "file", "breaks", "tests")
    for mutation in mutations:
        table.add_row(mutation.name, mutation.side, mutation.file, mutation.breaks, "\n".join(mutation.tests))
    return table


def table_of_outcomes(outcomes: Sequence[Outcome]) -> Table:
    """Return a table of outcomes, with the first failed test or the explanation of each."""
    table = Table("name", "side", "outcome", "seconds", "by")
    for outcome in outcomes:
        explained = outcome.verdict == "survived" and outcome.is_expected
        verdict = "explained" if explained else outcome.verdict
        by = outcome.mutation.survives if explained else outcome.detail
        style = "" if explained else STYLES[outcome.verdict]
        table.add_row(outcome.mutation.name, outcome.mutation.side, verdict, f"{outcome.seconds:.1f}", by, style=style)
    return table


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the numbers of mutations by outcome, as text."""
    found = Counter("explained" if o.mutation.survives and o.is_expected else o.verdict for o in outcomes)
    wrong = sum(not outcome.is_expected for outcome in outcomes)
    counts = (f"{found['killed']} killed", f"{found['timeout']} killed by timeout", f"{found['explained']} survive with an explanation")
    return f"{len(outcomes)} mutations: {', '.join(counts)}, {wrong} not as expected,"


def as_record(outcome: Outcome) -> dict[str, object]:
    """Return an outcome as a record for a JSON file."""
    mutation = outcome.mutation
    return {
        "name": mutation.name, "side": mutation.side, "file": mutation.file, "verdict": outcome.verdict,
        "is_expected": outcome.is_expected, "seconds": round(outcome.seconds, 1), "detail": outcome.detail, "survives": mutation.survives,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
