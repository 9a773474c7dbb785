"""A loss of a linear layer of tensors; see `fastloss/core/layer.py`. Gradients are computed in the forward pass.

With one value for each sample, upstream gradients differ from sample to sample, and gradients are computed in the backward pass.
torch.compile sees the operator `fastloss::linear_loss`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastloss.backends.torch import operators
from fastloss.backends.torch.autograd import times_upstream
from fastloss.backends.torch.bound_loss import BoundLoss, value_dtype
from fastloss.backends.torch.joint import compute_jointly
from fastloss.backends.torch.memory_views import HALVES, check_tensors, has_memory, refuse_gradient, refuse_transforms, to_tensor
from fastloss.backends.torch.operators import LIBRARY, TAGS, no_gradients
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.checks import count_group_axes, to_validate
from fastloss.core.layer import Wanted, compute_layer
from fastloss.core.products import Products

Compute = Callable[..., tuple[Any, tuple[Any, ...]]]  # returns the value and the wanted gradients
NAMES = ("input", "linear_weight", "linear_bias")  # of the tensors that have a gradient
NOTHING: Wanted = (False, False, False)


def value_of_layer(compute: Compute, loss: Any, piece: int, operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Compute the value with autograd attached to input, weight and bias."""
    given = {**operands, **options}
    if is_small(piece, given):
        return value_of_small_layer(loss, **given)
    differentiable = [given.get(name) for name in NAMES]
    for name, x in given.items():
        if isinstance(x, Tensor) and name not in NAMES:
            refuse_gradient(name, x)
    wanted = tuple(isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() for x in differentiable)
    has_samples = count_group_axes(options["reduction"], operands["input"].shape) > 0
    tensors = [x for x in given.values() if isinstance(x, Tensor)]
    if not has_memory(tensors):
        check_tensors((name, given[name]) for name in operands)
        refuse_transforms(tensors)
        return compiled_value(loss, piece, given, NOTHING if has_samples else wanted)
    detached = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}

    def compute_detached(wanted: Wanted, **more: Any) -> Any:
        rest = {**detached, **more}
        return compute({name: rest.pop(name) for name in operands}, rest, wanted)

    if not any(wanted):
        return compute_detached(NOTHING)[0]
    return LayerFunction.apply(compute_detached, has_samples, *differentiable)


def is_small(piece: int, given: Mapping[str, Any]) -> bool:
    """Whether all outputs fit into a quarter of a piece, or with places an eighth, and PyTorch's layer raises no errors of its own.

    The layer and the loss one after the other then take less time than `LayerFunction`.
    """
    operands: list[Any] = [given.get(name) for name in (*NAMES, "target")]
    x, w, b, target = operands
    if not is_plain_layer(x, w, b) or not isinstance(target, Tensor) or target.requires_grad:
        return False
    if given.keys() & {"inplace_grad", "process_group"}:
        return False
    size = x.numel() // max(1, x.shape[1]) * len(w) * x.element_size()
    return 0 < size <= piece // (4 if x.dim() == 2 else 8) and not torch.is_autocast_enabled(x.device.type)


def is_plain_layer(x: Any, w: Any, b: Any) -> bool:
    """Whether tensors are the input, the weight and the bias of a layer, dense, of one dtype that has no 16 bits, and on one device."""
    if x.dim() < 2 or not isinstance(w, Tensor) or w.dim() != 2 or x.shape[1] != w.shape[1]:
        return False
    if b is not None and not (isinstance(b, Tensor) and b.shape == w.shape[:1]):
        return False
    others = [w] if b is None else [w, b]
    is_dense = all(a.layout is torch.strided for a in (x, *others))
    return is_dense and x.dtype in (torch.float32, torch.float64) and all(a.dtype is x.dtype and a.device == x.device for a in others)


def value_of_small_layer(loss: Any, input: Any, linear_weight: Any, target: Any, linear_bias: Any = None, **options: Any) -> Any:
    """Compute the value of a loss of outputs that exist as a whole."""
    if input.dim() == 2:
        return loss(torch.nn.functional.linear(input, linear_weight, linear_bias), target, **options)
    places = torch.nn.functional.conv1d(input.flatten(2), linear_weight[:, :, None], linear_bias)
    return loss(places.unflatten(2, input.shape[2:]), target, **options)


class LayerFunction(torch.autograd.Function):
    """The value of a loss of a linear layer, as a function of input, weight and bias."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, has_samples: bool, *tensors: Any) -> Any:
        """Compute the value and the gradients; only the value if there is one for each sample."""
        ctx.compute, ctx.has_samples, ctx.wanted = compute, has_samples, ctx.needs_input_grad[2:]
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        value, gradients = compute(NOTHING if has_samples else ctx.wanted)
        if not has_samples:
            ctx.compute = None
            ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the gradients, multiplied by the upstream gradient."""
        if torch.is_grad_enabled():  # `create_graph=True`
            raise NotImplementedError("fastloss.linear has no second derivatives; accepted: the layer and the loss one after the other")
        if ctx.has_samples:
            gradients = ctx.compute(ctx.wanted, grad_output=upstream)[1]
        else:
            gradients = [None if x is None else times_upstream(x, upstream, 1.0) for x in ctx.saved_tensors]
        return None, None, *(None if x is None else x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))


LIBRARY.define(
    "linear_loss(str loss, str reduction, int piece, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, "
    "Tensor[] others, str[] names, float[] numbers, ScalarType dtype, bool[] wanted, Tensor? upstream) -> Tensor[]",
    tags=TAGS,
)


