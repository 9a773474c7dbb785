"""Write the tables and draw the pictures of the losses: `python -m docs.losses`.

With `--check`, nothing is written, and an outdated table is an error. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tabulate import tabulate

import fastloss as fl
from bench.page import replace_block
from fastloss.formula import OPTIONS
from fastloss.losses.table import LOSSES, Row
from tests.exhaustive import MEASURED, PATHS, beside_bound
from tests.ulp import QUANTITIES, ULP

Array = npt.NDArray[np.float64]
ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "losses"


def main() -> None:
    """Write every table and picture, or only check the tables."""
    parser = argparse.ArgumentParser(prog="python -m docs.losses", description="Write the tables and draw the pictures of the losses.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    if parser.parse_args().check:
        sys.exit("\n".join(outdated()) or None)
    for name, (file, table) in TABLES.items():
        file.write_text(replaced(file.read_text(), name, table()))
    PICTURES.mkdir(exist_ok=True)
    for name, picture in DRAWN.items():
        draw(name, picture())


# Tables


def outdated() -> list[str]:
    """Return a message for every table that is out of date."""
    stale = [(name, file) for name, (file, table) in TABLES.items() if replaced(file.read_text(), name, table()) != file.read_text()]
    return [f"{file.relative_to(ROOT)}: the table '{name}' is out of date; run python -m docs.losses" for name, file in stale]


def replaced(text: str, name: str, table: str) -> str:
    """Return a page's text with the table between its two marks."""
    return replace_block(text, name, "docs/losses.py", table)


def table_of(rows: Iterable[list[str]], header: list[str]) -> str:
    """Return a table in Markdown."""
    return str(tabulate(list(rows), header, tablefmt="github", disable_numparse=True))


def loss_table() -> str:
    """Return the table of every loss with its input and its parameters."""
    rows = ([f"`{call(row)}`", row.input, parameters(row)] for row in LOSSES.values())
    table = table_of(rows, ["loss", "input", "parameters"])
    return re.sub(r"( |---)[ -]*\|$", r"\1|", table, flags=re.MULTILINE)  # the README is short of space


def overview_list() -> str:
    """Return the list that says when to choose which loss. As a table, it would be too wide for a phone."""
    return "\n".join(f"- [`{name}`](#{name}): {row.purpose}" for name, row in LOSSES.items())


def accuracy_table() -> str:
    """Return the table of the largest errors, a row for each loss and each way to call it."""
    names = dict.fromkeys(name for name, _ in ULP if name.split(",")[0] in LOSSES)
    rows = ([code(name), *(largest_error(name, quantity) for quantity in QUANTITIES)] for name in names)
    return table_of(rows, ["loss", "value", "gradient", "second derivative"])


def largest_error(name: str, quantity: str) -> str:
    """Return the error bound of a quantity as text, or both bounds for a loss with two gradients."""
    allowed = ulps(ULP.get((name, quantity), ()))
    second = ULP.get((name, f"target_{quantity}"))
    return allowed if second is None else f"{allowed} by mu, {ulps(second)} by logvar"


def measured_table() -> str:
    """Return the table of the largest errors that `python -m tests.exhaustive` has found. Code paths with the same errors share a row."""
    records, rows = json.loads(MEASURED.read_text()), dict[tuple[str, ...], list[str]]()
    for formula in dict.fromkeys(record["formula"] for record in records):
        for record in sorted((x for x in records if x["formula"] == formula), key=lambda x: PATHS.index(x["code path"])):
            rows.setdefault((formula, f"{record['pairs']:,}", *shown_errors(record)), []).append(record["code path"])
    headings = ["formula", "code paths", "pairs", "value", "gradient", "second derivative"]
    return table_of(([formula_of(name), ", ".join(paths), *cells] for (name, *cells), paths in rows.items()), headings)


def shown_errors(record: dict[str, Any]) -> list[str]:
    """Return each error of a sweep with the promised bound."""
    errors = [beside_bound(error["error"], error["bound"]) for error in record["errors"].values()]
    return [*errors, *[""] * (len(QUANTITIES) - len(errors))]


