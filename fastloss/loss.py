"""`Loss`, what every loss can do, and `elementwise_loss`, which makes one out of a formula.

A `Loss` is called for the value; its methods give slopes and curvatures. What a call does with NumPy's arrays and options is
in `call.py`; arrays of a framework go through that framework's door (`fastloss.torch`).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, overload

import numpy as np

from fastloss.call import Bounds, Call, Definition, as_array, kept_axes
from fastloss.formula import OPTIONS, Formula
from fastloss.plan import Array, is_float


def find_door(array: Any) -> Any:
    """Return what takes a framework's arrays; None if the array is not of one. What nobody has imported has made no array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):  # it may be on its way
        from fastloss.torch import autograd  # not import_module, which torch.compile refuses, nor sys.modules, on which it guards

        return autograd
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        from fastloss.cuda import door

        return door
    return None


def raise_deferred() -> None:
    """Wait for the GPU, and raise the error of a bad element that a call with `validate` has found on it, if there was one.

    On a GPU such a call does not wait to see whether it has to raise: the error comes with the next call that validates, or
    here. Without a GPU this does nothing.
    """
    if (calls := sys.modules.get("fastloss.cuda.call")) is not None:
        calls.raise_deferred()


class AnyLoss:
    """What losses of every kind have: a name, and one way for a call's arrays, whoever made them, to the passes over memory."""

    __name__: str
    __qualname__: str
    _reduction = "mean"  # the default
    operands: tuple[str, str] = ("input", "target")
    defaults: Mapping[str, Any] = {}  # of settings that are not a formula's
    overwrites = True  # whether one gradient may take the place of the input
    options: tuple[str, ...]  # the names that are accepted beside those of the operands
    key: str  # the loss's own, in LOSSES

    def __reduce__(self) -> str:
        return self.__qualname__  # pickled by name, as functions are

    def _register(self, *definitions: Definition) -> None:
        """Make the loss known, under a key that is another one for another loss of the same name."""
        self.options = definitions[0].options
        module = getattr(self, "__module__", None) or ""
        own = module.partition(".")[0] == "fastloss"
        text = repr([(d.formula.text, d.bounds, d.unit) for d in definitions])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.key = self.__qualname__ if own else f"{module}.{self.__qualname__} {digest}"
        LOSSES[self.key] = self

    def writes_value(self, reduction: str) -> bool:
        """Whether the value is an array like the first operand, and so not summed but wanted."""
        return reduction == "none"

    def value_shape(self, shape: tuple[int, ...], reduction: str, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the value, of operands of a shape."""
        return shape if reduction == "none" else shape[: kept_axes(reduction, shape)]

    def require(self, quantity: str) -> None:
        """Refuse what the loss's formula does not return."""

    def _run(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], first: Any, second: Any, weight: Any, reduction: str | None,
        options: dict[str, Any]
    ) -> tuple[Any, list[Array]]:  # fmt: skip
        """Return the reduced value, if it is summed, and the arrays that are wanted; of tensors, tensors."""
        reduction = self._reduction if reduction is None else reduction
        if type(first) is not np.ndarray and (door := find_door(first)) is not None:
            outcome: tuple[Any, list[Array]] = door.run(self, summed, wanted, first, second, weight, reduction, options)
            return outcome
        return self._compute(summed, wanted, first, second, weight, reduction, options)

    def _compute(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], first: Any, second: Any, weight: Any, reduction: str,
        options: dict[str, Any], call: type[Call] = Call
    ) -> tuple[Any, list[Array]]:  # fmt: skip
        """Do the same for arrays: NumPy's, or those that another kind of call is for."""
        raise NotImplementedError


LOSSES: dict[str, AnyLoss] = {}  # by key: how a compiled graph names them