def compiled_value(loss: AbstractLoss, piece: int, given: Mapping[str, Any], wanted: Wanted) -> Any:
    """Call the operator for the value, which autograd can differentiate."""
    if not isinstance(given["target"], Tensor):
        raise NotImplementedError("a sparse target is not supported in compiled code; accepted: a call under torch.compiler.disable")
    rest = dict(given)
    x, w, b, target = (rest.pop(name, None) for name in (*NAMES, "target"))
    reduction, dtype = rest.pop("reduction"), value_dtype(x)
    tensors = {name: rest.pop(name) for name in list(rest) if isinstance(rest[name], Tensor)}
    settings = {name: to_validate(value) if name == "validate" else value for name, value in rest.items()}
    bound = BoundLoss(loss, reduction, tuple(tensors), dtype)
    key, _, _, _, *options = operators.pack_arguments(bound, [x, target, *tensors.values()], settings)
    return torch.ops.fastloss.linear_loss(key, reduction, piece, x, w, b, target, *options, dtype, list(wanted), None)[0]


@torch.library.impl(LIBRARY, "linear_loss", "CUDA")
@torch.library.impl(LIBRARY, "linear_loss", "CPU")
def _linear_loss(
    loss: str, reduction: str, piece: int, input: Any, linear_weight: Any, linear_bias: Any, target: Any, others: list[Any],
    names: list[str], numbers: list[float], dtype: torch.dtype, wanted: list[bool], upstream: Any
) -> list[Any]:  # fmt: skip
    bound, settings = operators.unpack_arguments(loss, reduction, others, names, numbers, dtype)
    options = {**settings, **dict(zip(bound.names, others, strict=True)), "linear_bias": linear_bias, "grad_output": upstream}
    given = {name: x for name, x in options.items() if x is not None} | {"reduction": reduction}
    operands = {"input": input, "linear_weight": linear_weight, "target": target}
    value, gradients = compute_layer_of_tensors(bound.loss, piece, operands, given, tuple(wanted), dtype)
    return [value, *(x for x in gradients if x is not None)]


@torch.library.register_fake("fastloss::linear_loss", lib=LIBRARY)
def _(
    loss: str, reduction: str, piece: int, input: Any, linear_weight: Any, linear_bias: Any, target: Any, others: list[Any],
    names: list[str], numbers: list[float], dtype: torch.dtype, wanted: list[bool], upstream: Any
) -> list[Any]:  # fmt: skip
    shape = input.shape[: count_group_axes(reduction, input.shape)]
    chosen = [x for x, needed in zip((input, linear_weight, linear_bias), wanted, strict=True) if needed]
    gradients = [x.new_empty(x.shape, dtype=torch.float32 if x.dtype in HALVES else x.dtype) for x in chosen]
    return [input.new_empty(shape, dtype=dtype), *gradients]


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Any]) -> None:
    """Save the computed gradients or, with one value for each sample, all that they are computed from."""
    loss, reduction, piece, x, w, b, target, others, names, numbers, dtype, wanted, _ = inputs
    ctx.call, ctx.lists, ctx.wanted = (loss, reduction, piece), ([None] * len(others), names, numbers, dtype), wanted
    ctx.has_samples = count_group_axes(reduction, x.shape) > 0
    ctx.dtypes = [None if a is None else a.dtype for a in (x, w, b)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*((x, w, b, target, *others) if ctx.has_samples else output[1:]))


def multiply_gradients(ctx: Any, grads: list[Any]) -> tuple[Any, ...]:
    """Return the gradients of the operator with respect to input, weight and bias."""
    others, names, numbers, dtype = ctx.lists
    if ctx.has_samples:
        wanted = [bool(x) for x in ctx.needs_input_grad[3:6]]
        x, w, b, target, *saved = ctx.saved_tensors
        rest = (list(saved), names, numbers, dtype, wanted, grads[0])
        computed = torch.ops.fastloss.linear_loss(*ctx.call, x, w, b, target, *rest)[1:]
    else:
        wanted, computed = ctx.wanted, [gradient * grads[0].to(gradient.dtype) for gradient in ctx.saved_tensors]
    found = iter(computed)
    by = [next(found).to(dtype) if needed else None for dtype, needed in zip(ctx.dtypes, wanted, strict=True)]
    return None, None, None, *by, None, *no_gradients(others, names, numbers), None, None, None


torch.library.register_autograd("fastloss::linear_loss", multiply_gradients, setup_context=save_gradients, lib=LIBRARY)


def multiply(a: Any, b: Any, out: Any, start: Any) -> None:
    """Write `start` plus the product of two matrices, with PyTorch."""
    x, y, z = map(to_tensor, (a, b, out))
    if start is None:
        torch.mm(x, y, out=z)
    else:
        torch.addmm(z if start is out else to_tensor(start), x, y, out=z)


def sum_rows(x: Any, out: Any, adds: bool) -> None:
    """Write or add the sum of the rows of a matrix; PyTorch's sum has a quarter of the error of a product."""
    total = to_tensor(out)
    total.add_(to_tensor(x).sum(0)) if adds else torch.sum(to_tensor(x), 0, out=total)


PRODUCTS = Products(multiply, sum_rows)


def compute_layer_of_tensors(
    loss: AbstractLoss, piece: int, operands: Mapping[str, Any], options: Mapping[str, Any], wanted: Wanted, dtype: torch.dtype
) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
    """Compute the value, as a tensor of a dtype, and the wanted gradients."""
    method = functools.partial(compute_layer, loss, piece, wanted=wanted, products=PRODUCTS)
    value, gradients = compute_jointly(method, operands, options, dtype)
    return value.to(dtype), gradients
