"""The operators that PyTorch's compilers call in the place of a loss.

The compilers know the shapes of an operator's results and how to differentiate it, but do not look into its kernels. The operators
handle every loss, including those that users make: the first argument is the loss's key in `REGISTER`.

`fastloss::loss_and_slopes` computes the value and the gradients in one pass. The product of a gradient and what comes down the
chain is left to the compiler, which fuses it with its neighbours. `fastloss::loss` computes the value alone, and
`fastloss::derivatives` the gradients from an upstream gradient; the two also compute what is differentiated in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.backends.torch import double_backward
from fastloss.backends.torch.bound_loss import BoundLoss
from fastloss.backends.torch.memory_views import HALVES
from fastloss.core.abstract_loss import REGISTER, AbstractLoss
from fastloss.core.checks import refuse_unknown
from fastloss.core.definition import operand_of

CALL = "str loss, str reduction, Tensor first, Tensor second, Tensor[] others, str[] names, float[] numbers"
# options that are True or False; operators receive them as numbers
FLAGS = ("validate", "per_channel", "per_sample", "background", "squared", "zero_absent")
SLOPES = ("slope", "target_slope")  # gradients with respect to the first operand and to the second
# the derivatives of each gradient with respect to the first operand and to the second
SECOND_DERIVATIVES = {"slope": ("curvature", "cross_curvature"), "target_slope": ("cross_curvature", "target_curvature")}

LIBRARY = torch.library.Library("fastloss", "DEF")
# `mode="reduce-overhead"` captures CUDA graphs, which must own all their memory; kernels use workspaces that belong to streams
TAGS = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch._C.Tag, name, None)) is not None]
LIBRARY.define(f"loss({CALL}, ScalarType dtype) -> Tensor", tags=TAGS)
LIBRARY.define(f"loss_and_slopes({CALL}, ScalarType dtype, str[] wanted) -> Tensor[]", tags=TAGS)
LIBRARY.define(f"derivatives({CALL}, str[] wanted, Tensor? upstream) -> Tensor[]", tags=TAGS)


def pack_arguments(bound: BoundLoss, tensors: Sequence[Any], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a call as the arguments that the operators begin with."""
    first, second = tensors[:2]
    others, names = list(tensors[2:]), list(bound.names)  # PyTorch 2.6 makes a tuple of `*others`
    numbers: dict[str, float] = {}
    definition = bound.loss.definition
    parameters = () if definition is None or definition.classes else definition.formula.defaults  # parameters that may be arrays
    for name, x in settings.items():
        if name in parameters and isinstance(x, float) and torch.compiler.is_compiling():
            # As a constant of the compiled code, the number could not change without another compilation. Of the ways to make a
            # tensor of it, a product is one that the compiler takes as an operation on a variable.
            others.append(torch.ones((), dtype=torch.float64) * x)
            names.append(name)
        else:
            numbers[name] = x
    return bound.loss.key, bound.reduction, first, second, others, [*names, *numbers], [float(x) for x in numbers.values()]


