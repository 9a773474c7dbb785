"""`Record`: what a run of the benchmarks has measured and what it had to leave out, as it goes into a results file.

It serves both devices, and needs nothing that a machine with a GPU may lack.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.row import Result, Row, WrongError

FORMAT = 1  # of the results file
Checked = list[tuple[Row, dict[str, float]]]  # rows that compute what they should, with their errors


@dataclass
class Record:
    """A results file's content, and who is told, in a line, what is left out."""

    machine: dict[str, Any]
    say: Callable[[str], Any]
    content: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.content = {"format": FORMAT, "date": now, "machine": self.machine, "cases": [], "threads": [], "left_out": []}

    def leave_out(self, what: str) -> None:
        """Note and say that something is not measured."""
        if what not in self.content["left_out"]:
            self.content["left_out"].append(what)
            self.say(what)

    def attempt(self, name: str, case: Case, make: Callable[[], Iterable[Row]]) -> Iterator[Row]:
        """Yield the rows of another library, which may raise anything: the others are measured."""
        try:
            yield from make()
        except Exception as error:
            self.leave_out(f"{name} is left out of {case}: {first_line(error)}")

    def check(self, case: Case, rows: Iterable[Row], expected: Result) -> Checked:
        """Return the rows that compute what they should; each has run once then. A row of fastloss's own has to."""
        checked = []
        for row in rows:
            try:
                checked.append((row, row.errors(expected)))
            except Exception as error:
                if row.name.startswith("fastloss"):
                    raise
                said = str(error) if isinstance(error, WrongError) else first_line(error)
                self.leave_out(f"{row.name} is left out of {case}: {said}")
        return checked

    def add(self, case: Case, rows: Checked, times: dict[str, list[float]], extra: dict[str, int | None]) -> None:
        """Add a case: the rounds, errors and extra memory of its rows."""
        entries = [
            {"name": row.name, "seconds": times[row.name], "errors": errors, "extra_bytes": extra.get(row.name)} for row, errors in rows
        ]
        self.content["cases"].append(asdict(case) | {"shape": case.shape, "rows": entries})

    def save(self, file: Path) -> None:
        """Write what was measured so far, whole or not at all: a long run that is broken off has lost nothing."""
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps(self.content, separators=(",", ":")) + "\n")
        part.replace(file)


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def installed(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the packages that are here, with their versions."""
    for name in packages:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
