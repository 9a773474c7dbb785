"""Compare the float32 errors of binary cross-entropy from logits in four libraries: `python -m docs.peers`.

The table is printed, and written into docs/accuracy.md. Needs the extras `test` and `peers`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import mpmath
import numpy as np
import optax
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn._loss.loss import HalfBinomialLoss
from tabulate import tabulate

import fastloss as fl
from bench.page import replace_block
from tests import oracle
from tests.ulp import ulp_error

PAGE = Path(__file__).parent / "accuracy.md"
BLOCK = ("other libraries", "docs/peers.py")  # the name of the table's block in the page, and the script that writes it
POINTS = [(-10.0, 0.0), (-16.0, 0.0), (16.0, 1.0), (20.0, 1.0), (100.0, 1.0), (np.inf, 1.0), (-np.inf, 0.0)]  # logits and targets
CORRECT = 8  # ulp: the roundings of a few operations
Pair = tuple[float, float]  # a value and a gradient


def by_fastloss(z: float, t: float) -> Pair:
    """Return fastloss's value and gradient."""
    value, gradient = fl.binary_cross_entropy_with_logits.value_and_grad(np.float32([z]), np.float32([t]), reduction="none")
    return value.item(), gradient.item()


def by_torch(z: float, t: float) -> Pair:
    """Return PyTorch's value and gradient."""
    logit = torch.tensor([z], requires_grad=True)
    value = F.binary_cross_entropy_with_logits(logit, torch.tensor([t]))
    value.backward()
    return value.item(), logit.grad.item()


def by_optax(z: float, t: float) -> Pair:
    """Return optax's value and gradient."""
    value, gradient = jax.value_and_grad(optax.sigmoid_binary_cross_entropy)(np.float32(z), np.float32(t))
    return value.item(), gradient.item()


def by_sklearn(z: float, t: float) -> Pair:
    """Return scikit-learn's value and gradient."""
    value, gradient = HalfBinomialLoss().loss_gradient(np.float32([t]), np.float32([z]))
    return value.item(), gradient.item()


LIBRARIES: dict[str, Callable[[float, float], Pair]] = {
    "fastloss": by_fastloss,
    "torch": by_torch,
    "optax": by_optax,
    "scikit-learn": by_sklearn,
}


def table() -> str:
    """Return the table of errors in Markdown, with the versions of the libraries."""
    headings = ["", *(f"z={z:g}, t={t:g}" for z, t in POINTS)]
    rows = []
    for name, compute in LIBRARIES.items():
        values, gradients = zip(*(errors(compute, z, t) for z, t in POINTS), strict=True)
        rows += [[f"{name}, value", *values], [f"{name}, gradient", *gradients]]
    text = tabulate(rows, headings, tablefmt="github", disable_numparse=True)
    return f"{text}\n\nMeasured with {versions()}, on a CPU."


def versions() -> str:
    """Return the versions of the other libraries as text."""
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "optax", "jax", "scikit-learn"))


def errors(compute: Callable[[float, float], Pair], z: float, t: float) -> list[str]:
    """Return the relative errors of a library's value and gradient as text."""
    exact = oracle.binary_cross_entropy_with_logits(mpmath.mpf(z), mpmath.mpf(t), oracle.MP)[:2]
    return [error(got, float(want)) for got, (want, _) in zip(compute(z, t), exact, strict=True)]


def error(got: float, want: float) -> str:
    """Return the relative error of a number as text, or a word if the number is correct, NaN, or wrongly 0."""
    if ulp_error(got, want, want, np.float32) <= CORRECT:
        return "correct"
    return "NaN" if np.isnan(got) else "returns 0" if got == 0 else f"{100 * abs(got / want - 1):.0g} %"


def main() -> None:
    """Print the table and write it into the page."""
    text = table()
    print(text)
    PAGE.write_text(replace_block(PAGE.read_text(), *BLOCK, text))


if __name__ == "__main__":
    main()
