"""Write the README's bars of time from the benchmarks of record: `python -m docs.bars`.

The bars are text, because a package index cannot show a picture from a path in the repository.
"""

from __future__ import annotations

import math
from pathlib import Path

from bench import machine
from bench.page import replace_block
from bench.report import duration
from bench.results import Results, load

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SOURCE = "bench/results/epyc-zen5-2-cores.json"
LONGEST = 36  # characters of the longest bar
ROWS = {  # the rows of the headline case: their names in the results, and in the README
    "limit: triad": "memory limit",
    "fastloss, out=": "fastloss",
    "fastloss on tensors": "fastloss, tensors",
    "torch.compile": "torch.compile",
    "JAX": "JAX",
    "torch eager": "PyTorch",
    "optax": "optax",
    "NumPy, stable": "NumPy",
    "numexpr": "numexpr",
    "scikit-learn": "scikit-learn",
}


def bars(results: Results) -> str:
    """Draw the times of value and gradient as a block of text, with the machine that they were measured on."""
    rows = results.measured[results.headline()].rows
    times = {label: rows[name].median for name, label in ROWS.items() if name in rows}
    slowest = max(times.values())
    lines = [f"{label:<18}{duration(time):>8}  {'█' * math.ceil(time / slowest * LONGEST)}" for label, time in times.items()]
    return "\n".join(["```text", *lines, "```", "", f"{machine.sentence(results.machine)}; {results.date}; from `{SOURCE}`."])


def filled() -> str:
    """Return the README's text with the bars of the results of record."""
    return replace_block(README.read_text(), "bars", "docs/bars.py", bars(load(ROOT / SOURCE)))


if __name__ == "__main__":
    README.write_text(filled())
