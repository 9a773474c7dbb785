"""`Loss`, the class of elementwise losses; `TargetLoss`, for quantities of the target; `elementwise_loss`, which makes a loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

from fastloss.backends.find import find_backend
from fastloss.core.abstract_loss import AbstractLoss, signature
from fastloss.core.accumulated import Accumulated
from fastloss.core.call import Arguments
from fastloss.core.checks import is_none, refuse_grad_output
from fastloss.core.definition import Bounds, Definition
from fastloss.core.docstrings import complete
from fastloss.core.plan import Array
from fastloss.formula import OPTIONS, Formula

_OPTIONS = ("weight", "reduction", *OPTIONS)
_TARGET = {"target": "Any shape and strides; float16, bfloat16 (`ml_dtypes`), float32, float64, bool, or integers of 8 to 64 bits."}
_TARGET_OPTIONS = {
    "weight": "array that broadcasts against `target`. It multiplies the value; a mean still divides by the number of elements.",
    "mask": "bool array that broadcasts against `target`. Elements where it is False do not count, also in the number that a mean "
    "divides by.",
    "out": 'array for the values, with reduction "none". It may not overlap any other array.',
}
_TARGET_RETURNS = "A float64 number, or an array for the reductions that keep an axis."
VALUE, SLOPE, CURVATURE = ("value",), ("slope",), ("curvature",)


class Loss(AbstractLoss):
    """An elementwise loss: call it for the value; `grad`, `value_and_grad` and `curvature` take the same arguments.

    All arrays of a call belong to one framework, and to one device: those of NumPy, CuPy, Dask, or tensors of PyTorch. Arithmetic is
    float32, or float64 where input or target is float64. Results stored in 16 bits are rounded once. Sums accumulate in float64 and do not
    depend on the number of threads. A mean over no elements is NaN, with a RuntimeWarning.

    With CuPy, a value is a 0-d array, and no call waits for the device. With PyTorch, a value has the input's dtype, with autograd
    attached to input and target; gradients and curvatures are tensors without autograd. A call of the value then takes
    `inplace_grad=True`, which lets the gradient overwrite the input, or `process_group`, over whose joined batch it is computed.

    `curvature` raises NotImplementedError if the loss's formula does not return it.

    Args:
        input: the first operand.
        target: the second operand.
    """

    __doc__ = complete(__doc__, _OPTIONS, "value, grad = fastloss.mse_loss.value_and_grad(input, target)", ("an operand",))

    definition: Definition

    def __init__(self, function: Callable[..., Any], probabilities: tuple[str, ...], bounds: Bounds, reduction: str) -> None:
        formula = Formula(function, counts=(2, 3, 6))
        if unknown := bounds.keys() - formula.defaults.keys():
            raise ValueError(f"bounds are given for {', '.join(sorted(unknown))}, which {function.__name__} does not have")
        self.definition = Definition(formula, bounds, probabilities, (*formula.defaults, *_OPTIONS))
        self._reduction = reduction
        functools.update_wrapper(self, function, updated=())
        self.__doc__ = self.complete_doc(_OPTIONS, "value, grad = {}.value_and_grad(input, target)")
        self.__signature__ = signature(self.operands, reduction, {**formula.defaults, **OPTIONS})
        self.register(self.definition)

    def complete_doc(self, options: Iterable[str], example: str, **texts: Any) -> str:
        """Return the formula's docstring with the options, errors and an example call, in which {} stands for the loss."""
        name = f"fastloss.{self.__name__}" if self.is_own else self.__name__
        doc = self.definition.formula.function.__doc__
        return complete(doc, options, example.format(name), self.definition.probabilities, **texts)

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str | None = None, **options: Any) -> Any:
        """Return the loss: a float64 number, one number for each sample, or with reduction "none" an array of the input's dtype."""
        reduction = self._reduction if reduction is None else reduction
        if options:
            refuse_grad_output(options)
        if is_none(reduction):
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
        if is_none(reduction):
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
        """Compute the requested quantities in one pass."""
        outcome: tuple[Any, list[Any]] = self.bind(arguments, call).compute()
        return outcome


class TargetLoss(Accumulated):
    """A quantity of the target alone, with the options of a loss. Its formula does not read the input."""

    operands = ("target",)

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        functools.update_wrapper(self, loss, updated=())
        self.options = loss.options
        options = [name for name in _OPTIONS if name != "grad_output"]
        self.__doc__ = loss.complete_doc(options, "value = {}(target)", operands=_TARGET, own=_TARGET_OPTIONS, returns=_TARGET_RETURNS)
        parameters = list(loss.__signature__.parameters.values())[1:]
        self.__signature__ = inspect.Signature([p for p in parameters if p.name != "grad_output"])

    def __repr__(self) -> str:
        return f"<{self._loss.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self._loss.__qualname__

    def __call__(self, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the value; with reduction "none" an array of the target's dtype, or float32 for integers."""
        if "grad_output" in options:
            raise TypeError(f"{self._loss.__name__} has no gradient, and so no grad_output")
        return self._loss(find_backend(target).placeholder_input(target), target, weight, reduction, **options)

    def sample_sums(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> dict[str, Any]:
        """Return the sums of the samples; see `Accumulated`."""
        return self._loss.sample_sums([find_backend(operands[0]).placeholder_input(operands[0]), *operands], options, call)


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
    """Make a loss from a formula: a function of one element that returns (value, slope) or (value, slope, curvature).

        from fastloss.ops import sqrt

        @fastloss.elementwise_loss
        def pseudo_huber(z, t, delta=1.0):
            d = (z - t) / delta
            v = sqrt(d * d + 1.0)
            return delta * delta * (v - 1.0), delta * d / v

    The first two arguments are an element of the input and an element of the target. The slope is the derivative of the value by the
    input, the curvature the second derivative. If the target has a gradient too, the formula returns six quantities:
    (value, slope, curvature, target_slope, cross_curvature, target_curvature), the last three being the derivatives by the target,
    by both, and twice by the target.

    Further arguments are the loss's parameters. The default of each is a number, or None for a parameter that may be absent; the
    formula may test for None. A call passes numbers, or arrays that broadcast against the input. A parameter that a call leaves at
    its default is a constant of the kernel. The names of options (see `Loss`) are reserved.

    A formula may not branch on an element. It computes with operators and the functions of `fastloss.ops`, and may call helpers
    written in the same way. The loss has every method and option of `Loss`, on every kind of array.

    Args:
        function: the formula.
        probabilities: operands, of "input" and "target", that must lie in [0, 1]; `validate=True` checks them.
        bounds: the smallest and the largest number accepted for each parameter. Arrays are not checked.
        reduction: the loss's default reduction.

    Raises:
        FormulaError: the formula cannot be compiled; the message names the line and what to use instead. It is a `TypeError`,
            raised at once.
        ValueError: `bounds` names a parameter that the formula does not have.
    """
    if function is None:
        return lambda f: Loss(f, probabilities, bounds or {}, reduction)
    return Loss(function, probabilities, bounds or {}, reduction)
