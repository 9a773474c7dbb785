"""The rows of Optax, whose losses are compiled by JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from bench.batch import Batch
from bench.peers import with_jax
from bench.row import Row

LOSSES: dict[str, Callable[..., Any]] = {
    "binary_cross_entropy_with_logits": optax.sigmoid_binary_cross_entropy,
    "mse_loss": optax.squared_error,
    "huber_loss": optax.huber_loss,
    "log_cosh_loss": optax.log_cosh,
    "cross_entropy": lambda z, t: optax.softmax_cross_entropy_with_integer_labels(z, t, axis=1),
    "sigmoid_focal_loss": lambda z, t: optax.sigmoid_focal_loss(z, t, alpha=0.25, gamma=2.0),
}


def rows(batch: Batch, _threads: int) -> list[Row]:
    """Return the row of a case, or no row if Optax does not have the loss or the case has an option."""
    case = batch.case
    return [with_jax.row(batch, "optax", LOSSES[case.loss])] if case.loss in LOSSES and not case.option else []