def value(bound: BoundLoss, tensors: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    """Call an operator for the value, which autograd can differentiate."""
    arguments = *pack_arguments(bound, tensors, settings), bound.dtype
    first, second = tensors[:2]
    wanted = [name for name, x in zip(SLOPES, (first, second), strict=True) if x.requires_grad and torch.is_grad_enabled()]
    bound.plan_backward(first, second, settings)
    if wanted and bound.has_early_slopes and first.dtype not in HALVES and second.dtype not in HALVES:
        return torch.ops.fastloss.loss_and_slopes(*arguments, wanted)[0]
    return torch.ops.fastloss.loss(*arguments)


def derivatives(bound: BoundLoss, settings: Mapping[str, Any], wanted: Sequence[str], upstream: Any, tensors: Sequence[Any]) -> list[Any]:
    """Call the operator `fastloss::derivatives` for first or second derivatives. Autograd can differentiate first derivatives."""
    grads: list[Any] = torch.ops.fastloss.derivatives(*pack_arguments(bound, tensors, settings), list(wanted), upstream)
    return grads


def evaluate(
    bound: BoundLoss, summed: Sequence[str], wanted: Sequence[str], tensors: Sequence[Any], settings: Mapping[str, Any],
    special: Mapping[str, Any],
) -> tuple[Any, list[Any]]:  # fmt: skip
    """Compute value and derivatives with the operators, without autograd: the reduced value or None, and the quantities in `wanted`."""
    if "out" in special:
        raise NotImplementedError("out is not supported in compiled code, where the compiler allocates memory; leave it out")
    upstream = special.get("grad_output")
    tensors = [x.detach() for x in tensors]
    if upstream is not None and not isinstance(upstream, Tensor):
        upstream = torch.scalar_tensor(upstream, dtype=torch.float64, device=tensors[0].device)
    upstream = None if upstream is None else upstream.detach()
    slopes = [name for name in wanted if name != "value"]
    if len(slopes) < len((*summed, *wanted)) and set(slopes) <= set(SLOPES) and upstream is None:
        both = torch.ops.fastloss.loss_and_slopes(*pack_arguments(bound, tensors, settings), bound.dtype, slopes)
        return (both[0], both[1:]) if summed else (None, [*both[1:], both[0]])
    computed_value = value(bound, tensors, settings) if summed or "value" in wanted else None
    computed = derivatives(bound, settings, slopes, upstream, tensors)
    return (computed_value, computed) if summed else (None, [*computed, *([computed_value] if "value" in wanted else [])])


def unpack_arguments(
    loss: str, reduction: str, others: Sequence[Any], names: Sequence[str], numbers: Sequence[float], dtype: torch.dtype
) -> tuple[BoundLoss, dict[str, Any]]:
    """Make a `BoundLoss` and its settings from the arguments of an operator."""
    options = zip(names[len(others) :], numbers, strict=True)
    settings = {name: bool(x) if name in FLAGS else x for name, x in options}
    return BoundLoss(REGISTER[loss], reduction, tuple(names[: len(others)]), dtype), settings


@torch.library.impl(LIBRARY, "loss", "CUDA")
@torch.library.impl(LIBRARY, "loss", "CPU")
def _loss(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], dtype: torch.dtype
) -> Any:
    bound, settings = unpack_arguments(loss, reduction, others, names, numbers, dtype)
    computed = bound.value([first, second, *others], settings)
    return with_declared_value(bound, computed, first)


@torch.library.register_fake("fastloss::loss", lib=LIBRARY)
def fake_value(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], dtype: torch.dtype
) -> Any:
    """Return a value of the shape and dtype that the operator returns."""
    bound, settings = unpack_arguments(loss, reduction, others, names, numbers, dtype)
    check_arguments(bound.loss, first, second, names)
    if bound.writes_value and not bound.has_axes_of_its_own:
        return torch.empty_like(first)
    return first.new_empty(bound.loss.value_shape(first.shape, reduction, settings), dtype=dtype)


@torch.library.impl(LIBRARY, "loss_and_slopes", "CUDA")
@torch.library.impl(LIBRARY, "loss_and_slopes", "CPU")
def _loss_and_slopes(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], dtype: torch.dtype,
    wanted: list[str]
) -> list[Any]:  # fmt: skip
    bound, settings = unpack_arguments(loss, reduction, others, names, numbers, dtype)
    computed, slopes = bound.value_and_slopes(tuple(wanted), [first, second, *others], settings, 1.0)
    return [
        with_declared_value(bound, computed, first),
        *(with_declared_strides(x, operand_for(name, first, second)) for name, x in zip(wanted, slopes, strict=True)),
    ]


@torch.library.register_fake("fastloss::loss_and_slopes", lib=LIBRARY)
def _(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], dtype: torch.dtype,
    wanted: list[str]
) -> list[Any]:  # fmt: skip
    computed = fake_value(loss, reduction, first, second, others, names, numbers, dtype)
    return [computed, *(torch.empty_like(operand_for(name, first, second)) for name in wanted)]


