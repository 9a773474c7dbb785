"""The benchmarks on a device: every kind of case runs and is checked, and its results can be read."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from bench import cases, gpu
from bench.cases import BCE, MSE, Case
from bench.record import Record
from bench.row import Row

SIZED = {replace(case, size=size) for case in gpu.cases() for size in ("1Ki", "mnist")}
CASES = sorted((case for case in SIZED if case.is_possible), key=str)


@pytest.fixture
def record(cp, monkeypatch):
    monkeypatch.setitem(cases.SIZES, "mnist", (4, 3, 14, 13))  # fibers are slow
    return Record(gpu.description(), lambda line: None)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case.size == "1Ki"), id=str(case)) for case in CASES])
def test_every_case(record, case):
    gpu.run(record, case, rounds=1)
    (entry,) = record.content["cases"]
    names = [row["name"] for row in entry["rows"]]
    assert {"fastloss", "fastloss, out="} & set(names)
    assert ("fastloss, graph replay" in names) is not ("dice" in case.loss or "vae" in case.loss)
    assert any(name.startswith("limit") for name in names)
    assert all(len(row["seconds"]) == 1 for row in entry["rows"])


def test_a_wrong_row_is_left_out(record, monkeypatch):
    def cupy(self):
        wrong = Row("CuPy, naive", lambda: (self.arrays[0].sum(), self.arrays[0]), self.read)
        return [wrong, replace(self.ours()[0], name="CuPy, another")]

    monkeypatch.setattr(gpu.OnDevice, "cupy", cupy)
    gpu.run(record, Case(size="mnist"), rounds=1)
    (entry,) = record.content["cases"]
    assert {row["name"] for row in entry["rows"]} & {"CuPy, naive", "CuPy, another"} == {"CuPy, another"}
    assert any(line.startswith("CuPy, naive is left out of") and "its result is off by" in line for line in record.content["left_out"])


def test_a_case_that_fails_is_left_out_and_the_others_are_measured(record, monkeypatch, tmp_path, capsys):
    ours = gpu.OnDevice.ours
    monkeypatch.setattr(gpu.OnDevice, "ours", lambda self: ours(self) if self.case.loss == MSE else 1 / 0)
    monkeypatch.setattr(gpu, "cases", lambda: [Case(loss, size="1Ki") for loss in (BCE, MSE, "l1_loss")])
    assert gpu.main(["--json", f"{tmp_path}/gpu.json", "--rounds", "2", "--loss", MSE, "--loss", BCE]) == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [(entry["loss"], len(entry["rows"][0]["seconds"])) for entry in content["cases"]] == [(MSE, 2)]
    said = f"{Case(BCE, size='1Ki')} is left out: ZeroDivisionError: division by zero"
    assert said in content["left_out"]
    output = capsys.readouterr().out
    assert said in output
    assert re.search(r"fastloss, out= +[\d.]+ us +[\d.]+ x the limit", output)


def test_a_missing_folder_is_an_error_before_anything_is_measured(cp, tmp_path, capsys):
    for arguments in (["--json", f"{tmp_path}/no/gpu.json"], ["--png", f"{tmp_path}/no"]):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert f"the folder {tmp_path}/no does not exist" in capsys.readouterr().err


def test_tables_and_pictures_of_saved_results(record, tmp_path):
    console = pytest.importorskip("rich.console").Console(record=True, width=140)
    from bench import goals, machine, pictures, report
    from bench.results import load

    for case in (Case(size="mnist"), Case("mse_loss", size="mnist")):
        gpu.run(record, case, rounds=2)
    for entry in record.content["cases"]:
        entry["size"] = "huge"  # the size that a GPU is measured with
    path = tmp_path / "gpu.json"
    record.save(path)
    results = load(path)
    assert results.is_gpu
    report.show(console, results)
    assert "256x3x256x256" in console.export_text()
    assert machine.sentence(results.machine).startswith(f"{record.content['machine']['gpu']} (")
    assert [p.name for p in pictures.draw(results, tmp_path)] == ["limit.png"]
    assert {goal.against for goal, _ in goals.verdicts(results)} >= {"the limit"}
