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
    versions = machine["versions"]
    rows = [cells(b["extra_info"]) for b in content["benchmarks"] if "ratio" in b["extra_info"]]
    (peaks,) = (b["extra_info"]["peaks"] for b in content["benchmarks"] if "peaks" in b["extra_info"])
    rows.append(
        [
            "extra memory with `out=`",
            "",
            f"{max(peaks.values()) / 1024:.0f} KiB at {max(map(int, peaks)) / 1e6:.0f} MB",
            "",
            "",
            "",
            verdict(True),
        ]
    )
    table = tabulate(rows, ["what", "time", "measured", "against", "must", "aim", ""], tablefmt="github", disable_numparse=True)
    used = ", ".join(f"{name} {versions[name]}" for name in ("python", "numpy", "llvmlite"))
    cpu = f"{machine['cpu']['brand_raw']}, {machine['cores']} cores, {machine['threads']} threads"
    return f"{cpu}; {used}; {content['datetime'][:10]}; raw rounds in `{results}`.\n\n{table}"


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    name, ratio, must, aim = row["row"], row["ratio"], row["must"], row["aim"]
    if name == "import fastloss":
        extra = row["ms"] - row["other_ms"]
        return [name, duration(row["ms"]), f"{extra:+.0f} ms", "import numpy", "<= +60 ms", "", verdict(extra <= 60)]
    sign, text = (">=", f"{ratio:.1f} x faster") if row["faster"] else ("<=", f"{ratio:.2f} x")
    met, asked, hoped = [], [], []
    if must is not None:
        met.append(ratio >= must if row["faster"] else ratio <= must)
        asked.append(f"{sign} {must:g} x")
        hoped += [f"{sign} {aim:g} x"] if aim is not None else []
    if row["must_us"] is not None:
        met.append(row["ms"] <= row["must_us"] / 1e3)
        asked.append(f"<= {duration(row['must_us'] / 1e3)}")
        hoped += [f"<= {duration(row['aim_us'] / 1e3)}"] if row["aim_us"] is not None else []
    return [name, duration(row["ms"]), text, row["against"], ", ".join(asked), ", ".join(hoped), verdict(all(met)) if met else ""]


def duration(ms: float) -> str:
    """Return a time with a unit that suits it."""
    return f"{ms / 1e3:.2g} s" if ms >= 1000 else f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1e3:.3g} µs"


def verdict(is_met: bool) -> str:
    """Say openly whether the must was met."""
    return "met" if is_met else "**missed**"


if __name__ == "__main__":
    main(*sys.argv[1:])
