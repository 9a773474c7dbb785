"""Tables of a results file: for the terminal by rich, for the README by tabulate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from tabulate import tabulate

from bench import goals, machine
from bench.cases import SIZES, Case
from bench.compare import Change
from bench.ours import PLAIN
from bench.results import PEERS, Measured, Results

MISSED = "missed"
WIDE = 40  # characters of a column, before its text is folded
PARTS = {"value": "value", "grad": "gradient", "value_and_grad": "value+grad"}
MARKS = {
    "short": "<!-- speed: written by python -m bench --write -->",
    "all": "<!-- all speeds: written by python -m bench --write -->",
}
END = "<!-- end of speed -->"
ABOUT = {
    "limit": "Bars: how many times as long as the memory's limit each library takes for BCE and MSE",
    "losses": "For every loss, the time of fastloss and of others over the limit",
    "size": "Time of each library over that of fastloss for BCE and MSE, by batch size from 1,000 elements on, on arrays and on tensors",
    "memory": "Bars: extra memory of each library for BCE, in multiples of the logits",
}


@dataclass
class Table:
    """A title, headings and cells; the first column is text, the others are numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table for a README."""
        align = ["left"] + ["right"] * (len(self.headings) - 1)
        text = tabulate(self.rows, self.headings, tablefmt="github", disable_numparse=True, colalign=align)
        return f"**{self.title}**\n\n{text}"

    def rich(self) -> RichTable:
        """Return the table for a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for k, heading in enumerate(self.headings):
            widest = max(map(len, (*heading.split(), *(row[k] for row in self.rows))))
            table.add_column(heading, justify="right" if k else "left", min_width=min(widest, WIDE))
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(results: Results) -> list[Table]:
    """Return all tables that the results have rows for."""
    made = [
        details(results.measured[case]) for case in (results.headline(), Case(size="mnist"), Case(size="1Ki")) if case in results.measured
    ]
    return [
        table
        for table in [
            *made,
            overview(results.measured),
            tensors(results.measured),
            ways(results),
            threads(results),
            start(results),
            aims(results),
        ]
        if table.rows
    ]


def short(results: Results) -> list[Table]:
    """Return the tables for a first look: the headline, value and gradient of every loss, and what is not as it should be."""
    headlines = {case: m for case, m in results.measured.items() if case == Case(case.loss) or case == Case(size=case.size)}
    missed = aims(results)
    missed.title = "Goals that are missed"
    missed.rows = [row for row in missed.rows if row[-1] == MISSED]
    made = [details(headlines[Case()])] if Case() in headlines else []
    return [table for table in [*made, overview(headlines), tensors(headlines), missed, start(results)] if table.rows]


def details(measured: Measured) -> Table:
    """Return every row of a case."""
    headings = ["", "time", "quartiles", "x the limit", "fastloss is faster by", "memory, x logits", "error"]
    table = Table(title(measured.case), headings)
    ours, limit = measured.ours.median, measured.limit.median
    for name, row in sorted(measured.rows.items(), key=lambda item: item[1].median):
        low, high = row.quartiles
        memory = measured.memory(name)
        error = row.errors.get("gradient", row.errors.get("value"))
        faster = f"{row.median / ours:.1f} x" if name in PEERS else ""
        times = [duration(row.median), f"{duration(low)} - {duration(high)}", f"{row.median / limit:.2f}"]
        table.rows.append([name, *times, faster, "" if memory is None else f"{memory:.1f}", "" if error is None else f"{error:.0e}"])
    return table


def title(case: Case) -> str:
    """Return a case in words."""
    plain = Case()
    rest = [x for x, usual in ((case.dtype, plain.dtype), (case.layout, plain.layout), (case.option, "")) if x != usual]
    shape = "x".join(map(str, case.shape)) if case.size in SIZES else case.size
    return ", ".join([f"{case.subject.short} {PARTS[case.part]}", *rest, *([shape] if case.size != plain.size else [])])


