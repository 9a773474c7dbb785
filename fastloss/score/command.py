"""The command `fastloss score`: reads its arguments, computes the losses, and writes its files."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import fastloss as fl
from fastloss.core.checks import refuse_unknown
from fastloss.core.definition import entries_of
from fastloss.core.dtypes import is_float
from fastloss.core.plan import Array
from fastloss.losses.table import LOSSES
from fastloss.score import report, thumbnails
from fastloss.score.arguments import loss_options, losses
from fastloss.score.batches import MOST_BYTES, Batches
from fastloss.score.partial import Partial
from fastloss.score.sources import RawFormat, Source, open_source, stamp, to_dtype
from fastloss.score.statistics import Values

INTERRUPTED = 130  # exit status of a process that Ctrl-C ended
MOST_SHOWN = 24  # images in the sheet
WIDTH = 100  # characters in a line if the output is not a terminal


def run(arguments: argparse.Namespace, is_process: bool) -> int:
    """Compute the losses, and return the exit status: 2 after an error, of which one line says what was found.

    `is_process` says that the process has no other purpose, so that it may be replaced.
    """
    try:
        work = Run(arguments)
        work.batches.prepare()
        if is_process and "numba" in sys.modules:
            restart()
        work.finish()
    except KeyboardInterrupt:
        print("fastloss score: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError) as error:
        print(f"fastloss score: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def restart() -> None:
    """Replace the process by one that finds its kernels on disk: the 70 MB that Numba takes to compile them are never given back."""
    if "FASTLOSS_SCORE_RESTARTED" not in os.environ:  # where kernels cannot be stored, the next process compiles them too
        os.environ["FASTLOSS_SCORE_RESTARTED"] = "1"
        os.execv(sys.executable, sys.orig_argv)


class Run:
    """A run of the command: its files, opened and checked, before anything is computed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.check_outputs()
        check_installed(("matplotlib",) if arguments.png else ())
        numbers, files = options_of(arguments)
        operands = open_operands(arguments)
        arrays = {name: open_source(path, name) for name, path in files.items()}
        shape, loss = operands["input"].shape, losses()[arguments.loss]
        by_image = {
            name: x for name, x in arrays.items()
            if x.shape[:1] == shape[:1] and loss.axes_of(name, len(x.shape), len(shape))[:1] == (0,)
        }  # fmt: skip
        whole = {name: load(x, name) for name, x in arrays.items() if name not in by_image}
        self.sources = {**operands, **arrays}
        self.batches = Batches(loss, {**operands, **by_image}, whole, {"reduction": arguments.reduction, **numbers})
        self.partial = Partial(arguments.out, self.batches.accumulator(), self.origin())
        self.names = operands["target"].names()
        if arguments.png:
            thumbnails.check_shape(shape, LOSSES[arguments.loss].classes)

    def check_outputs(self) -> None:
        """Raise ValueError for files that cannot be written, before anything is read."""
        report.check_format(self.arguments.out)
        for path in filter(None, (self.arguments.out, self.arguments.png)):
            if not path.resolve().parent.is_dir():
                raise ValueError(f"the folder {path.resolve().parent} does not exist")

    def origin(self) -> dict[str, Any]:
        """Return everything that decides the results."""
        return {
            "version": fl.__version__, "loss": self.arguments.loss, **self.batches.settings,
            **{name: stamp(source) for name, source in self.sources.items()},
        }  # fmt: skip

    def finish(self) -> None:
        """Compute all images, and write the output.

        An error of the computation deletes the partial results. An interrupt, or an error when the output is written, leaves them.
        """
        self.partial.open(self.arguments.resume)
        try:
            self.write(self.compute_or_remove())
            self.partial.remove()
        finally:
            self.partial.close()

    def compute_or_remove(self) -> str:
        """Compute all images and return the time that it took, in words. Delete the partial results after an error."""
        try:
            seconds, size = self.compute()
            for name, now in self.origin().items():
                if now != (before := self.partial.origin[name]):
                    raise ValueError(f"{name} changed while it was read: it was {before} and is {now}")
        except Exception:
            self.partial.remove()
            raise
        return f"{size / 1e9:.2f} GB in {seconds:.3f} s: {size / max(seconds, 1e-9) / 1e9:.2f} GB/s"

    def compute(self) -> tuple[float, int]:
        """Compute the images that are missing; return the seconds that this took, and the number of bytes that were read."""
        batches, total = self.batches, self.partial.total
        first, begin = total.samples, time.perf_counter()
        with progress_bar() as bar, HeldInterrupt() as interrupt:
            task = bar.add_task(self.arguments.loss, total=batches.count * batches.image_bytes, completed=first * batches.image_bytes)
            for scores in batches.from_image(first):
                self.partial.add(scores)
                bar.update(task, completed=total.samples * batches.image_bytes)
                if interrupt.has_arrived:
                    break
        self.partial.save()
        if interrupt.has_arrived:
            raise KeyboardInterrupt
        return time.perf_counter() - begin, (total.samples - first) * batches.image_bytes

    def write(self, speed: str) -> None:
        """Write the files under other names, rename them when all are complete, and print the summary."""
        values, arguments = Values(self.partial.values), self.arguments
        worst = values.worst(arguments.worst)
        new = {path: path.with_name(f"{path.name}.new") for path in (arguments.out, arguments.png) if path}
        try:
            report.write_table(new[arguments.out], arguments.out.suffix, values, self.names)
            if arguments.png:
                self.draw(new[arguments.png], values, worst)
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a mean over no elements is NaN
                table = report.summary(self.partial.total, values, worst, self.names)
            for path, complete in new.items():
                os.replace(complete, path)
        finally:
            for complete in new.values():
                complete.unlink(missing_ok=True)
        console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        console.print(table)
        console.print(f"{speed}; written: {', '.join(map(str, new))}", markup=False, soft_wrap=True)

    def draw(self, png: Path, values: Values, worst: list[tuple[int, float]]) -> None:
        """Draw the histogram and the sheet."""
        found = [(f"{report.title_of(image, self.names)}\n{loss:.4g}", image) for image, loss in worst[:MOST_SHOWN]]
        sheet = [(title, *thumbnails.thumbnails(self.batches, image)) for title, image in found]
        from fastloss.score import picture  # imports matplotlib, whose memory is not needed before

        picture.draw(png, values, [picture.Shown(*x) for x in sheet], self.note())

    def note(self) -> str:
        """Return a note for the title of the sheet: the part of an image that it shows, or "" for all of it."""
        if LOSSES[self.arguments.loss].classes:
            return " (the most probable class of each pixel)"
        channels = thumbnails.channels(self.sources["input"].shape[1:])
        return "" if channels in (1, 3) else f" (the first of {channels} channels)"


