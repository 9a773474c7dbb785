"""Tables of a results file: in the terminal by rich, in a page by tabulate."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from tabulate import tabulate

from bench import goals, machine
from bench.cases import CURVE, Case
from bench.compare import Change
from bench.ours import PLAIN
from bench.page import has_block, marks, replace_block
from bench.results import PEERS, Measured, Results, Timing

PARTS = {"value": "value", "grad": "gradient", "value_and_grad": "value+grad"}
SUMMARY, REST = "speed", "all speeds"  # the blocks of a page: the first look, and every other case
AUTHOR = "python -m bench --write"
ALT_TEXTS = {
    "limit": "Bars: the time of each library over the memory limit, for BCE and MSE",
    "losses": "For every loss, the time of fastloss and of other libraries over the memory limit",
    "size": "Time of each library over that of fastloss for BCE and MSE, by batch size from 1,000 elements on, on arrays and on tensors",
    "memory": "Bars: extra memory of each library for BCE, in multiples of the logits",
}
# groups of cases, a table each
EVERY_LOSS, SIZE, PART, SIZE_AND_PART, DTYPE, LAYOUT = GROUPS = (
    "Every loss, value and gradient",
    "Batch sizes, value and gradient",
    "Value alone, gradient alone",
    "Batch sizes, value alone, gradient alone",
    "Dtypes",
    "Layouts and options",
)
BOTH = (EVERY_LOSS, SIZE)  # groups of value and gradient alone; they are in the summary


@dataclass
class Table:
    """A title, headings, cells and a note; the first column is text, the others are numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """Return the table as a section of a page."""
        align = ["left"] + ["right"] * (len(self.headings) - 1)
        text = tabulate(self.rows, self.headings, tablefmt="pipe", disable_numparse=True, colalign=align)
        return "\n\n".join(filter(None, (f"### {self.title}", self.note, text)))

    def rich(self) -> RichTable:
        """Return the table for a terminal."""
        table = RichTable(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for k, heading in enumerate(self.headings):
            table.add_column("\n".join(heading.split()), justify="right" if k else "left", no_wrap=k > 0)  # only the first column folds
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(results: Results) -> list[Table]:
    """Return all tables for which the results have rows."""
    return [*summary(results), *rest(results)]


def summary(results: Results) -> list[Table]:
    """Return the tables for a first look: the headline, every loss, the batch sizes, and where fastloss falls short."""
    headline = results.measured.get(results.headline())
    made = [details(headline)] if headline else []
    for group in BOTH:
        found = grouped(results, group)
        made += [overview(group, found), tensors(group, found)]
    made += [faster_peers(results), aims(results, met=False), start(results)]
    return [table for table in made if table.rows]


def rest(results: Results) -> list[Table]:
    """Return the tables of all cases that are not in the summary."""
    small = (Case(size="mnist"), Case(size="1Ki"))
    made = [details(results.measured[case]) for case in small if case in results.measured]
    for group in (PART, SIZE_AND_PART, DTYPE, LAYOUT):
        found = grouped(results, group)
        made += [overview(group, found), tensors(group, found)]
    made += [ways(results), threads(results), aims(results, met=True)]
    return [table for table in made if table.rows]


def grouped(results: Results, group: str) -> list[Measured]:
    """Return the cases of a group; the sizes of the curve are in the picture alone."""
    return [m for case, m in results.measured.items() if case.size not in CURVE and group_of(case, results.headline(case.loss)) == group]


def group_of(case: Case, headline: Case) -> str:
    """Return the group of a case by the axes on which it differs from the headline of its loss."""
    if (case.layout, case.option) != (headline.layout, headline.option):
        return LAYOUT
    if case.dtype != headline.dtype:
        return DTYPE
    if case.size != headline.size:
        return SIZE if case.part == headline.part else SIZE_AND_PART
    return EVERY_LOSS if case.part == headline.part else PART


def details(measured: Measured) -> Table:
    """Return every row of a case, the fastest first."""
    headings = ["", "time", "quartiles", "time / limit", "speed-up of fastloss", "extra memory / logits", "error"]
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


def title(case: Case, with_part: bool = True) -> str:
    """Return a case in words, with or without the part (value, gradient or both) that is computed."""
    plain = Case()
    others = [x for x, usual in ((case.dtype, plain.dtype), (case.layout, plain.layout), (case.option, "")) if x != usual]
    shape = "x".join(map(str, case.shape))
    name = f"{case.subject.title} {PARTS[case.part]}" if with_part else case.subject.title
    return ", ".join([name, *others, *([shape] if case.shape != plain.shape else [])])


def overview(group: str, cases: Iterable[Measured]) -> Table:
    """Return a group's table, a row for each case: fastloss, its distance from the limit, and its speed-up over each peer."""
    peers = [name for name in PEERS if any(name in m.rows for m in cases)]
    table = Table(group, ["", "fastloss", "time / limit", *peers], note="Under each library: its time over that of fastloss with `out=`.")
    for measured in cases:
        ratios = [measured.ratio(name, measured.ours.name) for name in peers]
        times = [duration(measured.ours.median), f"{measured.ours.median / measured.limit.median:.2f}"]
        table.rows.append([title(measured.case, group not in BOTH), *times, *("" if ratio is None else f"{ratio:.1f}" for ratio in ratios)])
    return table


def tensors(group: str, cases: Iterable[Measured]) -> Table:
    """Return forward and backward in PyTorch: time and extra memory of fastloss and of PyTorch's own loss."""
    memories = [f"memory, {name}" for name in ("fastloss", "in place", "eager")]
    table = Table(f"{group}, PyTorch tensors", ["", "fastloss", "in place", "torch eager", "torch.compile", *memories])
    table.note = (
        "Forward and backward. Under torch: its time over that of fastloss. Memory: beside the arguments, in multiples of the logits."
    )
    names = [goals.TENSORS, goals.TENSORS_IN_PLACE, "torch eager", "torch.compile"]
    for measured in cases:
        if goals.TENSORS not in measured.rows:
            continue
        ours, in_place = (measured.rows.get(name) for name in names[:2])
        times = [duration(row.median) if row else "" for row in (ours, in_place)]
        ratios = [measured.ratio(name, goals.TENSORS) for name in names[2:]]
        memory = [measured.memory(name) if name in measured.rows else None for name in names[:3]]
        shown = [f"{ratio:.1f}" if ratio else "" for ratio in ratios] + ["" if m is None else f"{m:.1f}" for m in memory]
        table.rows.append([title(measured.case, group not in BOTH), *times, *shown])
    return table


def faster_peers(results: Results) -> Table:
    """Return every case in which another library is faster than fastloss, the largest difference first."""
    table = Table("Where other libraries are faster", ["", "fastloss", "other library", "its time", "fastloss / other"])
    found = [(m, ours, peer) for m in results.measured.values() for ours, peer in rivals(m) if peer.median < ours.median]
    for measured, ours, peer in sorted(found, key=lambda row: row[2].median / row[1].median):
        name = title(measured.case) + ("" if ours is measured.ours else f", {ours.name}")
        table.rows.append([name, duration(ours.median), peer.name, duration(peer.median), f"{ours.median / peer.median:.2f} x"])
    return table


def rivals(measured: Measured) -> list[tuple[Timing, Timing]]:
    """Return the pairs of rows of fastloss and of a peer that do the same on the same arrays."""
    torch = tuple(name for name in PEERS if name.startswith("torch"))
    pairs = ((measured.ours.name, PEERS), (goals.TENSORS, torch), (goals.TENSORS_IN_PLACE, torch))
    rows = measured.rows
    return [(rows[ours], rows[peer]) for ours, peers in pairs for peer in peers if ours in rows and peer in rows]


def ways(results: Results) -> Table:
    """Return the cost of buffers, dtypes, layouts and options."""
    headings = ["", "with out=", "fresh gradient / out=", "in place / out=", "out= / plain"]
    table = Table("Cost of buffers, dtypes, layouts and options", headings)
    table.note = "Ratios of times. Plain: float32, contiguous, without an option."
    for case, measured in results.measured.items():
        ours = measured.ours.name
        ratios = [measured.ratio(name, ours) for name in ("fastloss, fresh gradient", "fastloss, in place")]
        ratios.append(measured.ratio(ours, PLAIN))
        if case.size == Case().size and any(ratios[1:]):
            table.rows.append([title(case), duration(measured.ours.median), *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return table


def threads(results: Results) -> Table:
    """Return times by the number of threads."""
    table = Table("Threads", ["", "threads", "time", "speed-up over 1 thread"])
    first: dict[str, float] = {}
    for case, count, row in results.threads:
        name = f"{case.subject.title}: {row.name}"
        alone = first.setdefault(name, row.median)
        table.rows.append([name, str(count), duration(row.median), f"{alone / row.median:.2f}"])
    return table


def start(results: Results) -> Table:
    """Return the wall time of a process up to its first result."""
    rows, compiled = results.start, results.content.get("kernels_compiled", {})
    counts = ", ".join(f"{count} in the {process}" for process, count in compiled.items())
    table = Table("Start of a process", ["", "time", "more than import numpy"])
    table.note = f"Wall time of whole processes. Kernels compiled: {counts}."
    for name, row in rows.items():
        table.rows.append([name, duration(row.median), f"{duration(row.median - rows['import numpy'].median)}"])
    return table


def aims(results: Results, met: bool) -> Table:
    """Return the goals that are met, or those that are missed."""
    table = Table("Goals that are met" if met else "Goals that are missed", ["", "compared with", "goal", "measured"])
    for goal, ratio in goals.verdicts(results):
        if goal.met(ratio) == met:
            row = f", {goal.row}" if goal.row else ""
            table.rows.append([title(goal.case) + row, goal.against, goal.asked, f"{ratio:.2f} x"])
    return table


def changes(found: list[Change]) -> Table:
    """Return the changes that exceed the noise."""
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


def blocks(page: Path) -> list[str]:
    """Return the names of the blocks that a page has. Raises `ValueError` if it has none."""
    text = page.read_text() if page.is_file() else ""
    found = [name for name in (SUMMARY, REST) if has_block(text, name, AUTHOR)]
    if not found:
        places = " or ".join(" and ".join(marks(name, AUTHOR)) for name in (SUMMARY, REST))
        raise ValueError(f"{page} has no place for the tables; it needs, once each, the lines {places}")
    return found


def filled(page: Path, results: Results, source: Path | str, pictures: list[Path]) -> str:
    """Return a page's text with the tables and pictures between its marks."""
    here = page.resolve().parent
    head = f"{machine.sentence(results.machine)}; {results.date}; raw rounds in `{source}`."
    images = [f"![{ALT_TEXTS[path.stem]}]({os.path.relpath(path.resolve(), here)})" for path in pictures]
    lines = [f"- {line}" for line in results.content["left_out"]]
    left_out = "\n".join(["### Rows that are left out\n", *lines]) if lines else ""
    parts = {
        SUMMARY: [head, *images, *(table.markdown() for table in summary(results))],
        REST: [head, *(table.markdown() for table in rest(results)), left_out],
    }
    text = page.read_text()
    for name in blocks(page):
        text = replace_block(text, name, AUTHOR, "\n\n".join(filter(None, parts[name])))
    return text


def write_page(page: Path, results: Results, source: Path | str, pictures: list[Path]) -> None:
    """Write the tables and pictures between a page's marks."""
    page.write_text(filled(page, results, source, pictures))