@torch.library.impl(LIBRARY, "derivatives", "CUDA")
@torch.library.impl(LIBRARY, "derivatives", "CPU")
def _derivatives(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], wanted: list[str],
    upstream: Any
) -> list[Any]:  # fmt: skip
    bound, settings = unpack_arguments(loss, reduction, others, names, numbers, first.dtype)
    computed = bound.compute((), tuple(wanted), [first, second, *others], settings, grad_output=upstream)[1]
    return [with_declared_strides(x, operand_for(name, first, second)) for name, x in zip(wanted, computed, strict=True)]


@torch.library.register_fake("fastloss::derivatives", lib=LIBRARY)
def _(
    loss: str, reduction: str, first: Any, second: Any, others: list[Any], names: list[str], numbers: list[float], wanted: list[str],
    upstream: Any
) -> list[Any]:  # fmt: skip
    check_arguments(REGISTER[loss], first, second, names)
    return [torch.empty_like(operand_for(name, first, second)) for name in wanted]


def check_arguments(loss: AbstractLoss, first: Any, second: Any, names: Sequence[str]) -> None:
    """Refuse, while PyTorch traces, shapes and options that the kernels would refuse."""
    loss.check_operands(first.shape, second)
    refuse_unknown(dict.fromkeys(names), loss.options)


def operand_for(output: str, first: Any, second: Any) -> Any:
    """Return the operand that has the shape and dtype of an output."""
    return second if operand_of(output) == "target" else first


def with_declared_strides(computed: Any, operand: Any) -> Any:
    """Return a result with the strides that the fake implementation declared, those of `torch.empty_like`. Copy it if they differ."""
    strides = torch.empty_like(operand, device="meta").stride()
    return computed if computed.stride() == strides else torch.empty_like(operand).copy_(computed)


