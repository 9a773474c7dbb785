"""JAX, compiled by XLA: `jax.jit(jax.value_and_grad(...))`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.batch import SCALE, Batch
from bench.peers.formulas import FORMULAS, reduced
from bench.row import Result, Row, split

XP = SimpleNamespace(
    abs=jnp.abs, exp=jnp.exp, log=jnp.log, log1p=jnp.log1p, sigmoid=jax.nn.sigmoid, softplus=jax.nn.softplus, where=jnp.where,
    bce=lambda z, t: jnp.maximum(z, 0) - z * t + jnp.log1p(jnp.exp(-jnp.abs(z))),
)  # fmt: skip


def rows(batch: Batch, _threads: int) -> list[Row]:
    """Return the row of a case; XLA takes as many threads as the process may use CPUs."""
    formula = FORMULAS[batch.case.loss]
    return [row(batch, "JAX", lambda *arrays: formula(XP, *arrays))] if not batch.case.option else []


def row(batch: Batch, name: str, formula: Callable[..., Any]) -> Row:
    """Return the row of a formula."""
    function, arrays = compiled(batch, formula)

    def read(result: Any) -> Result:
        value, grads = split(batch.case.part, result)
        return value, [np.asarray(g) for g in grads]

    return Row(name, lambda: jax.block_until_ready(function(*arrays)), read)


def compiled(batch: Batch, formula: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """Return a formula compiled with its gradients as the case asks, and its arrays."""
    case = batch.case
    jax.config.update("jax_enable_x64", case.dtype == "float64")

    def loss(*arrays: Any) -> Any:
        given = [x.astype(jnp.float32) if case.is_half else x * jnp.float32(SCALE) if x.dtype == jnp.uint8 else x for x in arrays]
        return reduced(case, formula(*given))

    transform: Any = {"value": lambda f, _: f, "grad": jax.grad, "value_and_grad": jax.value_and_grad}[case.part]
    return jax.jit(transform(loss, case.subject.gradients)), [jnp.asarray(x) for x in batch.arrays]
