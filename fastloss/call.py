"""`Call`: one call's arrays and options, and the passes over memory that are made for it.

Plans and kernels are kept by the `Request` they were made for, so that a small call costs microseconds; whatever depends on
the request alone is checked when its plan is made.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastloss.formula import Formula
from fastloss.plan import REDUCTIONS, Array, Request, belongs_to, check_dtype, is_float, make_plan, same_elements, shares_memory

Bounds = Mapping[str, tuple[float, float]]
Fields = tuple[Any, ...]  # of a `Request`
# the least number that a parameter may be which may not be 0, and the largest that one may be which has to be finite
ABOVE_0, LARGEST = math.nextafter(0.0, 1.0), sys.float_info.max

INPUT_AND_TARGET: tuple[str, ...] = ("input", "target")
SEARCHED = 1 << 20  # elements looked at together when the first bad one is sought


class Definition(NamedTuple):
    """What a call has to know of the loss it computes."""

    formula: Formula
    bounds: Bounds  # of parameters: the least and the largest number
    unit: tuple[str, ...]  # operands that belong in [0, 1], which `validate` checks
    options: tuple[str, ...]  # the names that are accepted beside those of the arrays
    operands: tuple[str, str] = ("input", "target")  # what the caller knows them by
    buffers: int = 1  # how many arrays `out` is


class Call:
    """One call's arrays and options, sorted into what is read, what is a number, and how the result is reduced.

    The arrays are NumPy's; calls of another kind of arrays are classes of their own, which replace what touches the elements.
    """

    __slots__ = (
        "arrays", "kept", "loss", "must_count", "names", "numbers", "out", "parameters", "reduction", "shape", "upstream", "validate"
    )  # fmt: skip

    kind: Any = np.ndarray  # of arrays that are taken as they are

    def __init__(
        self, loss: Definition, input: Any, target: Any, weight: Any, reduction: Any, options: Mapping[str, Any]
    ) -> None:  # fmt: skip
        self.loss, self.reduction = loss, reduction
        kind = self.kind
        x = input if type(input) is kind else self.as_array(loss.operands[0], input)
        t = target if type(target) is kind else self.as_array(loss.operands[1], target)
        self.names, self.arrays = INPUT_AND_TARGET, [x, t]
        self.shape = x.shape
        self.kept = kept_axes(reduction, x.shape)
        self.upstream: Any = 1.0
        self.out, self.validate = options.get("out"), False
        self.must_count = False  # whether a mean has to look at the elements to know how many they are
        self.parameters: tuple[str, ...] = ()
        self.numbers: dict[str, float] = {}
        if weight is not None:
            self.add("weight", weight)
        if len(options) > (self.out is not None):
            self.take(options)

    @staticmethod
    def as_array(name: str, value: Any) -> Any:
        """Return the caller's array without a copy."""
        return as_array(name, value)

    @staticmethod
    def is_number(value: Any) -> bool:
        """Whether an option is one number, and not an array or a list of them."""
        return isinstance(value, (int, float)) or np.ndim(value) == 0

    @staticmethod
    def check_buffer(name: str, out: Any) -> None:
        """Refuse what cannot be written to."""
        if type(out) is not np.ndarray and (not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray)):
            raise TypeError(f"{name} must be a numpy.ndarray, not {type(out).__name__}")
        if not out.flags.writeable:
            raise ValueError(f"{name} is read-only")

    @staticmethod
    def empty_like(array: Any) -> Any:
        """Return an array to write to."""
        return np.empty_like(array)

    @staticmethod
    def as_upstream(array: Any) -> Any:
        """Return what gradients are multiplied by, one number a sample."""
        return array.astype(np.float64)

    @staticmethod
    def warn_of_nothing(counted: Any) -> None:
        """Warn where a mean is of no element, and so NaN."""
        if not np.all(counted):
            warn_of_nothing()

    def add(self, name: str, value: Any) -> None:
        """Add an array that is read."""
        if isinstance(value, str):  # PyTorch's regression losses have `reduction` in the place of `weight`
            raise TypeError(f"{name} is {value!r}; accepted: an array or a number (a reduction is given by name, reduction={value!r})")
        self.names += (name,)
        self.arrays.append(self.as_array(name, value))

    def take(self, options: Mapping[str, Any]) -> None:
        """Sort the options into arrays and numbers."""
        refuse_unknown(options, self.loss.options)
        self.take_parameters(options)
        if (mask := options.get("mask")) is not None:
            self.add("mask", mask)
        if (scale := options.get("target_scale")) is not None:
            self.numbers["target_scale"] = self.number("target_scale", scale)
        if (ignored := options.get("ignore_index")) is not None:
            self.ignore(to_float("ignore_index", ignored))
        if (upstream := options.get("grad_output")) is not None:
            self.take_upstream(upstream)
        self.validate = bool(take_validate(options.get("validate")) and self.loss.unit)
        self.must_count = self.excludes and self.reduction in ("mean", "sample_mean")

    def take_parameters(self, values: Mapping[str, Any]) -> None:
        """Take the formula's parameters, numbers or arrays, as far as they are given and not their defaults."""
        given = []
        for name, default in self.loss.formula.defaults.items():
            if (value := values.get(name)) is None:
                continue
            if not self.is_number(value):
                self.add(name, value)
            elif (number := self.number(name, value)) != default:
                self.numbers[name] = number
            else:
                continue
            given.append(name)
        self.parameters = tuple(given)

    def ignore(self, ignored: float) -> None:
        """Take a target value out, if targets can have it; a floating-point one is rounded as they are."""
        dtype = self.arrays[1].dtype
        if can_hold(dtype, ignored):
            self.numbers["ignore_index"] = float(np.asarray(ignored, dtype)) if is_float(dtype) else ignored

    def take_upstream(self, grad_output: Any) -> None:
        """Take the derivative of what follows the loss: a number, or an array of the loss's shape."""
        if self.is_number(grad_output):
            self.upstream = to_float("grad_output", grad_output)
            return
        array = self.as_array("grad_output", grad_output)
        shape = self.shape if self.reduction == "none" else self.shape[: self.kept]
        check_upstream(array, shape, self.reduction)
        if self.reduction == "none" and array.ndim:
            self.add("grad_output", array)
        else:
            self.upstream = self.as_upstream(array)

    def number(self, name: str, value: Any) -> float:
        """Return an option that is a plain number, if it lies where it may."""
        return bounded(name, value, self.loss.bounds.get(name, (-math.inf, math.inf)))

    def make_outputs(self, wanted: tuple[str, ...]) -> list[Array]:
        """Return the arrays to write: the caller's buffers first, new ones beside them."""
        outputs = [*self.buffers()]
        while len(outputs) < len(wanted):
            like = self.arrays[self.names.index(belongs_to(wanted[len(outputs)]))]
            outputs.append(self.empty_like(like))
        return outputs

    def buffers(self) -> tuple[Array, ...]:
        """Return what the caller gave to be written."""
        if self.out is None:
            return ()
        return as_buffers(self.out, self.loss.buffers, self.check_buffer)

    def compute(self, summed: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[Any, list[Array]]:
        """Return the reduced value, if it is summed, and the arrays that are wanted."""
        borrowed, validate = self.out is not None, self.validate
        if validate and borrowed:
            self.check_elements()  # first, so that nothing is written to the caller's buffer
            validate = False
        counting = self.must_count and not wanted  # only gradients have to know it beforehand
        counted = 1 if counting else self.count()
        scale = self.scale(counted) if wanted else 1.0
        outputs = self.make_outputs(wanted)
        sums = self.run((*summed, "count") if counting else summed, wanted, outputs, scale, validate, borrowed)
        if counting:
            counted = sums[1]
        return (self.reduce(sums[0], counted) if summed else None), outputs

    def run(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Array], scale: Any = 1.0, validate: bool = False,
        borrowed: bool = False
    ) -> Any:  # fmt: skip
        """Make one pass; return the sums, each a number, or an array with one a group. Raises if an element is bad."""
        launch = find_launch(*self.request(summed, wanted, outputs, validate))
        sums, bad = launch.run(self.arrays + outputs, self.numbers.values(), scale, borrowed)
        if bad:
            self.complain()
        return sums

    def request(self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Array], validate: bool = False) -> Fields:
        """Return the fields of the `Request` for a pass: to make one takes longer than to find its launch."""
        layouts = tuple([(a.dtype, a.shape, a.strides) for a in self.arrays + outputs])
        checked = self.loss.unit if validate else ()
        names, numbers = self.names, tuple(self.numbers)
        return self.loss.formula, self.shape, self.kept, summed, checked, wanted, self.parameters, numbers, names, layouts

    def scan(self, summed: tuple[str, ...], validate: bool, *needed: str) -> Any:
        """Make a pass that computes no loss and reads only what it needs; return the sums."""
        scan = copy.copy(self)
        kept = [k for k, name in enumerate(self.names) if name in needed]
        scan.names, scan.arrays = tuple(self.names[k] for k in kept), [self.arrays[k] for k in kept]
        scan.numbers = {name: x for name, x in self.numbers.items() if name in needed}
        scan.parameters = ()
        return scan.run(summed, (), [], validate=validate)

    def derive(self, loss: Definition, arrays: Mapping[str, Array]) -> Call:
        """Return a call of another formula on the same arrays and options, with its parameters given as arrays."""
        other = copy.copy(self)
        other.loss, other.parameters, other.kept = loss, tuple(arrays), 0
        given = [self.as_array(name, x) for name, x in arrays.items()]
        other.names, other.arrays = (*self.names, *arrays), [*self.arrays, *given]
        return other

    @property
    def excludes(self) -> bool:
        """Whether a mask or an ignored target value takes elements out."""
        return "mask" in self.names or "ignore_index" in self.numbers

    def count(self) -> Any:
        """Return how many elements the reduction divides by, one number or one a sample."""
        if self.must_count:
            needed = ("target", "mask", "ignore_index") if "ignore_index" in self.numbers else ("mask",)
            return self.scan(("count",), False, *needed)[0]
        if self.reduction == "batchmean":
            return self.shape[0]
        if self.reduction in ("mean", "sample_mean"):
            return math.prod(self.shape[self.kept :])
        return 1

    def scale(self, counted: Any) -> Any:
        """Return what gradients are multiplied by, one number or one a sample."""
        if not self.kept:
            return self.upstream / counted if counted else math.nan  # where nothing counts, every gradient is 0 all the same
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(np.broadcast_to(np.divide(self.upstream, counted), self.shape[:1]))

    def reduce(self, total: Any, counted: Any) -> Any:
        """Return the reduced value from the sum."""
        if not self.kept and counted:
            return np.float64(total / counted)
        self.warn_of_nothing(counted)
        with np.errstate(all="ignore"):
            return np.divide(total, counted)

    def check_elements(self) -> None:
        """Make a pass that writes nothing; raise if an element is outside [0, 1]."""
        self.scan((), True, *self.loss.unit, "target", "mask", "ignore_index", "target_scale")

    def complain(self) -> None:
        """Find the first element outside [0, 1], a part of the batch at a time, and raise the error that names it."""
        shape = self.shape or (1,)
        named = {name: np.broadcast_to(array, self.shape).reshape(shape) for name, array in zip(self.names, self.arrays, strict=True)}
        step = max(1, SEARCHED * shape[0] // named["target"].size)
        for first in range(0, shape[0], step):
            part = {name: array[first : first + step] for name, array in named.items()}
            for name in self.loss.unit:
                if (bad := self.outside_unit(name, part)).any():
                    where = np.unravel_index(np.argmax(bad), bad.shape)
                    index = (int(where[0]) + first, *map(int, where[1:]))[: len(self.shape)]
                    raise ValueError(complaint(name, index, part[name][where], "target_scale" in self.numbers))
        raise ValueError("a target is outside [0, 1] by a rounding error; accepted: targets in [0, 1]")

    def outside_unit(self, name: str, part: dict[str, Array]) -> Any:
        """Return which elements of a part of an array count and lie outside [0, 1]."""
        x = part[name] * self.numbers.get("target_scale", 1.0) if name == "target" else part[name]
        bad = ~((x >= 0) & (x <= 1)) & part.get("mask", np.True_)
        if "ignore_index" in self.numbers:
            bad &= part["target"] != self.numbers["ignore_index"]
        return bad


@functools.lru_cache(maxsize=1024)
def find_launch(*request: Any) -> Any:
    """Return what runs a request, given by its fields: its plan with the compiled kernel."""
    plan = make_plan(Request(*request))
    from fastloss.cpu.launch import Launch, Nothing  # brings llvmlite, and Numba where a kernel is compiled

    return Launch(plan) if plan.size else Nothing(plan)


def complaint(name: str, index: tuple[int, ...], found: Any, is_scaled: bool) -> str:
    """Say which element is outside [0, 1]."""
    hint = "; for images stored as whole numbers pass target_scale=1/255" if found.dtype.kind in "iu" and not is_scaled else ""
    logits = "; for logits use binary_cross_entropy_with_logits" if name == "input" else ""
    return f"{name}[{', '.join(map(str, index))}] is {found!s}; accepted: {name}s in [0, 1]{hint}{logits}"


def refuse_unknown(options: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    """Refuse options that a loss does not have."""
    if unknown := sorted(name for name in options if name not in accepted):
        raise TypeError(f"unknown option {', '.join(unknown)}; accepted: {', '.join(accepted)}")


def check_reduction(reduction: Any, accepted: Sequence[str]) -> None:
    """Refuse a reduction that a loss does not have."""
    if not isinstance(reduction, str) or reduction not in accepted:
        known = isinstance(reduction, str) and reduction in REDUCTIONS
        raise ValueError(f"reduction {reduction!r} is unknown{' here' * known}; accepted: {', '.join(map(repr, accepted))}")


def kept_axes(reduction: Any, shape: tuple[int, ...]) -> int:
    """Return how many leading axes keep sums of their own under a reduction."""
    check_reduction(reduction, REDUCTIONS)
    if reduction in ("mean", "sum", "none"):
        return 0
    if not shape:
        raise ValueError(f"reduction {reduction!r} needs a first axis, and the input has none: its shape is ()")
    return 0 if reduction == "batchmean" else 1


def check_upstream(array: Array, shape: tuple[int, ...], reduction: str) -> None:
    """Refuse a `grad_output` that is neither of the loss's shape nor a number, as one of a device may be."""
    if array.ndim and array.shape != shape:
        raise ValueError(f"grad_output has shape {array.shape}; with reduction {reduction!r} the loss has shape {shape}")
    check_dtype("grad_output", array.dtype)


def as_buffers(out: Any, count: int, check: Callable[[str, Any], None]) -> tuple[Array, ...]:
    """Return `out` as so many arrays that can be written to; one is given by itself, several as a tuple or a list."""
    if count == 1:
        check("out", out)
        return (out,)
    if not isinstance(out, (tuple, list)) or len(out) != count:
        raise TypeError(f"out must be {count} arrays, one a gradient, not {type(out).__name__}")
    for k, buffer in enumerate(out):
        check(f"out[{k}]", buffer)
    return tuple(out)


def check_apart(buffers: tuple[Array, ...], reads: Mapping[str, Array], own: tuple[str, ...]) -> None:
    """Refuse buffers that share memory with each other, or with what is read but their own array, element for element."""
    for k, buffer in enumerate(buffers):
        others = [(name, x) for name, x in reads.items() if not (name == own[k] and same_elements(buffer, x))]
        others += [(f"out[{j}]", buffers[j]) for j in range(k)]
        for name, other in others:
            if shares_memory(buffer, other):
                raise ValueError(f"out[{k}] shares memory with {name}; only out=({', '.join(own)}), the very same elements, is allowed")


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


def bounded(name: str, value: Any, bounds: tuple[float, float]) -> float:
    """Return an option that is a plain number, if it lies within its bounds."""
    number, (low, high) = to_float(name, value), bounds
    if not low <= number <= high:
        least = "more than 0" if low == ABOVE_0 else f"{low:g} or more" if low > -math.inf else "any number but NaN"
        least = f"{least}, and finite" if high == LARGEST else least
        accepted = least if high >= LARGEST else f"from {low:g} to {high:g}" if low > -math.inf else f"{high:g} or less"
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
    return number


def check_flag(name: str, value: Any) -> None:
    """Refuse an option that is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def take_validate(value: Any) -> bool:
    """Return whether elements are looked at; "defer" says that the error may come later, which only a GPU makes use of."""
    if value is None or (isinstance(value, str) and value == "defer"):
        return value is not None
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"validate is {value!r}; accepted: True, False, 'defer'")
    return bool(value)


def to_float(name: str, value: Any) -> float:
    """Return an option that is a plain number."""
    plain = isinstance(value, (int, float))
    if not plain and (isinstance(value, (str, bytes)) or np.ndim(value) != 0 or np.iscomplexobj(value)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is too large for a float64") from None


def warn_of_nothing() -> None:
    """Warn, at the first caller outside the package, that a mean is NaN because no element counts."""
    warnings.warn("mean of no elements: the input is empty, or all of it is masked", RuntimeWarning, stacklevel=outside())


def outside() -> int:
    """Return the stack level, seen from the caller, of the first caller outside the package, for warnings."""
    level, frame, package = 1, sys._getframe(1), os.path.join(os.path.dirname(__file__), "")
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level


def can_hold(dtype: np.dtype[Any], ignored: float) -> bool:
    """Whether a target of this dtype can equal the number; where it cannot, no element is ignored."""
    if math.isnan(ignored):
        raise ValueError("ignore_index is NaN, which equals nothing; pass mask=~numpy.isnan(target)")
    if is_float(dtype):
        return True
    if abs(ignored) > 2.0**53 or not ignored.is_integer():
        raise ValueError(f"ignore_index is {ignored!r}; accepted for {dtype} targets: whole numbers up to 2**53")
    if dtype.kind == "b":
        return ignored in (0.0, 1.0)
    return dtype.kind in "iu" and bool(np.iinfo(dtype).min <= ignored <= np.iinfo(dtype).max)
