"""Train models whose last layer and loss are one, so that the logits never exist as a whole; the part to copy is `train`.

python examples/last_layer_torch.py labels             (needs PyTorch, scikit-learn, matplotlib and rich; a minute each)
python examples/last_layer_torch.py decoder
python examples/last_layer_torch.py segmentation
python examples/last_layer_torch.py labels --by torch  layer and loss by PyTorch: the same learning curve, up to rounding

labels: which of 100,000 sequences of five characters does a part of Python's standard library have? The model is told how often it
has each pair of characters, and the targets are a sparse matrix. decoder: an autoencoder of digits of 28 x 28 pixels.
segmentation: which of 256 colours does each pixel of a black-and-white photograph have? The last layer is a convolution of one pixel.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import load_digits, load_sample_images
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from torch import Tensor, nn
from torch.nn import functional

import fastloss as fl
import fastloss.torch as ft

mpl.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt

CHARACTERS = 200  # of a part of the standard library
PAIRS = 2048  # numbers that a part's pairs of characters are hashed to
HELD_OUT = 256  # samples for the score, never for training
COLUMNS = 128  # at the right of each photograph: held out
COLOURS = 256  # classes of pixels
SCORES = 10  # the number of times that a training is scored
BEST = 10  # labels of a sample, or colours of a pixel, that are scored

Batch = tuple[Tensor, Any]  # inputs of the model, and targets, which may be sparse


@dataclass
class Task:
    """A model, its data, and how it is scored."""

    body: nn.Module
    layer: nn.Module  # the last layer: Linear, or a convolution of one pixel
    loss: Any  # of fastloss
    options: dict[str, Any]
    loss_of_torch: Callable[[Tensor, Any], Tensor]
    batch: Callable[[int, torch.Generator], Batch]
    held_out: Batch
    score: Callable[[Tensor, Any], float]
    name_of_score: str
    baseline: float  # the score of a model that sees no input


@dataclass
class History:
    """The measurements of each step, and the scores of the steps that were scored."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # the numbers of the steps that were scored
    scores: list[float] = field(default_factory=list)
    logits: int = 0  # of a step


def train(task: Task, options: argparse.Namespace, report: Callable[[float], None]) -> History:
    """Train the model, report the loss of every step, and score the predictions for held-out data at regular intervals."""
    random = torch.Generator().manual_seed(options.seed)
    if options.by == "fastloss":
        criterion = ft.LinearLoss(task.loss, task.layer, **task.options)
    else:
        criterion = lambda features, target: task.loss_of_torch(task.layer(features), target)  # noqa: E731
    optimiser = torch.optim.Adam([*task.body.parameters(), *task.layer.parameters()], lr=options.rate)
    history = History()
    for step in range(1, options.steps + 1):
        inputs, target = task.batch(options.batch, random)
        begin = time.perf_counter()
        optimiser.zero_grad()
        features = task.body(inputs)
        loss = criterion(features, target)
        loss.backward()
        optimiser.step()
        history.step_seconds.append(time.perf_counter() - begin)
        history.losses.append(loss.item())
        history.logits = features.numel() // features.shape[1] * len(task.layer.weight)
        if step % max(1, options.steps // SCORES) == 0:
            inputs, target = task.held_out
            with torch.inference_mode():
                history.scores.append(task.score(task.layer(task.body(inputs)), target))
            history.scored.append(step)
        report(history.losses[-1])
    return history


def labels(options: argparse.Namespace) -> Task:
    """Tell the sequences of five characters of a text from its pairs of characters."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    parts = np.array([text[at : at + CHARACTERS] for at in range(0, len(text), CHARACTERS)])
    np.random.default_rng(0).shuffle(parts)
    parts = parts[: options.parts]
    counted = {"analyzer": "char", "lowercase": False}
    pairs = HashingVectorizer(ngram_range=(2, 2), n_features=PAIRS, alternate_sign=False, dtype=np.float32, **counted).transform(parts)
    targets = CountVectorizer(ngram_range=(5, 5), max_features=options.labels, binary=True, dtype=np.uint8, **counted).fit_transform(parts)
    layer = nn.Linear(256, targets.shape[1])
    frequencies = torch.from_numpy(np.asarray(targets.mean(axis=0), np.float32)).flatten()
    with torch.no_grad():
        layer.bias.copy_(frequencies.logit())  # the model begins with the frequencies of the labels

    def batch(count: int, random: torch.Generator) -> Batch:
        chosen = torch.randint(HELD_OUT, len(parts), (count,), generator=random).numpy()
        return 20 * torch.from_numpy(pairs[chosen].toarray()), targets[chosen]

    def precision(logits: Tensor, target: Any) -> float:
        return float(np.take_along_axis(target.toarray(), logits.topk(BEST).indices.numpy(), axis=1).mean())

    return Task(
        nn.Sequential(nn.Linear(PAIRS, 256), nn.ReLU()), layer, fl.binary_cross_entropy_with_logits, {},
        lambda logits, target: functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(target.toarray()).float()),
        batch, (20 * torch.from_numpy(pairs[:HELD_OUT].toarray()), targets[:HELD_OUT]), precision, f"precision of the best {BEST} labels",
        precision(frequencies.expand(HELD_OUT, -1), targets[:HELD_OUT]),
    )  # fmt: skip


def decoder(options: argparse.Namespace) -> Task:
    """Encode and decode digits of 28 x 28 pixels."""
    small = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    digits = functional.interpolate(small, size=28, mode="bilinear").clamp(0, 255).to(torch.uint8).flatten(1)
    digits = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))]
    body = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32), nn.Linear(32, 256), nn.ReLU())

    def batch(count: int, random: torch.Generator) -> Batch:
        images = digits[torch.randint(HELD_OUT, len(digits), (count,), generator=random)]
        return images / 255, images

    def error(logits: Tensor, images: Tensor) -> float:
        return (logits.sigmoid() - images / 255).abs().mean().item()

    held_out = digits[:HELD_OUT] / 255, digits[:HELD_OUT]
    return Task(
        body, nn.Linear(256, 784), fl.binary_cross_entropy_with_logits, {"target_scale": 1 / 255},
        lambda logits, images: functional.binary_cross_entropy_with_logits(logits, images / 255),
        batch, held_out, error, "mean absolute error of a pixel", error((digits[HELD_OUT:] / 255).mean(dim=0).logit(1e-6), held_out[1]),
    )  # fmt: skip


def segmentation(options: argparse.Namespace) -> Task:
    """Tell the colours of black-and-white photographs, as classes."""
    photographs = np.stack(load_sample_images().images)
    colours = MiniBatchKMeans(COLOURS, n_init=1, random_state=0).fit(photographs[:, ::3, ::3].reshape(-1, 3).astype(np.float32))
    classes = torch.from_numpy(colours.predict(photographs.reshape(-1, 3).astype(np.float32)).astype(np.uint8)).reshape(
        photographs.shape[:3]
    )
    grey = torch.from_numpy(photographs).float().mean(dim=-1)[:, None] / 255
    body = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=4, dilation=4), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU()
    )
    size, seen = options.size, photographs.shape[2] - COLUMNS

    def batch(count: int, random: torch.Generator) -> Batch:
        cuts = []
        for _ in range(count):
            k, top, left = (int(torch.randint(n, (), generator=random)) for n in (2, photographs.shape[1] - size, seen - size))
            cuts.append((k, slice(top, top + size), slice(left, left + size)))
        return torch.stack([grey[k, :, y, x] for k, y, x in cuts]), torch.stack([classes[cut] for cut in cuts])

    def found(logits: Tensor, target: Tensor) -> float:
        return (logits.topk(BEST, dim=1).indices == target[:, None]).any(dim=1).float().mean().item()

    held_out = grey[..., seen:], classes[..., seen:]
    frequencies = classes[..., :seen].flatten().bincount(minlength=COLOURS)[:, None, None].expand(len(classes), -1, *held_out[1].shape[1:])
    return Task(
        body, nn.Conv2d(64, COLOURS, 1), fl.cross_entropy, {}, lambda logits, target: functional.cross_entropy(logits, target.long()),
        batch, held_out, found, f"pixels whose colour is among the best {BEST}", found(frequencies, held_out[1]),
    )  # fmt: skip


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {"labels": labels, "decoder": decoder, "segmentation": segmentation}


def draw(history: History, task: Task, options: argparse.Namespace) -> None:
    """Draw the learning curve, and beside it the score of held-out data."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(np.arange(1, len(history.losses) + 1), history.losses, color="#0072b2", linewidth=0.8)
    left.set(title="Learning curve", xlabel="step", ylabel=f"{task.loss.__name__}, nats", ylim=(0, None))
    right.plot(history.scored, history.scores, color="#0072b2", marker="o", markersize=4, label="model")
    right.axhline(task.baseline, color="#d55e00", linestyle="--", label="without input")
    right.set(title="Held-out data", xlabel="step", ylabel=task.name_of_score, ylim=(0, None))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=110)
    plt.close(figure)


