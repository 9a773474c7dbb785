"""Why can cross-entropy train an autoencoder, when it does not end at zero? A picture of the answer.

Two autoencoders learn the same patches of real photographs from the same start, whose outputs are saturated: one by binary
cross-entropy, one by squared error behind the sigmoid. Cross-entropy does not end at 0 but near its floor, the entropy of
the images, and its gradient is alive from the first step; that of squared error is multiplied by p (1 - p) and sleeps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_sample_images

import fastloss as fl
from fastloss import reference

mpl.use("Agg")  # a file, and no screen
import matplotlib.pyplot as plt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SIZE = 16  # pixels along a patch
BATCH = 1024
HIDDEN = 96
START = -7.0  # every output's first logit: p = 0.0009, an almost black picture
RATE, MOMENTUM = 6e-3, 0.9
PIXELS: dict[str, Any] = {"target_scale": 1 / 255, "reduction": "batchmean"}  # uint8 images as they are; sum over pixels, mean over patches
SHOWN = 8
COMPARED = 10  # NumPy's loss is timed beside ours in every tenth step


def cut_patches() -> Bytes:
    """Cut scikit-learn's two sample photographs into overlapping patches, shuffled: (patches, 3 * SIZE * SIZE)."""
    photographs: list[Bytes] = load_sample_images().images
    windows = [sliding_window_view(photograph, (SIZE, SIZE), (0, 1))[::6, ::6] for photograph in photographs]
    patches = np.concatenate([w.reshape(-1, 3 * SIZE * SIZE) for w in windows])
    np.random.default_rng(0).shuffle(patches)
    return patches


