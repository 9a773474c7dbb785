"""JAX, compiled by XLA: `jax.jit(jax.value_and_grad(...))`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.batch import SCALE, Batch
from bench.formulas import FORMULAS, reduced
from bench.row import Result, Row, split


def cross_entropy(z: Any, t: Any) -> Any:
    """Compute the cross-entropy of every entry from class indices."""
    own = jnp.take_along_axis(z, jnp.expand_dims(t, 1), 1)
    return jax.scipy.special.logsumexp(z, 1) - jnp.squeeze(own, 1)


XP = SimpleNamespace(
    abs=jnp.abs, exp=jnp.exp, log=jnp.log, log1p=jnp.log1p, sigmoid=jax.nn.sigmoid, softplus=jax.nn.softplus, sqrt=jnp.sqrt,
    where=jnp.where, cross_entropy=cross_entropy, softmax=jax.nn.softmax, one_hot=lambda t, classes: jax.nn.one_hot(t, classes, axis=1),
    bce=lambda z, t: jnp.maximum(z, 0) - z * t + jnp.log1p(jnp.exp(-jnp.abs(z))),
)  # fmt: skip


def rows(batch: Batch, _threads: int) -> list[Row]:
    """Return the row of a case, or no row if it has an option. XLA uses as many threads as the process has CPUs."""
    formula = FORMULAS[batch.case.loss]
    return [row(batch, "JAX", lambda *arrays: formula(XP, *arrays))] if not batch.case.option else []


def row(batch: Batch, name: str, formula: Callable[..., Any]) -> Row:
    """Return the row of a formula, compiled for a case."""
    function, arrays = compiled(batch, formula)

    def read(result: Any) -> Result:
        value, grads = split(batch.case.part, result)
        return value, [np.asarray(g) for g in grads]

    return Row(name, lambda: jax.block_until_ready(function(*arrays)), read)


def compiled(batch: Batch, formula: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """Compile a formula for the pass of a case, and return it with its arguments."""
    case = batch.case
    jax.config.update("jax_enable_x64", case.dtype == "float64")

    def loss(*arrays: Any) -> Any:
        given = [x.astype(jnp.float32) if x.dtype.itemsize == 2 else x * jnp.float32(SCALE) if x.dtype == jnp.uint8 else x for x in arrays]
        return reduced(case, formula(*given))

    transform: Any = {"value": lambda f, _: f, "grad": jax.grad, "value_and_grad": jax.value_and_grad}[case.part]
    arrays = [jnp.asarray(x, jnp.int32 if kind == "classes" else None) for kind, x in zip(case.subject.arrays, batch.arrays, strict=True)]
    return jax.jit(transform(loss, case.subject.gradients)), arrays
