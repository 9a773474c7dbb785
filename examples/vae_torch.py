"""Train a convolutional variational autoencoder on crops of real photographs, in PyTorch; the part to copy is `train`.

python examples/vae_torch.py                 (needs PyTorch, scikit-learn, matplotlib and rich; about a minute)
python examples/vae_torch.py --by torch      the loss by PyTorch alone: the same learning curve, up to rounding
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import fastloss as fl
import fastloss.torch as ft

mpl.use("Agg")  # a file, and no screen
import matplotlib.pyplot as plt

HELD_OUT = 256  # columns at the right of each photograph, which are shown and never trained on
PATCH = 8  # pixels along a patch, whose colours become channels
SHOWN = 8
RATE = 2e-3
UNITS = {"bce": "nats an image", "mse": "squared error an image"}
# Where squared error stands for Gaussian pixels, beta is twice their variance: here the standard deviation is 0.05. Near
# p = 0.5 the cross-entropy rises twice as fast; its beta = 1 would take every pixel for a coin, and blur the pictures.
BETA = {"bce": 0.01, "mse": 0.005}


class Residual(nn.Module):
    """Two convolutions beside a straight way; at the start they add nothing, which keeps the first steps tame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return what was there and what is added."""
        return x + self.second(functional.silu(self.first(self.norm(x))))


class VAE(nn.Module):
    """Images in [0, 1], (N, 3, H, W), to the logits of their reconstruction, and the means and log-variances of their code.

    All layers are convolutions over patches: the code is (N, latents, H / 8, W / 8), for any multiples of 8.
    """

    def __init__(self, latents: int = 32, width: int = 96) -> None:
        super().__init__()
        colours = 3 * PATCH**2
        self.latents = latents
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(PATCH), nn.Conv2d(colours, width, 3, padding=1), Residual(width), nn.Conv2d(width, 2 * latents, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latents, width, 1), Residual(width), nn.Conv2d(width, colours, 3, padding=1), nn.PixelShuffle(PATCH)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, means and log-variances; the code is drawn at random in training, and is its mean otherwise."""
        mu, logvar = self.encoder(x - 0.5).chunk(2, dim=1)
        code = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return self.decoder(code), mu, logvar


class TorchVAELoss(nn.Module):
    """The objective and its two parts, as PyTorch alone computes them; images are floats in [0, 1]."""

    def __init__(self, reconstruction: str, beta: float) -> None:
        super().__init__()
        self.reconstruction, self.beta = reconstruction, beta

    def forward(self, logits: Tensor, images: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over pixels and latents, means over the batch."""
        if self.reconstruction == "bce":
            reconstruction = functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
        else:
            reconstruction = functional.mse_loss(torch.sigmoid(logits), images, reduction="sum") / len(images)
        divergence = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / len(images)
        return reconstruction + self.beta * divergence, reconstruction, divergence


def load_photographs() -> list[Tensor]:
    """Return scikit-learn's two sample photographs, (3, 427, 640), uint8."""
    return [torch.from_numpy(photograph.transpose(2, 0, 1).copy()) for photograph in load_sample_images().images]


def cut(photographs: Sequence[Tensor], count: int, size: int, random: torch.Generator) -> Tensor:
    """Cut random squares out of the photographs: (count, 3, size, size), uint8."""
    squares = []
    for k in range(count):
        photograph = photographs[k % len(photographs)]
        top, left = (int(torch.randint(length - size + 1, (), generator=random)) for length in photograph.shape[1:])
        squares.append(photograph[:, top : top + size, left : left + size])
    return torch.stack(squares)


@dataclass
class History:
    """What was measured in each step."""

    totals: list[float] = field(default_factory=list)
    reconstructions: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)  # the least that the reconstruction can be, of the same images
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)


def train(model: VAE, photographs: Sequence[Tensor], options: argparse.Namespace, report: Callable[[float], None]) -> History:
    """Train the model, and report the loss of every step."""
    random = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=options.steps + 1, pct_start=0.1, cycle_momentum=False)
    by_fastloss = options.by == "fastloss"
    if by_fastloss:  # uint8 images as they are; the gradient replaces the logits
        criterion = ft.VAELoss(options.loss, options.beta, target_scale=1 / 255, inplace_grad=True)
    else:
        criterion = TorchVAELoss(options.loss, options.beta)
    history = History()
    for _ in range(options.steps):
        images = cut(photographs, options.batch, options.size, random)
        begin = time.perf_counter()
        optimiser.zero_grad()
        x = images / 255
        logits, mu, logvar = model(x)
        time_loss(logits, history.loss_seconds)
        total, reconstruction, divergence = criterion(logits, images if by_fastloss else x, mu, logvar)
        total.backward()
        optimiser.step()
        schedule.step()
        history.step_seconds.append(time.perf_counter() - begin)
        history.totals.append(total.item())
        history.reconstructions.append(reconstruction.item())
        history.divergences.append(divergence.item())
        history.floors.append(floor(images, options.loss))
        report(history.totals[-1])
    return history


def time_loss(logits: Tensor, seconds: list[float]) -> None:
    """Note how long it takes from here until the logits have their gradient: the loss, forwards and backwards."""
    begin = time.perf_counter()
    logits.register_hook(lambda _: seconds.append(time.perf_counter() - begin))


def floor(images: Tensor, loss: str) -> float:
    """Return the least that the reconstruction of these images can cost: cross-entropy does not end at 0."""
    return fl.binary_entropy(images, target_scale=1 / 255, reduction="batchmean").item() if loss == "bce" else 0.0


