"""Train a small U-Net to find pasted shapes in photographs by Dice and cross-entropy; the part to copy is `train`.

python examples/segmentation_torch.py                 (needs PyTorch, scikit-learn, matplotlib and rich; about a minute)
python examples/segmentation_torch.py --by torch      the loss by PyTorch alone: the same learning curve, up to rounding

Ellipses and rectangles are cut out of one photograph and pasted into crops of the other, the rectangles half transparent. Their
borders, where colours are mixed, and an unlabelled strip of every image have the label 255, which the loss ignores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.colors import to_rgb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import fastloss as fl
import fastloss.torch as ft

mpl.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt

CLASSES = ("ellipses", "rectangles")
COLOURS = ("#e69f00", "#56b4e9")  # distinct for colour-blind readers
IGNORED = 255  # the label of pixels that the loss ignores
BORDER = 1.5  # pixels on either side of a shape's edge, where its colour is mixed
HELD_OUT = 256  # columns at the right of each photograph: for the score and the picture, never for training
SHAPES = 2  # the most shapes in an image
SCORED = 64  # the number of held-out images
SCORES = 20  # the number of times that a training is scored
SHOWN = 8
RATE = 6e-3


class UNet(nn.Module):
    """Map images in [0, 1], (N, 3, H, W), to the logits of their masks, (N, classes, H, W); H and W are multiples of 16.

    The first layer turns squares of 2 x 2 pixels into channels, and the last one turns channels back into pixels. This saves three
    quarters of the work at full size.
    """

    def __init__(self, classes: int = len(CLASSES), width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 3 * width, 4 * width]
        self.down = nn.ModuleList(map(convolutions, [12, *widths[:-1]], widths))
        self.up = nn.ModuleList(map(convolutions, [a + b for a, b in pairwise(widths)], widths[:-1]))
        self.last = nn.Conv2d(width, 4 * classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the masks."""
        x, skipped = functional.pixel_unshuffle(x - 0.5, 2), []
        for k, layers in enumerate(self.down):
            x = layers(functional.max_pool2d(x, 2) if k else x)
            skipped.append(x)
        for layers, beside in zip(reversed(self.up), skipped[-2::-1], strict=True):
            x = layers(torch.cat([functional.interpolate(x, scale_factor=2.0), beside], dim=1))
        return functional.pixel_shuffle(self.last(x), 2)


def convolutions(channels: int, outputs: int) -> nn.Module:
    """Return the two convolutions of one scale, with their normalisations and activations."""
    return nn.Sequential(*convolution(channels, outputs), *convolution(outputs, outputs))


def convolution(channels: int, outputs: int) -> tuple[nn.Module, ...]:
    """Return a convolution, its normalisation and its activation. Before a normalisation, a bias would have no effect."""
    return nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def load_photographs() -> list[Tensor]:
    """Return scikit-learn's two sample photographs, (3, 427, 640), uint8."""
    return [torch.from_numpy(photograph.transpose(2, 0, 1).copy()) for photograph in load_sample_images().images]


def cut(photograph: Tensor, size: int, random: torch.Generator) -> Tensor:
    """Cut a random square out of a photograph, and mirror it with a probability of 1/2."""
    top, left = (int(torch.randint(length - size + 1, (), generator=random)) for length in photograph.shape[1:])
    square = photograph[:, top : top + size, left : left + size]
    return square.flip(2) if torch.rand((), generator=random) < 0.5 else square


def uniform(low: float, high: float, count: int, random: torch.Generator) -> Tensor:
    """Return a random number for each image: (count, 1, 1)."""
    return low + (high - low) * torch.rand(count, 1, 1, generator=random)


