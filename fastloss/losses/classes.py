"""Losses of entries that belong to one of several classes each, such as pixels or images, from class indices as they are stored.

A formula takes -log p and 1 - p, for the probability p that the softmax of an entry's logits gives to its class. Both keep their digits
where the logits are saturated; see `fastloss/kernel/entry.py`. The formula returns the value and its derivative by -log p. The gradient by
the logit of each class follows from the derivative of -log p, which is p - 1 for the entry's class and p for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, TypeVar

import numpy as np

from fastloss.backends.find import find_backend
from fastloss.core.abstract_loss import AbstractLoss, C, signature
from fastloss.core.call import Arguments
from fastloss.core.checks import (
    check_broadcast,
    check_class_target,
    check_class_weight,
    check_dtype,
    is_none,
    refuse_grad_output,
    to_bounded,
)
from fastloss.core.definition import Bounds, Definition, classes_last, classes_second, entries_of, entry_axes
from fastloss.core.docstrings import OPTIONS, complete
from fastloss.core.dtypes import is_float
from fastloss.core.plan import Array
from fastloss.formula import Formula
from fastloss.loss import CURVATURE, SLOPE, VALUE
from fastloss.losses.table import row
from fastloss.ops import exp, pow, where

__all__ = ["cross_entropy", "focal_cross_entropy_loss"]

_IGNORED = -100  # the default of PyTorch
K = TypeVar("K", bound="ClassLoss")
OPTIONS_OF_CLASSES: dict[str, Any] = {"ignore_index": _IGNORED, "mask": None, "pixel_weight": None, "grad_output": None, "out": None}
_SMOOTHING = {"label_smoothing": 0.0}
OPERANDS = {
    "input": "Shape (N, C, ...) or (C,), any strides; float16, bfloat16 (`ml_dtypes`), float32 or float64.",
    "target": "The shape of the input without the axis of classes; bool or integers of 8 to 64 bits.",
}
OWN = {
    "weight": "array (C,) with the weight of each class. It multiplies value and gradient, and a mean divides by the sum of the "
    "weights of the entries' classes.",
    "ignore_index": "target value whose entries are excluded as if by `mask`.",
    "mask": "bool array that broadcasts against `target`. Entries where it is False have gradient 0 and do not count, also in the number "
    "that a mean divides by.",
    "pixel_weight": "array that broadcasts against `target`. It multiplies value and gradient; a mean does not divide by it.",
    "out": 'array for the gradient, or with reduction "none" for the value. It may be the input, which is then overwritten by the '
    "gradient, and may not overlap any other array.",
    "label_smoothing": "a in [0, 1]; each entry belongs to its class by 1 - a + a / C, and to each other class by a / C.",
}
ROW: dict[str, Any] = {
    "input": "logits, (N, C, ...)", "arrays": ("logits", "classes"), "axes": 2, "is_elementwise": False, "classes": True,
}  # fmt: skip
_RETURNS = (
    "The call itself returns a float64 number, or arrays for the reductions that keep an axis. `grad` returns an array of the input's "
    "shape and dtype; `value_and_grad` returns the value and the gradient."
)


class ClassLoss(AbstractLoss):
    """A loss between logits of several classes and class indices. `grad` and `value_and_grad` take the arguments of a call."""

    definition: Definition
    takes_probabilities = False  # whether targets may be a probability of each class

    def __init__(self, function: Callable[..., Any], bounds: Bounds, settings: Mapping[str, Any]) -> None:
        formula = Formula(function, ("value", "slope"))
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__
        self.settings = dict(settings)
        own = {**formula.defaults, **settings, **OPTIONS_OF_CLASSES}
        self.definition = Definition(formula, bounds, (), (*own, "weight", "reduction"), classes=True)
        self.__signature__ = signature(self.operands, "mean", own)
        example = f"value, grad = fastloss.{self.__name__}.value_and_grad(input, target)"
        listed = ("weight", "reduction", *settings, *OPTIONS_OF_CLASSES)
        self.__doc__ = complete(function.__doc__, listed, example, (), OPERANDS, OPTIONS | OWN, _RETURNS)
        self.register(self.definition)

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the loss: a float64 number, one number for each sample, or with reduction "none" an array of the target's shape."""
        refuse_grad_output(options)
        if is_none(reduction):
            return find_backend(input).compute(self, Arguments((), VALUE, input, target, weight, reduction, options))[1][0]
        if options.get("out") is not None:
            raise ValueError(
                f"out takes an array of the target's shape, and with reduction {reduction!r} the value is none; use grad or value_and_grad"
            )
        return find_backend(input).compute(self, Arguments(VALUE, (), input, target, weight, reduction, options))[0]

    def grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Array:
        """Return the gradient with respect to the input, in the input's dtype."""
        gradient: Array = find_backend(input).compute(self, Arguments((), SLOPE, input, target, weight, reduction, options))[1][0]
        return gradient

    def value_and_grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Any, Array]:
        """Return the loss and its gradient with respect to the input, from one pass over memory."""
        if is_none(reduction):
            slope, value = find_backend(input).compute(self, Arguments((), (*SLOPE, *VALUE), input, target, weight, reduction, options))[1]
            return value, slope
        value, outputs = find_backend(input).compute(self, Arguments(VALUE, SLOPE, input, target, weight, reduction, options))
        return value, outputs[0]

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute the requested quantities in one pass."""
        value, computed = self.bind(arguments, call).compute()
        outputs = [x[..., 0] if name == "value" else classes_second(x) for name, x in zip(arguments.wanted, computed, strict=True)]
        return value, with_buffer(outputs, arguments.options)

    def bind(self, arguments: Arguments, call: type[C]) -> C:
        """Make the call of a pass, on views of the arrays whose last axis is that of classes."""
        options = dict(arguments.options)
        own = {name: to_bounded(name, options.pop(name, default), (0.0, 1.0)) for name, default in self.settings.items()}
        made = call_of_classes(self, self.definition, arguments._replace(options=options), call)
        made.numbers.update({name: x for name, x in own.items() if x})
        return made

    def count(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> Any:
        """Return the number that a mean divides by, for each sample; see `Accumulated`."""
        given = dict(options)
        arguments = Arguments((), (), operands[0], operands[1], given.pop("weight", None), "sample_mean", given)
        counted = self.bind(arguments, call).count()
        return counted * len(operands[0]) if isinstance(counted, int) else counted

    def value_shape(self, shape: tuple[int, ...], reduction: str, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the loss's value for operands of a given shape."""
        return super().value_shape(entries_of(shape), reduction, options)

    def axes_of(self, name: str, count: int, axes: int) -> tuple[int, ...]:
        """Return the axes of an input that the axes of an array lie along; see `AbstractLoss`."""
        return entry_axes(axes)[:count] if name == "grad_output" else super().axes_of(name, count, axes)

    def check_operands(self, first: tuple[int, ...], second: Any) -> None:
        """Raise an error if the targets are not class indices that fit the shape of the input."""
        check_class_target(first, second.shape, not is_integer(second.dtype), self.takes_probabilities)

    def require(self, quantity: str) -> None:
        """Raise NotImplementedError: targets are class indices."""
        raise NotImplementedError(f"{self.__name__} has no {quantity}; it is differentiable by the input")


