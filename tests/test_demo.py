"""The demo and the example run from the command line."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from fastloss import demo
from tests.labels import misplaced

EXAMPLE = Path(__file__).parents[1] / "examples" / "autoencoder_numpy.py"  # test_examples.py tests those in PyTorch


def fastloss(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "fastloss", *arguments], capture_output=True, text=True, check=False, **options)


def test_demo_learns_and_draws(tmp_path):
    done = fastloss("demo", "--steps", "60", "--png", str(tmp_path / "picture.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = {
        line.split("│")[1].strip(): [cell.split()[0] for cell in line.split("│")[2:4]]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    }
    first, last, least = (float(rows[label][0]) for label in ("loss, first step", "loss, mean of the last 20 steps", "floor of the loss"))
    assert least < last < 0.5 * first
    awake, asleep = map(float, rows["largest gradient, first step"])
    assert awake > 100 * asleep
    sharp, dark = map(float, rows["pixel error at the end, rms"])
    assert sharp < 0.6 * dark


def test_no_label_of_the_demos_picture_is_beyond_its_axes(tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    assert demo.run(20, tmp_path / "picture.png") == 0
    assert [misplaced(figure) for figure in figures] == [[]]


def test_demo_reports_errors(tmp_path):
    done = fastloss("demo", "--png", str(tmp_path / "nowhere" / "picture.png"))
    assert done.returncode == 1
    assert "does not exist" in done.stdout.replace("\n", " ")
    for steps in ("0", "-3", "many"):
        done = fastloss("demo", "--steps", steps)
        assert done.returncode == 2
        assert f"{steps!r} is not a whole number of 1 or more" in done.stderr
    blocked = tmp_path / "matplotlib"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')")
    done = fastloss("demo", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "the demo needs matplotlib, which is not installed: pip install 'fastloss[demo]'\n"


def test_the_example_in_numpy_learns(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-1]))
    assert last < 0.5 * first