def random_shapes(count: int, size: int, is_ellipse: Tensor, random: torch.Generator) -> Tensor:
    """Return each pixel's distance from the edge of a random shape, in pixels, negative inside; each image has its own shape."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    x, y = x - uniform(0.1 * size, 0.9 * size, count, random), y - uniform(0.1 * size, 0.9 * size, count, random)
    turn = uniform(0, np.pi, count, random)
    x, y = torch.cos(turn) * x + torch.sin(turn) * y, torch.cos(turn) * y - torch.sin(turn) * x
    width, height = (uniform(size / 8, size / 3.5, count, random) for _ in range(2))
    ellipse = (torch.hypot(x / width, y / height) - 1) * torch.minimum(width, height)
    return torch.where(is_ellipse, ellipse, torch.maximum(x.abs() - width, y.abs() - height))


def make_batch(photographs: Sequence[Tensor], count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images, (count, 3, size, size), and their masks, (count, classes, size, size); both uint8."""
    first = torch.randint(2, (count,), generator=random).tolist()
    images = torch.stack([cut(photographs[k], size, random) for k in first]).float()
    masks = torch.zeros(count, len(CLASSES), size, size, dtype=torch.uint8)
    ignored = torch.zeros(count, 1, size, size, dtype=torch.bool)
    for _ in range(SHAPES):
        others = torch.stack([cut(photographs[1 - k], size, random) for k in first])
        is_ellipse = torch.rand(count, 1, 1, generator=random) < 0.5
        distance = random_shapes(count, size, is_ellipse, random)
        distance[torch.rand(count, generator=random) < 0.25] = size  # no shape here
        distance = distance.unsqueeze(1)
        opacity = torch.where(is_ellipse, 1.0, 0.5).unsqueeze(1)
        images = torch.lerp(images, others.float(), opacity * torch.sigmoid(-2 * distance))
        of_class = torch.cat([is_ellipse, ~is_ellipse], dim=1).unsqueeze(-1)
        masks = torch.where(distance < 0, of_class.to(torch.uint8), masks)  # a shape hides the shapes below it
        ignored = torch.where(distance < -BORDER, False, ignored | (distance < BORDER))
    ignored |= unseen_strip(count, size, random)
    return images.round().to(torch.uint8), masks.masked_fill(ignored, IGNORED)


