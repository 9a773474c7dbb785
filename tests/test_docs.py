"""The documentation: its tables are current, it speaks of every loss, and its examples print what it says."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re

import pytest

import fastloss as fl
from bench import report
from bench.results import load
from docs import losses

PAGE = (losses.ROOT / "docs" / "losses.md").read_text()
README = (losses.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PUBLIC = [name for name in fl.__all__ if not inspect.isclass(getattr(fl, name)) and not inspect.isfunction(getattr(fl, name))]


def test_tables_are_what_would_be_written():
    assert losses.outdated() == []


def test_a_table_that_is_not_is_found(monkeypatch):
    file, table = losses.TABLES["losses"]
    monkeypatch.setitem(losses.TABLES, "losses", (file, lambda: table().replace("beta", "gamma")))
    assert losses.outdated() == ["README.md: the table 'losses' is out of date; run python -m docs.losses"]


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_speeds_are_those_of_the_results_they_name(page):
    path = losses.ROOT / page
    (source,) = set(re.findall(r"raw rounds in `(.*)`", path.read_text()))
    pictures = [path.parent / picture for picture in re.findall(r"!\[.*\]\((.*results/.*\.png)\)", path.read_text())]
    assert path.read_text() == report.filled(path, load(losses.ROOT / source), source, pictures)
    assert pictures
    assert all(picture.is_file() for picture in pictures)


def test_times_inside_a_training_step_are_those_of_the_results_they_name():
    pytest.importorskip("torch")
    from bench import training_step

    (source,) = re.findall(r"every round is in `(.*)`", README)
    table = training_step.table(json.loads((losses.ROOT / source).read_text()), source)
    assert training_step.filled(losses.ROOT / "README.md", table) == README


@pytest.mark.parametrize("name", PUBLIC)
def test_every_loss_is_documented(name):
    assert f"\n## {name}\n" in PAGE
    assert f"](losses/{name}.png)" in PAGE
    assert f"| `{name}" in README.partition("<!-- losses:")[2].partition("<!-- end of losses")[0]


@pytest.mark.parametrize("picture", sorted({*re.findall(r"\]\(losses/(.*)\.png\)", PAGE), *losses.DRAWN}))
def test_every_picture_is_drawn_and_shown(picture):
    assert (losses.PICTURES / f"{picture}.png").is_file()
    assert picture in losses.DRAWN
    assert f"](losses/{picture}.png)" in PAGE


def test_examples_print_what_the_page_says():
    names: dict[str, object] = {}
    for code in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        assert out.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE), code
