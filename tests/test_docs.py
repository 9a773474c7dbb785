"""The documentation: its tables are current, and it describes every loss; its examples are in `test_examples_in_docs.py`."""

from __future__ import annotations

import importlib
import inspect
import json
import re

import pytest

import fastloss as fl
from bench import page, report
from bench.results import load
from docs import losses
from tests.labels import misplaced

DOCS = losses.ROOT / "docs"
LOSSES = (DOCS / "losses.md").read_text()
BENCHMARKS = DOCS / "benchmarks.md"
PUBLIC = [name for name in fl.__all__ if not inspect.isclass(getattr(fl, name)) and not inspect.isfunction(getattr(fl, name))]


def test_tables_are_up_to_date():
    assert losses.outdated() == []


def test_an_outdated_table_is_found(monkeypatch):
    file, table = losses.TABLES["losses"]
    monkeypatch.setitem(losses.TABLES, "losses", (file, lambda: table().replace("beta", "gamma")))
    assert losses.outdated() == ["README.md: the table 'losses' is out of date; run python -m docs.losses"]


@pytest.mark.parametrize("page", [BENCHMARKS, DOCS / "benchmarks-classes.md"], ids=lambda page: page.stem)
def test_speeds_are_those_of_the_results_that_the_page_names(page):
    text = page.read_text()
    (source,) = set(re.findall(r"raw rounds in `(.*)`", text))
    pictures = [DOCS / picture for picture in re.findall(r"!\[.*\]\((.*results/.*\.png)\)", text)]
    assert report.blocks(page) == [report.SUMMARY, report.REST]
    assert text == report.filled(page, load(losses.ROOT / source), source, pictures)
    assert len(pictures) == 4 * (page == BENCHMARKS)
    assert all(picture.is_file() for picture in pictures)


@pytest.mark.parametrize("name", ["training_step", "everyday", "compiled", "linear"])
def test_tables_of_a_measurement_are_those_of_the_results_that_the_page_names(name):
    pytest.importorskip("torch")
    measurement = importlib.import_module(f"bench.{name}").MEASUREMENT
    file = DOCS / "linear.md" if name == "linear" else BENCHMARKS
    text = file.read_text()
    begin, end = page.marks(measurement.block, f"python -m {measurement.command} --write")
    (source,) = re.findall(r"all times are in `(.*)`", text.partition(begin)[2].partition(end)[0])
    assert measurement.filled(file, json.loads((losses.ROOT / source).read_text()), source) == text


def test_the_picture_of_linear_layers_has_no_label_beyond_its_axes(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from bench import linear

    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    (source,) = re.findall(r"all times are in `(.*)`", (DOCS / "linear.md").read_text())
    linear.draw(json.loads((losses.ROOT / source).read_text()), tmp_path / "linear.png")
    assert [misplaced(figure) for figure in figures] == [[]]


def test_table_of_errors_of_other_libraries_is_up_to_date():
    for name in ("torch", "optax"):
        pytest.importorskip(name)
    from docs import peers

    text = peers.PAGE.read_text()
    if peers.versions() not in text:
        pytest.skip(f"the page was measured with other versions than {peers.versions()}")
    assert text == page.replace_block(text, *peers.BLOCK, peers.table())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_loss_is_documented(name):
    readme = (losses.ROOT / "README.md").read_text()
    assert f"\n## {name}\n" in LOSSES
    assert f"](losses/{name}.png)" in LOSSES
    assert f"| `{name}" in readme.partition("<!-- losses:")[2].partition("<!-- end of losses")[0]


@pytest.mark.parametrize("picture", sorted({*re.findall(r"\]\(losses/(.*)\.png\)", LOSSES), *losses.DRAWN}))
def test_every_picture_is_drawn_and_shown(picture):
    assert (losses.PICTURES / f"{picture}.png").is_file()
    assert picture in losses.DRAWN
    assert f"](losses/{picture}.png)" in LOSSES
