"""Pictures of a results file: bars against the limit, time per element over size, memory, threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # a file, and no screen
import matplotlib.pyplot as plt
import numpy as np

from bench.cases import BCE, CURVE, MSE, Case
from bench.results import LIMITS, Measured, Results

# Okabe and Ito's colours, told apart by colour-blind readers too; lines have markers of their own besides
OURS, LIMIT, OTHERS = "#0072b2", "#000000", "#bbbbbb"
COLOURS = ["#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d00", "#999999", "#5d3a9b"]
MARKERS = "sD^vPX<>"
LOG_ROOM = 2.2  # of a logarithmic axis, right of the longest bar, for its label


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every picture that there are rows for; return their paths."""
    pictures = {"limit": bars, "size": curve, "memory": memory, "losses": losses}
    made = []
    for name, picture in pictures.items():
        figure = picture(results)
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=110)
            plt.close(figure)
    return made


def shown(measured: Measured) -> list[str]:
    """Return the rows of a case that a picture shows, the fastest first."""
    hidden = {"fastloss, plain", "fastloss, fresh gradient", "fastloss, in place", "limit: triad, prefetched"}
    return sorted(measured.rows.keys() - hidden, key=lambda name: measured.rows[name].median)


def colour(name: str) -> str:
    """Return a bar's colour: ours, the memory's, or that of all others."""
    return OURS if name.startswith("fastloss") else LIMIT if name.startswith("limit") else OTHERS


def bars(results: Results) -> Any:
    """Draw how many times as long as the limit every row takes, for BCE and MSE."""
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


def curve(results: Results) -> Any:
    """Draw the time per element over the number of elements."""
    cases = (Case(size=size) for size in CURVE)
    points = [results.measured[case] for case in cases if case in results.measured]
    if len(points) < 2:
        return None
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    names = dict.fromkeys(name for m in points for name in shown(m))
    others, ours = iter(zip(COLOURS, MARKERS, strict=True)), iter(("-", "--", "-."))
    for name in names:
        x = [m.case.elements for m in points if name in m.rows]
        y = [m.rows[name].median / m.case.elements * 1e9 for m in points if name in m.rows]
        if name.startswith("fastloss"):
            style = {"color": OURS, "marker": "o", "linewidth": 2.5, "linestyle": next(ours), "zorder": 3}
        elif name in LIMITS:
            style = {"color": LIMIT, "linestyle": ":", "marker": "."}
        else:
            shade, marker = next(others)
            style = {"color": shade, "marker": marker, "linewidth": 1.2}
        axes.plot(x, y, label=name, markersize=5, **style)
    axes.set(xscale="log", yscale="log", xlabel="elements of the batch", ylabel="nanoseconds an element")
    axes.set_title(f"BCE, value and gradient, float32, {results.machine['threads']} threads")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3.5)
    tidy(axes, "both")
    return figure


def memory(results: Results) -> Any:
    """Draw how much memory a call needs beside its arguments."""
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
    """Draw every loss: ours, and the fastest other, over the limit."""
    found = [m for m in results.measured.values() if m.case == results.headline(m.case.loss)]
    if len(found) < 3 or not any(m.rows.keys() & {"torch.compile", "torch eager", "NumPy, stable"} for m in found):
        return None
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    y = np.arange(len(found))
    drawn = ("fastloss, out=", "torch.compile", "JAX", "torch eager", "NumPy, stable")
    for name, shade, marker in zip(drawn, (OURS, *COLOURS[:3], OTHERS), "osD^v", strict=True):
        points = [(m.rows[name].median / m.limit.median, k) for k, m in enumerate(found) if name in m.rows]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=shade, label=name, markersize=8)
    axes.axvline(1, color=LIMIT, linewidth=1, linestyle=":", label="limit")
    axes.set(xscale="log", xlabel="time over the limit (logarithmic)", yticks=y, yticklabels=[m.case.subject.title for m in found])
    axes.invert_yaxis()
    axes.set_title(f"Value and gradient\n{subtitle(results, results.headline())}")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    tidy(axes, "x")
    axes.grid(axis="y", color="#eeeeee")
    return figure


def subtitle(results: Results, case: Case) -> str:
    """Return what a picture's rows have in common."""
    where = results.machine["gpu"] if results.is_gpu else f"{results.machine['threads']} threads, {results.machine['cpu']}"
    return f"{' x '.join(map(str, case.shape))}, {case.dtype}, {where}"


def tidy(axes: Any, logarithmic: str) -> None:
    """Take away what a reader does not need, and write numbers as such."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if logarithmic == "x" and axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.grid(axis="x", color="#dddddd")
    if logarithmic == "both":
        axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(color="#dddddd")
