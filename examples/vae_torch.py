"""Train a variational autoencoder in PyTorch on handwritten digits or on crops of photographs; the part to copy is `train`.

python examples/vae_torch.py                      (needs PyTorch, scikit-learn, matplotlib and rich; less than a minute)
python examples/vae_torch.py --data photographs   larger images in colour (about a minute)
python examples/vae_torch.py --by torch           the loss by PyTorch alone: the same learning curve, up to rounding
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
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional

import fastloss as fl
import fastloss.torch as ft

mpl.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt

HELD_OUT_DIGITS = 297  # of 1,797
HELD_OUT_COLUMNS = 256  # at the right of each photograph
PATCH = 8  # pixels along a patch; the pixels of a patch become the channels of the first layer
SHOWN = 12
RATE = 2e-3
# Cross-entropy with beta = 1 models each pixel as the toss of a coin, which blurs the pictures. Squared error with a weight beta
# models pixels as Gaussian variables of variance beta / 2.
BETA = {
    "digits": {"bce": 0.3, "mse": 0.05},
    "photographs": {"bce": 0.01, "mse": 0.005},
}
UNITS = {"bce": "nats per image", "mse": "squared error per image"}
OBJECTIVE, RECONSTRUCTION, DIVERGENCE, FLOOR = "#000000", "#0072b2", "#d55e00", "#cccccc"  # colours


class Residual(nn.Module):
    """Two convolutions beside a skip connection; the second starts at zero, so that the block starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input plus the output of the convolutions."""
        return x + self.second(functional.silu(self.first(self.norm(x))))


class VAE(nn.Module):
    """Map images in [0, 1], (N, colours, H, W), to the logits of their reconstruction and the means and log-variances of their code.

    All layers are convolutions over patches: the code is (N, latents, H / patch, W / patch), for any multiples of `patch`. A digit is
    a single patch, and its code is a single vector.
    """

    def __init__(self, colours: int = 3, latents: int = 32, width: int = 96, patch: int = PATCH) -> None:
        super().__init__()
        channels = colours * patch**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(channels, width, 3, padding=1), Residual(width), nn.Conv2d(width, 2 * latents, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latents, width, 1), Residual(width), nn.Conv2d(width, channels, 3, padding=1), nn.PixelShuffle(patch)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, means and log-variances. The decoder gets a random code in training, and the mean in evaluation."""
        mu, logvar = self.encoder(x - 0.5).chunk(2, dim=1)
        code = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return self.decoder(code), mu, logvar