def formula_of(sweep: str) -> str:
    """Set the loss's name at the begin of a sweep's name as code."""
    name, *rest = sweep.split(", ", 1)
    return ", ".join([f"`{name}`", *rest])


def code(name: str) -> str:
    """Set a loss's name, and the parameter or dtype after it, as code."""
    return ", ".join(f"`{word}`" for word in name.split(", "))


def ulps(limits: Any) -> str:
    """Return the bounds for targets 0 and 1 and for soft targets as text; equal bounds appear once."""
    texts = [f"{limit:g}" if limit else "exact" for limit in (limits if isinstance(limits, tuple) else (limits,))]
    return ", soft ".join(dict.fromkeys(texts))


def call(row: Row) -> str:
    """Return a loss's name, followed by its arguments if they are not an input and a target."""
    arguments = [p.name for p in inspect.signature(row.loss).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    return row.name if arguments == ["input", "target"] else f"{row.name}({', '.join(arguments)})"


def parameters(row: Row) -> str:
    """Return the parameters that only this loss has, with their defaults."""
    found = inspect.signature(row.loss).parameters.values()
    own = [p for p in found if p.default is not p.empty and p.name not in ("weight", "reduction", *OPTIONS)]
    # a default reduction that differs from that of most losses
    own += [p for p in found if p.name == "reduction" and p.default != "mean"]
    return ", ".join(f"`{p.name}`" if p.default is None else f"`{p.name}={default(p.default)}`" for p in own)


def default(value: Any) -> str:
    """Return a default value as it is typed in a call, without a trailing .0."""
    return f"{value:g}" if isinstance(value, float) else f'"{value}"' if isinstance(value, str) else str(value)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "losses": (ROOT / "README.md", loss_table),
    "accuracy": (ROOT / "docs" / "accuracy.md", accuracy_table),
    "measured": (ROOT / "docs" / "reliability.md", measured_table),
    "overview": (ROOT / "docs" / "losses.md", overview_list),
}


# Pictures


class Line(NamedTuple):
    """One curve of each panel, with their common label."""

    label: str
    value: Array
    gradient: Array


class Picture(NamedTuple):
    """Two panels side by side, over the same axis."""

    axis: str
    x: Array
    lines: Iterable[Line]
    limits: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
    titles: tuple[str, str] = ("value", "gradient")
    mark: Callable[[Axes, Axes], None] | None = None  # draws additional marks