def unseen_strip(count: int, size: int, random: torch.Generator) -> Tensor:
    """Choose a random strip of unlabelled columns in each image, a sixth of its width: (count, 1, 1, size), bool."""
    first = torch.randint(size - size // 6 + 1, (count, 1, 1, 1), generator=random)
    column = torch.arange(size)
    return (column >= first) & (column < first + size // 6)


def torch_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute Dice plus cross-entropy of the labelled pixels by PyTorch alone."""
    labelled = masks != IGNORED
    t = torch.where(labelled, masks, 0).float()
    p = torch.sigmoid(logits) * labelled
    overlap, total = (p * t).sum(dim=(2, 3)), (p + t).sum(dim=(2, 3))
    dice = (1 - (2 * overlap + 1) / (total + 1)).mean()
    entropy = functional.binary_cross_entropy_with_logits(logits, t, weight=labelled.float(), reduction="sum")
    return dice + entropy / labelled.sum()


@dataclass
class History:
    """The measurements of each step, and the scores of the steps that were scored."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # the numbers of the steps that were scored
    scores: list[list[float]] = field(default_factory=list)  # a number for each class


def train(model: UNet, photographs: Sequence[Tensor], options: argparse.Namespace, report: Callable[[float], None]) -> History:
    """Train the model, report the loss of every step, and score the predictions for held-out images at regular intervals."""
    random = torch.Generator().manual_seed(options.seed)
    held_out = make_batch([photograph[:, :, -HELD_OUT:] for photograph in photographs], SCORED, options.size, random)
    photographs = [photograph[:, :, :-HELD_OUT] for photograph in photographs]
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=options.steps + 1, pct_start=0.1, cycle_momentum=False)
    # fastloss takes the uint8 masks as they are, and the gradient replaces the logits
    criterion = ft.DiceBCEWithLogitsLoss(ignore_index=IGNORED, inplace_grad=True) if options.by == "fastloss" else torch_loss
    history = History()
    for step in range(1, options.steps + 1):
        images, masks = make_batch(photographs, options.batch, options.size, random)
        begin = time.perf_counter()
        optimiser.zero_grad()
        logits = model(images / 255)
        time_loss(logits, history.loss_seconds)
        loss = criterion(logits, masks)
        loss.backward()
        optimiser.step()
        schedule.step()
        history.step_seconds.append(time.perf_counter() - begin)
        history.losses.append(loss.item())
        if step % max(1, options.steps // SCORES) == 0:
            history.scored.append(step)
            history.scores.append(score(predict(model, held_out[0]), held_out[1]))
        report(history.losses[-1])
    return history


def time_loss(logits: Tensor, seconds: list[float]) -> None:
    """Record the time from here until the logits have their gradient: the loss, forward and backward."""
    begin = time.perf_counter()
    logits.register_hook(lambda _: seconds.append(time.perf_counter() - begin))


def predict(model: UNet, images: Tensor) -> Tensor:
    """Return the probability that a pixel belongs to a class, for every pixel and class."""
    model.eval()
    with torch.inference_mode():
        probabilities = torch.sigmoid(model(images / 255))
    model.train()
    return probabilities


def score(probabilities: Tensor, masks: Tensor) -> list[float]:
    """Return each class's intersection over union, counted over the labelled pixels of all images."""
    labelled, found, there = masks != IGNORED, probabilities > 0.5, masks == 1
    axes = (0, 2, 3)
    union = ((found | there) & labelled).sum(dim=axes)
    return ((found & there).sum(dim=axes) / union.clamp(min=1)).tolist()


def paint(images: Tensor, amounts: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Return grey images, tinted with the classes' colours in the given amounts; ignored pixels are hatched."""
    grey = images.float().mean(dim=1, keepdim=True).div(255).mul(0.6).expand(-1, 3, -1, -1)
    for amount, colour in zip(amounts.unbind(dim=1), COLOURS, strict=True):
        grey = torch.lerp(grey, torch.tensor(to_rgb(colour)).reshape(3, 1, 1), 0.85 * amount.unsqueeze(1))
    if ignored is None:
        return grey
    index = torch.arange(images.shape[-1])
    hatch = ((index + index[:, None]) // 2 % 2).float()
    return torch.where(ignored, hatch, grey)


def draw(history: History, rows: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Draw the learning curve and the scores above the pictures."""
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subplots(1, 2)
    steps = np.arange(1, len(history.losses) + 1)
    left.plot(steps, history.losses, color="#0072b2", linewidth=0.8)
    left.set(title="Learning curve", xlabel="step", ylabel="Dice loss + cross-entropy (nats per pixel)", ylim=(0, None))
    for name, colour, scores in zip(CLASSES, COLOURS, np.transpose(history.scores), strict=True):
        right.plot(history.scored, scores, color=colour, marker="o", markersize=3, label=name)
    right.set(title=f"{SCORED} held-out images", xlabel="step", ylabel="intersection over union", ylim=(0, 1))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    for row, (label, pictures) in zip(bottom.subplots(len(rows), SHOWN), rows.items(), strict=True):
        for axes, image in zip(row, pictures, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(options.out, dpi=110)
    plt.close(figure)


def show(model: UNet, photographs: Sequence[Tensor], options: argparse.Namespace) -> dict[str, Tensor]:
    """Return rows of pictures in [0, 1], by their labels: held-out images, their masks and the predictions."""
    random = torch.Generator().manual_seed(options.seed + 1)
    images, masks = make_batch([photograph[:, :, -HELD_OUT:] for photograph in photographs], SHOWN, options.size, random)
    ignored = (masks == IGNORED).any(dim=1, keepdim=True)
    return {
        "held out": images / 255,
        "mask\n(hatched: ignored)": paint(images, (masks == 1).float(), ignored),
        "predicted": paint(images, predict(model, images)),
    }


def summary(history: History, options: argparse.Namespace) -> str:
    """Return the measurements as text."""
    step, loss = np.median(history.step_seconds), np.median(history.loss_seconds)
    scores = ", ".join(f"{name} {x:.3f}" for name, x in zip(CLASSES, history.scores[-1], strict=True))
    return (
        f"loss, mean of the last steps: {np.mean(history.losses[-20:]):.4f}\n"
        f"intersection over union of {SCORED} held-out images: {scores}\n"
        f"training: {sum(history.step_seconds):.1f} s; median step: {1e3 * step:.1f} ms\n"
        f"  of which the loss by {options.by}, its gradient included: {1e3 * loss:.2f} ms, {loss / step:.1%}"
    )


def count(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def side(text: str) -> int:
    """Parse a size that can be halved four times and is no larger than the held-out part of a photograph."""
    if not text.isdecimal() or int(text) % 16 or not 32 <= int(text) <= HELD_OUT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 16 from 32 to {HELD_OUT}")
    return int(text)


def picture(text: str) -> Path:
    """Parse the path of a picture that can be written."""
    path = Path(text)
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png in a folder that exists")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small U-Net to find pasted shapes in photographs.")
    parser.add_argument("--size", type=side, default=64, help="pixels along an image (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=16, help="images per step (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=1200, help="default: %(default)s")
    parser.add_argument("--by", choices=("fastloss", "torch"), default="fastloss", help="what computes the loss (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model, crops and shapes (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="threads of PyTorch and of fastloss (default: the default of each)")
    parser.add_argument("--out", type=picture, default=Path("segmentation.png"), help="file for the picture (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> History:
    """Train the model, print and return the measurements, and write the picture."""
    options, console = parse(arguments), Console()
    if options.threads:
        torch.set_num_threads(options.threads)
        fl.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, photographs = UNet(), load_photographs()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps, note="")
        history = train(model, photographs, options, lambda loss: progress.update(task, advance=1, note=f"loss {loss:.3f}"))
    console.print(summary(history, options), highlight=False)
    draw(history, show(model, photographs, options), options)
    console.print(f"picture: {options.out}", highlight=False)
    return history


if __name__ == "__main__":
    main()