def check_installed(names: Iterable[str]) -> None:
    """Raise ModuleNotFoundError for a package that is needed later and is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def options_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the options of the loss that are numbers or flags, and those that are files."""
    names = ("mask", "weight", *loss_options())
    given = {name: x for name in names if (x := getattr(arguments, name)) is not None}
    refuse_unknown(given, losses()[arguments.loss].accumulated_options())
    files = {name: x for name, x in given.items() if isinstance(x, Path)}
    return {name: x for name, x in given.items() if name not in files}, files


def open_operands(arguments: argparse.Namespace) -> dict[str, Source]:
    """Open the input and the target."""
    dtype = to_dtype(arguments.dtype) if arguments.dtype else None
    target_dtype = to_dtype(arguments.target_dtype) if arguments.target_dtype else dtype
    predicted = open_source(arguments.input, "input", RawFormat(dtype, arguments.shape))
    like, raw_shape = predicted.shape, arguments.shape or predicted.shape
    if LOSSES[arguments.loss].classes:
        like = entries_of(like)
        raw_shape = raw_shape if target_dtype is not None and is_float(target_dtype) else entries_of(raw_shape)
    return {"input": predicted, "target": open_source(arguments.target, "target", RawFormat(target_dtype, raw_shape), like)}


def load(source: Source, name: str) -> Array:
    """Read an array that is the same for all images."""
    size = int(np.prod(source.shape)) * source.dtype.itemsize
    if size > MOST_BYTES // 4:
        raise ValueError(f"{name} has shape {source.shape} and {size >> 20} MiB; accepted: one image, or as many images as the input has")
    return source.read(0, np.empty(source.shape, source.dtype))


def progress_bar() -> Progress:
    """Make a progress bar with the rate and the time left. It is shown in terminals only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, refresh_per_second=5, transient=True, disable=not console.is_terminal)


class HeldInterrupt(AbstractContextManager["HeldInterrupt"]):
    """Note Ctrl-C instead of raising KeyboardInterrupt, so that no batch is counted by half. A second one has its usual effect."""

    def __enter__(self) -> Self:
        self.has_arrived, self.usual = False, signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_: Any) -> None:
        """Note the interrupt."""
        self.has_arrived = True
        signal.signal(signal.SIGINT, self.usual)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.usual)
