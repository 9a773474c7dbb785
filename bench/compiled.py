"""Compare fastloss under torch.compile with torch.compile's own code: forward and backward of a loss, and of what stands before it.

python -m bench.compiled                                  (needs the extras torch and bench, and a C++ compiler; two minutes)
python -m bench.compiled --json FILE --write docs/benchmarks.md
python -m bench.compiled --show FILE --write docs/benchmarks.md    (measures nothing)

The logits are a leaf, or the product of a leaf and a factor, which the compiler can fuse with the loss, or the output of a linear
layer. With the linear layer, the time of the same step with a constant gradient is subtracted. All rows are called by turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import track

import fastloss as fl
import fastloss.torch as ft
from bench.measure import no_garbage_collection
from bench.page import Measurement
from bench.report import Table, duration

SHAPE = (64, 3, 256, 256)
ROUNDS = 31
LOSSES: dict[str, tuple[Any, Any]] = {
    "BCE": (F.binary_cross_entropy_with_logits, ft.binary_cross_entropy_with_logits),
    "MSE": (F.mse_loss, ft.mse_loss),
    "L1": (F.l1_loss, ft.l1_loss),
}
PLACES = ("a leaf", "behind a multiplication", "behind a linear layer")
WAYS = ("torch.compile", "fastloss under torch.compile")


def step(place: str, loss: Callable[..., Any]) -> Callable[[], Any]:
    """Return a compiled training step without an update."""
    if place == "behind a linear layer":
        layer, images, target = linear_layer()
        compiled = torch.compile(lambda: loss(layer(images), target), fullgraph=True, dynamic=False)
        return partial(forward_backward, compiled, list(layer.parameters()))
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(SHAPE, generator=generator).requires_grad_(), torch.rand(SHAPE, generator=generator)
    factor = 1.0 if place == "a leaf" else 0.7
    compiled = torch.compile(lambda: loss(logits if factor == 1.0 else logits * factor, target), fullgraph=True, dynamic=False)
    return partial(forward_backward, compiled, [logits])


def linear_layer() -> tuple[Any, Any, Any]:
    """Return a linear layer, its input, and targets of its output's shape."""
    torch.manual_seed(0)
    return torch.nn.Linear(16, 3072), torch.randn(4096, 16), torch.rand(4096, 3072)


def constant_step() -> Callable[[], Any]:
    """Return the step with the linear layer, in which a constant gradient stands for the loss."""
    layer, images, target = linear_layer()
    return partial(forward_backward, torch.compile(lambda: layer(images), fullgraph=True, dynamic=False), list(layer.parameters()), target)


def forward_backward(compiled: Callable[[], Any], leaves: list[Any], upstream: Any = None) -> None:
    """Compute forward and backward, and forget the gradients."""
    compiled().backward(upstream)
    for leaf in leaves:
        leaf.grad = None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every row in every round."""
    torch.set_num_threads(options.threads)
    fl.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # the rows share two pieces of code
    rows: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for place in PLACES:
        for name, losses in LOSSES.items():
            rows |= {(name, place, way): step(place, loss) for way, loss in zip(WAYS, losses, strict=True)}
    rows["", "behind a linear layer", "constant gradient"] = constant_step()
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in rows}
    order, keys = np.random.default_rng(0), list(rows)
    for run in rows.values():
        run()
        run()
    with no_garbage_collection():
        for _ in track(range(ROUNDS), "compiled", console=Console(stderr=True)):
            for k in order.permutation(len(keys)):
                begin = time.perf_counter()
                rows[keys[k]]()
                seconds[keys[k]].append(round(time.perf_counter() - begin, 6))
    return {"rows": [{"loss": key[0], "place": key[1], "way": key[2], "seconds": times} for key, times in seconds.items()]}


def table(content: dict[str, Any]) -> str:
    """Return the table of results in Markdown."""
    medians = {(row["loss"], row["place"], row["way"]): statistics.median(row["seconds"]) for row in content["rows"]}
    made = Table("Forward and backward under torch.compile", ["", *WAYS, "speed-up"])
    for name in LOSSES:
        for place in PLACES:
            rest = medians["", place, "constant gradient"] if place == "behind a linear layer" else 0.0
            theirs, ours = (medians[name, place, way] - rest for way in WAYS)
            made.rows.append([f"{name}, {place}", duration(theirs), duration(ours), f"{theirs / ours:.2f} x"])
    return made.markdown()


MEASUREMENT = Measurement(
    "bench.compiled", "Compare fastloss under torch.compile with torch.compile's own code.", "compiled", measure, table
)

if __name__ == "__main__":
    MEASUREMENT.run()
