"""`Loss`, what every loss can do, and `elementwise_loss`, which makes one out of a formula.

Design: a) A `Loss` is called for the value; its methods give slopes and curvatures. b) A `_Call` sorts the options into
arrays and numbers, and makes the passes over memory that they need: one, or two where a mean has to count first. c) Plans
and kernels are kept by the `Request` they were made for, so that a small call costs microseconds; whatever depends on the
request alone is checked when its plan is made.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, overload

import numpy as np

from fastloss.formula import OPTIONS, Formula
from fastloss.plan import REDUCTIONS, Array, Request, check_dtype, make_plan

Bounds = Mapping[str, tuple[float, float]]

SEARCHED = 1 << 20  # elements looked at together when the first bad target is sought


class Loss:
    """A loss function: call it for the value; `grad`, `value_and_grad` and `curvature` take the same arguments.

    Args:
        input: any shape and strides; float32 or float64. Arithmetic is float32, or float64 where input or target is.
        target: the same shape; float32, float64, bool, or an integer type of 8 to 64 bits.
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
        validate: whether a target outside [0, 1] is an error; only the cross-entropies have that condition. The check is
            part of the same pass, or with `out` a pass before it, so that nothing is written.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, a number out of its bounds (arrays of parameters are not
            looked at), an `out` that is read-only or overlaps, a bad target.
        TypeError: a dtype or type that is not accepted, an unknown option.
        NotImplementedError: `curvature`, where the loss's formula gives none.

    A mean of no elements, all masked or the input empty, is NaN with a RuntimeWarning.
    """

    def __init__(self, function: Callable[..., Any], unit_target: bool, bounds: Bounds) -> None:
        self.formula = Formula(function)
        if unknown := bounds.keys() - self.formula.defaults.keys():
            raise ValueError(f"bounds are given for {', '.join(sorted(unknown))}, which {function.__name__} does not have")
        self.unit_target = unit_target
        self.bounds = bounds
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        self.__signature__ = _signature(self.formula.defaults)

    def __repr__(self) -> str:
        return f"<loss {self.__name__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.__qualname__  # pickled by name, as functions are

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the loss: a float64 number, one a sample, or with reduction "none" an array of the input's dtype."""
        if options.get("grad_output") is not None:
            raise ValueError("grad_output scales a gradient, and the value alone has none: use grad or value_and_grad")
        if reduction == "none":
            return self._run("", ("value",), input, target, weight, reduction, options)[1][0]
        if options.get("out") is not None:
            raise ValueError(
                f"out takes an array of the input's shape, and with reduction {reduction!r} the value is none; use grad or value_and_grad"
            )
        return self._run("value", (), input, target, weight, reduction, options)[0]

    def grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Array:
        """Return the gradient with respect to the input, in the input's dtype."""
        return self._run("", ("slope",), input, target, weight, reduction, options)[1][0]

    def value_and_grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Any, Array]:
        """Return the loss and its gradient with respect to the input, from one pass over memory."""
        if reduction == "none":
            slope, value = self._run("", ("slope", "value"), input, target, weight, reduction, options)[1]
            return value, slope
        value, outputs = self._run("value", ("slope",), input, target, weight, reduction, options)
        return value, outputs[0]

    def curvature(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Array:
        """Return the second derivative with respect to each element of the input: the diagonal of the Hessian."""
        if not self.formula.has_curvature:
            raise NotImplementedError(f"{self.__name__} has no curvature: its formula returns (value, slope)")
        return self._run("", ("curvature",), input, target, weight, reduction, options)[1][0]

    def _run(
        self, summed: str, wanted: tuple[str, ...], input: Any, target: Any, weight: Any, reduction: str, options: dict[str, Any]
    ) -> tuple[Any, list[Array]]:
        """Return the reduced value, if it is summed, and the arrays that are wanted."""
        call = _Call(self, input, target, weight, reduction, options)
        borrowed = call.out is not None
        validate = call.validate and self.unit_target
        if validate and borrowed:
            call.check_targets()  # first, so that nothing is written to the caller's buffer
            validate = False
        counted = call.count()
        scale = call.scale(counted) if wanted else 1.0
        outputs = call.make_outputs(wanted)
        total, bad = call.run(summed, validate, wanted, outputs, scale, borrowed)
        if bad:
            call.complain()
        return (call.reduce(total, counted) if summed else None), outputs


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
        """Return the value, as a loss does; with reduction "none" float32, or float64 for float64 targets."""
        t = as_array("target", target)
        unread = np.broadcast_to(np.zeros((), np.float64 if t.dtype == np.float64 else np.float32), t.shape)
        if "grad_output" in options:
            raise TypeError(f"{self._loss.__name__} has no gradient, and so no grad_output")
        return self._loss(unread, t, weight, reduction, **options)


class _Call:
    """One call's arrays and options, and the passes over memory made for it."""

    __slots__ = ("arrays", "loss", "names", "numbers", "out", "parameters", "reduction", "shape", "upstream", "validate")

    def __init__(self, loss: Loss, input: Any, target: Any, weight: Any, reduction: str, options: dict[str, Any]) -> None:
        self.loss, self.reduction = loss, reduction
        x = input if type(input) is np.ndarray else as_array("input", input)
        t = target if type(target) is np.ndarray else as_array("target", target)
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            raise ValueError(f"reduction {reduction!r} is unknown; accepted: {', '.join(map(repr, REDUCTIONS))}")
        self.names, self.arrays = ["input", "target"], [x, t]
        self.shape = x.shape
        self.upstream: Any = 1.0
        self.out, self.validate = options.get("out"), False
        self.parameters, self.numbers = loss.formula.given, loss.formula.numbers
        if weight is not None:
            self.add("weight", weight)
        if len(options) > (self.out is not None):
            self.take(options)

    @property
    def by_sample(self) -> bool:
        """Whether each first-axis entry has a value of its own."""
        return self.reduction in ("sample_mean", "sample_sum")

    def add(self, name: str, value: Any) -> None:
        """Add an array that is read."""
        self.names.append(name)
        self.arrays.append(as_array(name, value))

    def take(self, options: dict[str, Any]) -> None:
        """Sort the options into arrays and numbers."""
        formula, self.numbers = self.loss.formula, {}
        if unknown := options.keys() - OPTIONS.keys() - formula.defaults.keys():
            accepted = ", ".join([*formula.defaults, "weight", "reduction", *OPTIONS])
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; accepted: {accepted}")
        given = {name: value for name, default in formula.defaults.items() if (value := options.get(name, default)) is not None}
        self.parameters = tuple(given)
        for name, value in given.items():
            if is_number(value):
                self.numbers[name] = self.number(name, value)
            else:
                self.add(name, value)
        if (mask := options.get("mask")) is not None:
            self.add("mask", mask)
        if (scale := options.get("target_scale")) is not None:
            self.numbers["target_scale"] = self.number("target_scale", scale)
        if (ignored := options.get("ignore_index")) is not None and can_hold(self.arrays[1].dtype, to_float("ignore_index", ignored)):
            self.numbers["ignore_index"] = float(ignored)
        if (upstream := options.get("grad_output")) is not None:
            self.take_upstream(upstream)
        self.validate = bool(options.get("validate"))

    def take_upstream(self, grad_output: Any) -> None:
        """Take the derivative of what follows the loss: a number, or an array of the loss's shape."""
        if is_number(grad_output):
            self.upstream = to_float("grad_output", grad_output)
            return
        array = as_array("grad_output", grad_output)
        shape = self.shape if self.reduction == "none" else self.shape[:1] if self.by_sample else ()
        if array.shape != shape:
            raise ValueError(f"grad_output has shape {array.shape}; with reduction {self.reduction!r} the loss has shape {shape}")
        if self.reduction == "none":
            self.add("grad_output", array)
        else:
            check_dtype("grad_output", array.dtype)
            self.upstream = array.astype(np.float64)

    def number(self, name: str, value: Any) -> float:
        """Return an option that is a plain number, if it lies where it may."""
        number = to_float(name, value)
        low, high = self.loss.bounds.get(name, (-math.inf, math.inf))
        if not low <= number <= high:
            accepted = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more" if low > -math.inf else "any number but NaN"
            raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
        return number

    def make_outputs(self, wanted: tuple[str, ...]) -> list[Array]:
        """Return the arrays to write: the caller's buffer for the first, new ones beside it."""
        x, out = self.arrays[0], self.out
        if out is None:
            return [np.empty_like(x) for _ in wanted]
        if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
            raise TypeError(f"out must be a numpy.ndarray, not {type(out).__name__}")
        if not out.flags.writeable:
            raise ValueError("out is read-only")
        return [out] if len(wanted) == 1 else [out, np.empty_like(x)]

    def run(
        self, summed: str, checked: bool, wanted: tuple[str, ...], outputs: list[Array], scale: Any, borrowed: bool
    ) -> tuple[Any, bool]:
        """Make one pass; return the sum, or one a sample, and whether a target was bad.

        The request is a bare tuple here, because making a `Request` takes longer than finding its launch.
        """
        arrays = self.arrays + outputs
        layouts = tuple([(a.dtype, a.shape, a.strides) for a in arrays])
        numbers = self.numbers
        launch = find_launch(
            (self.loss.formula, self.shape, self.reduction, summed, checked, wanted, self.parameters, (*numbers,), (*self.names,), layouts)
        )
        result: tuple[Any, bool] = launch.run(arrays, numbers.values(), scale, borrowed)
        return result

    def scan(self, checked: bool, *needed: str) -> tuple[Any, bool]:
        """Make a pass that computes no loss and reads only what it needs; return the count of elements that count."""
        scan = copy.copy(self)
        kept = [k for k, name in enumerate(self.names) if name in needed]
        scan.names, scan.arrays = [self.names[k] for k in kept], [self.arrays[k] for k in kept]
        scan.numbers = {name: x for name, x in self.numbers.items() if name in needed}
        scan.parameters = ()
        return scan.run("count", checked, (), [], 1.0, False)

    def count(self) -> Any:
        """Return how many elements the reduction divides by, one number or one a sample."""
        if self.reduction == "batchmean":
            return self.shape[0] if self.shape else 1
        if self.reduction not in ("mean", "sample_mean"):
            return 1
        if "ignore_index" in self.numbers:
            return self.scan(False, "target", "mask", "ignore_index")[0]
        if "mask" in self.names:
            return self.scan(False, "mask")[0]
        return math.prod(self.shape[1:] if self.by_sample else self.shape)

    def scale(self, counted: Any) -> Any:
        """Return what gradients are multiplied by, one number or one a sample."""
        if not self.by_sample:
            return self.upstream / counted if counted else math.nan  # where nothing counts, every gradient is 0 all the same
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(np.broadcast_to(np.divide(self.upstream, counted), self.shape[:1]))

    def reduce(self, total: Any, counted: Any) -> Any:
        """Return the reduced value from the sum."""
        if not self.by_sample and counted:
            return np.float64(total / counted)
        if not np.all(counted):
            warnings.warn("mean of no elements: the input is empty, or all of it is masked", RuntimeWarning, stacklevel=outside())
        with np.errstate(all="ignore"):
            return np.divide(total, counted)

    def check_targets(self) -> None:
        """Make a pass that reads the targets and writes nothing; complain if one is outside [0, 1]."""
        if self.scan(True, "target", "mask", "ignore_index", "target_scale")[1]:
            self.complain()

    def complain(self) -> None:
        """Find the first target outside [0, 1], a part of the batch at a time, and raise the error that names it."""
        named = dict(zip(self.names, self.arrays, strict=True))
        shape = self.shape or (1,)
        target, counted = named["target"].reshape(shape), np.broadcast_to(named.get("mask", np.True_), shape)
        scale = self.numbers.get("target_scale", 1.0)
        step = max(1, SEARCHED * shape[0] // target.size)
        for first in range(0, shape[0], step):
            t = target[first : first + step]
            bad = counted[first : first + step] & ~((t * scale >= 0) & (t * scale <= 1))
            if "ignore_index" in self.numbers:
                bad &= t != self.numbers["ignore_index"]
            if bad.any():
                where = np.unravel_index(np.argmax(bad), bad.shape)
                index = (int(where[0]) + first, *map(int, where[1:]))[: len(self.shape)]
                whole = target.dtype.kind in "iu" and "target_scale" not in self.numbers
                hint = "; for images stored as whole numbers pass target_scale=1/255" if whole else ""
                raise ValueError(f"target[{', '.join(map(str, index))}] is {t[where]!s}; accepted: targets in [0, 1]{hint}")
        raise ValueError("a target is outside [0, 1] by a rounding error; accepted: targets in [0, 1]")


@functools.lru_cache(maxsize=1024)
def find_launch(request: tuple[Any, ...]) -> Any:
    """Return what runs a request, given as a tuple of its fields: its plan with the compiled kernel."""
    plan = make_plan(Request(*request))
    from fastloss.cpu.launch import Launch, Nothing  # brings llvmlite, and Numba where a kernel is compiled

    return Launch(plan) if plan.size else Nothing(plan)


def as_array(name: str, value: Any) -> Array:
    """Return the caller's array without a copy; numbers and lists become arrays."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; pass {name}.data, and mask=~{name}.mask")
    if type(value).__module__.partition(".")[0] in ("torch", "cupy", "dask", "jax", "jaxlib", "tensorflow"):
        raise TypeError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}; accepted: numpy.ndarray, and what numpy.asarray makes one of"
        )
    return np.asarray(value)


def is_number(value: Any) -> bool:
    """Whether an option is one number, and not an array or a list of them."""
    return isinstance(value, (int, float)) or np.ndim(value) == 0


def to_float(name: str, value: Any) -> float:
    """Return an option that is a plain number."""
    if isinstance(value, (str, bytes)) or np.ndim(value) != 0 or np.iscomplexobj(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is too large for a float64") from None


def outside() -> int:
    """Return the stack level of the first caller outside this file, for warnings."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    return level


def can_hold(dtype: np.dtype[Any], ignored: float) -> bool:
    """Whether a target of this dtype can equal the number; where it cannot, no element is ignored."""
    if math.isnan(ignored):
        raise ValueError("ignore_index is NaN, which equals nothing; pass mask=~numpy.isnan(target)")
    if dtype.kind == "f":
        return True
    if abs(ignored) > 2.0**53 or not ignored.is_integer():
        raise ValueError(f"ignore_index is {ignored!r}; accepted for {dtype} targets: whole numbers up to 2**53")
    if dtype.kind == "b":
        return ignored in (0.0, 1.0)
    return dtype.kind in "iu" and bool(np.iinfo(dtype).min <= ignored <= np.iinfo(dtype).max)


def _signature(parameters: Mapping[str, Any]) -> inspect.Signature:
    """Return what a call accepts, for help() and editors."""
    Parameter = inspect.Parameter
    leading = {"input": Parameter.empty, "target": Parameter.empty, "weight": None, "reduction": "mean"}
    return inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default) for name, default in leading.items()]
        + [Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in {**parameters, **OPTIONS}.items()]
    )


