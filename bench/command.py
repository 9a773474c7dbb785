"""The command `python -m bench` on a CPU: its arguments, and the measurements that they select."""

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

PICTURES = Path("bench-pictures")  # created if it does not exist
QUICK, FULL = 1.0, 6.0  # seconds for each case, at least `measure.LEAST` rounds
WIDTH = 140  # characters in a line if the output is not a terminal
START = 5  # rounds in which processes are started
QUICK_ROWS = (
    "fastloss, out=", "fastloss on tensors", "limit: triad", "limit: dot product, then triad", "limit: copy",
    "limit: read, then copy", "NumPy, stable", "torch eager", "JAX",
)  # fmt: skip
AXES = {
    "loss": tuple(cases.SUBJECTS),
    "part": cases.PASSES,
    "dtype": cases.DTYPES,
    "size": tuple(cases.SIZES | cases.CLASS_SIZES | cases.CURVE),
    "layout": cases.LAYOUTS,
    "option": cases.OPTIONS[1:],
}
DESCRIPTION = """Time the losses and compare them with NumPy, with other libraries that are installed, and with the limit that memory
bandwidth sets. By default a selection of cases is timed in a minute or two; --full times every case, and the options for loss, pass,
dtype, size, layout and option time the cases that they select."""


def main(arguments: list[str]) -> int:
    """Parse the arguments, run the benchmarks, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=DESCRIPTION)
    parser.add_argument("--full", action="store_true", help="time every case, and sizes up to 10^9 elements")
    for axis, accepted in AXES.items():
        name = "pass" if axis == "part" else axis
        help_text = f"time only cases with this {name}: {', '.join(accepted)}; may be given several times"
        parser.add_argument(f"--{name}", dest=axis, action="append", choices=accepted, metavar=name.upper(), help=help_text)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: measure on a GPU; see --device cuda --help")
    parser.add_argument("--threads", type=thread_count, default=machine.cpus(), help="threads of each library (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to this file, with hardware, versions, threads and date")
    parser.add_argument("--png", type=Path, metavar="FOLDER", default=PICTURES, help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--write", type=Path, nargs="+", metavar="PAGE", default=(), help="write tables between the marks in these files")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing; show tables and pictures of a results file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="measure nothing; show what got slower or faster")
    return run(parser.parse_args(arguments))


def thread_count(text: str) -> int:
    """Parse a number of threads, at most the number of CPUs that the process may use."""
    if not text.isdecimal() or not 1 <= int(text) <= machine.cpus():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {machine.cpus()}, the CPUs of this process")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Compare two results files or measure, as the arguments say, and return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        return print_changes(console, *arguments.compare) if arguments.compare else print_results(console, arguments)
    except ValueError as error:
        console.print(str(error), style="red", markup=False)
        return 2


def print_changes(console: Console, old: Path, new: Path) -> int:
    """Print what changed between two results files. Return 1 if a row got slower, else 0."""
    before, after = load(old), load(new)
    for name, results in (("old", before), ("new", after)):
        console.print(f"{name}: {machine.sentence(results.machine)}; {results.date}", markup=False)
    found = compare.compare(before, after)
    if not found:
        raise ValueError("the two files have no case in common")
    table = report.changes(found)
    console.print(table.rich() if table.rows else f"{len(found)} rows compared: nothing changed beyond the noise")
    return int(any(change.verdict == "slower" for change in found))


def print_results(console: Console, arguments: argparse.Namespace) -> int:
    """Measure or load results, print tables, write files, and return 0."""
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
    """Refuse files and folders that cannot be written, before anything is measured."""
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"the folder {arguments.json.resolve().parent} does not exist")
    if arguments.png == PICTURES:
        PICTURES.mkdir(exist_ok=True)
    if not arguments.png.is_dir():
        raise ValueError(f"the folder {arguments.png} for the pictures does not exist")
    for page in arguments.write:
        report.blocks(page)
    if arguments.write and not (arguments.show or arguments.json):
        raise ValueError("--write needs --json or --show, because a page names its results file")


def measure(console: Console, arguments: argparse.Namespace) -> Results:
    """Make the selected measurements, and show a progress bar."""
    machine.keep_to(arguments.threads)
    installed, missing = peers.load()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # the bar is not redrawn while rows are timed
        suite = Suite(arguments.threads, installed, partial(console.print, style="yellow", markup=False))
        for line in missing:
            suite.record.leave_out(line)
        jobs = plan(suite, arguments)
        bar = progress.add_task("", total=len(jobs))
        for description, job in jobs:
            progress.update(bar, description=description, refresh=True)
            job()
            progress.update(bar, advance=1, refresh=True)
            if arguments.json:
                suite.record.save(arguments.json)
    return Results(suite.record.content)


Job = tuple[str, Callable[[], Any]]  # a measurement, with its description


def plan(suite: Suite, arguments: argparse.Namespace) -> list[Job]:
    """Return the selected measurements in their order."""
    chosen = {axis: tuple(given) for axis in AXES if (given := getattr(arguments, axis))}
    if chosen:
        selected = cases.select(**chosen)
        if not selected:
            raise ValueError("no loss accepts such arrays; docs/losses.md lists the axes and dtypes that each loss needs")
        return [(str(case), partial(suite.run, case, FULL)) for case in selected]
    if arguments.full:
        table = [(str(case), partial(suite.run, case, FULL)) for case in cases.full()]
        return [*table, ("threads", partial(suite.scale, FULL)), ("starting processes", partial(suite.start, START, suite.peers))]
    # only some rows in most cases, because the compilers of other libraries take seconds for each case
    table = [(str(case), partial(suite.run, case, QUICK, None if case in cases.HEADLINES else QUICK_ROWS)) for case in cases.quick()]
    return [*table, ("threads", partial(suite.scale, QUICK)), ("starting processes", partial(suite.start, START, ()))]