def show(model: VAE, photographs: Sequence[Tensor], options: argparse.Namespace) -> dict[str, Tensor]:
    """Return rows of pictures in [0, 1]: images that were not trained on, what is made of them, and of noise."""
    random = torch.Generator().manual_seed(options.seed)
    images = torch.cat([varied(cut([photograph], 64, options.size, random) / 255) for photograph in photographs])
    model.eval()
    with torch.inference_mode():
        logits, mu, _ = model(images)
        sampled = model.decoder(torch.randn(mu.shape, generator=random))
    return {"held out": images, "reconstructed": torch.sigmoid(logits), "sampled": torch.sigmoid(sampled)}


def varied(images: Tensor) -> Tensor:
    """Return half as many images as are shown: of those with more contrast than most."""
    by_contrast = images.std(dim=(1, 2, 3)).argsort()
    return images[by_contrast[(torch.linspace(0.7, 1, SHOWN // 2) * (len(images) - 1)).long()]]


def draw(history: History, pictures: dict[str, Tensor], options: argparse.Namespace) -> None:
    """Draw the learning curve and its parts above the pictures."""
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    left, right = top.subplots(1, 2)
    floors, unit = np.array(history.floors), UNITS[options.loss]
    plot(left, history.totals, "#0072b2", "objective")
    if options.loss == "bce":
        plot(left, floors, "black", "its floor: the entropy of the images")
    left.set(title="Learning curve", xlabel="step", ylabel=unit, ylim=(0, None))
    above = np.array(history.reconstructions) - floors
    plot(right, above, "#0072b2", "reconstruction" + (" above the floor" if options.loss == "bce" else ""))
    plot(right, options.beta * np.array(history.divergences), "#d55e00", f"{options.beta:g} x divergence of the code")
    right.set(title="What it is made of", xlabel="step", ylabel=f"{unit}, logarithmic", yscale="log")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    for row, (label, images) in zip(bottom.subplots(len(pictures), SHOWN), pictures.items(), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(options.out, dpi=110)
    plt.close(figure)


def plot(axes: Axes, values: npt.ArrayLike, colour: str, label: str) -> None:
    """Draw what was measured in each step, pale, and the mean of the last 20 steps over it."""
    sums = np.cumsum(np.pad(values, (20, 0)))
    means = (sums[20:] - sums[:-20]) / np.minimum(np.arange(1, len(sums) - 19), 20)
    steps = np.arange(1, len(means) + 1)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, means, color=colour, label=label)


def summary(history: History, options: argparse.Namespace) -> str:
    """Return what is printed at the end."""
    last = slice(-20, None)
    total, reconstruction, divergence, floor = (
        np.mean(x[last]) for x in (history.totals, history.reconstructions, history.divergences, history.floors)
    )
    step, loss = np.median(history.step_seconds), np.median(history.loss_seconds)
    above = f", {reconstruction - floor:.1f} above the entropy of the images" if options.loss == "bce" else ""
    return (
        f"mean of the last steps, {UNITS[options.loss]}: {total:.1f}\n"
        f"  = {reconstruction:.1f} of reconstruction{above}\n"
        f"  + {options.beta:g} x {divergence:.1f} nats of divergence\n"
        f"training: {sum(history.step_seconds):.1f} s; median step: {1e3 * step:.1f} ms\n"
        f"  of which the loss by {options.by}, its gradient included: {1e3 * loss:.2f} ms, {loss / step:.1%}"
    )


def count(text: str) -> int:
    """Return a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def side(text: str) -> int:
    """Return a size that patches fill and photographs have."""
    if not text.isdecimal() or int(text) % PATCH or not 2 * PATCH <= int(text) <= HELD_OUT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {PATCH} from {2 * PATCH} to {HELD_OUT}")
    return int(text)


def weight(text: str) -> float:
    """Return a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number from 0 on")
    return value


def picture(text: str) -> Path:
    """Return the path of a picture that can be written."""
    path = Path(text)
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png in a folder that exists")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a variational autoencoder on crops of photographs.")
    parser.add_argument("--size", type=side, default=64, help="pixels along a crop (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=16, help="crops a step (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=1500, help="default: %(default)s")
    parser.add_argument("--loss", choices=UNITS, default="bce", help="what measures the reconstruction (default: %(default)s)")
    parser.add_argument("--beta", type=weight, help=f"weight of the divergence (default: {BETA['bce']} with bce, {BETA['mse']} with mse)")
    parser.add_argument("--by", choices=("fastloss", "torch"), default="fastloss", help="what computes the loss (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of model, crops and noise (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="of PyTorch and of fastloss (default: what each takes)")
    parser.add_argument("--out", type=picture, default=Path("vae.png"), help="where the picture goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.beta = BETA[options.loss] if options.beta is None else options.beta
    return options


def main(arguments: Sequence[str] | None = None) -> History:
    """Train, print what was measured, write the picture; return what was measured."""
    options, console = parse(arguments), Console()
    if options.threads:
        torch.set_num_threads(options.threads)
        fl.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, photographs = VAE(), load_photographs()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps, note="")
        history = train(
            model,
            [photograph[:, :, :-HELD_OUT] for photograph in photographs],
            options,
            lambda loss: progress.update(task, advance=1, note=f"{loss:.1f} {UNITS[options.loss]}"),
        )
    console.print(summary(history, options), highlight=False)
    draw(history, show(model, [photograph[:, :, -HELD_OUT:] for photograph in photographs], options), options)
    console.print(f"picture: {options.out}", highlight=False)
    return history


if __name__ == "__main__":
    main()
