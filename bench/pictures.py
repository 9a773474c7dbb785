"""Pictures of a results file: bars over the limit, times by batch size, memory, and every loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt
import numpy as np

from bench.cases import BCE, CURVE, MSE, SIZES, Case
from bench.goals import TENSORS
from bench.report import duration
from bench.results import PEERS, Measured, Results

# Okabe and Ito's colours and some more, which colour-blind readers can tell apart; each line also has a marker of its own
OURS, LIMIT, OTHERS = "#0072b2", "#000000", "#bbbbbb"
COLOURS = ["#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d00", "#999999", "#5d3a9b", "#117733"]
MARKERS = "sD^vPX<>h"
STYLES: dict[str, dict[str, Any]] = {"fastloss": {"color": OURS, "marker": "o", "linewidth": 2.5, "zorder": 3}} | {
    name: {"color": colour, "marker": marker, "linewidth": 1.2} for name, colour, marker in zip(PEERS, COLOURS, MARKERS, strict=True)
}
# the row of fastloss on arrays and that on tensors, and the rows compared with each
SETTINGS = {
    "fastloss, out=": [name for name in PEERS if not name.startswith("torch")],
    TENSORS: [name for name in PEERS if name.startswith("torch")],
}
ROOM = 5  # the least ratio between batch sizes whose times are written beside each other
LOG_ROOM = 2.2  # the end of a logarithmic axis over that of its longest bar, which leaves room for a label


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw each picture that the results have rows for; return the paths."""
    pictures = {"limit": bars, "size": sizes, "memory": memory, "losses": losses}
    made = []
    for name, picture in pictures.items():
        figure = picture(results)
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=110)
            plt.close(figure)
    return made


def shown(measured: Measured) -> list[str]:
    """Return the names of the rows of a case that a picture shows, the fastest first."""
    hidden = {"fastloss, plain", "fastloss, fresh gradient", "fastloss, in place", "limit: triad, prefetched"}
    return sorted(measured.rows.keys() - hidden, key=lambda name: measured.rows[name].median)


def colour(name: str) -> str:
    """Return the colour of a bar: one for fastloss, one for the limits, one for all other libraries."""
    return OURS if name.startswith("fastloss") else LIMIT if name.startswith("limit") else OTHERS


def bars(results: Results) -> Any:
    """Draw the time of each row over the limit, for BCE and MSE."""
    found = [results.measured[case] for loss in (BCE, MSE) if (case := results.headline(loss)) in results.measured]
    if not found:
        return None
    figure, all_axes = plt.subplots(1, len(found), figsize=(6.2 * len(found), 5), layout="constrained", squeeze=False)
    for axes, measured in zip(all_axes[0], found, strict=True):
        names = shown(measured)[::-1]
        limit = measured.limit.median
        ratios = [measured.rows[name].median / limit for name in names]
        quartiles = np.array([measured.rows[name].quartiles for name in names]).T / limit
        whiskers = np.abs(quartiles - ratios)
        axes.barh(names, ratios, color=[colour(name) for name in names], xerr=whiskers, error_kw={"elinewidth": 1, "ecolor": "#555555"})
        for y, (ratio, high) in enumerate(zip(ratios, quartiles[1], strict=True)):
            axes.text(high * 1.1, y, f"{ratio:.3g} x", va="center")
        axes.set(xscale="log", xlim=(0.5, max(ratios) * LOG_ROOM), xlabel="time over the limit (logarithmic; whiskers: quartiles)")
        axes.axvline(1, color=LIMIT, linewidth=1, linestyle=":")
        axes.set_title(f"{measured.case.subject.title}: value and gradient")
        tidy(axes, "x")
    figure.suptitle(subtitle(results, results.headline()))
    return figure