class Loss(AnyLoss):
    """A loss function: call it for the value; `grad`, `value_and_grad` and `curvature` take the same arguments.

    Arrays are NumPy's, CuPy's or PyTorch's tensors, all of one kind and on one device. On a GPU no call waits for the device: of
    CuPy's arrays a value is a 0-d array. Of tensors the value has the input's dtype and autograd attached, to input and target;
    gradients and curvatures are tensors without. A call of the value takes `inplace_grad` then: whether the gradient may
    overwrite the input.

    Args:
        input: any shape and strides; float16, bfloat16 (`ml_dtypes`), float32 or float64. Arithmetic is float32, or float64
            where input or target is; what is stored in 16 bits is rounded once.
        target: the same shape; these, bool, or an integer type of 8 to 64 bits.
        weight: array that broadcasts against input; multiplies value and gradient, not the number a mean divides by.
        reduction: "mean", "sum", "none", "batchmean" (sum / first axis), and "sample_mean" and "sample_sum", one number a
            first-axis entry. Sums accumulate in float64, and do not depend on the number of threads.
        mask: bool array that broadcasts against input; elements where it is False count nowhere, not in the mean's number
            either, and have gradient 0.
        ignore_index: a target value that means "masked".
        target_scale: number that multiplies integer targets, such as 1/255 for uint8 images.
        grad_output: derivative of what follows the loss: a number, or an array of the loss's shape. Scales gradients and
            curvatures only.
        out: array of the input's shape and dtype for the gradient or curvature, or with "none" for the value. It may be the
            input, which is then overwritten; any other overlap with what is read is an error.
        validate: whether an element outside [0, 1] is an error; only the cross-entropies have that condition. The check is
            part of the same pass, or with `out` a pass before it, so that nothing is written. On a GPU the call does not
            wait to see: the error comes from the next call that validates, or from `fastloss.raise_deferred()`. "defer" says
            that this is known; on a CPU it is as True.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, a number out of its bounds (arrays of parameters are not
            looked at), an `out` that is read-only or overlaps, a bad target.
        TypeError: a dtype or type that is not accepted, an unknown option.
        NotImplementedError: `curvature`, where the loss's formula gives none.

    A mean of no elements, all masked or the input empty, is NaN with a RuntimeWarning.
    """

    def __init__(self, function: Callable[..., Any], unit: tuple[str, ...], bounds: Bounds, reduction: str) -> None:
        formula = Formula(function, counts=(2, 3, 6))
        if unknown := bounds.keys() - formula.defaults.keys():
            raise ValueError(f"bounds are given for {', '.join(sorted(unknown))}, which {function.__name__} does not have")
        self._definition = Definition(formula, bounds, unit, (*formula.defaults, "weight", "reduction", *OPTIONS))
        self._reduction = reduction
        functools.update_wrapper(self, function, updated=())
        self.__signature__ = signature(("input", "target"), reduction, {**formula.defaults, **OPTIONS})
        self._register(self._definition)

    def __repr__(self) -> str:
        return f"<loss {self.__name__}{self.__signature__}>"

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any) -> Any:
        """Return the loss: a float64 number, one a sample, or with reduction "none" an array of the input's dtype."""
        reduction = self._reduction if reduction is None else reduction
        refuse_grad_output(options)
        if reduction == "none":
            return self._run((), ("value",), input, target, weight, reduction, options)[1][0]
        if options.get("out") is not None:
            raise ValueError(
                f"out takes an array of the input's shape, and with reduction {reduction!r} the value is none; use grad or value_and_grad"
            )
        return self._run(("value",), (), input, target, weight, reduction, options)[0]

    def grad(self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any) -> Array:
        """Return the gradient with respect to the input, in the input's dtype."""
        return self._run((), ("slope",), input, target, weight, reduction, options)[1][0]

    def value_and_grad(
        self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any
    ) -> tuple[Any, Array]:
        """Return the loss and its gradient with respect to the input, from one pass over memory."""
        reduction = self._reduction if reduction is None else reduction
        if reduction == "none":
            slope, value = self._run((), ("slope", "value"), input, target, weight, reduction, options)[1]
            return value, slope
        value, outputs = self._run(("value",), ("slope",), input, target, weight, reduction, options)
        return value, outputs[0]

    def curvature(self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any) -> Array:
        """Return the second derivative with respect to each element of the input: the diagonal of the Hessian."""
        self.require("curvature")
        return self._run((), ("curvature",), input, target, weight, reduction, options)[1][0]

    def require(self, quantity: str) -> None:
        """Refuse what the formula does not return."""
        if quantity not in (names := self._definition.formula.names):
            raise NotImplementedError(f"{self.__name__} has no {quantity}: its formula returns ({', '.join(names)})")

    def _compute(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], first: Any, second: Any, weight: Any, reduction: str,
        options: dict[str, Any], call: type[Call] = Call
    ) -> tuple[Any, list[Array]]:  # fmt: skip
        return call(self._definition, first, second, weight, reduction, options).compute(summed, wanted)