# Colours by Okabe and Ito, "Color Universal Design", 2008: distinct for colour-blind readers; the strokes differ for print
STROKES = (("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":"))
GREY = "#555555"
SHORT = 20  # the most characters of a label with which all labels fit in one line below the panels
LOGITS = np.linspace(-6, 6, 601)
ERRORS = np.linspace(-3, 3, 601)
PROBABILITIES = np.linspace(0, 1, 2001)
SOFT = 0.25  # a target between 0 and 1
IMAGE = 0.1  # the target for cross-entropy and squared error: at 0.25, the two limits H(t) and (1 - t)**2 nearly coincide


def draw(name: str, picture: Picture) -> None:
    """Draw a picture into its file."""
    figure = Figure(figsize=(6, 3), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    panels = figure.subplots(1, 2)
    for line, (colour, stroke) in zip(picture.lines, STROKES, strict=False):
        for axes, y in zip(panels, line[1:], strict=True):
            axes.plot(picture.x, broken(y), color=colour, linestyle=stroke, linewidth=1.6, label=line.label)
    ticks = np.linspace(picture.x[0], picture.x[-1], 5 if picture.x is PROBABILITIES else 7)
    for axes, title, limits in zip(panels, picture.titles, picture.limits, strict=True):
        finish(axes, title, picture.axis, ticks, limits)
    if picture.mark:
        picture.mark(*panels)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = len(labels) if max(map(len, labels)) < SHORT else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=2.4)
    figure.savefig(PICTURES / f"{name}.png", bbox_inches="tight", pad_inches=0.15)


def finish(axes: Axes, title: str, label: str, ticks: Array, limits: tuple[float, float] | None) -> None:
    """Give a panel its title, its axes and a line at 0."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    axes.set_xticks(ticks)
    axes.tick_params(labelsize=8)
    axes.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if limits:
        axes.set_ylim(limits)


def broken(y: Array) -> Array:
    """Return a curve with gaps at its jumps, so that no vertical stroke is drawn there."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(np.gradient(y)) > 0.45, np.nan, y)


def curves(name: str, x: Array, *lines: tuple[str, float, dict[str, float]]) -> Iterator[Line]:
    """Compute a loss of one element over its input, a line for each label, target and set of parameters."""
    loss = LOSSES[name].loss
    for label, target, given in lines:
        value, gradient = loss.value_and_grad(x, np.full_like(x, target), reduction="none", **given)
        yield Line(label, value, gradient)


def targets(name: str, x: Array) -> Iterator[Line]:
    """Compute a loss for targets 0, 1 and one between them."""
    return curves(name, x, *((f"t = {t:g}", t, {}) for t in (0.0, SOFT, 1.0)))


def settings(name: str, x: Array, t: float, parameter: str, *numbers: float, **fixed: float) -> Iterator[Line]:
    """Compute a loss for several values of a parameter."""
    return curves(name, x, *((f"{parameter} = {number:g}", t, {parameter: number, **fixed}) for number in numbers))


def log_cosh_lines() -> Iterator[Line]:
    """Compute log-cosh, the Huber loss and the absolute error."""
    yield from curves("log_cosh_loss", ERRORS, ("log-cosh", 0, {}))
    yield from curves("huber_loss", ERRORS, ("Huber, delta = 1", 0, {}))
    yield from curves("l1_loss", ERRORS, ("absolute error", 0, {}))


def gaussian_lines() -> Iterator[Line]:
    """Compute the Gaussian divergence over its mean, and over the logarithm of its variance."""
    zero = np.zeros_like(ERRORS)
    for label, k, latents in (("over mu, logvar = 0", 0, (ERRORS, zero)), ("over logvar, mu = 0", 1, (zero, ERRORS))):
        value, gradients = fl.gaussian_kl_loss.value_and_grad(*latents, reduction="none")
        yield Line(label, value, gradients[k])


def class_lines(*cases: tuple[Any, str, dict[str, float]]) -> Iterator[Line]:
    """Compute losses of classes over the logit of the right class, of three; the others are 0."""
    z, t = np.zeros((len(LOGITS), 3)), np.zeros(len(LOGITS), int)
    z[:, 0] = LOGITS
    for loss, label, given in cases:
        value, gradient = loss.value_and_grad(z, t, reduction="none", **given)
        yield Line(label, value, gradient[:, 0])


def vae_lines() -> Iterator[Line]:
    """Compute the VAE objective for a code of one number, for several values of beta."""
    for beta in (0.0, 1.0, 4.0):
        value, gradient = np.transpose([code_and_pixel(mu, beta) for mu in ERRORS])
        yield Line(f"beta = {beta:g}", value, gradient)


def code_and_pixel(mu: float, beta: float) -> tuple[float, float]:
    """Return the VAE objective and its gradient by mu, for one pixel with target 1 and a decoder that returns the logit 4 mu."""
    code = np.array([[mu]])
    value, gradients = fl.vae_loss.value_and_grad(4 * code, np.ones_like(code), code, np.zeros_like(code), beta=beta)
    return float(value.total), (4 * gradients.reconstruction_logits + gradients.mu).item()


def pixel(loss: Any, size: int, inside: bool, label: str, **given: float) -> Line:
    """Compute a loss over the logit of one of 64 pixels, `size` of which form the region. All other predictions are right."""
    region = np.arange(64) < size
    target = np.broadcast_to(region.astype(float), (LOGITS.size, 1, 64))
    logits = np.where(target > 0, 6.0, -6.0)
    at = 0 if inside else 63
    logits[:, 0, at] = LOGITS
    value, gradient = loss.value_and_grad(logits, target, reduction="sample_mean", **given)
    return Line(label, value, gradient[:, 0, at])


def dice_lines() -> Iterator[Line]:
    """Compute the Dice loss over a pixel inside and outside a small and a larger region."""
    for size in (4, 16):
        yield pixel(fl.dice_with_logits_loss, size, True, f"inside a region of {size} pixels")
        yield pixel(fl.dice_with_logits_loss, size, False, f"outside a region of {size} pixels")


def dice_bce_lines() -> Iterator[Line]:
    """Compute Dice plus cross-entropy, and each alone, over a pixel of a small region."""
    loss = fl.dice_bce_with_logits_loss
    yield pixel(loss, 4, True, "sum")
    yield pixel(loss, 4, True, "Dice alone", bce_weight=0.0)
    yield pixel(loss, 4, True, "BCE alone", dice_weight=0.0)


def pixel_of_classes(loss: Any, label: str, **given: float) -> Line:
    """Compute a loss of classes over the logit of one of 64 pixels for its class, which 4 pixels have. All other predictions are right."""
    target = np.broadcast_to((np.arange(64) < 4).astype(np.uint8), (LOGITS.size, 64))
    logits = np.stack([np.where(target == c, 6.0, 0.0) for c in range(3)], axis=1)
    logits[:, 1, 0] = LOGITS
    value, gradient = loss.value_and_grad(logits, target, reduction="sample_mean", **given)
    return Line(label, value, gradient[:, 1, 0])


def dice_softmax_lines() -> Iterator[Line]:
    """Compute the Dice loss of classes, and its Jaccard and Tversky forms."""
    yield pixel_of_classes(fl.dice_softmax_loss, "Dice")
    yield pixel_of_classes(fl.dice_softmax_loss, "Jaccard: alpha = 1, beta = 1", alpha=1.0, beta=1.0)
    yield pixel_of_classes(fl.dice_softmax_loss, "Tversky: alpha = 0.3, beta = 0.7", alpha=0.3, beta=0.7)


def dice_cross_entropy_lines() -> Iterator[Line]:
    """Compute Dice plus cross-entropy of classes, and each alone."""
    loss = fl.dice_cross_entropy_loss
    yield pixel_of_classes(loss, "sum")
    yield pixel_of_classes(loss, "Dice alone", ce_weight=0.0)
    yield pixel_of_classes(loss, "cross-entropy alone", dice_weight=0.0)


def floor_lines() -> Iterator[Line]:
    """Compute the cross-entropy over the probability, with and without the entropy of the target."""
    with np.errstate(divide="ignore"):
        logits = np.log(PROBABILITIES) - np.log1p(-PROBABILITIES)
    for t in (0.05, SOFT, 0.5):
        (line,) = curves("binary_cross_entropy_with_logits", logits, (f"BCE, t = {t:g}", t, {}))
        yield Line(line.label, line.value, line.value - fl.binary_entropy([t]))


def mark_floor(left: Axes, right: Axes) -> None:
    """Draw the entropy, and mark the points where the cross-entropies touch it."""
    entropy = fl.binary_entropy(PROBABILITIES, reduction="none")
    left.plot(PROBABILITIES, entropy, color="black", linewidth=1, label="entropy H(p)")
    for t, (colour, _) in zip((0.05, SOFT, 0.5), STROKES, strict=False):
        left.plot(t, fl.binary_entropy([t]), "o", color=colour, markersize=5)
        right.plot(t, 0, "o", color=colour, markersize=5, clip_on=False)


def both_lines() -> Iterator[Line]:
    """Compute cross-entropy and squared error for a soft target."""
    yield from curves("binary_cross_entropy_with_logits", LOGITS, ("BCE", IMAGE, {}))
    yield from curves("mse_with_logits_loss", LOGITS, ("MSE of the sigmoid", IMAGE, {}))


def mark_minimum(left: Axes, right: Axes) -> None:
    """Mark the common minimum, and the entropy, which is the lowest cross-entropy."""
    logit, floor = np.log(IMAGE / (1 - IMAGE)), float(fl.binary_entropy([IMAGE]))
    for axes in (left, right):
        axes.axvline(logit, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    left.axhline(floor, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    left.plot([logit, logit], [floor, 0], "o", color="black", markersize=4, clip_on=False)
    right.plot(logit, 0, "o", color="black", markersize=4)
    left.text(6, floor - 0.05, f"H(t) = {floor:.3f}", fontsize=9, ha="right", va="top", color=GREY)
    right.text(logit - 0.3, 0.04, "p = t", fontsize=9, ha="right", color=GREY)


def plain(row: Row) -> Picture:
    """Draw a loss of one element at each of its settings."""
    label, x = {"logits": ("logit", LOGITS), "any": ("input - target", ERRORS)}[row.input]
    defaults = {p.name: p.default for p in inspect.signature(row.loss).parameters.values() if isinstance(p.default, float)}
    settings = [defaults | dict(given) for given in row.settings]
    named = [(", ".join(f"{name} = {number:g}" for name, number in given.items()) or row.title, given) for given in settings]
    return Picture(label, x, curves(row.name, x, *((text, 0.0, given) for text, given in named)))


DRAWN: dict[str, Callable[[], Picture]] = {
    **{name: partial(plain, row) for name, row in LOSSES.items() if row.is_elementwise and row.input in ("logits", "any")},
    "binary_cross_entropy_with_logits": lambda: Picture("logit", LOGITS, targets("binary_cross_entropy_with_logits", LOGITS)),
    "binary_cross_entropy": lambda: Picture(
        "probability", PROBABILITIES, targets("binary_cross_entropy", PROBABILITIES), ((-0.2, 5), (-12, 12))
    ),
    "mse_loss": lambda: Picture("input", ERRORS, targets("mse_loss", ERRORS), ((-0.3, 9), None)),
    "l1_loss": lambda: Picture("input", ERRORS, curves("l1_loss", ERRORS, ("t = 0", 0, {}), ("t = 1", 1, {}))),
    "smooth_l1_loss": lambda: Picture("input - target", ERRORS, settings("smooth_l1_loss", ERRORS, 0, "beta", 0, 0.5, 1, 2)),
    "huber_loss": lambda: Picture("input - target", ERRORS, settings("huber_loss", ERRORS, 0, "delta", 0.5, 1, 2)),
    "log_cosh_loss": lambda: Picture("input - target", ERRORS, log_cosh_lines()),
    "mse_with_logits_loss": lambda: Picture("logit", LOGITS, targets("mse_with_logits_loss", LOGITS)),
    "sigmoid_focal_loss": lambda: Picture(
        "logit", LOGITS, settings("sigmoid_focal_loss", LOGITS, 1, "gamma", 0, 1, 2, 5, alpha=-1), ((-0.15, 4), None)
    ),
    "gaussian_kl_loss": lambda: Picture("mu, or logvar", ERRORS, gaussian_lines(), ((-0.3, 6), (-3.2, 6))),
    "vae_loss": lambda: Picture("mu", ERRORS, vae_lines(), ((-0.6, 12), (-8, 8)), titles=("total", "gradient by mu")),
    "dice_with_logits_loss": lambda: Picture("logit of one pixel", LOGITS, dice_lines()),
    "dice_bce_with_logits_loss": lambda: Picture("logit of one pixel", LOGITS, dice_bce_lines()),
    "cross_entropy": lambda: Picture(
        "logit of the class",
        LOGITS,
        class_lines(*((fl.cross_entropy, f"label_smoothing = {a:g}", {"label_smoothing": a}) for a in (0.0, 0.1, 0.3))),
        ((-0.15, 5), None),
    ),
    "focal_cross_entropy_loss": lambda: Picture(
        "logit of the class",
        LOGITS,
        class_lines(*((fl.focal_cross_entropy_loss, f"gamma = {g:g}", {"gamma": g}) for g in (0.0, 1.0, 2.0, 5.0))),
        ((-0.15, 4), None),
    ),
    "dice_softmax_loss": lambda: Picture("logit of one pixel", LOGITS, dice_softmax_lines()),
    "dice_cross_entropy_loss": lambda: Picture("logit of one pixel", LOGITS, dice_cross_entropy_lines()),
    "binary_entropy": lambda: Picture("p", PROBABILITIES, floor_lines(), ((-0.05, 2), (-0.05, 2)), ("BCE", "BCE - H(t)"), mark_floor),
    "bce-or-mse": lambda: Picture("logit", LOGITS, both_lines(), ((-0.1, 3), None), mark=mark_minimum),
}


if __name__ == "__main__":
    main()