def with_declared_value(bound: BoundLoss, computed: Any, first: Any) -> Any:
    """Return a value with the strides that the fake implementation declared."""
    if not bound.writes_value:
        return computed
    return computed.contiguous() if bound.has_axes_of_its_own else with_declared_strides(computed, first)


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the arguments of an operator for its derivative."""
    loss, reduction, first, second, others, names, numbers, *rest = inputs
    ctx.call, ctx.rest = (loss, reduction, names, numbers), rest[:1]
    upstream = rest[1] if len(rest) > 1 else None
    ctx.save_for_backward(first, second, upstream, *others)


def save_slopes(ctx: Any, inputs: tuple[Any, ...], output: list[Any]) -> None:
    """Save the gradients that `fastloss::loss_and_slopes` has computed, and its arguments for second derivatives."""
    loss, reduction, first, second, others, names, numbers, _, wanted = inputs
    ctx.call = loss, reduction, names, numbers, wanted
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], first, second, *others)


def multiply_slopes(ctx: Any, grads: list[Any]) -> tuple[Any, ...]:
    """Return the gradients of `fastloss::loss_and_slopes` with respect to the two operands."""
    loss, reduction, names, numbers, wanted = ctx.call
    slopes, (first, second, *others) = ctx.saved_tensors[: len(wanted)], ctx.saved_tensors[len(wanted) :]
    upstream = grads[0]
    if torch.is_grad_enabled():  # the gradient will be differentiated again
        slopes = torch.ops.fastloss.derivatives(loss, reduction, first, second, others, names, numbers, wanted, upstream)
    else:
        slopes = [slope * append_axes(upstream, slope).to(slope.dtype) for slope in slopes]
    named = dict(zip(wanted, slopes, strict=True))
    return None, None, *map(named.get, SLOPES), *no_gradients(others, names, numbers), None, None if wanted else []


def append_axes(upstream: Any, slope: Any) -> Any:
    """Append axes of length 1 to an upstream gradient, so that it broadcasts against the gradient of an operand."""
    return upstream.reshape(upstream.shape + (1,) * (slope.dim() - upstream.dim()))


def differentiate_loss(ctx: Any, upstream: Any) -> tuple[Any, ...]:
    """Return the gradients of `fastloss::loss` with respect to the two operands."""
    first, second, _, *others = ctx.saved_tensors
    loss, reduction, names, numbers = ctx.call
    wanted = [name for name, needed in zip(SECOND_DERIVATIVES, ctx.needs_input_grad[2:4], strict=True) if needed]
    if "target_slope" in wanted:
        REGISTER[loss].require("target_slope")
    computed = torch.ops.fastloss.derivatives(loss, reduction, first, second, others, names, numbers, wanted, upstream)
    slopes = dict(zip(wanted, computed, strict=True))
    return None, None, *map(slopes.get, SECOND_DERIVATIVES), *no_gradients(others, names, numbers), None


def differentiate_derivatives(ctx: Any, grads: list[Any]) -> tuple[Any, ...]:
    """Return the gradients of `fastloss::derivatives` with respect to the two operands and to the upstream gradient."""
    first, second, upstream, *others = ctx.saved_tensors
    (wanted,), (loss, reduction, names, numbers) = ctx.rest, ctx.call
    if not SECOND_DERIVATIVES.keys() >= set(wanted):
        raise NotImplementedError("third derivatives of a loss are not supported; accepted: first and second derivatives")
    if (formula := double_backward.FORMULAS.get(loss)) is not None:
        bound, settings = unpack_arguments(loss, reduction, others, names, numbers, first.dtype)
        settings = {**REGISTER[loss].settings, **settings, **dict(zip(bound.names, others, strict=True))}
        by = double_backward.second_derivatives(formula, reduction, settings, wanted, grads, first, second, upstream)
    else:
        by = diagonal_second_derivatives(ctx, wanted, grads, first, second, upstream, others)
    return None, None, by[0], by[1], *no_gradients(others, names, numbers, wanted), by[2]


def no_gradients(others: Sequence[Any], *lists: Sequence[Any]) -> list[Any]:
    """Return empty gradients for arguments that are lists: a list for tensors and for an empty list, else None, as PyTorch expects."""
    return [[None] * len(others), *(None if x else [] for x in lists)]


def diagonal_second_derivatives(
    ctx: Any, wanted: list[str], grads: list[Any], first: Any, second: Any, upstream: Any, others: list[Any]
) -> Sequence[Any]:
    """Return the gradients of `fastloss::derivatives` for a loss that is a sum over elements, so that its Hessian is diagonal."""
    loss, reduction, names, numbers = ctx.call

    def derivative(quantity: str, upstream: Any) -> Any:
        REGISTER[loss].require(quantity)
        (computed,) = torch.ops.fastloss.derivatives(loss, reduction, first, second, others, names, numbers, [quantity], upstream)
        return computed

    pairs = [(name, grad) for name, grad in zip(wanted, grads, strict=True) if grad is not None]
    by: list[Any] = [None, None, None]
    for k in range(2):
        if ctx.needs_input_grad[2 + k]:
            by[k] = sum(grad * derivative(SECOND_DERIVATIVES[name][k], upstream) for name, grad in pairs)
    if ctx.needs_input_grad[8]:
        products = sum(grad * derivative(name, torch.ones_like(upstream)) for name, grad in pairs)
        by[2] = products if products.shape == upstream.shape else products.reshape(*upstream.shape, -1).sum(-1)
    return by


torch.library.register_autograd("fastloss::loss", differentiate_loss, setup_context=save_arguments, lib=LIBRARY)
torch.library.register_autograd("fastloss::loss_and_slopes", multiply_slopes, setup_context=save_slopes, lib=LIBRARY)
torch.library.register_autograd("fastloss::derivatives", differentiate_derivatives, setup_context=save_arguments, lib=LIBRARY)
