"""A results file, read: cases, rows, medians, and ratios between rows of one case, which were timed in turn."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import BCE, Case
from bench.ours import OURS
from bench.record import FORMAT

LIMITS = ("limit: triad", "limit: dot product", "limit: dot product, then triad", "limit: copy", "limit: read")
PEERS = ("NumPy, stable", "NumPy, naive", "numexpr", "scikit-learn", "torch eager", "torch.compile", "JAX", "optax", "CuPy, naive")


@dataclass(frozen=True)
class Timing:
    """The rounds of a row."""

    name: str
    seconds: tuple[float, ...]
    errors: dict[str, float]
    extra_bytes: int | None

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile, in seconds."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(low), float(high)


@dataclass(frozen=True)
class Measured:
    """A case with its rows."""

    case: Case
    rows: dict[str, Timing]

    def first(self, *names: str) -> Timing | None:
        """Return the first row there is of some names."""
        return next((self.rows[name] for name in names if name in self.rows), None)

    @property
    def ours(self) -> Timing:
        """The row that stands for fastloss."""
        return next(self.rows[name] for name in OURS if name in self.rows)

    @property
    def limit(self) -> Timing:
        """The row that stands for the memory."""
        return next(self.rows[name] for name in LIMITS if name in self.rows)

    def memory(self, name: str) -> float | None:
        """Return the extra memory of a row in multiples of the logits, where it was measured."""
        extra = self.rows[name].extra_bytes
        return None if extra is None else extra / (self.case.elements * 4)

    def ratio(self, name: str, against: str) -> float | None:
        """Return how many times as long one row takes as another."""
        row, other = self.rows.get(name), self.rows.get(against)
        return row.median / other.median if row and other else None


class Results:
    """The content of a results file."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.machine, self.date = content["machine"], content["date"][:10]
        self.measured = {m.case: m for m in map(read_case, content["cases"])}

    @property
    def is_gpu(self) -> bool:
        """Whether it was measured on a GPU."""
        return "gpu" in self.machine

    def headline(self, loss: str = BCE) -> Case:
        """Return the case of a loss that is looked at first: what keeps a CPU busy is over on a GPU before it has begun."""
        return Case(loss, size="huge" if self.is_gpu else Case.size)

    @property
    def threads(self) -> list[tuple[Case, int, Timing]]:
        """What was measured on 1 to all threads: the case, how many, and the rounds."""
        entries = [(to_case(entry), row) for entry in self.content["threads"] for row in entry["rows"]]
        return [(case, row["threads"], to_timing(row)) for case, row in entries]

    @property
    def start(self) -> dict[str, Timing]:
        """What a process pays before its first result."""
        return {row["name"]: to_timing(row) for row in self.content.get("start", [])}


def read_case(entry: dict[str, Any]) -> Measured:
    """Return a case of the file."""
    return Measured(to_case(entry), {row["name"]: to_timing(row) for row in entry["rows"]})


def to_case(entry: dict[str, Any]) -> Case:
    """Return the cell of the table that an entry names."""
    return Case(**{axis.name: entry[axis.name] for axis in fields(Case)})


def to_timing(row: dict[str, Any]) -> Timing:
    """Return the rounds of a row, with what else was noted of it."""
    return Timing(row["name"], tuple(row["seconds"]), row.get("errors", {}), row.get("extra_bytes"))


def load(path: Path) -> Results:
    """Return the results in a file. Raises `ValueError` if it is not one."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not a results file: it is not JSON") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is not a results file of this version: its format is {found!r}; accepted: {FORMAT}")
    return Results(content)
