"""`python -m bench`: what it takes, and what it does in turn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import cases, compare, machine, peers, pictures, report
from bench.results import Results, load
from bench.suite import Suite

PICTURES = Path("bench-pictures")  # made if it is not there
QUICK, FULL = 1.0, 6.0  # seconds a case, at least some rounds
WIDTH = 140  # characters a line where the output is no terminal
START = 5  # rounds of starting processes
FEW = (  # rows of most quick cases
    "fastloss, out=", "fastloss on tensors", "limit: triad", "limit: dot product, then triad", "NumPy, stable", "torch eager", "JAX",
)  # fmt: skip
AXES = {
    "loss": tuple(cases.SUBJECTS),
    "part": cases.PASSES,
    "dtype": cases.DTYPES,
    "size": (*cases.SIZES, *cases.CURVE),
    "layout": cases.LAYOUTS,
    "option": cases.OPTIONS[1:],
}
DESCRIPTION = """Time the losses, in turn, against NumPy, the peers that are installed, and what the memory allows: a quick run of a
minute or two, every case of record with --full, or the cells that are named."""


def main(arguments: list[str]) -> int:
    """Do what the arguments ask for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=DESCRIPTION)
    parser.add_argument("--full", action="store_true", help="every case of record, and sizes up to 10^9 elements")
    for axis, accepted in AXES.items():
        name = "pass" if axis == "part" else axis
        help_text = f"cells of the table of cases to time, instead of its selections: {', '.join(accepted)}; may be given several times"
        parser.add_argument(f"--{name}", dest=axis, action="append", choices=accepted, metavar=name.upper(), help=help_text)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: on a GPU, see --device cuda --help")
    parser.add_argument("--threads", type=thread_count, default=machine.cpus(), help="for all libraries (default: the CPUs, %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there, with hardware, versions, threads and date")
    parser.add_argument("--png", type=Path, metavar="FOLDER", default=PICTURES, help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE", default=(), help="write tables between these files' marks")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: tables and pictures of a results file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="measure nothing: what got slower or faster")
    return run(parser.parse_args(arguments))


def thread_count(text: str) -> int:
    """Return a number of threads that the process may use."""
    if not text.isdecimal() or not 1 <= int(text) <= machine.cpus():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {machine.cpus()}, the CPUs that this process may use")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        return compared(console, *arguments.compare) if arguments.compare else measured(console, arguments)
    except ValueError as error:
        console.print(str(error), style="red", markup=False)
        return 2


def compared(console: Console, old: Path, new: Path) -> int:
    """Say what changed between two results files; the exit status is 1 if something got slower."""
    before, after = load(old), load(new)
    for name, results in (("old", before), ("new", after)):
        console.print(f"{name}: {machine.sentence(results.machine)}; {results.date}", markup=False)
    found = compare.compare(before, after)
    if not found:
        raise ValueError("the two files have no case in common")
    table = report.changes(found)
    console.print(table.rich() if table.rows else f"{len(found)} rows compared: nothing changed beyond the noise")
    return int(any(change.verdict == "slower" for change in found))


def measured(console: Console, arguments: argparse.Namespace) -> int:
    """Measure, or read what was measured; print the tables, and write files."""
    check_folders(arguments)
    results = load(arguments.show) if arguments.show else measure(console, arguments)
    report.show(console, results)
    drawn = pictures.draw(results, arguments.png)
    for path in drawn:
        console.print(f"picture: {path}", markup=False)
    for page in arguments.write:
        report.write_page(page, results, arguments.show or arguments.json, drawn)
    return 0


def check_folders(arguments: argparse.Namespace) -> None:
    """Refuse, before minutes are spent, files that could not be written."""
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"the folder {arguments.json.resolve().parent} does not exist")
    if arguments.png == PICTURES:
        PICTURES.mkdir(exist_ok=True)
    if not arguments.png.is_dir():
        raise ValueError(f"the folder {arguments.png} for the pictures does not exist")
    for page in arguments.write:
        report.check_page(page)
    if arguments.write and not (arguments.show or arguments.json):
        raise ValueError("a page names the file with the rounds: give --json or --show too")


def measure(console: Console, arguments: argparse.Namespace) -> Results:
    """Measure what is asked for, with a progress bar."""
    machine.keep_to(arguments.threads)
    here, absent = peers.load()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # nothing is drawn while something is timed
        suite = Suite(arguments.threads, here, partial(console.print, style="yellow", markup=False))
        for line in absent:
            suite.record.leave_out(line)
        steps = plan(suite, arguments)
        task = progress.add_task("", total=len(steps))
        for description, step in steps:
            progress.update(task, description=description, refresh=True)
            step()
            progress.update(task, advance=1, refresh=True)
            if arguments.json:
                suite.record.save(arguments.json)
    return Results(suite.record.content)


Step = tuple[str, Callable[[], Any]]


def plan(suite: Suite, arguments: argparse.Namespace) -> list[Step]:
    """Return what is measured, one thing after the other, with a description each."""
    chosen = {axis: tuple(given) for axis in AXES if (given := getattr(arguments, axis))}
    if chosen:
        selected = cases.select(**chosen)
        if not selected:
            raise ValueError("no loss takes such arrays: docs/losses.md has the axes and dtypes that each needs")
        return [(str(case), partial(suite.run, case, FULL)) for case in selected]
    if arguments.full:
        table = [(str(case), partial(suite.run, case, FULL)) for case in cases.full()]
        return [*table, ("threads", partial(suite.scale, FULL)), ("starting processes", partial(suite.start, START, suite.peers))]
    # compiling takes other libraries seconds a case
    table = [(str(case), partial(suite.run, case, QUICK, None if case in cases.HEADLINES else FEW)) for case in cases.quick()]
    return [*table, ("threads", partial(suite.scale, QUICK)), ("starting processes", partial(suite.start, START, ()))]
