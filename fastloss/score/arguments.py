"""The arguments of `fastloss score`. The options of the losses are read from the losses' signatures."""

from __future__ import annotations

import argparse
import inspect
from functools import partial
from pathlib import Path
from typing import Any

from fastloss.core.accumulated import REDUCTIONS
from fastloss.core.definition import INPUT_AND_TARGET
from fastloss.core.docstrings import OPTIONS
from fastloss.losses.table import LOSSES

DESCRIPTION = """Compute a loss of files that may be larger than memory: of each image, and in total. An image is an entry of the
first axis."""
OF_THIS_COMMAND = {*INPUT_AND_TARGET, "weight", "mask", "reduction", "grad_output", "out"}  # or without a meaning here


def losses() -> dict[str, Any]:
    """Return the losses of an input and a target, by name."""
    return {name: row.loss for name, row in LOSSES.items() if row.loss.operands == INPUT_AND_TARGET}


def loss_options() -> dict[str, dict[str, Any]]:
    """Return, for each option of a loss, the names of the losses that have it with their defaults."""
    found: dict[str, dict[str, Any]] = {}
    for name, loss in losses().items():
        for parameter in inspect.signature(loss).parameters.values():
            if parameter.name not in OF_THIS_COMMAND:
                found.setdefault(parameter.name, {})[name] = parameter.default
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments to a parser."""
    parser.description = DESCRIPTION
    parser.add_argument("input", type=Path, metavar="INPUT", help="a .npy file, a Zarr array, or raw numbers (--dtype, --shape)")
    parser.add_argument("target", type=Path, metavar="TARGET", help="one of these, or a folder of pictures in the order of their names")
    parser.add_argument("--loss", required=True, choices=losses(), metavar="LOSS", help=f"one of {', '.join(losses())}")
    parser.add_argument("--reduction", choices=REDUCTIONS, default="mean", help="of the total; that of an image is a mean or a sum")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file for the loss of each image: .csv or .parquet")
    parser.add_argument("--png", type=Path, metavar="FILE", help="file for a histogram, and the worst images beside their targets")
    parser.add_argument(
        "--worst", type=partial(whole, 0), default=8, metavar="K", help="how many of the worst images are named (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run with the same arguments")
    raw = parser.add_argument_group("raw files")
    raw.add_argument("--shape", type=shape, metavar="N,C,H,W", help="shape of raw numbers; a raw target may take that of the input")
    raw.add_argument("--dtype", metavar="DTYPE", help="dtype of raw numbers, such as float32")
    raw.add_argument("--target-dtype", metavar="DTYPE", help="dtype of a raw target, if it is another")
    options = parser.add_argument_group("options of the losses", "numbers may be written as quotients, such as 1/255")
    for name in ("mask", "weight"):
        of_classes = "; of a loss of several classes, one number for each class" if name == "weight" else ""
        options.add_argument(f"--{name}", type=Path, metavar="FILE", help=describe(OPTIONS[name].format(first="input")) + of_classes)
    for name, owners in loss_options().items():
        add_option(options, name, owners)


def add_option(group: Any, name: str, owners: dict[str, Any]) -> None:
    """Add an option of losses: a flag, or a number or an array in a file."""
    of = describe(OPTIONS[name].format(probabilities="an operand")) if name in OPTIONS else f"of {', '.join(owners)}"
    flag = f"--{name.replace('_', '-')}"
    if any(isinstance(default, bool) for default in owners.values()):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=of)
    elif name in OPTIONS:
        group.add_argument(flag, type=number, metavar="NUMBER", help=of)
    else:
        group.add_argument(flag, type=number_or_file, metavar="NUMBER|FILE", help=of)


def describe(text: str) -> str:
    """Return the first sentence of an option's documentation, for argparse."""
    return text.partition(". ")[0].rstrip(".").replace("`", "").replace("%", "%%")


def number(text: str) -> float:
    """Parse a number or a quotient of two."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def number_or_file(text: str) -> float | Path:
    """Parse a number, or the name of a file with an array."""
    try:
        return number(text)
    except argparse.ArgumentTypeError:
        return Path(text)


def shape(text: str) -> tuple[int, ...]:
    """Parse a shape."""
    parts = text.strip("()").rstrip(",").split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; an example: 1000,3,64,64")
    return tuple(map(int, parts))


def whole(least: int, text: str) -> int:
    """Parse a whole number of at least `least`, which is not negative."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(text)
