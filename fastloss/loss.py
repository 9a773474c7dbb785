"""`Loss`, which every elementwise loss is an instance of, and `elementwise_loss`, which makes one from a formula."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, overload

from fastloss.backends.find import find_backend
from fastloss.core.abstract_loss import AbstractLoss, signature
from fastloss.core.call import Arguments
from fastloss.core.checks import refuse_grad_output
from fastloss.core.definition import Bounds, Definition
from fastloss.core.plan import Array
from fastloss.formula import OPTIONS, Formula

VALUE, SLOPE, CURVATURE = ("value",), ("slope",), ("curvature",)


class Loss(AbstractLoss):
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

    definition: Definition

    def __init__(self, function: Callable[..., Any], probabilities: tuple[str, ...], bounds: Bounds, reduction: str) -> None:
        formula = Formula(function, counts=(2, 3, 6))
        if unknown := bounds.keys() - formula.defaults.keys():
            raise ValueError(f"bounds are given for {', '.join(sorted(unknown))}, which {function.__name__} does not have")
        self.definition = Definition(formula, bounds, probabilities, (*formula.defaults, "weight", "reduction", *OPTIONS))
        self._reduction = reduction
        functools.update_wrapper(self, function, updated=())
        self.__signature__ = signature(self.operands, reduction, {**formula.defaults, **OPTIONS})
        self.register(self.definition)

    def __repr__(self) -> str:
        return f"<loss {self.__name__}{self.__signature__}>"

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any) -> Any:
        """Return the loss: a float64 number, one number for each sample, or with reduction "none" an array of the input's dtype."""
        reduction = self._reduction if reduction is None else reduction
        refuse_grad_output(options)
        if reduction == "none":
            return find_backend(input).compute(self, Arguments((), VALUE, input, target, weight, reduction, options))[1][0]
        if options.get("out") is not None:
            raise ValueError(
                f"out takes an array of the input's shape, and with reduction {reduction!r} the value is none; use grad or value_and_grad"
            )
        return find_backend(input).compute(self, Arguments(VALUE, (), input, target, weight, reduction, options))[0]

    def grad(self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any) -> Array:
        """Return the gradient with respect to the input, in the input's dtype."""
        reduction = self._reduction if reduction is None else reduction
        return find_backend(input).compute(self, Arguments((), SLOPE, input, target, weight, reduction, options))[1][0]

    def value_and_grad(
        self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any
    ) -> tuple[Any, Array]:
        """Return the loss and its gradient with respect to the input, from one pass over memory."""
        reduction = self._reduction if reduction is None else reduction
        if reduction == "none":
            slope, value = find_backend(input).compute(self, Arguments((), ("slope", "value"), input, target, weight, reduction, options))[
                1
            ]
            return value, slope
        value, outputs = find_backend(input).compute(self, Arguments(VALUE, SLOPE, input, target, weight, reduction, options))
        return value, outputs[0]

    def curvature(self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any) -> Array:
        """Return the second derivative with respect to each element of the input: the diagonal of the Hessian."""
        self.require("curvature")
        reduction = self._reduction if reduction is None else reduction
        return find_backend(input).compute(self, Arguments((), CURVATURE, input, target, weight, reduction, options))[1][0]

    def require(self, quantity: str) -> None:
        """Raise NotImplementedError if the formula does not return a quantity, such as "curvature"."""
        if quantity not in (names := self.definition.formula.names):
            raise NotImplementedError(f"{self.__name__} has no {quantity}: its formula returns ({', '.join(names)})")

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute what the arguments ask for in one pass."""
        outcome: tuple[Any, list[Any]] = call(self.definition, arguments).compute()
        return outcome


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
        return self._loss(find_backend(target).placeholder_input(target), target, weight, reduction, **options)


@overload
def elementwise_loss(function: Callable[..., Any], /) -> Loss: ...
@overload
def elementwise_loss(
    *, probabilities: tuple[str, ...] = ..., bounds: Bounds = ..., reduction: str = ...
) -> Callable[[Callable[..., Any]], Loss]: ...
def elementwise_loss(
    function: Callable[..., Any] | None = None, /, *, probabilities: tuple[str, ...] = (), bounds: Bounds | None = None,
    reduction: str = "mean"
) -> Any:  # fmt: skip
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

    `probabilities` names the operands, of "input" and "target", that must lie in [0, 1]; `validate=True` checks them. `bounds`
    gives, by parameter, the least and the largest number that is accepted; arrays are not looked at. `reduction` is the
    loss's default.

    Raises `FormulaError`, a `TypeError`, at once if the formula cannot be compiled; it names the line and what to use.
    """
    if function is None:
        return lambda f: Loss(f, probabilities, bounds or {}, reduction)
    return Loss(function, probabilities, bounds or {}, reduction)
