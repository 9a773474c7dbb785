"""The CuPy example equals the NumPy example except for the array module, and follows the same learning curve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ulp import TRAINING, assert_close

EXAMPLES = Path(__file__).parents[2] / "examples"


def code_of(name):
    """Return the lines of an example's code after its docstring, without imports."""
    text = (EXAMPLES / name).read_text().split('"""')[2]
    return [line for line in text.splitlines() if not line.startswith("import")]


def test_only_the_array_module_differs():
    assert code_of("autoencoder_numpy.py") == code_of("autoencoder_cupy.py")


def test_both_learn_the_same(cp, capsys):
    pytest.importorskip("sklearn")
    printed = []
    for name in ("autoencoder_numpy.py", "autoencoder_cupy.py"):
        text = (EXAMPLES / name).read_text()
        for long, short in (("range(300)", "range(7)"), ("step == 299", "step == 6")):
            assert long in text
            text = text.replace(long, short)
        exec(compile(text, name, "exec"), {"__name__": "example"})
        printed.append([float(x) for x in re.findall(r"(\d+\.\d+)", capsys.readouterr().out)])
    assert len(printed[0]) == 4
    assert_close(printed[1], printed[0], TRAINING)
    assert printed[0][2] < printed[0][0]
