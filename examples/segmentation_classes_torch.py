"""Train a small U-Net to tell the colours of black-and-white photographs, by cross-entropy; the part to copy is `train`.

python examples/segmentation_classes_torch.py                 (needs PyTorch, scikit-learn, matplotlib and rich)
python examples/segmentation_classes_torch.py --by torch      the loss by PyTorch alone: the same learning curve, up to rounding

The masks are the clusters of the photographs' colours. The network sees the brightness alone and has to infer the colour from texture
and surroundings. Pixels at the edge of a cluster, where colours are mixed, have the label 255, which the loss ignores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import fastloss as fl
import fastloss.torch as ft

mpl.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt

IGNORED_COLOUR = "#d00000"
CLASSES = {"black": "#1a1a1a", "teal": "#009e9e", "brown": "#8c5a2b", "orange": "#ffa640", "white": "#a9cdf5"}  # from dark to bright
IGNORED = 255  # the label of pixels that the loss ignores
SMOOTHED = 5  # the side of the square of pixels whose mean colour decides the class of the pixel at its centre
HEIGHT = 424  # rows of a photograph that are used, a multiple of 8
HELD_OUT = 256  # columns at the right of each photograph: for the score, never for training
SCORES = 20  # the number of times that a training is scored
RATE = 2e-3


class UNet(nn.Module):
    """Map brightness in [0, 1], (N, 1, H, W), to the logits of the classes, (N, C, H, W); H and W are multiples of 8.

    The first layer turns squares of 2 x 2 pixels into channels, and the last one turns channels back into pixels. This saves three
    quarters of the work at full size.
    """

    def __init__(self, classes: int = len(CLASSES), width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([convolutions(4, width), convolutions(width, 2 * width), convolutions(2 * width, 4 * width)])
        self.up = nn.ModuleList([convolutions(6 * width, 2 * width), convolutions(3 * width, width)])
        self.last = nn.Conv2d(width, 4 * classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes."""
        large = self.down[0](functional.pixel_unshuffle(x - 0.5, 2))
        middle = self.down[1](functional.max_pool2d(large, 2))
        small = self.down[2](functional.max_pool2d(middle, 2))
        middle = self.up[0](torch.cat([functional.interpolate(small, scale_factor=2.0), middle], dim=1))
        large = self.up[1](torch.cat([functional.interpolate(middle, scale_factor=2.0), large], dim=1))
        return functional.pixel_shuffle(self.last(large), 2)


def convolutions(channels: int, outputs: int) -> nn.Module:
    """Return two convolutions, each with a normalisation, before which a bias would have no effect, and an activation."""
    layers: list[nn.Module] = []
    for inputs in (channels, outputs):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Photographs(NamedTuple):
    """Photographs of one size, and the class of each pixel."""

    colours: Tensor  # (N, H, W, 3), uint8
    brightness: Tensor  # (N, 1, H, W), in [0, 1]
    masks: Tensor  # (N, H, W), uint8

    @property
    def seen(self) -> int:
        """The number of columns that may be used for training."""
        return self.masks.shape[-1] - HELD_OUT


def load_photographs() -> Photographs:
    """Return scikit-learn's two sample photographs with their masks."""
    colours = torch.from_numpy(np.stack(load_sample_images().images)[:, :HEIGHT])
    channels = colours.permute(0, 3, 1, 2).float() / 255
    return Photographs(colours, channels.mean(dim=1, keepdim=True), make_masks(channels))


