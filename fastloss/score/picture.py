"""The picture of a run: a histogram of the images' losses, and the worst images beside their targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fastloss.score.statistics import Values
from fastloss.score.thumbnails import Bytes

PAIRS = 4  # images in a row of the sheet, each beside its target
BINS = 60


class Shown(NamedTuple):
    """An image of the sheet."""

    title: str
    picture: Bytes
    target: Bytes


def draw(png: Path, values: Values, sheet: Sequence[Shown], note: str) -> None:
    """Write the picture to a file. The note says what is shown of the images in the sheet."""
    rows = math.ceil(len(sheet) / PAIRS)
    figure: Any = Figure(figsize=(11, 3 + 1.75 * rows), dpi=110, layout="constrained")
    if rows:
        parts = figure.subfigures(2, 1, height_ratios=(3, 1.75 * rows))
        draw_sheet(parts[1], sheet, note)
    draw_histogram(parts[0] if rows else figure, values)
    figure.savefig(png, format="png")


def draw_histogram(figure: Any, values: Values) -> None:
    """Draw how many images have which loss."""
    counts, edges = values.histogram(BINS)
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color="#0072b2")
    for share, style in ((0.5, "-"), (0.95, "--")):
        (at,) = values.quantiles((share,))
        if math.isfinite(at):
            axes.axvline(at, color="black", linestyle=style, linewidth=1, label=f"{share:.0%} of the images: at most {at:.4g}")
            axes.legend(frameon=False)
    axes.set(title=f"The losses of {values.count:,} images", xlabel="loss", ylabel="images")
    axes.spines[["top", "right"]].set_visible(False)


def draw_sheet(figure: Any, sheet: Sequence[Shown], note: str) -> None:
    """Draw images, and on the right of each its target."""
    figure.suptitle(f"The images with the largest losses, each with its target on the right{note}")
    grid = figure.subplots(math.ceil(len(sheet) / PAIRS), 2 * PAIRS, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for shown, pair in zip(sheet, grid.reshape(-1, 2), strict=False):
        for axes, x in zip(pair, (shown.picture, shown.target), strict=True):
            axes.imshow(x, cmap="gray", vmin=0, vmax=255)
        pair[0].set_title(shown.title, fontsize=7, loc="left")