@overload
def elementwise_loss(function: Callable[..., Any], /) -> Loss: ...
@overload
def elementwise_loss(*, unit_target: bool = ..., bounds: Bounds = ...) -> Callable[[Callable[..., Any]], Loss]: ...
def elementwise_loss(function: Callable[..., Any] | None = None, /, *, unit_target: bool = False, bounds: Bounds | None = None) -> Any:
    """Make a loss out of a formula: a function of one element, which returns (value, slope) or (value, slope, curvature).

        from fastloss.ops import sqrt

        @fastloss.elementwise_loss
        def charbonnier(z, t, eps=1e-3):
            d = z - t
            v = sqrt(d * d + eps * eps)
            return v, d / v

    The first two arguments are an element of the input and of the target; the slope is the derivative by the first, the
    curvature, if it is given, the second. Further arguments are the loss's parameters, each with a number as its default, or
    None for one that may be absent, which the formula may ask; a call gives numbers, or arrays that broadcast against the
    input. The names of options (see `Loss`) are taken. A formula may not branch on an element, and computes with
    operators and the functions of `fastloss.ops` alone; helpers written like that may be called.

    `unit_target` says that targets belong in [0, 1], which `validate=True` then checks. `bounds` gives, by parameter,
    the least and the largest number that is accepted; arrays are not looked at.

    Raises `FormulaError`, a `TypeError`, at once if the formula cannot be compiled; it names the line and what to use.
    """
    if function is None:
        return lambda f: Loss(f, unit_target, bounds or {})
    return Loss(function, unit_target, bounds or {})