def sizes(results: Results) -> Any:
    """Draw the time of each library over that of fastloss, by batch size: a row of panels per loss, a column per kind of array."""
    found = [points for loss in (BCE, MSE) if (points := over_sizes(results, loss))]
    if not found:
        return None
    settings = [ours for ours in SETTINGS if any(ours in measured.rows for points in found for measured in points)]
    shape, size = (len(found), len(settings)), (1.5 + 5 * len(settings), 1 + 3.9 * len(found))
    figure, grid = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False)
    panels = [
        Panel(axes, [measured for measured in points if ours in measured.rows], ours, SETTINGS[ours])
        for row, points in zip(grid, found, strict=True)
        for axes, ours in zip(row, settings, strict=True)
    ]
    for panel in panels:
        panel.draw_ratios()
        panel.write_times()
    low = min(y for panel in panels for line in panel.axes.lines for y in line.get_ydata())
    grid[0, 0].set_ylim(bottom=low / 6)  # room for the markers of the fastest
    for panel in panels:
        panel.mark_fastest()
    for axes, ours in zip(grid[0], settings, strict=True):
        kind = "PyTorch tensors, through autograd" if ours == TENSORS else "CuPy arrays" if results.is_gpu else "NumPy arrays"
        axes.set_title(kind, pad=24)
    for axes, points in zip(grid[:, 0], found, strict=True):
        axes.set_ylabel(f"{points[0].case.subject.title}: time / time of fastloss")
    for axes in grid[-1]:
        axes.set_xlabel("elements of the batch (above: time of fastloss)")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    names = [name for name in STYLES if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside right center", frameon=False)
    figure.suptitle(f"Value and gradient, float32, {processor(results)}")
    return figure


def over_sizes(results: Results, loss: str) -> list[Measured]:
    """Return the cases of a loss on the curve in order of size; where there are fewer than two, those of the sizes of the table."""
    for names in (CURVE, SIZES):
        cases = (Case(loss, size=name) for name in names)
        found = [results.measured[case] for case in cases if case in results.measured]
        if len(found) > 1:
            return found
    return []


@dataclass(frozen=True)
class Panel:
    """Axes, the cases drawn in them in order of size, the name of the row of fastloss, and those of the rows compared with it."""

    axes: Any
    points: Sequence[Measured]
    ours: str
    others: Sequence[str]

    def draw_ratios(self) -> None:
        """Draw the times of the other rows over that of fastloss."""
        self.axes.plot([measured.case.elements for measured in self.points], [1] * len(self.points), label="fastloss", **STYLES["fastloss"])
        for name in self.others:
            drawn = [(m.case.elements, ratio) for m in self.points if (ratio := m.ratio(name, self.ours)) is not None]
            if drawn:
                self.axes.plot(*zip(*drawn, strict=True), label=name, **STYLES[name])
        self.axes.set(xscale="log", yscale="log")
        tidy(self.axes, "both")

    def write_times(self) -> None:
        """Write the times of fastloss above the panel, for as many sizes as there is room for."""
        written: list[Measured] = []
        for measured in self.points:
            if not written or measured.case.elements > ROOM * written[-1].case.elements:
                written.append(measured)
        above = self.axes.secondary_xaxis("top")
        times = [duration(measured.rows[self.ours].median) for measured in written]
        above.set_xticks([measured.case.elements for measured in written], times, fontsize=8, color=OURS)
        above.tick_params(length=0, which="both")
        above.spines["top"].set_visible(False)

    def mark_fastest(self) -> None:
        """Draw the marker of the fastest row at the bottom of each size that has several rows, and shade what is faster than fastloss."""
        for measured in self.points:
            names = [name for name in (self.ours, *self.others) if name in measured.rows]
            if len(names) > 1:
                fastest = min(names, key=lambda name: measured.rows[name].median)
                style = STYLES["fastloss" if fastest == self.ours else fastest]
                self.axes.plot(measured.case.elements, 0.05, transform=self.axes.get_xaxis_transform(), label="_fastest", **style)
        self.axes.axhspan(self.axes.get_ylim()[0], 1, color="#fbe9df", zorder=0)
        style = {"transform": self.axes.transAxes, "fontsize": 9, "color": "#555555"}
        self.axes.text(0.01, 0.1, "fastest at each size:", **style)
        self.axes.text(0.99, 0.1, "below 1: faster than fastloss", ha="right", **style)


def memory(results: Results) -> Any:
    """Draw the memory that a call allocates."""
    measured = results.measured.get(Case())
    if measured is None:
        return None
    extra = {name: multiple for name in measured.rows if (multiple := measured.memory(name)) is not None}
    if not extra:
        return None
    names = sorted(extra, key=lambda name: -extra[name])
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.barh(names, [extra[name] for name in names], color=[colour(name) for name in names])
    for y, name in enumerate(names):
        axes.text(extra[name] + 0.05, y, f"{extra[name]:.1f}", va="center")
    axes.set(xlabel="extra memory at its peak, in multiples of the logits (a fresh gradient is 1)")
    axes.set_xlim(0, max(extra.values()) * 1.1 + 0.2)
    axes.set_title(f"BCE, value and gradient\n{subtitle(results, Case())}")
    tidy(axes, "x")
    return figure


def losses(results: Results) -> Any:
    """Draw, for every loss, the times of fastloss and of other libraries over the limit."""
    found = [m for m in results.measured.values() if m.case == results.headline(m.case.loss)]
    if len(found) < 3 or not any(m.rows.keys() & {"torch.compile", "torch eager", "NumPy, stable"} for m in found):
        return None
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    y = np.arange(len(found))
    drawn = ("fastloss, out=", "torch.compile", "JAX", "torch eager", "NumPy, stable")
    for name in drawn:
        points = [(m.rows[name].median / m.limit.median, k) for k, m in enumerate(found) if name in m.rows]
        if points:
            style = STYLES[name.removesuffix(", out=")] | {"linestyle": "", "markersize": 8}
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.axvline(1, color=LIMIT, linewidth=1, linestyle=":", label="limit")
    axes.set(xscale="log", xlabel="time over the limit (logarithmic)", yticks=y, yticklabels=[label(m.case) for m in found])
    axes.invert_yaxis()
    axes.set_title(f"Value and gradient\n{subtitle(results, results.headline())}")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy(axes, "x")
    axes.grid(axis="y", color="#eeeeee")
    return figure


def label(case: Case) -> str:
    """Return the title of a case's loss, for losses of classes with their shape."""
    return f"{case.subject.title}, {' x '.join(map(str, case.shape))}" if case.subject.classes else case.subject.title


def subtitle(results: Results, case: Case) -> str:
    """Return the shape, dtype and processor of a case."""
    return f"{' x '.join(map(str, case.shape))}, {case.dtype}, {processor(results)}"


def processor(results: Results) -> str:
    """Return the name of the GPU, or that of the CPU with the number of threads."""
    return str(results.machine["gpu"]) if results.is_gpu else f"{results.machine['threads']} threads, {results.machine['cpu']}"


def tidy(axes: Any, logarithmic: str) -> None:
    """Remove two sides of the frame, draw a grid, and write ticks of logarithmic axes as plain numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if logarithmic == "x" and axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.grid(axis="x", color="#dddddd")
    if logarithmic == "both":
        axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(color="#dddddd")
