"""Write a results file into the README's speed table: `python -m bench.report bench/results/FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- speed: written by bench/report.py -->", "<!-- end of speed -->"


def main(results: str) -> None:
    """Replace what stands between the README's two marks."""
    content = json.loads(Path(results).read_text())
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{report(content, results)}\n{END}{after}")


def report(content: dict[str, Any], results: str) -> str:
    """Return the machine's description and the table."""
    machine = content["machine_info"]
    rows = [cells(b["extra_info"]) for b in content["benchmarks"] if "ratio" in b["extra_info"]]
    rows += [memory(b["extra_info"]) for b in content["benchmarks"] if "peaks" in b["extra_info"]]
    table = tabulate(rows, ["what", "time", "measured", "against", "must", "aim", ""], tablefmt="github", disable_numparse=True)
    used = ", ".join(f"{name} {machine['versions'][name]}" for name in ("python", "numpy", "numba"))
    cpu = f"{machine['cpu']['brand_raw']}, {machine['cores']} cores, {machine['threads']} threads"
    return f"{cpu}; {used}; {content['datetime'][:10]}; raw rounds in `{results}`.\n\n{table}"


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    ratio, ms, faster = row["ratio"], row["ms"], row["faster"]
    if (most := row["must_extra_ms"]) is not None:
        extra = ms - row["other_ms"]
        return [row["row"], duration(ms), f"{extra:+.0f} ms", row["against"], f"<= +{most:g} ms", "", verdict([extra <= most], [])]
    asked, musts = limits(ratio, row["must"], faster, ms, row["must_us"])
    hoped, aims = limits(ratio, row["aim"], faster, ms, row["aim_us"])
    text = f"{ratio:.1f} x faster" if faster else f"{ratio:.2f} x"
    return [row["row"], duration(ms), text, row["against"], asked, hoped, verdict(musts, aims)]


def limits(ratio: float, limit: float | None, faster: bool, ms: float, limit_us: float | None) -> tuple[str, list[bool]]:
    """Return what is asked of a row, as text, and which parts of it are met."""
    texts, met = [], []
    if limit is not None:
        texts.append(f"{'>=' if faster else '<='} {limit:g} x")
        met.append(ratio >= limit if faster else ratio <= limit)
    if limit_us is not None:
        texts.append(f"<= {duration(limit_us / 1e3)}")
        met.append(ms <= limit_us / 1e3)
    return ", ".join(texts), met


def memory(row: dict[str, Any]) -> list[str]:
    """Return the row of what a call allocates, at the largest size."""
    size, peak = max((int(size), peak) for size, peak in row["peaks"].items())
    most = row["must_bytes"]
    return [row["row"], "", f"{peak / 1024:.0f} KiB at {size / 1e6:.0f} MB", "", f"< {most >> 10} KiB", "", verdict([peak < most], [])]


def duration(ms: float) -> str:
    """Return a time with a unit that suits it."""
    return f"{ms / 1e3:.2g} s" if ms >= 1000 else f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1e3:.3g} µs"


def verdict(musts: list[bool], aims: list[bool]) -> str:
    """Say openly what was missed."""
    if not all(musts):
        return "**missed**"
    return "aim missed" if not all(aims) else "met" if musts else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