def make_masks(channels: Tensor) -> Tensor:
    """Return the cluster of every pixel's colour, from the darkest to the brightest cluster, and 255 at the edges of clusters."""
    smooth = functional.avg_pool2d(channels, SMOOTHED, stride=1, padding=SMOOTHED // 2, count_include_pad=False).permute(0, 2, 3, 1)
    kmeans = KMeans(len(CLASSES), n_init=4, random_state=0).fit(smooth[:, ::4, ::4].reshape(-1, 3).numpy())
    rank = kmeans.cluster_centers_.sum(axis=1).argsort().argsort()
    labels = torch.from_numpy(rank[kmeans.predict(smooth.reshape(-1, 3).numpy())]).reshape(smooth.shape[:-1]).float()
    largest, smallest = (sign * functional.max_pool2d(sign * labels, 3, stride=1, padding=1) for sign in (1, -1))
    return labels.masked_fill(largest != smallest, IGNORED).to(torch.uint8)


def make_batch(photographs: Photographs, count: int, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut random squares out of the part for training, half of them mirrored: brightness, (count, 1, size, size), and masks."""
    brightness, masks = [], []
    for _ in range(count):
        k, top, left, is_mirrored = (
            int(torch.randint(length, (), generator=random))
            for length in (len(photographs.masks), HEIGHT - size + 1, photographs.seen - size + 1, 2)
        )
        for cuts, whole in ((brightness, photographs.brightness), (masks, photographs.masks)):
            square = whole[k, ..., top : top + size, left : left + size]
            cuts.append(square.flip(-1) if is_mirrored else square)
    return torch.stack(brightness), torch.stack(masks)


def class_weights(masks: Tensor) -> Tensor:
    """Return a weight for each class, larger for rare classes: the inverse root of its number of pixels, with mean 1."""
    counts = masks[masks != IGNORED].bincount(minlength=len(CLASSES))
    weights = counts.clamp(min=1).rsqrt()
    return weights / weights.mean()


def make_loss(by: str, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of logits and masks. fastloss takes uint8 masks as they are, and the gradient replaces the logits."""
    if by == "fastloss":
        return ft.CrossEntropyLoss(weight, ignore_index=IGNORED, inplace_grad=True)
    return lambda logits, masks: functional.cross_entropy(logits, masks.long(), weight, ignore_index=IGNORED)


@dataclass
class History:
    """The measurements of each step, and the scores of the steps that were scored."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # the numbers of the steps that were scored
    scores: list[list[float]] = field(default_factory=list)  # a number for each class


def train(model: UNet, photographs: Photographs, options: argparse.Namespace, report: Callable[[float], None]) -> History:
    """Train the model, report the loss of every step, and score the predictions for the held-out parts at regular intervals."""
    random = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=options.steps + 1, pct_start=0.1, cycle_momentum=False)
    criterion = make_loss(options.by, class_weights(photographs.masks[..., : photographs.seen]))
    history = History()
    for step in range(1, options.steps + 1):
        brightness, masks = make_batch(photographs, options.batch, options.size, random)
        begin = time.perf_counter()
        optimiser.zero_grad()
        logits = model(brightness)
        time_loss(logits, history.loss_seconds)
        loss = criterion(logits, masks)
        loss.backward()
        optimiser.step()
        schedule.step()
        history.step_seconds.append(time.perf_counter() - begin)
        history.losses.append(loss.item())
        if step % max(1, options.steps // SCORES) == 0:
            history.scored.append(step)
            history.scores.append(score(predict(model, photographs), photographs))
        report(history.losses[-1])
    return history


def time_loss(logits: Tensor, seconds: list[float]) -> None:
    """Record the time from here until the logits have their gradient: the loss, forward and backward."""
    begin = time.perf_counter()
    logits.register_hook(lambda _: seconds.append(time.perf_counter() - begin))


def predict(model: UNet, photographs: Photographs) -> Tensor:
    """Return the most probable class of every pixel."""
    model.eval()
    with torch.inference_mode():
        classes = model(photographs.brightness).argmax(dim=1)
    model.train()
    return classes


def score(predicted: Tensor, photographs: Photographs) -> list[float]:
    """Return each class's intersection over union, counted over the labelled pixels of the held-out parts."""
    masks = photographs.masks[..., photographs.seen :]
    labelled = masks != IGNORED
    pairs = len(CLASSES) * masks[labelled].long() + predicted[..., photographs.seen :][labelled]
    confusion = pairs.bincount(minlength=len(CLASSES) ** 2).reshape(len(CLASSES), len(CLASSES))
    both = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - both
    return (both / union.clamp(min=1)).tolist()


def paint(classes: Tensor) -> np.ndarray:
    """Return classes in their colours; ignored pixels are red."""
    colours = np.ones((IGNORED + 1, 3))
    colours[: len(CLASSES)] = [to_rgb(colour) for colour in CLASSES.values()]
    colours[IGNORED] = to_rgb(IGNORED_COLOUR)
    return colours[classes.numpy()]


def draw(history: History, photographs: Photographs, predicted: Tensor, options: argparse.Namespace) -> None:
    """Draw the learning curve and the scores above the photographs, their masks and the predictions."""
    figure = plt.figure(figsize=(11, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4, 5))
    draw_curves(top, history)
    bottom.suptitle("Right of the dashed lines: held out, never seen in training", fontsize="medium")
    grid = bottom.subplots(len(photographs.masks), 4)
    for k, row in enumerate(grid):
        taken = photographs.colours[k].numpy(), photographs.brightness[k, 0].numpy()
        for axes, image in zip(row, (*taken, paint(photographs.masks[k]), paint(predicted[k])), strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
            for colour, style in (("white", "-"), ("black", "--")):
                axes.axvline(photographs.seen, color=colour, linestyle=style, linewidth=1.2)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[0], ("photograph", "input", "mask", "prediction"), strict=True):
        axes.set_title(title)
    patches = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in CLASSES.items()]
    patches.append(Patch(facecolor=IGNORED_COLOUR, label="ignored"))
    bottom.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(options.out, dpi=110)
    plt.close(figure)


def draw_curves(figure: Any, history: History) -> None:
    """Draw the learning curve, and beside it the intersection over union of each class and their mean."""
    left, right = figure.subplots(1, 2)
    left.plot(np.arange(1, len(history.losses) + 1), history.losses, color="#0072b2", linewidth=0.8)
    left.set(title="Learning curve", xlabel="step", ylabel="cross-entropy (nats per pixel)", ylim=(0, None))
    for (name, colour), scores in zip(CLASSES.items(), np.transpose(history.scores), strict=True):
        right.plot(history.scored, scores, color=colour, marker="o", markersize=3, label=name)
    right.plot(history.scored, np.mean(history.scores, axis=1), color="#0072b2", linewidth=2.5, label="mean")
    right.set(title="Held-out parts", xlabel="step", ylabel="intersection over union", ylim=(0, 1))
    right.legend(frameon=False, loc="lower right", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


def summary(history: History, options: argparse.Namespace) -> str:
    """Return the measurements as text."""
    step, loss = np.median(history.step_seconds), np.median(history.loss_seconds)
    scores = ", ".join(f"{name} {x:.3f}" for name, x in zip(CLASSES, history.scores[-1], strict=True))
    return (
        f"loss, mean of the last steps: {np.mean(history.losses[-20:]):.4f}\n"
        f"mean intersection over union of the held-out parts: {np.mean(history.scores[-1]):.3f} ({scores})\n"
        f"training: {sum(history.step_seconds):.1f} s; median step: {1e3 * step:.1f} ms\n"
        f"  of which the loss by {options.by}, its gradient included: {1e3 * loss:.2f} ms, {loss / step:.1%}"
    )


def count(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def side(text: str) -> int:
    """Parse a size that can be halved three times and is no larger than the part of a photograph for training."""
    if not text.isdecimal() or int(text) % 8 or not 16 <= int(text) <= 384:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8 from 16 to 384")
    return int(text)


def picture(text: str) -> Path:
    """Parse the path of a picture that can be written."""
    path = Path(text)
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png in a folder that exists")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small U-Net to tell the colours of black-and-white photographs.")
    parser.add_argument("--size", type=side, default=64, help="pixels along an image (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=16, help="images per step (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=600, help="default: %(default)s")
    parser.add_argument("--by", choices=("fastloss", "torch"), default="fastloss", help="what computes the loss (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and of the crops (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="threads of PyTorch and of fastloss (default: the default of each)")
    parser.add_argument("--out", type=picture, default=Path("classes.png"), help="file for the picture (default: %(default)s)")
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
    draw(history, photographs, predict(model, photographs), options)
    console.print(f"picture: {options.out}", highlight=False)
    return history


if __name__ == "__main__":
    main()