def summary(history: History, task: Task) -> str:
    """Return the measurements as text."""
    return (
        f"loss, mean of the last steps: {np.mean(history.losses[-20:]):.5f}\n"
        f"held-out data, {task.name_of_score}: {history.scores[-1]:.3f}; without input {task.baseline:.3f}\n"
        f"training: {sum(history.step_seconds):.1f} s; median step: {1e3 * np.median(history.step_seconds):.1f} ms\n"
        f"logits of a step: {history.logits * 4 / 1e6:.0f} MB, as many bytes of gradient"
    )


def count(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def side(text: str) -> int:
    """Parse the side of a square that is cut out of a photograph."""
    if not text.isdecimal() or not 16 <= int(text) <= 384:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 16 to 384")
    return int(text)


def picture(text: str) -> Path:
    """Parse the path of a picture that can be written."""
    path = Path(text)
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png in a folder that exists")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a model whose last layer and loss are one.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--labels", type=count, default=100_000, help="number of labels (default: %(default)s)")
    parser.add_argument("--parts", type=count, default=20_000, help="parts of the text, at most (default: %(default)s)")
    parser.add_argument("--size", type=side, default=96, help="pixels along a part of a photograph (default: %(default)s)")
    parser.add_argument("--batch", type=count, help="samples of a step (default: 256, and 8 photographs)")
    parser.add_argument("--steps", type=count, default=100, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--by", choices=("fastloss", "torch"), default="fastloss", help="what computes the loss (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and of the batches (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="threads of PyTorch and of fastloss (default: the default of each)")
    parser.add_argument("--out", type=picture, default=Path("last_layer.png"), help="file for the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.batch = options.batch or (8 if options.task == "segmentation" else 256)
    return options


def main(arguments: Sequence[str] | None = None) -> History:
    """Train the model, print and return the measurements, and write the picture."""
    options, console = parse(arguments), Console()
    if options.threads:
        torch.set_num_threads(options.threads)
        fl.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with console.status("preparing the data"):
        task = TASKS[options.task](options)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=options.steps, note="")
        history = train(task, options, lambda loss: progress.update(bar, advance=1, note=f"loss {loss:.4f}"))
    console.print(summary(history, task), highlight=False)
    draw(history, task, options)
    console.print(f"picture: {options.out}", highlight=False)
    return history


if __name__ == "__main__":
    main()
