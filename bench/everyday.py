"""Compare fastloss on tensors with PyTorch's own losses on batches of everyday size, each call right behind another operator.

python -m bench.everyday                                  (needs the extras torch and bench; three minutes)
python -m bench.everyday --json FILE --write docs/benchmarks.md
python -m bench.everyday --show FILE --write docs/benchmarks.md    (measures nothing)

A cell is a loss, an option, a shape, and a pass: forward and backward, or the value without a gradient. Its two rows, eager PyTorch
and `fastloss.torch`, are called by turns in random order, each after a `torch.relu` of the same size: PyTorch's threads are then
awake, as in a training step. Only the loss is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import track

import fastloss as fl
import fastloss.torch as ft
from bench.measure import no_garbage_collection
from bench.page import Measurement
from bench.report import Table

SHAPES = ((1024,), (128, 1, 28, 28), (128, 3, 32, 32), (64, 3, 64, 64), (8, 1, 256, 256))
PASSES = ("forward + backward", "value")
COMMON = ("mean", "sum", "none", "bfloat16", "float64")
OPTIONS = {
    "binary_cross_entropy_with_logits": (*COMMON, "weight", "pos_weight"),
    "binary_cross_entropy": (*COMMON, "weight"),
    "mse_loss": (*COMMON, "weight"),
    "l1_loss": COMMON,
    "smooth_l1_loss": COMMON,
    "huber_loss": COMMON,
}
BUDGET, LEAST, MOST = 0.3, 15, 400  # seconds for each cell, and bounds of its rounds


class Cell(NamedTuple):
    """What is timed."""

    loss: str
    option: str
    shape: tuple[int, ...]
    part: str


def cells() -> Iterator[Cell]:
    """Yield every cell."""
    for shape in SHAPES:
        for loss, options in OPTIONS.items():
            for option in options:
                for part in PASSES:
                    yield Cell(loss, option, shape, part)


def row(cell: Cell, functions: Any) -> Callable[[], Any]:
    """Return a call of a cell's loss in a module of functions."""
    dtype = getattr(torch, cell.option, torch.float32) if "float" in cell.option else torch.float32
    generator = torch.Generator().manual_seed(0)
    target, factor = (torch.rand(cell.shape, generator=generator).to(dtype) for _ in range(2))
    drawn = torch.randn(cell.shape, generator=generator)
    logits = (drawn.sigmoid() if cell.loss == "binary_cross_entropy" else 3 * drawn).to(dtype)
    reduction = cell.option if cell.option in ("sum", "none") else "mean"
    options = {cell.option: factor} if cell.option in ("weight", "pos_weight") else {}
    function = getattr(functions, cell.loss)
    if cell.part == "value":

        def value() -> Any:
            with torch.no_grad():
                return function(logits, target, reduction=reduction, **options)

        return value
    upstream = torch.ones_like(logits) if reduction == "none" else None
    logits.requires_grad_()

    def forward_backward() -> Any:
        function(logits, target, reduction=reduction, **options).backward(upstream)
        logits.grad = None

    return forward_backward


def measure_cell(cell: Cell, order: np.random.Generator) -> tuple[list[float], list[float]]:
    """Return the seconds of eager PyTorch and of fastloss in every round."""
    rows, busy = [row(cell, F), row(cell, ft)], torch.randn(cell.shape)
    for run in rows * 3:
        run()
    begin = time.perf_counter()
    for run in rows:
        torch.relu(busy)
        run()
    rounds = int(np.clip(BUDGET / (time.perf_counter() - begin), LEAST, MOST))
    seconds: tuple[list[float], list[float]] = ([], [])
    with no_garbage_collection():
        for _ in range(rounds):
            for k in order.permutation(2):
                torch.relu(busy)
                begin = time.perf_counter()
                rows[k]()
                seconds[k].append(time.perf_counter() - begin)
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen cells, and return the medians in microseconds."""
    torch.set_num_threads(options.threads)
    fl.set_num_threads(options.threads)
    order, entries = np.random.default_rng(0), []
    for cell in track(chosen(options), "everyday batches", console=Console(stderr=True)):
        eager, ours = (round(statistics.median(times) * 1e6, 2) for times in measure_cell(cell, order))
        entries.append({**cell._asdict(), "eager": eager, "fastloss": ours})
    return {"cells": entries}


def tables(content: dict[str, Any]) -> str:
    """Return the tables of results in Markdown."""
    found = {(e["loss"], e["option"], tuple(e["shape"]), e["part"]): e["eager"] / e["fastloss"] for e in content["cells"]}
    shapes = [shape for shape in SHAPES if any(key[2] == shape for key in found)]
    texts = []
    for part in PASSES:
        made = Table(f"Eager PyTorch's time over fastloss's, {part}", ["", *("x".join(map(str, shape)) for shape in shapes)])
        for loss, option in dict.fromkeys(key[:2] for key in found):
            of_shapes = [found.get((loss, option, shape, part)) for shape in shapes]
            made.rows.append([f"{loss}, {option}", *(f"{ratio:.2f}" if ratio else "" for ratio in of_shapes)])
        texts.append(made.markdown())
    for name, group in (("1,024 elements", SHAPES[:1]), ("larger batches", SHAPES[1:])):
        ratios = [ratio for key, ratio in found.items() if key[2] in group]
        if ratios:
            slower = sum(ratio < 1 for ratio in ratios)
            texts.append(
                f"Of {len(ratios)} cells with {name}, {slower} are slower than eager PyTorch; "
                f"the median is {statistics.median(ratios):.2f} x, the smallest {min(ratios):.2f} x."
            )
    return "\n\n".join(texts)


def chosen(options: argparse.Namespace) -> list[Cell]:
    """Return the cells that the arguments of the command select."""
    return [
        cell
        for cell in cells()
        if cell.loss in (options.loss or OPTIONS)
        and cell.option in (options.option or OPTIONS[cell.loss])
        and prod(cell.shape) in (options.elements or map(prod, SHAPES))
    ]


MEASUREMENT = Measurement("bench.everyday", "Compare with PyTorch on batches of everyday size.", "everyday batches", measure, tables)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss", action="append", choices=OPTIONS, help="only this loss; may be given several times")
    parser.add_argument("--option", action="append", choices=OPTIONS["binary_cross_entropy_with_logits"], help="only this option")
    parser.add_argument("--elements", type=int, action="append", help="only batches of so many elements")
    MEASUREMENT.run(parser)