def varied(patches: Bytes) -> Bytes:
    """Return a few patches to show, from rather plain to full of contrast."""
    contrast = patches[:BATCH].reshape(BATCH, 3, -1).std(axis=2).mean(axis=1)
    chosen = np.argsort(contrast)[np.linspace(BATCH // 3, BATCH - 1, SHOWN).astype(int)]
    shown: Bytes = patches[chosen]
    return shown


class Autoencoder:
    """Two layers, with plain gradient descent and momentum, in NumPy."""

    def __init__(self, pixels: int) -> None:
        rng = np.random.default_rng(1)
        self.parameters = [
            (rng.standard_normal((pixels, HIDDEN)) * 4 / np.sqrt(pixels)).astype(np.float32),
            np.zeros(HIDDEN, np.float32),
            (rng.standard_normal((HIDDEN, pixels)) / HIDDEN).astype(np.float32),
            np.full(pixels, START, np.float32),
        ]
        self.momenta = [np.zeros_like(p) for p in self.parameters]

    def forward(self, images: Bytes) -> tuple[Floats, Floats, Floats]:
        """Return the scaled images, the code, and the logits of the reconstruction."""
        encode, encode_bias, decode, decode_bias = self.parameters
        x = images * np.float32(1 / 255) - np.float32(0.5)
        code = np.tanh(x @ encode + encode_bias)
        return x, code, code @ decode + decode_bias

    def backward(self, x: Floats, code: Floats, slope: Floats) -> None:
        """Take a step down the loss, given its gradient with respect to the logits."""
        inner = (slope @ self.parameters[2].T) * (1 - code * code)
        gradients = [x.T @ inner, inner.sum(axis=0), code.T @ slope, slope.sum(axis=0)]
        for parameter, momentum, gradient in zip(self.parameters, self.momenta, gradients, strict=True):
            momentum *= MOMENTUM
            momentum -= RATE * gradient
            parameter += momentum


@dataclass
class Training:
    """One loss's autoencoder, and what was measured while it learned."""

    name: str
    loss: Any
    numpy_loss: Any
    model: Autoencoder
    losses: list[float] = field(default_factory=list)
    pixel_errors: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    numpy_seconds: list[float] = field(default_factory=list)

    def step(self, images: Bytes) -> None:
        """Learn from one batch; the gradient replaces the logits."""
        x, code, logits = self.model.forward(images)
        self.pixel_errors.append(float(fl.mse_with_logits_loss(logits, images, target_scale=1 / 255)))
        if len(self.losses) % COMPARED == 0:
            self.time_numpy(logits, images)
        begin = time.perf_counter()
        value, slope = self.loss.value_and_grad(logits, images, out=logits, **PIXELS)
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(float(value))
        self.slopes.append(float(np.abs(slope).max()) * BATCH)
        self.model.backward(x, code, slope)

    def time_numpy(self, logits: Floats, images: Bytes) -> None:
        """Time the same loss in NumPy, float copy of the images not counted."""
        targets = images * np.float32(1 / 255)
        begin = time.perf_counter()
        reference.value_and_grad(self.numpy_loss, logits, targets)
        self.numpy_seconds.append(time.perf_counter() - begin)

    def reconstruct(self, images: Bytes) -> Floats:
        """Return the pictures that the model makes of images, in [0, 1]."""
        return reference.sigmoid(self.model.forward(images)[2])


def run(steps: int, png: Path) -> int:
    """Train both, print what was measured, write the picture; return the exit status."""
    console = Console()
    if not png.resolve().parent.is_dir():
        console.print(f"the folder {png.resolve().parent} for the picture does not exist", style="red")
        return 1
    patches = cut_patches()
    console.print(
        f"{len(patches):,} patches of {SIZE} x {SIZE} pixels in 3 colours, uint8; batches of {BATCH}; {fl.get_num_threads()} threads"
    )
    trainings = [
        Training(
            "cross-entropy", fl.binary_cross_entropy_with_logits, reference.binary_cross_entropy_with_logits, Autoencoder(patches.shape[1])
        ),
        Training("squared error", fl.mse_with_logits_loss, reference.mse_with_logits_loss, Autoencoder(patches.shape[1])),
    ]
    floor = float(fl.binary_entropy(patches, **PIXELS))
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        for training in trainings:
            train(training, patches, steps, progress)
    console.print(summary(trainings, floor))
    draw(trainings, floor, varied(patches), png)
    console.print(f"picture: {png}")
    return 0


def train(training: Training, patches: Bytes, steps: int, progress: Progress) -> None:
    """Take the steps, batch after batch, with a progress bar."""
    task = progress.add_task(training.name, total=steps, note="")
    for step in range(steps):
        first = step * BATCH % (len(patches) - BATCH + 1)
        training.step(patches[first : first + BATCH])
        progress.update(task, advance=1, note=f"pixel error {training.pixel_errors[-1] ** 0.5:.3f}")


def summary(trainings: list[Training], floor: float) -> Table:
    """Return the table that the demo prints: a row for each quantity, a column for each training."""
    table = Table(title="sums over a patch's pixels, means over patches")
    for heading in ("", *(training.name for training in trainings)):
        table.add_column(heading, justify="right" if heading else "left")
    times = [tuple(float(np.median(s)) * 1e3 for s in (training.seconds, training.numpy_seconds)) for training in trainings]
    rows: dict[str, list[str]] = {
        "loss, first step": [f"{training.losses[0]:.1f}" for training in trainings],
        "loss, mean of the last 20 steps": [f"{np.mean(training.losses[-20:]):.1f}" for training in trainings],
        "least loss there is": [f"{floor:.1f} (entropy)", "0.0"],
        "largest slope, first step": [f"{training.slopes[0]:.5f}" for training in trainings],
        "pixel error at the end, rms": [f"{np.mean(training.pixel_errors[-20:]) ** 0.5:.3f}" for training in trainings],
        "time in the loss, median of a step": [f"{ours:.2f} ms" for ours, _ in times],
        "the same in NumPy": [f"{numpy:.2f} ms" for _, numpy in times],
        "ratio": [f"{numpy / ours:.0f} x" for ours, numpy in times],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def draw(trainings: list[Training], floor: float, images: Bytes, png: Path) -> None:
    """Draw both learning curves above originals and reconstructions."""
    colours = ("#0072b2", "#d55e00")  # told apart by colour-blind readers too
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 0.8))
    left, right = top.subplots(1, 2)
    left.plot(trainings[0].losses, color=colours[0], label="cross-entropy in training")
    left.axhline(floor, color="black", linestyle="--", label="its floor: the entropy of the images")
    left.set(title="Cross-entropy ends near its floor, not at 0", xlabel="step", ylabel="nats per patch", ylim=(0, None))
    for training, colour in zip(trainings, colours, strict=True):
        right.plot(np.sqrt(training.pixel_errors), color=colour, label=f"trained with {training.name}")
    right.set(
        title="From a saturated start, squared error learns late", xlabel="step", ylabel="pixel error, root mean square", ylim=(0, None)
    )
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    rows: list[tuple[str, Any]] = [("original", images / 255), *((training.name, training.reconstruct(images)) for training in trainings)]
    for row, (label, pictures) in zip(bottom.subplots(len(rows), len(images)), rows, strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture.reshape(3, SIZE, SIZE).transpose(1, 2, 0))
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(png, dpi=110)
    plt.close(figure)
