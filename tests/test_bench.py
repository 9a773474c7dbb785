"""The benchmark suite: rows are checked before they are timed, rounds are interleaved, and tables follow from the rounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from bench import cases, command, compare, formulas, goals, limit, measure, ours, peers, pictures, report
from bench.batch import Batch
from bench.cases import BCE, MSE, Case
from bench.goals import TENSORS
from bench.page import marks
from bench.record import FORMAT, Record
from bench.results import Results, load
from bench.row import Row, WrongError, expected
from bench.suite import Suite
from tests.labels import misplaced
from tests.ulp import ROW, SUM, assert_close

SMALL = Case(size="1Ki")
RECORD = Path(__file__).parents[1] / "bench" / "results" / "epyc-zen5-2-cores.json"
MACHINE = {
    "cpu": "a CPU", "architecture": "x", "cache_mib": 32, "simd": "avx2", "cores": 2, "memory_gib": 8, "system": "Linux", "threads": 2,
    "versions": {"python": "3", "fastloss": "0"},
}  # fmt: skip


def content(case=None, **seconds):
    """Make the content of a results file with one case and invented rounds."""
    case = case or Case()
    rows = [
        {"name": name, "seconds": times, "errors": {"gradient": 1e-8}, "extra_bytes": 1 << 20}
        for name, times in ({"fastloss, out=": [2.0, 2.1, 2.2], "limit: triad": [1.0, 1.0, 1.1], "torch eager": [40.0]} | seconds).items()
    ]
    entry = {**{name: getattr(case, name) for name in ("loss", "part", "dtype", "size", "layout", "option")}, "rows": rows}
    return {"format": FORMAT, "date": "2026-01-01T00:00:00", "machine": MACHINE, "cases": [entry], "threads": [], "left_out": []}


# --- the table of cases


def test_every_loss_is_timed_in_every_pass():
    import fastloss as fl

    losses = {name for name in fl.__all__ if name.endswith(("_loss", "cross_entropy", "_logits")) and name != "elementwise_loss"}
    assert losses == set(cases.SUBJECTS)
    assert {(case.loss, case.part) for case in cases.table()} >= {(loss, part) for loss in losses for part in cases.PASSES}


def test_every_axis_is_varied_and_no_case_is_repeated():
    table = cases.full()
    assert len(set(table)) == len(table)
    assert {case.dtype for case in table} == set(cases.DTYPES)
    assert {case.size for case in table} == set(cases.SIZES | cases.CURVE | cases.CLASS_SIZES)
    assert {case.layout for case in table} == set(cases.LAYOUTS)
    assert {case.option for case in table} == set(cases.OPTIONS)


def test_impossible_cases_are_not_selected():
    assert cases.select(loss=("dice_with_logits_loss",), size=("1Ki",)) == []
    assert cases.select(loss=("gaussian_kl_loss",), dtype=("uint8 targets",)) == []
    assert cases.select(loss=("mse_loss",), option=("pos_weight",)) == []
    assert cases.select(loss=("cross_entropy",), size=("1Ki",)) == cases.select(loss=("mse_loss",), size=("volume",)) == []


# --- rows: each computes its case


@pytest.mark.parametrize("case", dict.fromkeys(case.tiny for case in cases.table()), ids=str)
def test_our_rows_and_numpys_compute_the_case(case):
    batch = Batch(case)
    want = expected(batch)
    for row in ours.rows(batch) + ours.numpy_rows(batch):
        if row.name != ours.PLAIN:
            errors = row.errors(want)
            assert set(errors) == {"value": {"value"}, "grad": {"gradient"}}.get(case.part, {"value", "gradient"})
            assert max(errors.values()) <= ROW[case.dtype]


def test_expectation_computed_in_parts_equals_that_of_the_whole(monkeypatch):
    batch = Batch(Case(size="mnist", option="mask"))
    value, (grad,) = expected(batch)
    monkeypatch.setattr("bench.row.AT_ONCE", 3_000)
    monkeypatch.setattr("bench.row.CHECKED", 10_000)
    of_parts, (looked_at,) = expected(batch)
    assert 10_000 <= looked_at.size < batch.arrays[0].size
    assert_close(of_parts, value, SUM[np.dtype(np.float64)])
    assert np.array_equal(looked_at, grad[: len(looked_at)])


def test_a_row_that_computes_something_else_is_refused():
    value, (grad,) = want = expected(Batch(SMALL))
    for wrong, factor in ((value * 1.02, 1.0), (value, 1.02), (np.nan, 1.0), (value, np.nan)):
        with pytest.raises(WrongError, match="off by"):
            Row("wrong", lambda v=wrong, f=factor: (v, [f * grad]), lambda result: result).errors(want)


def test_overwritten_arrays_are_restored():
    batch = Batch(SMALL)
    row = next(row for row in ours.rows(batch) if row.name == "fastloss, in place")
    first = row.errors(expected(batch))
    assert row.errors(expected(batch)) == first


def test_installed_peers_compute_the_cases():
    here, absent = peers.load()
    assert "scikit-learn" in here
    assert len(here) + len(absent) == len(peers.PEERS)
    suite = Suite(1, ["scikit-learn"], pytest.fail)
    for loss in ("binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "huber_loss"):
        for part in cases.PASSES:
            batch = Batch(Case(loss, part, size="1Ki"))
            assert "scikit-learn" in [row.name for row, _ in suite.record.check(batch.case, suite.rows(batch), expected(batch))]


def test_an_absent_peer_is_reported_and_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn._loss.loss", None)
    monkeypatch.delitem(sys.modules, "bench.peers.with_sklearn", raising=False)
    here, absent = peers.load()
    assert "scikit-learn" not in here
    assert any(line.startswith("scikit-learn is left out") and "pip install scikit-learn" in line for line in absent)


def test_a_peer_that_fails_is_reported_and_left_out(monkeypatch):
    monkeypatch.setattr(peers, "rows", lambda *_: [Row("broken", lambda: 1 / 0, lambda result: result)])
    said = []
    suite = Suite(1, ["broken"], said.append)
    batch = Batch(SMALL)
    assert "broken" not in [row.name for row, _ in suite.record.check(batch.case, suite.rows(batch), expected(batch))]
    assert said == [f"broken is left out of {SMALL}: ZeroDivisionError: division by zero"]


def test_rows_that_do_not_fit_into_memory_are_reported_and_left_out(monkeypatch):
    said = []
    suite = Suite(1, ["torch"], said.append)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3 * 4096, total=1 << 30))
    suite.run(SMALL, 0.0)
    (entry,) = suite.record.content["cases"]
    assert {row["name"].partition(",")[0] for row in entry["rows"]} == {"fastloss", "limit: triad"}
    assert {line.partition(" is left out")[0] for line in said} == {"NumPy, stable", "NumPy, naive", "torch"}
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0, total=1 << 30))
    suite.run(replace(SMALL, loss="mse_loss"), 0.0)
    assert len(suite.record.content["cases"]) == 1


def test_our_own_row_that_fails_is_an_error():
    row = Row("fastloss, out=", lambda: (0.0, []), lambda result: result)
    with pytest.raises(WrongError, match="off by"):
        Record(MACHINE, pytest.fail).check(SMALL, [row], expected(Batch(SMALL)))


@pytest.mark.parametrize(
    ("dtype", "target"), [("f4", "f4"), ("f8", "f8"), ("f2", "f2"), ("f4", "u1"), ("f4", None), ("f2", None), ("u1", None)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_limits_move_the_stated_bytes(dtype, target, threads):
    dtype, target = np.dtype(dtype), target and np.dtype(target)
    bound = limit.Limit(dtype.itemsize, target.itemsize if target else 0, threads)
    limit.check(bound, dtype, target)
    bound._triad = bound._dot
    with pytest.raises(RuntimeError, match="triad"):
        limit.check(bound, dtype, target)


def test_every_loss_that_is_a_sum_has_a_naive_formula():
    assert set(formulas.NAIVE) == {name for name in cases.SUBJECTS if "dice" not in name and "vae" not in name}


# --- measuring


def counted(name, log, work=lambda: None, **more):
    def run():
        log.append(name)
        work()

    return Row(name, run, **more)


def test_rounds_are_interleaved_in_random_order(monkeypatch):
    monkeypatch.setattr(measure, "SHORT", 0.0)  # one call per round
    log = []
    times = measure.measure([counted(name, log) for name in "abc"], 0.0)
    log = log[9:]  # without the three calls of each row that estimate its duration
    assert log[::2] == log[1::2]  # each timed call follows an untimed one
    rounds = ["".join(log[k : k + 6 : 2]) for k in range(0, len(log), 6)]
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", measure.LEAST)


def test_slow_rows_run_in_every_third_round(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", 1e-3)
    monkeypatch.setattr(measure, "SHORT", 1e-4)
    import time

    times = measure.measure([counted("slow", [], lambda: time.sleep(2e-3)), counted("fast", [])], 0.0)
    assert len(times["fast"]) == measure.LEAST == 3 * len(times["slow"])


def test_setup_and_restore_are_not_timed():
    import time

    def pause():
        time.sleep(0.05)

    row = Row("row", lambda: None, before=pause, restore=pause)
    assert measure.timed(row, 1) < 0.05


@pytest.mark.skipif(not measure.PEAK.exists(), reason="the system does not report peak memory")
def test_extra_memory_is_the_peak_of_a_call():
    size = 64 << 20
    assert abs(measure.extra_memory(Row("one array", lambda: np.ones(size, np.uint8))) - size) < size // 16
    assert abs(measure.extra_memory(Row("freed again", lambda: np.ones(size, np.uint8).sum())) - size) < size // 16
    assert measure.extra_memory(Row("nothing", lambda: None)) < size // 16


# --- results: comparing, goals, tables, pictures


def verdict(old, new):
    (change,) = compare.compare(Results(content(**old)), Results(content(**new)))
    return change.verdict


def test_compare_reports_slower_rows_beyond_the_noise():
    steady, slower, faster = ({"fastloss, out=": [x, 1.01 * x, 0.99 * x]} for x in (2.0, 3.0, 1.5))
    assert [verdict(steady, other) for other in (steady, slower, faster)] == ["same", "slower", "faster"]


def test_compare_ignores_a_slower_machine_a_faster_limit_and_noisy_rounds():
    drifted = {"fastloss, out=": [4.0, 4.2, 4.4], "limit: triad": [2.0, 2.0, 2.2]}
    noisy = {"fastloss, out=": [2.0, 3.0, 4.0]}
    assert verdict({}, drifted) == "same"
    assert verdict({}, noisy) == "same"
    assert verdict({}, {"limit: triad": [0.6, 0.6, 0.66]}) == "same"


def test_goals_are_met_or_missed_by_the_ratios():
    results = Results(content())
    found = {(goal.case, goal.against): (ratio, goal.met(ratio)) for goal, ratio in goals.verdicts(results)}
    assert found[Case(), goals.LIMIT] == (2.1, False)
    assert found[Case(), "torch eager"] == (40.0 / 2.1, True)
    assert (Case("mse_loss"), goals.LIMIT) not in found


def test_tables_hold_the_medians():
    (table, *_) = report.tables(Results(content()))
    ours_ = next(row for row in table.rows if row[0] == "fastloss, out=")
    assert ours_[1:4] == ["2.1 s", "2.05 s - 2.15 s", "2.10"]
    eager = next(row for row in table.rows if row[0] == "torch eager")
    assert eager[4] == "19.0 x"
    assert table.markdown().count("\n|") == 2 + len(table.rows)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5e-6, "0.5 µs"), (12.34e-6, "12.3 µs"), (4e-3, "4 ms"), (2.5, "2.5 s"), (-0.002, "-2 ms")]
)
def test_durations_have_a_unit_that_suits_them(seconds, text):
    assert report.duration(seconds) == text


def block(name):
    begin, end = marks(name, report.AUTHOR)
    return f"{begin}\nold\n{end}\n"


@pytest.mark.parametrize("names", [(report.SUMMARY,), (report.REST,), (report.SUMMARY, report.REST)])
def test_a_page_is_written_between_its_marks(tmp_path, names):
    page = tmp_path / "README.md"
    page.write_text("before\n" + "between\n".join(map(block, names)) + "after\n")
    written = Results(content() | {"left_out": ["optax is left out"]})
    for _ in range(2):
        report.write_page(page, written, tmp_path / "results.json", [tmp_path / "pictures" / "limit.png"])
    text = page.read_text()
    assert text.startswith("before\n" + marks(names[0], report.AUTHOR)[0])
    assert text.endswith(f"{marks(names[-1], report.AUTHOR)[1]}\nafter\n")
    assert "old" not in text
    assert text.count("](pictures/limit.png)") == (report.SUMMARY in names)
    assert text.count("2.1 s") == 2 * (report.SUMMARY in names)  # in the case's own table and in that of every loss
    assert text.count("optax is left out") == (report.REST in names)


def test_every_case_is_in_one_table():
    everything = [case for case in cases.full() if case.size not in cases.CURVE]
    found = Results(content() | {"cases": [content(case)["cases"][0] for case in everything]})
    tables = [report.grouped(found, group) for group in report.GROUPS]
    assert sorted(str(m.case) for table in tables for m in table) == sorted(map(str, everything))
    assert all(tables)


def test_faster_peers_are_listed_the_fastest_first():
    case = content(Case(part="value"), **{"fastloss": [3.0], "torch.compile": [1.5], "JAX": [1.0], "optax": [4.0]})
    del case["cases"][0]["rows"][0]  # a call for the value alone has no row with out=
    assert [row[1:] for row in report.faster_peers(Results(case)).rows] == [
        ["3 s", "JAX", "1 s", "3.00 x"],
        ["3 s", "torch.compile", "1.5 s", "2.00 x"],
    ]


def test_a_goal_is_listed_as_met_or_as_missed():
    met, missed = (report.aims(Results(content()), met).rows for met in (True, False))
    assert len(met) + len(missed) == len(goals.verdicts(Results(content())))
    assert ["BCE value+grad", "the limit", "<= 1.5 x", "2.10 x"] in missed
    assert ["BCE value+grad", "torch eager", ">= 15 x faster", "19.05 x"] in met


def test_pictures_without_results_are_not_drawn(tmp_path):
    drawn = pictures.draw(Results(content()), tmp_path)
    assert [path.name for path in drawn] == ["limit.png", "memory.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def over_sizes(*cases, **seconds):
    """Draw the picture over batch sizes; return it with the lines of its panels, by label."""
    found = [content(case, **seconds)["cases"][0] for case in cases]
    figure = pictures.sizes(Results(content() | {"cases": found}))
    return figure, [{line.get_label(): line for line in axes.lines if line.get_label() != "_fastest"} for axes in figure.axes]


def test_times_over_sizes_are_those_of_one_kind_of_case():
    others = [Case(part="value", size="10^5"), Case(dtype="float64", size="10^6"), Case(size="mnist"), Case(MSE, size="10^5")]
    figure, (arrays, tensors) = over_sizes(*others, Case(size="10^7"), Case(size="10^4"), **{"NumPy, stable": [4.2], TENSORS: [10.0]})
    assert {name: list(line.get_ydata()) for name, line in arrays.items()} == {"fastloss": [1, 1], "NumPy, stable": [2, 2]}
    assert {name: list(line.get_ydata()) for name, line in tensors.items()} == {"fastloss": [1, 1], "torch eager": [4, 4]}
    assert all(list(line.get_xdata()) == [10**4, 10**7] for line in (*arrays.values(), *tensors.values()))
    assert misplaced(figure) == []


def test_the_fastest_at_each_size_is_marked():
    found = [content(Case(size=size), **{TENSORS: [ours]})["cases"][0] for size, ours in (("10^4", 50.0), ("10^5", 30.0))]
    figure = pictures.sizes(Results(content() | {"cases": found}))
    arrays, tensors = ([line for line in axes.lines if line.get_label() == "_fastest"] for axes in figure.axes)
    assert arrays == []  # no peer was measured on arrays
    assert [(*line.get_xdata(), line.get_marker()) for line in tensors] == [
        (10**size, pictures.STYLES[name]["marker"]) for size, name in ((4, "torch eager"), (5, "fastloss"))
    ]


def test_sizes_of_the_table_are_drawn_where_the_curve_was_not_measured():
    cases = (Case(loss, size=size) for loss in (BCE, MSE) for size in ("large", "1Ki", "mnist"))
    _, panels = over_sizes(*cases, JAX=[3.0])
    assert [list(panel["fastloss"].get_xdata()) for panel in panels] == [[1024, 100352, 12582912]] * 2
    assert pictures.sizes(Results(content())) is None


def test_sizes_on_a_gpu_are_drawn_without_a_row_on_tensors(monkeypatch):
    monkeypatch.setitem(MACHINE, "gpu", "a GPU")
    figure, (arrays,) = over_sizes(Case(size="large"), Case(size="huge"), **{"CuPy, naive": [8.0]})
    assert {name: list(line.get_ydata()) for name, line in arrays.items()} == {"fastloss": [1, 1], "CuPy, naive": [8 / 2.1] * 2}
    assert figure.axes[0].get_title() == "CuPy arrays"
    assert misplaced(figure) == []


def test_no_label_of_the_pictures_is_beyond_its_axes(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    assert len(pictures.draw(load(RECORD), tmp_path)) == 4
    assert [label for figure in figures for label in misplaced(figure)] == []


def test_misplaced_labels_are_found():
    figure = Figure(figsize=(6, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="elements", ylabel="a label that is longer than its axes are high")
    left.text(0.9, 0.5, "beside")
    right.set(title="a title that is longer than the axes below it")
    right.set_xticks([0.4, 0.5], ["first label", "second label"])
    assert set(misplaced(figure)) == {
        "'a label that is longer than its axes are high' is beyond its axes",
        "'a label that is longer than its axes are high' is beyond the picture",
        "'a title that is longer than the axes below it' is beyond its axes",
        "'a title that is longer than the axes below it' is beyond the picture",
        "'beside' is beyond its axes",
        "'first label' is over 'second label'",
    }


# --- the command


def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "bench", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_measures_shows_and_compares(tmp_path):
    file = tmp_path / "results.json"
    done = bench("--loss", BCE, "--size", "1Ki", "--size", "16Ki", "--json", file, "--png", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fastloss, in place" in done.stdout
    rounds = json.loads(file.read_text())["cases"]
    assert [case["size"] for case in rounds] == ["1Ki", "16Ki"]
    assert all(len(row["seconds"]) >= measure.LEAST // 3 for case in rounds for row in case["rows"])
    shown = bench("--show", file, "--png", tmp_path)
    assert shown.stdout.split() == done.stdout[done.stdout.index("Batch sizes") :].split()
    same = bench("--compare", file, file)
    assert same.returncode == 0
    assert re.fullmatch(r"\d+ rows compared: nothing changed beyond the noise", same.stdout.splitlines()[-1])


def test_the_command_reports_slower_rows(tmp_path):
    for name, times in (("old", [2.0, 2.0, 2.0]), ("new", [3.0, 3.0, 3.0])):
        (tmp_path / name).write_text(json.dumps(content(**{"fastloss, out=": times})))
    done = bench("--compare", tmp_path / "old", tmp_path / "new")
    assert done.returncode == 1
    assert "slower" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--loss", "dice_with_logits_loss", "--size", "1Ki"), "no loss accepts such arrays"),
        (("--loss", "nothing"), "invalid choice: 'nothing'"),
        (("--threads", "0"), "'0' is not a whole number from 1 to"),
        (("--json", "/nowhere/results.json"), "the folder /nowhere does not exist"),
        (("--png", "/nowhere"), "the folder /nowhere for the pictures does not exist"),
        (("--write", "/nowhere/README.md", "--json", "x.json"), "/nowhere/README.md has no place for the tables"),
        (("--show", "/nowhere.json"), "/nowhere.json cannot be read: No such file or directory"),
        (("--show", __file__), "is not a results file: it is not JSON"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(arguments, said):
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in " ".join((done.stdout + done.stderr).split())


def test_results_of_another_format_are_refused(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content() | {"format": 0}))
    with pytest.raises(ValueError, match="its format is 0; accepted: 1"):
        load(file)


def test_a_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the tables"):
        report.blocks(page)


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    from bench.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setitem(sys.modules, "bench.command", None)
    monkeypatch.delattr("bench.command")
    assert main() == 1
    assert "pip install '.[bench]'" in capsys.readouterr().err


def test_threads_beyond_the_cpus_are_refused():
    with pytest.raises(Exception, match="whole number from 1 to"):
        command.thread_count("100000")
