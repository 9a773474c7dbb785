"""Time the loss inside training steps of the example's autoencoder, where PyTorch's threads have just been at work.

python -m bench.training_step                                  (needs the extras torch, bench and demo; some minutes)
python -m bench.training_step --json FILE --write docs/benchmarks.md
python -m bench.training_step --show FILE --write docs/benchmarks.md    (measures nothing)

A step is forward, loss, backward and Adam's update. Only the loss is timed: from the logits to the value and to the gradient
that the decoder receives. Rows take turns, one step each, in a new random order each round, without pauses.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import track

import fastloss as fl
from bench.page import Measurement
from bench.report import Table, duration
from examples.vae_torch import VAE, cut, load_photographs

PATCHES: dict[tuple[int, ...], int] = {(64, 3, 256, 256): 8, (128, 1, 28, 28): 4}  # shapes, and the pixels along a patch of the model
ROUNDS, SHORT_ROUNDS = 9, 101  # for large and small batches
LOSSES: dict[str, tuple[Any, Any]] = {
    "BCE": (fl.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
    "MSE": (fl.mse_loss, F.mse_loss),
}


def rows(ours: Callable[..., Any], theirs: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return the ways to compute a loss."""
    return {
        "fastloss": ours,
        "fastloss, in place": lambda logits, images: ours(logits, images, inplace_grad=True),
        "torch eager": theirs,
        "torch.compile": torch.compile(theirs, fullgraph=True, dynamic=False),
    }


class Training:
    """The example's model, and batches of crops of its photographs, of a shape (N, colours, size, size)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.model, self.photographs = VAE(colours=shape[1], patch=PATCHES[shape]), load_photographs()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.random = torch.Generator().manual_seed(0)

    def step(self, loss: Callable[..., Any]) -> tuple[float, float]:
        """Take a step; return the seconds of the loss, and of all."""
        images = cut(self.photographs, self.shape[0], self.shape[-1], self.random)[:, : self.shape[1]] / 255
        start = time.perf_counter()
        logits = self.model(images)[0]
        begin = time.perf_counter()
        (slope,) = torch.autograd.grad(loss(logits, images), logits)
        end = time.perf_counter()
        logits.backward(slope)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return end - begin, time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every row in every round, and of the steps, for each shape."""
    torch.set_num_threads(options.threads)
    fl.set_num_threads(options.threads)
    return {"shapes": [measure_shape(shape) for shape in PATCHES]}


def measure_shape(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the seconds of every row in every round, and of the steps."""
    training, order = Training(shape), np.random.default_rng(0)
    ways = {(loss, name): way for loss, pair in LOSSES.items() for name, way in rows(*pair).items()}
    seconds: dict[str, dict[str, list[float]]] = {loss: {name: [] for name in rows(*pair)} for loss, pair in LOSSES.items()}
    steps: list[float] = []
    for way in ways.values():  # compiles
        training.step(way)
    keys = list(ways)
    for _ in track(range(ROUNDS if math.prod(shape) > 1 << 20 else SHORT_ROUNDS), "training", console=Console(stderr=True)):
        for k in order.permutation(len(keys)):
            of_loss, of_step = training.step(ways[keys[k]])
            seconds[keys[k][0]][keys[k][1]].append(round(of_loss, 7))
            steps.append(round(of_step, 5))
    return {"shape": shape, "seconds": seconds, "steps": steps}


def tables(content: dict[str, Any]) -> str:
    """Return the tables of results in Markdown."""
    return "\n\n".join(map(table, content["shapes"]))


def table(content: dict[str, Any]) -> str:
    """Return the table of a shape in Markdown."""
    shape = "x".join(map(str, content["shape"]))
    made = Table(f"Time of the loss, {shape}", ["", "time of the loss", "speed-up of fastloss"])
    for loss, seconds in content["seconds"].items():
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        for name, median in sorted(medians.items(), key=lambda item: item[1]):
            faster = "" if name.startswith("fastloss") else f"{median / medians['fastloss']:.1f} x"
            made.rows.append([f"{loss}: {name}", duration(median), faster])
    return f"{made.markdown()}\n\nThe whole training step takes {duration(float(np.median(content['steps'])))}."


MEASUREMENT = Measurement("bench.training_step", "Time the loss inside training steps.", "training step", measure, tables)

if __name__ == "__main__":
    MEASUREMENT.run()
