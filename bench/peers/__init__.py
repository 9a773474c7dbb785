"""The other libraries: a module each, with `rows(batch, threads)`; one that is not installed is left out, and said to be."""

from __future__ import annotations

import importlib

from bench.batch import Batch
from bench.row import Row

# what to install, and the module of this folder that has its rows
PEERS = {"numexpr": "with_numexpr", "scikit-learn": "with_sklearn", "torch": "with_torch", "jax": "with_jax", "optax": "with_optax"}


def load() -> tuple[list[str], list[str]]:
    """Return the names of the peers that are here, and lines about those that are not."""
    here, absent = [], []
    for name, module in PEERS.items():
        try:
            importlib.import_module(f"{__name__}.{module}")
            here.append(name)
        except ImportError as missing:
            absent.append(f"{name} is left out: {missing} (pip install {name})")
    return here, absent


def rows(name: str, batch: Batch, threads: int) -> list[Row]:
    """Return a peer's rows of a case; none where it has no such loss or dtype."""
    made: list[Row] = importlib.import_module(f"{__name__}.{PEERS[name]}").rows(batch, threads)
    return made
