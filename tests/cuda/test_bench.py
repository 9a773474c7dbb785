"""The benchmarks on a device: every kind of case runs, is checked, and can be read again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastloss.bench import cases, gpu
from fastloss.bench.cases import Case

CASES = [replace(case, size=size) for case in gpu.cases() for size in ("1Ki", "mnist")]


@pytest.fixture
def suite(cp, monkeypatch):
    monkeypatch.setitem(cases.SIZES, "mnist", (4, 3, 14, 13))  # fibers take their time
    return gpu.Suite(lambda line: None, cp.cuda.runtime.deviceSynchronize)


@pytest.mark.parametrize("case", sorted({case for case in CASES if case.is_possible}, key=str), ids=str)
def test_every_case(suite, case):
    suite.run(case, rounds=1)
    (entry,) = suite.results["cases"]
    names = [row["name"] for row in entry["rows"]]
    assert {"fastloss", "fastloss, out="} & set(names)
    assert ("fastloss, graph replay" in names) is not ("dice" in case.loss or "vae" in case.loss)
    assert any(name.startswith("limit") for name in names)
    assert all(len(row["seconds"]) == 1 for row in entry["rows"])


def test_a_wrong_row_is_left_out(suite, monkeypatch):
    monkeypatch.setattr(
        gpu.OnDevice, "cupy", lambda self: [gpu.Row("CuPy, naive", lambda: (self.arrays[0].sum(), self.arrays[0]), self.read)]
    )
    suite.run(Case(size="mnist"), rounds=1)
    assert any("CuPy, naive: its result is off by" in line for line in suite.results["left_out"])


def test_tables_and_pictures_of_a_file(suite, tmp_path):
    console = pytest.importorskip("rich.console").Console(record=True, width=140)
    from fastloss.bench import goals, machine, pictures, report
    from fastloss.bench.results import load

    for case in (Case(size="mnist"), Case("mse_loss", size="mnist")):
        suite.run(case, rounds=2)
    for entry in suite.results["cases"]:
        entry["size"] = "huge"  # as they would be measured on a GPU
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(suite.results))
    results = load(path)
    assert results.is_gpu
    report.show(console, results)
    assert "256x3x256x256" in console.export_text()
    assert machine.sentence(results.machine).startswith(f"{suite.results['machine']['gpu']} (")
    assert [p.name for p in pictures.draw(results, tmp_path)] == ["limit.png"]
    assert {goal.against for goal, _ in goals.verdicts(results)} >= {"the limit"}