def call_of_classes(loss: AbstractLoss, definition: Definition, arguments: Arguments, call: type[C]) -> C:
    """Make a call on views of the arrays whose last axis is that of classes."""
    options = {"ignore_index": _IGNORED, **arguments.options}
    first, second = (call.as_array(name, x) for name, x in zip(loss.operands, arguments[2:4], strict=True))
    loss.check_operands(first.shape, second)
    logits, has_indices = classes_last(first), is_integer(second.dtype)
    if not has_indices and options.pop("ignore_index") not in (None, _IGNORED):
        raise ValueError("ignore_index excludes class indices, and target has probabilities; accepted: mask")
    entry_weight, weight = options.pop("pixel_weight", None), arguments.weight
    if weight is not None:
        weight = call.as_array("weight", weight)
        check_class_weight(weight.shape, logits.shape[-1])
        check_dtype("weight", weight.dtype)
    if options.get("mask") is not None:
        options["mask"] = for_entries("mask", options["mask"], first.shape, call)
    if (out := options.get("out")) is not None:
        call.check_buffer("out", out)
        options["out"] = append_axis(out) if arguments.wanted == VALUE else classes_last(out)
    second = append_axis(second) if has_indices else classes_last(second)
    made = call(definition, arguments._replace(first=logits, second=second, weight=weight, options=options))
    if entry_weight is not None:
        made.add("pixel_weight", for_entries("pixel_weight", entry_weight, first.shape, call))
    return made


