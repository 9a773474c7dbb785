"""Time the loss inside training steps of the example's autoencoder, where PyTorch's threads have just been at work.

python -m bench.training_step                                  (needs the extras torch, bench and demo; some minutes)
python -m bench.training_step --json FILE --write docs/benchmarks.md
python -m bench.training_step --show FILE --write docs/benchmarks.md    (measures nothing)

A step is forward, loss, backward and Adam's update. Only the loss is timed: from the logits to the value and to the gradient
that the decoder receives. Rows take turns, one step each, in a new random order each round, without pauses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import track

import fastloss as fl
from bench import machine
from bench.page import replace_block
from bench.report import Table, duration
from examples.vae_torch import VAE, cut, load_photographs

SHAPE = (64, 3, 256, 256)
ROUNDS = 9
BLOCK = ("training step", "python -m bench.training_step --write")  # the name of its block in a page, and the command that writes it
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
    """The example's model, and batches of crops of its photographs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.photographs = VAE(), load_photographs()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.random = torch.Generator().manual_seed(0)

    def step(self, loss: Callable[..., Any]) -> tuple[float, float]:
        """Take a step; return the seconds of the loss, and of all."""
        images = cut(self.photographs, SHAPE[0], SHAPE[-1], self.random) / 255
        start = time.perf_counter()
        logits = self.model(images)[0]
        begin = time.perf_counter()
        (slope,) = torch.autograd.grad(loss(logits, images), logits)
        end = time.perf_counter()
        logits.backward(slope)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return end - begin, time.perf_counter() - start


def measure(threads: int) -> dict[str, Any]:
    """Return the seconds of every row in every round, and of the steps."""
    torch.set_num_threads(threads)
    fl.set_num_threads(threads)
    training, order = Training(), np.random.default_rng(0)
    ways = {(loss, name): way for loss, pair in LOSSES.items() for name, way in rows(*pair).items()}
    seconds: dict[str, dict[str, list[float]]] = {loss: {name: [] for name in rows(*pair)} for loss, pair in LOSSES.items()}
    steps: list[float] = []
    for way in ways.values():  # compiles
        training.step(way)
    keys = list(ways)
    for _ in track(range(ROUNDS), "training", console=Console(stderr=True)):
        for k in order.permutation(len(keys)):
            of_loss, of_step = training.step(ways[keys[k]])
            seconds[keys[k][0]][keys[k][1]].append(round(of_loss, 6))
            steps.append(round(of_step, 4))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "machine": machine.description(threads), "shape": SHAPE, "seconds": seconds, "steps": steps}


def table(content: dict[str, Any], source: Path | str) -> str:
    """Return the table of a results file in Markdown, with the machine it was measured on."""
    shape = "x".join(map(str, content["shape"]))
    made = Table(f"Time of the loss, {shape}", ["", "time of the loss", "speed-up of fastloss"])
    for loss, seconds in content["seconds"].items():
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        for name, median in sorted(medians.items(), key=lambda item: item[1]):
            faster = "" if name.startswith("fastloss") else f"{median / medians['fastloss']:.1f} x"
            made.rows.append([f"{loss}: {name}", duration(median), faster])
    sentence = machine.sentence(content["machine"])
    step = f"The whole training step takes {duration(float(np.median(content['steps'])))}."
    return f"{made.markdown()}\n\n{step} {sentence}; {content['date'][:10]}; every round is in `{source}`."


def filled(page: Path, text: str) -> str:
    """Return a page's text with the table between its marks."""
    return replace_block(page.read_text(), *BLOCK, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or read, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.training_step", description="Time the loss inside training steps.")
    parser.add_argument("--threads", type=int, choices=range(1, machine.cpus() + 1), default=machine.cpus())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: the table of a file")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table between this page's marks")
    options = parser.parse_args(arguments)
    content = json.loads(options.show.read_text()) if options.show else measure(options.threads)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    text = table(content, options.show or options.json or "memory")
    print(text)
    if options.write:
        options.write.write_text(filled(options.write, text))


if __name__ == "__main__":
    main()
