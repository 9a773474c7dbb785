"""`Record`: the measurements of a benchmark, and the rows that were left out, as they are written to a results file.

The benchmarks of CPUs and of GPUs both use it. It needs no package that a machine with a GPU may lack.
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
Checked = list[tuple[Row, dict[str, float]]]  # rows with correct results, and their errors


@dataclass
class Record:
    """The content of a results file. `say` is called with a line for each row that is left out."""

    machine: dict[str, Any]
    say: Callable[[str], Any]
    content: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.content = {"format": FORMAT, "date": now, "machine": self.machine, "cases": [], "threads": [], "left_out": []}

    def leave_out(self, line: str) -> None:
        """Record and report, once, a line that says what is not measured and why."""
        if line not in self.content["left_out"]:
            self.content["left_out"].append(line)
            self.say(line)

    def attempt(self, name: str, case: Case, make: Callable[[], Iterable[Row]]) -> Iterator[Row]:
        """Yield the rows of another library. If it raises any error, leave the library out of the case."""
        try:
            yield from make()
        except Exception as error:
            self.leave_out(f"{name} is left out of {case}: {first_line(error)}")

    def check(self, case: Case, rows: Iterable[Row], expected: Result) -> Checked:
        """Call each row once, and return those with correct results. Raise if a row of fastloss fails; leave out others that fail."""
        checked = []
        for row in rows:
            try:
                checked.append((row, row.errors(expected)))
            except Exception as error:
                if row.name.startswith("fastloss"):
                    raise
                reason = str(error) if isinstance(error, WrongError) else first_line(error)
                self.leave_out(f"{row.name} is left out of {case}: {reason}")
        return checked

    def add(self, case: Case, rows: Checked, times: dict[str, list[float]], extra: dict[str, int | None]) -> None:
        """Add a case, with the times, errors and extra memory of its rows."""
        entries = [
            {"name": row.name, "seconds": times[row.name], "errors": errors, "extra_bytes": extra.get(row.name)} for row, errors in rows
        ]
        self.content["cases"].append(asdict(case) | {"shape": case.shape, "rows": entries})

    def save(self, file: Path) -> None:
        """Write all measurements so far, replacing the file in one operation, so that an interrupted benchmark loses none of them."""
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps(self.content, separators=(",", ":")) + "\n")
        part.replace(file)


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def installed(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the names and versions of those packages that are installed."""
    for name in packages:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
