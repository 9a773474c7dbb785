"""PyTorch, eager and compiled: forward, and backward through autograd as a training loop does it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from fastloss.bench.batch import SCALE, Array, Batch
from fastloss.bench.peers.formulas import FORMULAS, reduced
from fastloss.bench.row import Result, Row

XP = SimpleNamespace(
    abs=torch.abs, exp=torch.exp, log=torch.log, log1p=torch.log1p, sigmoid=torch.sigmoid, softplus=F.softplus, where=torch.where,
    bce=functools.partial(F.binary_cross_entropy_with_logits, reduction="none"),
)  # fmt: skip


def rows(batch: Batch, threads: int) -> list[Row]:
    """Return the rows of a case."""
    torch.set_num_threads(threads)
    function = loss_function(batch)
    torch.compiler.reset()  # or after some shapes it would silently not compile any more
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return [row(batch, "torch eager", function), row(batch, "torch.compile", compiled)]


def loss_function(batch: Batch) -> Callable[..., Any]:
    """Return the loss as a PyTorch user writes it; 16 bits are widened, as autocast does."""
    case = batch.case
    extra = {name: torch.from_numpy(x) for name, x in batch.extra.items()}
    own: Any = getattr(F, case.loss, None)

    def loss(*tensors: Any) -> Any:
        given = [x.float() if case.is_half else x * SCALE if x.dtype == torch.uint8 else x for x in tensors]
        if "mask" in extra:
            return (own(*given, reduction="none") * extra["mask"]).sum() / extra["mask"].sum()
        if own:
            return own(*given, **extra, reduction=case.reduction)
        return reduced(case, FORMULAS[case.loss](XP, *given))

    return loss


def row(batch: Batch, name: str, loss: Callable[..., Any]) -> Row:
    """Return the row of one way to run the loss."""
    case = batch.case
    tensors = [to_tensor(x) for x in batch.arrays]
    if case.part == "value":
        return Row(name, functools.partial(without_grad, loss, tensors), lambda result: (result.item(), ()))
    leaves = [tensors[k].requires_grad_() for k in case.subject.slopes]

    def run() -> tuple[Any, list[Any]]:
        value = loss(*tensors)
        value.backward()
        grads = [x.grad for x in leaves]
        for x in leaves:
            x.grad = None
        return value.detach(), grads

    def read(result: tuple[Any, list[Any]]) -> Result:
        return None if case.part == "grad" else result[0].item(), [to_array(g) for g in result[1]]

    return Row(name, run, read)


def without_grad(loss: Callable[..., Any], tensors: list[Any]) -> Any:
    """Return the value, with nothing kept for a backward pass."""
    with torch.no_grad():
        return loss(*tensors)


def to_tensor(x: Array) -> Any:
    """Return a tensor on the array's own memory."""
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)


def to_array(x: Any) -> Array:
    """Return a tensor as an array, 16 bits widened."""
    array: Array = x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
    return array
