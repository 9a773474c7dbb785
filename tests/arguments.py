"""The losses of the whole table, the one without gradients included, and the options that each of them takes."""

from __future__ import annotations

import inspect

from fastloss.losses import table
from tests.table import LOSSES, Case

EVERY_LOSS = {**LOSSES, "binary_entropy": Case(table.LOSSES["binary_entropy"])}
VAE_OPTIONS = ("reconstruction", "beta", "weight", "mask", "ignore_index", "target_scale", "validate", "grad_output", "out")


def options_of(row):
    """Return the names of the arguments that a loss takes besides its operands."""
    return VAE_OPTIONS if row.name == "vae_loss" else tuple(inspect.signature(row.loss).parameters)[len(row.arrays) :]


def methods_of(row):
    """Return the names of the methods that compute something."""
    return [name for name in ("__call__", "grad", "value_and_grad", "curvature") if name == "__call__" or hasattr(row.loss, name)]


def parameters_of(row):
    """Return the names of the parameters of a loss's formula."""
    return tuple(row.loss.definition.formula.defaults) if row.is_elementwise else ()