class TorchVAELoss(nn.Module):
    """Compute the objective and its two parts by PyTorch alone; images are floats in [0, 1]."""

    def __init__(self, reconstruction: str, beta: float) -> None:
        super().__init__()
        self.reconstruction, self.beta = reconstruction, beta

    def forward(self, logits: Tensor, images: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective, the reconstruction loss and the divergence: sums over pixels or latents, means over the batch."""
        if self.reconstruction == "bce":
            reconstruction = functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
        else:
            reconstruction = functional.mse_loss(torch.sigmoid(logits), images, reduction="sum") / len(images)
        divergence = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / len(images)
        return reconstruction + self.beta * divergence, reconstruction, divergence


class Digits:
    """Scikit-learn's handwritten digits: 8 x 8 pixels, uint8 from 0 (paper) to 16 (ink)."""

    colours, largest = 1, 16
    batch, steps = 128, 3000

    def __init__(self, seed: int) -> None:
        images = torch.from_numpy(load_digits().images.astype(np.uint8)).unsqueeze(1)
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
        self.held_out, self.training = images[:HELD_OUT_DIGITS], images[HELD_OUT_DIGITS:]

    def random_batch(self, count: int, random: torch.Generator) -> Tensor:
        """Return random digits to train on: (count, 1, 8, 8), uint8."""
        return self.training[torch.randint(len(self.training), (count,), generator=random)]

    def shown(self, _random: torch.Generator) -> Tensor:
        """Return held-out digits for the picture."""
        return self.held_out[:SHOWN]


class Photographs:
    """Random crops of scikit-learn's two sample photographs: uint8 from 0 to 255."""

    colours, largest = 3, 255
    batch, steps, size = 16, 1500, 64

    def __init__(self, size: int) -> None:
        photographs = load_photographs()
        self.size = size
        self.training = [photograph[:, :, :-HELD_OUT_COLUMNS] for photograph in photographs]
        self.held_out = [photograph[:, :, -HELD_OUT_COLUMNS:] for photograph in photographs]

    def random_batch(self, count: int, random: torch.Generator) -> Tensor:
        """Return random crops to train on: (count, 3, size, size), uint8."""
        return cut(self.training, count, self.size, random)

    def shown(self, random: torch.Generator) -> Tensor:
        """Return crops of the held-out columns for the picture, chosen among many for their contrast."""
        return torch.cat([by_contrast(cut([photograph], 64, self.size, random)) for photograph in self.held_out])


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


def by_contrast(images: Tensor) -> Tensor:
    """Choose half of the images to show, among those with the most contrast."""
    order = images.float().std(dim=(1, 2, 3)).argsort()
    return images[order[(torch.linspace(0.7, 1, SHOWN // 2) * (len(images) - 1)).long()]]


@dataclass
class History:
    """The measurements of each step."""

    totals: list[float] = field(default_factory=list)
    reconstructions: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)  # the least possible reconstruction loss of the same images
    step_seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)


def train(model: VAE, data: Digits | Photographs, options: argparse.Namespace, report: Callable[[float], None]) -> History:
    """Train the model, and report the loss of every step."""
    random = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=options.steps + 1, pct_start=0.1, cycle_momentum=False)
    by_fastloss = options.by == "fastloss"
    if by_fastloss:  # fastloss takes the uint8 images as they are; the gradient replaces the logits
        criterion = ft.VAELoss(options.loss, options.beta, target_scale=1 / data.largest, inplace_grad=True)
    else:
        criterion = TorchVAELoss(options.loss, options.beta)
    history = History()
    for _ in range(options.steps):
        images = data.random_batch(options.batch, random)
        begin = time.perf_counter()
        optimiser.zero_grad()
        x = images / data.largest
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
        history.floors.append(floor(images, data.largest, options.loss))
        report(history.totals[-1])
    return history


def time_loss(logits: Tensor, seconds: list[float]) -> None:
    """Record the time from here until the logits have their gradient: the loss, forward and backward."""
    begin = time.perf_counter()
    logits.register_hook(lambda _: seconds.append(time.perf_counter() - begin))


def floor(images: Tensor, largest: int, loss: str) -> float:
    """Return the reconstruction loss of a perfect reconstruction: the entropy of the images for cross-entropy, 0 for squared error."""
    return fl.binary_entropy(images, target_scale=1 / largest, reduction="batchmean").item() if loss == "bce" else 0.0


def show(model: VAE, data: Digits | Photographs, seed: int) -> list[tuple[str, Tensor]]:
    """Return labels and rows of pictures in [0, 1]: images that the model was not trained on, their reconstructions, and samples.

    Photographs have no samples: their code is a map of vectors, which are independent under the prior, so the decoder would make
    patches that do not fit together. The code of a digit is a single vector.
    """
    random = torch.Generator().manual_seed(seed)
    images = data.shown(random) / data.largest
    model.eval()
    with torch.inference_mode():
        logits, mu, _ = model(images)
        rows = [("held out", images), ("reconstructed", torch.sigmoid(logits))]
        if mu.shape[2:] == (1, 1):  # (N, latents, 1, 1)
            rows += [("sampled", sample(model, mu.shape, random)), ("", sample(model, mu.shape, random))]
    return rows


def sample(model: VAE, shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Return the images that the decoder makes of codes drawn from the prior."""
    return torch.sigmoid(model.decoder(torch.randn(shape, generator=random)))


def draw(history: History, rows: Sequence[tuple[str, Tensor]], options: argparse.Namespace) -> None:
    """Draw the learning curve and its parts above the pictures."""
    figure = plt.figure(figsize=(11, 5 + len(rows)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, len(rows)))
    left, right = top.subplots(1, 2)
    draw_curves(left, history, options)
    draw_parts(right, history, options)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    for row, (label, images) in zip(bottom.subplots(len(rows), SHOWN), rows, strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")  # smooths 8 x 8 pixels
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(options.out, dpi=110)
    plt.close(figure)


def draw_curves(axes: Axes, history: History, options: argparse.Namespace) -> None:
    """Draw the objective and its parts on a logarithmic axis, above the floor that no training can go below."""
    floors = np.array(history.floors)
    plot(axes, np.array(history.totals) - floors, OBJECTIVE, "objective")
    plot(axes, np.array(history.reconstructions) - floors, RECONSTRUCTION, "reconstruction")
    plot(axes, options.beta * np.array(history.divergences), DIVERGENCE, f"{options.beta:g} x divergence of the code")
    title = "Learning curve, above the entropy of the images" if options.loss == "bce" else "Learning curve"
    axes.legend(frameon=False, loc="upper right")
    axes.set(title=title, ylabel=f"{UNITS[options.loss]}, logarithmic", yscale="log")


def plot(axes: Axes, values: npt.ArrayLike, colour: str, label: str) -> None:
    """Draw the value of each step, pale, and the mean of the last 20 steps over it."""
    means = running_mean(values)
    steps = np.arange(1, len(means) + 1)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, means, color=colour, label=label)


def running_mean(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the mean of the last 20 steps, or of as many as there are."""
    sums = np.cumsum(np.pad(values, (20, 0)))
    return (sums[20:] - sums[:-20]) / np.minimum(np.arange(1, len(sums) - 19), 20)


def draw_parts(axes: Axes, history: History, options: argparse.Namespace) -> None:
    """Draw the parts of the objective as stacked bands, the lowest of which is the floor."""
    floors = np.array(history.floors)
    bands = [
        (floors, FLOOR, "floor: the entropy of the images"),
        (np.array(history.reconstructions) - floors, RECONSTRUCTION, "reconstruction above its floor"),
        (options.beta * np.array(history.divergences), DIVERGENCE, f"{options.beta:g} x divergence of the code"),
    ]
    if options.loss == "mse":  # its floor is 0
        bands = [(values, colour, label.removesuffix(" above its floor")) for values, colour, label in bands[1:]]
    values, colours, labels = zip(*bands, strict=True)
    axes.stackplot(np.arange(1, len(floors) + 1), *map(running_mean, values), colors=colours, labels=labels)
    axes.legend(frameon=False, loc="upper right", reverse=True)
    axes.set(title="Parts of the objective", ylabel=UNITS[options.loss], ylim=(0, None))


def summary(history: History, options: argparse.Namespace) -> str:
    """Return the measurements as text."""
    last = slice(-20, None)
    total, reconstruction, divergence, floor = (
        np.mean(x[last]) for x in (history.totals, history.reconstructions, history.divergences, history.floors)
    )
    step, loss = np.median(history.step_seconds), np.median(history.loss_seconds)
    above = f", {reconstruction - floor:.1f} above the entropy of the images" if options.loss == "bce" else ""
    return (
        f"mean of the last 20 steps, {UNITS[options.loss]}: {total:.1f}\n"
        f"  = {reconstruction:.1f} of reconstruction{above}\n"
        f"  + {options.beta:g} x {divergence:.1f} nats of divergence\n"
        f"training: {sum(history.step_seconds):.1f} s; median step: {1e3 * step:.1f} ms\n"
        f"  of which the loss by {options.by}, its gradient included: {1e3 * loss:.2f} ms, {loss / step:.1%}"
    )


def count(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def side(text: str) -> int:
    """Parse a size that is a whole number of patches and no larger than the held-out part of a photograph."""
    if not text.isdecimal() or int(text) % PATCH or not 2 * PATCH <= int(text) <= HELD_OUT_COLUMNS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {PATCH} from {2 * PATCH} to {HELD_OUT_COLUMNS}")
    return int(text)


def weight(text: str) -> float:
    """Parse a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number from 0 on")
    return value


def picture(text: str) -> Path:
    """Parse the path of a picture that can be written."""
    path = Path(text)
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png in a folder that exists")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults of some options depend on the data."""
    parser = argparse.ArgumentParser(description="Train a variational autoencoder on digits or on crops of photographs.")
    parser.add_argument("--data", choices=BETA, default="digits", help="default: %(default)s")
    parser.add_argument("--size", type=side, help=f"pixels along a crop of a photograph (default: {Photographs.size})")
    parser.add_argument("--batch", type=count, help=f"images per step (default: {Digits.batch} digits or {Photographs.batch} crops)")
    parser.add_argument("--steps", type=count, help=f"default: {Digits.steps} with digits, {Photographs.steps} with crops")
    parser.add_argument("--loss", choices=UNITS, default="bce", help="the loss of the reconstruction (default: %(default)s)")
    parser.add_argument("--beta", type=weight, help="weight of the divergence (default: depends on the data and the loss)")
    parser.add_argument("--by", choices=("fastloss", "torch"), default="fastloss", help="what computes the loss (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model, data and noise (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="threads of PyTorch and of fastloss (default: the default of each)")
    parser.add_argument("--out", type=picture, default=Path("vae.png"), help="file for the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.size and options.data == "digits":
        parser.error("--size is for photographs: digits have 8 x 8 pixels")
    usual = Digits if options.data == "digits" else Photographs
    options.batch = options.batch or usual.batch
    options.steps = options.steps or usual.steps
    options.beta = BETA[options.data][options.loss] if options.beta is None else options.beta
    return options


def main(arguments: Sequence[str] | None = None) -> History:
    """Train the model, print and return the measurements, and write the picture."""
    options, console = parse(arguments), Console()
    if options.threads:
        torch.set_num_threads(options.threads)
        fl.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = Digits(options.seed) if options.data == "digits" else Photographs(options.size or Photographs.size)
    model = VAE(data.colours)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps, note="")
        history = train(model, data, options, lambda loss: progress.update(task, advance=1, note=f"{loss:.1f} {UNITS[options.loss]}"))
    console.print(summary(history, options), highlight=False)
    draw(history, show(model, data, options.seed), options)
    console.print(f"picture: {options.out}", highlight=False)
    return history


if __name__ == "__main__":
    main()