def with_buffer(outputs: list[Any], options: Mapping[str, Any]) -> list[Any]:
    """Return outputs with the caller's buffer, if there is one, in place of the view of it that was written."""
    return outputs if options.get("out") is None else [options["out"], *outputs[1:]]


def is_integer(dtype: Any) -> bool:
    """Whether a dtype, of NumPy or of PyTorch, is that of class indices."""
    return not dtype.is_floating_point if hasattr(dtype, "is_floating_point") else not is_float(dtype)


def for_entries(name: str, x: Any, shape: tuple[int, ...], call: type[C]) -> Any:
    """Return an option with a number for each entry of an input of a shape, with an axis of length 1 in place of the classes."""
    array = call.as_array(name, x)
    check_broadcast(name, array.shape, "target", entries_of(shape))
    return append_axis(array)


def append_axis(x: Any) -> Any:
    """Return a view with an axis of length 1 at the end."""
    return x[..., np.newaxis]


class SumOverClasses(ClassLoss):
    """A loss of classes that is a weighted sum of -log p over them: its formula returns -log p and 1."""

    takes_probabilities = True

    def curvature(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Array:
        """Return the second derivative with respect to each logit: the diagonal of the Hessian."""
        computed = find_backend(input).compute(self, Arguments((), CURVATURE, input, target, weight, reduction, options))[1]
        curvature: Array = computed[0]
        return curvature


def class_loss(kind: type[K], bounds: Bounds | None = None, settings: Mapping[str, Any] | None = None) -> Callable[[Callable[..., Any]], K]:
    """Make a loss of classes of a kind from a formula; the bounds are those of its parameters."""
    return lambda function: kind(function, bounds or {}, settings or {})


@row("cross-entropy", "each image or pixel belongs to one of several classes", ulp={"value": 3.5, "slope": 4, "curvature": 7}, **ROW)
@class_loss(SumOverClasses, settings=_SMOOTHING)
def cross_entropy(surprise: Any, missed: Any) -> Any:
    """Cross-entropy between the softmax of logits and class indices.

    With p the softmax of an entry's logits along the axis of classes, t its class, and w the class weights:

        value = w[t] (-log p[t])
        slope = w[t] (p - 1) for the entry's class, w[t] p for the others
        curvature = w[t] p (1 - p)

    With label smoothing a, the value is the sum over the classes of w ((1 - a) [c = t] + a / C) (-log p); with a probability y of each
    class as target, y takes the place of [c = t], and a mean divides by the number of entries. Neither softmax nor one-hot arrays are
    formed. -log p and 1 - p are computed from sums of positive terms, so that saturated logits keep their digits; -inf and
    +inf as logits have the limits.

    Args:
        input: logits.
        target: class indices; or probabilities, of the input's shape and a floating-point dtype.

    Source: Good, "Rational Decisions", 1952; smoothing: Szegedy and others, "Rethinking the Inception Architecture", 2016.
    """
    return surprise, 1.0


@row(
    "focal cross-entropy", "the same, where most entries are easy and would outweigh the few hard ones",
    ulp={"value": 9, "slope": 10}, settings=({}, {"gamma": 0.5}), module="FocalCrossEntropyLoss", **ROW,
)  # fmt: skip
@class_loss(ClassLoss, bounds={"gamma": (0.0, inf)})
def focal_cross_entropy_loss(surprise: Any, missed: Any, gamma: Any = 2.0) -> Any:
    """Cross-entropy that counts an entry less, the better it is classified.

    With p the softmax of an entry's logits along the axis of classes, t its class, and w the class weights:

        value = w[t] (1 - p[t])**gamma (-log p[t])
        slope = r (p - 1) for the entry's class, r p for the others
                with r = w[t] ((1 - p[t])**gamma + gamma (1 - p[t])**(gamma - 1) p[t] (-log p[t]))

    1 - p is a sum of positive terms and keeps its digits where p is close to 1. With gamma = 0 this is `cross_entropy`.

    Args:
        input: logits.
        target: class indices.
        gamma: how strongly well classified entries are discounted, 0 or more.

    Source: Lin, Goyal, Girshick, He and Dollár, "Focal Loss for Dense Object Detection", 2017.
    """
    power = pow(missed, gamma)
    # p (-log p) / (1 - p), which is between 0 and 1: 1 at p = 1, and 0 at p = 0, where -log p is infinite
    share = where(missed == 0.0, 1.0, where(surprise == inf, 0.0, exp(-surprise) * surprise / missed))
    return where(power == 0.0, 0.0, power * surprise), power * (1.0 + gamma * share)
