"""The examples in the README and in the documentation run, and print what the pages show."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser

from docs import bars

ROOT = Path(__file__).parent.parent
SYBIL = Sybil([PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS)])
PAGES = [
    "README.md", "docs/accuracy.md", "docs/data-sets.md", "docs/index.md", "docs/linear.md", "docs/losses.md", "docs/options.md",
    "docs/pytorch.md", "docs/your-own-loss.md",
]  # fmt: skip
WITH_TORCH = {"README.md", "docs/linear.md", "docs/pytorch.md", "docs/your-own-loss.md"}


# One test for each page: with Sybil's own collection, a test for each example, pytest-xdist would run a page's examples in different
# processes, and later examples would not find the names that earlier ones define.
@pytest.mark.parametrize("page", [*PAGES, pytest.param("docs/gpus.md", marks=pytest.mark.gpu)])
def test_examples_of_a_page_run(page, monkeypatch):
    if page in WITH_TORCH:
        functional = pytest.importorskip("torch").nn.functional
        for name in ("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss"):
            monkeypatch.setattr(functional, name, getattr(functional, name))  # undoes an example's `patch` after the test
    examples = list(SYBIL.parse(ROOT / page))
    assert examples
    with np.printoptions():  # restores the print options that a page sets
        for example in examples:
            example.evaluate()


def test_bars_of_the_readme_are_those_of_the_results_they_name():
    assert bars.filled() == bars.README.read_text()


def test_the_readme_has_no_link_that_breaks_on_a_package_index():
    text = (ROOT / "README.md").read_text()
    assert 7_000 <= len(text.encode()) <= 9_000
    assert not re.findall(r"\]\((?!https?://)", text)
