"""The rows of forward and backward in PyTorch, as in a training loop: PyTorch's own losses, eager and compiled, and fastloss."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

import fastloss as fl
from bench.batch import SCALE, Array, Batch
from bench.formulas import FORMULAS, reduced
from bench.row import Result, Row
from fastloss.backends.torch.memory_views import to_array, to_tensor
from fastloss.cpu.memory import empty_cache

XP = SimpleNamespace(
    abs=torch.abs, exp=torch.exp, log=torch.log, log1p=torch.log1p, sigmoid=torch.sigmoid, softplus=F.softplus, sqrt=torch.sqrt,
    where=torch.where,
    cross_entropy=functools.partial(F.cross_entropy, reduction="none"), softmax=torch.softmax,
    one_hot=lambda t, classes: torch.movedim(F.one_hot(t, classes), -1, 1),
    bce=functools.partial(F.binary_cross_entropy_with_logits, reduction="none"),
)  # fmt: skip


def rows(batch: Batch, threads: int) -> list[Row]:
    """Return the rows of a case: PyTorch's losses, and fastloss on tensors for value and gradient."""
    torch.set_num_threads(threads)
    function = loss_function(batch)
    torch.compiler.reset()  # otherwise torch.compile silently stops compiling after some shapes
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    theirs = [row(batch, "torch eager", function), row(batch, "torch.compile", compiled)]
    return theirs if batch.case.part != "value_and_grad" else [*theirs, *our_rows(batch)]


def our_rows(batch: Batch) -> list[Row]:
    """Return the rows of fastloss on tensors: with a gradient of its own, and with `inplace_grad` if the loss has one gradient."""
    made = [replace(row(batch, "fastloss on tensors", our_function(batch), torch.uint8), release=empty_cache)]
    return [*made, in_place(batch)] if len(batch.case.subject.gradients) == 1 else made


def our_function(batch: Batch, **options: Any) -> Callable[..., Any]:
    """Return a function that computes the loss with fastloss, under autocast if the case has 16-bit tensors."""
    case, loss = batch.case, getattr(fl, batch.case.loss)
    options |= {"reduction": case.reduction} if case.subject.reduction is None else {}
    options |= batch.options | {name: torch.from_numpy(x) for name, x in batch.extra.items()}
    half = torch.bfloat16 if case.dtype == "bfloat16" else torch.float16

    def value(*tensors: Any) -> Any:
        with torch.autocast("cpu", dtype=half) if case.is_half else contextlib.nullcontext():
            result = loss(*tensors, **options)
        return getattr(result, "total", result)

    return value


class Output(torch.autograd.Function):
    """An identity that returns given memory as its output: a tensor that is not a leaf, like the output of a network."""

    @staticmethod
    def forward(ctx: Any, leaf: Any, memory: Any) -> Any:
        """Return a tensor on the given memory."""
        return to_tensor(memory)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Return the upstream gradient unchanged."""
        return grad, None


def in_place(batch: Batch) -> Row:
    """Return the row whose gradient overwrites the logits. From the second call on it therefore reads a gradient."""
    (slot,), function = batch.case.subject.gradients, our_function(batch, inplace_grad=True)
    memory = batch.arrays[slot].copy(order="K")

    def loss(*tensors: Any) -> Any:
        return function(*(Output.apply(x, memory) if k == slot else x for k, x in enumerate(tensors)))

    return replace(row(batch, "fastloss on tensors, in place", loss, torch.uint8), restore=lambda: np.copyto(memory, batch.arrays[slot]))


def loss_function(batch: Batch) -> Callable[..., Any]:
    """Return a function that computes the loss as a PyTorch user writes it. Like autocast, it converts 16-bit tensors to float32."""
    case = batch.case
    extra = {name: torch.from_numpy(x) for name, x in batch.extra.items()}
    own: Any = getattr(F, case.loss, None)

    def loss(*tensors: Any) -> Any:
        given = [x.float() if x.dtype.itemsize == 2 else x * SCALE if x.dtype == torch.uint8 else x for x in tensors]
        if "mask" in extra:
            return (own(*given, reduction="none") * extra["mask"]).sum() / extra["mask"].sum()
        if own:
            return own(*given, **extra, reduction=case.reduction)
        return reduced(case, FORMULAS[case.loss](XP, *given))

    return loss


def row(batch: Batch, name: str, loss: Callable[..., Any], index: Any = torch.int64) -> Row:
    """Return the row of a loss in PyTorch: the value, or forward and backward. `index` is the dtype of class indices."""
    case = batch.case
    kinds = zip(case.subject.arrays, map(to_tensor, batch.arrays), strict=True)
    tensors = [x.to(index) if kind == "classes" else x for kind, x in kinds]
    if case.part == "value":
        return Row(name, functools.partial(without_grad, loss, tensors), lambda result: (result.item(), ()))
    leaves = [tensors[k].requires_grad_() for k in case.subject.gradients]

    def run() -> tuple[Any, list[Any]]:
        value = loss(*tensors)
        value.backward()
        grads = [x.grad for x in leaves]
        for x in leaves:
            x.grad = None
        return value.detach(), grads

    def read(result: tuple[Any, list[Any]]) -> Result:
        return None if case.part == "grad" else result[0].item(), [widened(g) for g in result[1]]

    return Row(name, run, read)


def widened(x: Any) -> Array:
    """Convert a tensor to an array, and bfloat16 to float32."""
    return to_array(x.float() if x.dtype == torch.bfloat16 else x)


def without_grad(loss: Callable[..., Any], tensors: list[Any]) -> Any:
    """Compute the value without saving tensors for a backward pass."""
    with torch.no_grad():
        return loss(*tensors)