def refuse_grad_output(options: Mapping[str, Any]) -> None:
    """Refuse to take a derivative where there is no gradient to multiply."""
    if options.get("grad_output") is not None:
        raise ValueError("grad_output scales a gradient, and the value alone has none: use grad or value_and_grad")


class TargetLoss:
    """A quantity of the target alone, with the options of a loss: its formula does not read the input."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        functools.update_wrapper(self, loss, updated=())
        parameters = list(loss.__signature__.parameters.values())[1:]
        self.__signature__ = inspect.Signature([p for p in parameters if p.name != "grad_output"])

    def __repr__(self) -> str:
        return f"<{self._loss.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self._loss.__qualname__

    def __call__(self, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the value, as a loss does; with reduction "none" in the target's dtype, or float32 for integers."""
        if "grad_output" in options:
            raise TypeError(f"{self._loss.__name__} has no gradient, and so no grad_output")
        if (door := find_door(target)) is not None:
            return self._loss(door.unread_like(target), target, weight, reduction, **options)
        t = as_array("target", target)
        unread = np.broadcast_to(np.zeros((), t.dtype if is_float(t.dtype) else np.float32), t.shape)
        return self._loss(unread, t, weight, reduction, **options)


def signature(arrays: tuple[str, str], reduction: str, options: Mapping[str, Any]) -> inspect.Signature:
    """Return what a call accepts, for help() and editors."""
    Parameter = inspect.Parameter
    leading = {**dict.fromkeys(arrays, Parameter.empty), "weight": None, "reduction": reduction}
    return inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default) for name, default in leading.items()]
        + [Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in options.items()]
    )


@overload
def elementwise_loss(function: Callable[..., Any], /) -> Loss: ...
@overload
def elementwise_loss(
    *, unit: tuple[str, ...] = ..., bounds: Bounds = ..., reduction: str = ...
) -> Callable[[Callable[..., Any]], Loss]: ...
def elementwise_loss(
    function: Callable[..., Any] | None = None, /, *, unit: tuple[str, ...] = (), bounds: Bounds | None = None, reduction: str = "mean"
) -> Any:
    """Make a loss out of a formula: a function of one element, which returns (value, slope) or (value, slope, curvature).

        from fastloss.ops import sqrt

        @fastloss.elementwise_loss
        def charbonnier(z, t, eps=1e-3):
            d = z - t
            v = sqrt(d * d + eps * eps)
            return v, d / v

    The first two arguments are an element of the input and of the target; the slope is the derivative by the first, the
    curvature, if it is given, the second. A formula whose targets are to have gradients too returns six: (value, slope,
    curvature, target_slope, cross_curvature, target_curvature), with the derivatives by the target, by both, and twice by
    the target. Further arguments are the loss's parameters, each with a number as its default, or
    None for one that may be absent, which the formula may ask; a call gives numbers, or arrays that broadcast against the
    input, and what it leaves at its default is a constant of the kernel. The names of options (see `Loss`) are taken. A
    formula may not branch on an element, and computes with operators and the functions of `fastloss.ops` alone; helpers
    written like that may be called.

    `unit` names the operands, of "input" and "target", that belong in [0, 1], which `validate=True` then checks. `bounds`
    gives, by parameter, the least and the largest number that is accepted; arrays are not looked at. `reduction` is the
    loss's default.

    Raises `FormulaError`, a `TypeError`, at once if the formula cannot be compiled; it names the line and what to use.
    """
    if function is None:
        return lambda f: Loss(f, unit, bounds or {}, reduction)
    return Loss(function, unit, bounds or {}, reduction)
