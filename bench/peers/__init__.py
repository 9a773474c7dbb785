"""The peers: other libraries, each with a module that defines `rows(batch, threads)`. Those that are not installed are reported."""

from __future__ import annotations

import importlib

from bench.batch import Batch
from bench.row import Row

# by the name of the package to install: the module in this folder that makes the rows
PEERS = {"numexpr": "with_numexpr", "scikit-learn": "with_sklearn", "torch": "with_torch", "jax": "with_jax", "optax": "with_optax"}


def load() -> tuple[list[str], list[str]]:
    """Import the peers. Return the names of those that are installed, and a line about each that is missing."""
    installed, missing = [], []
    for name, module in PEERS.items():
        try:
            importlib.import_module(f"{__name__}.{module}")
            installed.append(name)
        except ImportError as error:
            missing.append(f"{name} is left out: {error} (pip install {name})")
    return installed, missing


def rows(name: str, batch: Batch, threads: int) -> list[Row]:
    """Return the rows of a peer for a case, or no rows if the peer does not support the loss, dtype or option."""
    made: list[Row] = importlib.import_module(f"{__name__}.{PEERS[name]}").rows(batch, threads)
    return made
