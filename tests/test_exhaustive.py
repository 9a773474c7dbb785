"""The sweeps over every argument: a sample of each, and the comparison itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("numba")

from tests.exhaustive import MEASURED
from tests.exhaustive.__main__ import main, parser
from tests.exhaustive.compare import compare, compare_cross_entropy
from tests.exhaustive.sweeps import SWEEPS
from tests.ulp import NUMPY

SAMPLES, SIZE = 32, 1 << 11  # blocks of a sweep, and inputs of a block


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_a_sample_of_each_sweep(sweep):
    size = SIZE if len(sweep.targets) < 100 else 1
    blocks = sweep.blocks(size)
    for block in blocks[:: max(1, len(blocks) // SAMPLES)]:
        errors = sweep.largest_errors(*block)[:, 0]
        assert (errors[: len(sweep.bounds)] <= sweep.bounds).all(), (block, errors)


def test_every_number_is_in_a_block():
    for sweep in SWEEPS:
        blocks = sweep.blocks(1 << 20)
        assert sum(stop - start for start, stop in blocks) * len(sweep.targets) == sweep.size
        assert all(0 < stop - start <= 1 << 20 for start, stop in blocks)
    assert sum(sweep.every_path for sweep in SWEEPS) == 2
    assert SWEEPS[0].size == 5 << 32


@pytest.mark.parametrize(
    ("got", "want", "magnitude", "error"),
    [
        (1.0, 1.0, 1.0, 0.0),
        (math.nan, math.nan, 1.0, 0.0),
        (math.inf, math.inf, math.inf, 0.0),
        (1.0, 1.0 + 2**-24, 1.0, 0.5),
        (1.0, 1.0 + 2**-23, 2.0, 0.5),
        (2.0**-149, 0.0, 0.0, 1.0),
        (1.0, math.nan, 1.0, math.inf),
        (math.nan, 1.0, 1.0, math.inf),
        (math.inf, 1.0, 1.0, math.inf),
        (1.0, math.inf, math.inf, math.inf),
        (-math.inf, math.inf, math.inf, math.inf),
        (math.inf, 2.0**128, 2.0**128, 0.0),
        (math.inf, 2.0**128 - 2.0**104, 2.0**128, 0.5),
        (2.0**128 - 2.0**104, 2.0**128 - 2.0**103, 2.0**128, 0.5),
    ],
)
def test_errors_in_float32(got, want, magnitude, error):
    worst = np.zeros((3, 3))
    compare(*(np.array([x]) for x in (3.0,)), 7.0, 1, *(np.array([x]) for x in (got, want, magnitude)), worst)
    wanted = [[0, 0, 0], [error, 3 if error else 0, 7 if error else 0], [0, 0, 0]]
    np.testing.assert_allclose(worst, wanted, rtol=NUMPY[np.dtype(np.float32)])


def test_the_largest_error_of_the_cross_entropy_is_found():
    z, t = np.array([-1.0, 2.0, 30.0]), np.array([0.0, 0.25])
    e, p = np.exp(-np.abs(z)), 1 / (1 + np.exp(-z))
    results = np.array([[np.log1p(np.exp(z)) - t_ * z, p - t_, e / (1 + e) ** 2] for t_ in t]).transpose(1, 0, 2)
    worst = np.zeros((3, 3))
    compare_cross_entropy(z, t, results, worst, False)
    assert (worst[:, 0] < 1e-6).all()
    results[1, 1, 2] *= 1 + 2**-20
    compare_cross_entropy(z, t, results, worst, False)
    assert 3 < worst[1, 0] < 17
    np.testing.assert_array_equal(worst[1, 1:], [30, 0.25])
    halves = np.zeros((3, 3))
    compare_cross_entropy(z, t, results.astype(np.float16).astype(np.float64), halves, True)
    assert halves[0, 0] == halves[2, 0] == 0
    results[0, 0, 1] += 2**-8  # two float16 ulp of the value
    compare_cross_entropy(z, t, results.astype(np.float16).astype(np.float64), halves, True)
    assert 1 < halves[0, 0] < 3


def test_the_record_is_of_all_arguments_and_within_the_promised_bounds():
    """A promise that changes, or a sweep of other arguments, needs another run."""
    records, sweeps = json.loads(MEASURED.read_text()), {sweep.name: sweep for sweep in SWEEPS}
    assert records
    for record in records:
        sweep, errors = sweeps[record["formula"]], record["errors"]
        assert (record["pairs"], record["every"]) == (sweep.size, 1)
        assert tuple(one["bound"] for one in errors.values()) == sweep.bounds
        assert all(one["error"] <= one["bound"] for one in errors.values())


def test_the_command(capsys, tmp_path):
    file = tmp_path / "found.json"
    for name in ("exp", "log", "exp"):  # the second outcome of a sweep replaces the first
        assert main(["--every", "100000", "--only", name, "--paths", "none", "--processes", "1", "--json", str(file)]) == 0
        assert name in capsys.readouterr().out
    records = json.loads(file.read_text())
    assert [(record["formula"], record["code path"]) for record in records] == [("log", "none"), ("exp", "none")]
    assert all(0 < record["errors"]["value"]["error"] < 1 for record in records)
    assert main(["--only", "unknown"]) == 2
    assert "there is no sweep unknown; accepted:" in capsys.readouterr().out
    assert parser().parse_args([]).every == 1
