"""`Results`: the content of a results file, with medians and with ratios of rows that were timed in the same rounds."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import BCE, Case
from bench.ours import OURS
from bench.record import FORMAT

LIMITS = (
    "limit: triad", "limit: dot product", "limit: dot product, then triad", "limit: copy", "limit: read", "limit: read, then copy",
)  # fmt: skip
PEERS = ("NumPy, stable", "NumPy, naive", "numexpr", "scikit-learn", "torch eager", "torch.compile", "JAX", "optax", "CuPy, naive")


@dataclass(frozen=True)
class Timing:
    """The times, errors and extra memory of a row."""

    name: str
    seconds: tuple[float, ...]
    errors: dict[str, float]
    extra_bytes: int | None

    @property
    def median(self) -> float:
        """The median time in seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the times in seconds."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(low), float(high)


@dataclass(frozen=True)
class Measured:
    """A case with the timings of its rows."""

    case: Case
    rows: dict[str, Timing]

    @property
    def ours(self) -> Timing:
        """The row that represents fastloss."""
        return next(self.rows[name] for name in OURS if name in self.rows)

    @property
    def limit(self) -> Timing:
        """The row that represents the limit of memory bandwidth."""
        return next(self.rows[name] for name in LIMITS if name in self.rows)

    def memory(self, name: str) -> float | None:
        """Return the extra memory of a row in multiples of the logits, or None if it was not measured."""
        extra = self.rows[name].extra_bytes
        return None if extra is None else extra / (self.case.elements * 4)

    def ratio(self, name: str, against: str) -> float | None:
        """Return the median time of a row over that of another row, or None if one of them was not measured."""
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
        """Whether the results are those of a GPU."""
        return "gpu" in self.machine

    def headline(self, loss: str = BCE) -> Case:
        """Return the main case of a loss. On a GPU it has more elements, because the time of fewer is mostly that of the launch."""
        return Case(loss, size="huge" if self.is_gpu else Case.size)

    @property
    def threads(self) -> list[tuple[Case, int, Timing]]:
        """The timings by the number of threads: each a case, a number of threads and a timing."""
        entries = [(to_case(entry), row) for entry in self.content["threads"] for row in entry["rows"]]
        return [(case, row["threads"], to_timing(row)) for case, row in entries]

    @property
    def start(self) -> dict[str, Timing]:
        """The wall times of processes up to their first result, by name."""
        return {row["name"]: to_timing(row) for row in self.content.get("start", [])}


def read_case(entry: dict[str, Any]) -> Measured:
    """Convert an entry of the file to a case with its timings."""
    return Measured(to_case(entry), {row["name"]: to_timing(row) for row in entry["rows"]})


def to_case(entry: dict[str, Any]) -> Case:
    """Convert an entry of the file to its case."""
    return Case(**{axis.name: entry[axis.name] for axis in fields(Case)})


def to_timing(row: dict[str, Any]) -> Timing:
    """Convert a row of the file to its timing."""
    return Timing(row["name"], tuple(row["seconds"]), row.get("errors", {}), row.get("extra_bytes"))


def load(path: Path) -> Results:
    """Load a results file. Raise ValueError if the file cannot be read, or is no results file of this version."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path} is not a results file: it is not JSON") from None
    number = content.get("format") if isinstance(content, dict) else None
    if number != FORMAT:
        raise ValueError(f"{path} is not a results file of this version: its format is {number!r}; accepted: {FORMAT}")
    return Results(content)