def overview(cases: Mapping[Case, Measured]) -> Table:
    """Return a line a case: ours, against the limit, and how much faster than each peer."""
    peers = [name for name in PEERS if any(name in m.rows for m in cases.values())]
    headings = ["", "fastloss", "x the limit", *peers]
    table = Table("Time of fastloss with out=, and how many times as long the others take", headings)
    for case, measured in cases.items():
        if case.size in SIZES:
            ratios = [measured.ratio(name, measured.ours.name) for name in peers]
            cells = ["" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
            table.rows.append([title(case), duration(measured.ours.median), f"{measured.ours.median / measured.limit.median:.2f}", *cells])
    return table


def tensors(cases: Mapping[Case, Measured]) -> Table:
    """Return forward and backward in PyTorch: ours, and how many times as long and how much memory PyTorch's own take."""
    headings = [
        "",
        "fastloss",
        "in place",
        "torch eager",
        "torch.compile",
        *(f"memory, {name}" for name in ("fastloss", "in place", "eager")),
    ]
    table = Table(
        "PyTorch: forward and backward; how many times as long torch takes, and extra memory in multiples of the logits", headings
    )
    names = [goals.TENSORS, f"{goals.TENSORS}, in place", "torch eager", "torch.compile"]
    for case, measured in cases.items():
        if goals.TENSORS not in measured.rows or case.size not in SIZES:
            continue
        ours, in_place = (measured.rows.get(name) for name in names[:2])
        times = [duration(row.median) if row else "" for row in (ours, in_place)]
        ratios = [measured.ratio(name, goals.TENSORS) for name in names[2:]]
        memory = [measured.memory(name) if name in measured.rows else None for name in names[:3]]
        shown = [f"{ratio:.1f}" if ratio else "" for ratio in ratios] + ["" if m is None else f"{m:.1f}" for m in memory]
        table.rows.append([title(case), *times, *shown])
    return table


def ways(results: Results) -> Table:
    """Return what buffers save, and what dtypes, layouts and options cost."""
    headings = ["", "with out=", "fresh gradient, x that", "in place, x that", "x float32, contiguous, without option"]
    table = Table("Buffers, dtypes, layouts and options", headings)
    for case, measured in results.measured.items():
        ours = measured.ours.name
        ratios = [measured.ratio(name, ours) for name in ("fastloss, fresh gradient", "fastloss, in place")]
        ratios.append(measured.ratio(ours, PLAIN))
        if case.size == Case().size and any(ratios[1:]):
            table.rows.append([title(case), duration(measured.ours.median), *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return table


def threads(results: Results) -> Table:
    """Return times by the number of threads."""
    table = Table("Threads", ["", "threads", "time", "x faster than 1 thread"])
    first: dict[str, float] = {}
    for case, count, row in results.threads:
        name = f"{case.subject.short}: {row.name}"
        alone = first.setdefault(name, row.median)
        table.rows.append([name, str(count), duration(row.median), f"{alone / row.median:.2f}"])
    return table


def start(results: Results) -> Table:
    """Return what a process pays before its first result."""
    rows, compiled = results.start, results.content.get("kernels_compiled", {})
    counts = ", ".join(f"{count} in the {process}" for process, count in compiled.items())
    table = Table(f"Wall time of whole processes; kernels compiled: {counts}", ["", "time", "more than import numpy"])
    for name, row in rows.items():
        table.rows.append([name, duration(row.median), f"{duration(row.median - rows['import numpy'].median)}"])
    return table


def aims(results: Results) -> Table:
    """Return the goals, and whether they are met."""
    table = Table("Goals", ["", "against", "asked", "measured", ""])
    for goal, ratio in goals.verdicts(results):
        row = f", {goal.row}" if goal.row else ""
        verdict = "met" if goal.met(ratio) else MISSED
        table.rows.append([title(goal.case) + row, goal.against, goal.asked, f"{ratio:.2f} x", verdict])
    return table


def changes(found: list[Change]) -> Table:
    """Return what changed beyond the noise."""
    table = Table("Changed beyond the noise", ["", "new / old", "interval, also over the limit", ""])
    for change in sorted(found, key=lambda c: -c.ratio):
        if change.verdict != "same":
            table.rows.append([change.what, f"{change.ratio:.2f}", f"{change.low:.2f} - {change.high:.2f}", change.verdict])
    return table


def duration(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def show(console: Console, results: Results) -> None:
    """Print every table."""
    for table in tables(results):
        console.print(table.rich())
        console.print()


def check_page(page: Path) -> tuple[str, str, str]:
    """Return a page's text before and after its marks, and which tables go between. Raises `ValueError` if it has none."""
    text = page.read_text() if page.is_file() else ""
    for selection, begin in MARKS.items():
        if text.count(begin) == 1 and text.count(END) == 1:
            before, rest = text.split(begin)
            return before + begin, END + rest.split(END)[1], selection
    raise ValueError(f"{page} has no place for the tables; it needs, once each, a line {' or '.join(MARKS.values())}, and a line {END}")


def filled(page: Path, results: Results, source: Path | str, pictures: list[Path]) -> str:
    """Return a page's text with the tables and pictures between its marks."""
    before, after, selection = check_page(page)
    here = page.resolve().parent
    head = f"{machine.sentence(results.machine)}; {results.date}; raw rounds in `{source}`."
    images = [f"![{ABOUT[path.stem]}]({os.path.relpath(path.resolve(), here)})" for path in pictures]
    chosen = tables(results) if selection == "all" else short(results)
    absent = [f"- {line}" for line in results.content["left_out"]] if selection == "all" else []
    return "\n\n".join([before, head, *images, *(table.markdown() for table in chosen), "\n".join([*absent, after])])


def write_page(page: Path, results: Results, source: Path | str, pictures: list[Path]) -> None:
    """Replace what stands between a page's two marks."""
    page.write_text(filled(page, results, source, pictures))
