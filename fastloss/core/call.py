"""`Call`: one call of a loss, with its arrays and options checked and sorted. The same on every machine.

Each machine has a subclass, which defines how arrays are recognised and allocated, and how a pass over memory is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple, Self

import numpy as np

from fastloss.core.checks import (
    can_hold,
    check_grad_output,
    check_target,
    count_group_axes,
    refuse_unknown,
    to_bounded,
    to_buffers,
    to_float,
    to_validate,
)
from fastloss.core.definition import INPUT_AND_TARGET, Definition, operand_of
from fastloss.core.dtypes import is_float

COUNT, TARGET = ("count",), ("target",)
ANY_NUMBER = (-math.inf, math.inf)
get_layout = attrgetter("dtype", "shape", "strides")


class Arguments(NamedTuple):
    """The quantities that a method of a loss requests, and the arguments that its caller passed."""

    summed: tuple[str, ...]  # quantities to reduce: ("value",) or ()
    wanted: tuple[str, ...]  # quantities to write, each to an array of its own
    first: Any
    second: Any
    weight: Any
    reduction: str
    options: dict[str, Any]


class Call:
    """The arguments of one call, sorted into arrays to read, options that are numbers, and the reduction."""

    __slots__ = (
        "arguments", "arrays", "group_axes", "loss", "must_count", "names", "numbers", "out", "parameters", "reduction", "shape",
        "upstream", "validate",
    )  # fmt: skip

    kind: Any = None  # arrays of exactly this type need no conversion and no check
    value_dtype: Any = np.float64  # dtype of reduced values

    def __init__(self, loss: Definition, arguments: Arguments) -> None:
        self.loss, self.arguments = loss, arguments
        _, _, first, second, weight, self.reduction, options = arguments
        kind = self.kind
        x = first if type(first) is kind else self.as_array(loss.operands[0], first)
        t = second if type(second) is kind else self.as_array(loss.operands[1], second)
        self.names: tuple[str, ...] = INPUT_AND_TARGET
        self.arrays: list[Any] = [x, t]
        self.shape: tuple[int, ...] = x.shape
        self.group_axes = count_group_axes(self.reduction, self.entries)
        self.upstream: Any = 1.0  # the upstream gradient: a number, or an array with one number for each group
        self.out, self.validate = options.get("out"), False
        self.must_count = False  # whether the divisor of a mean must be counted by a pass over the mask or the targets
        self.parameters: tuple[str, ...] = ()
        self.numbers: dict[str, float] = {}
        if weight is not None:
            self.add("weight", weight)
        if len(options) > (self.out is not None):
            self.sort(options)

    # --- methods that each machine's subclass defines

    @staticmethod
    def as_array(name: str, value: Any) -> Any:
        """Return the caller's array without a copy; convert a number or a list to an array."""
        raise NotImplementedError

    @staticmethod
    def is_number(value: Any) -> bool:
        """Whether an option is a single number that the host can read without waiting, not an array or a list."""
        raise NotImplementedError

    @staticmethod
    def check_buffer(name: str, out: Any) -> None:
        """Raise TypeError or ValueError if a buffer cannot be written to."""
        raise NotImplementedError

    @staticmethod
    def address_of(array: Any) -> int:
        """Return the address of an array's first element."""
        raise NotImplementedError

    @staticmethod
    def to_host(array: Any) -> Any:
        """Return an array of results as a NumPy array."""
        return array

    @staticmethod
    def empty_like(array: Any) -> Any:
        """Allocate an output with the shape, dtype and memory order of an array."""
        raise NotImplementedError

    @classmethod
    def scratch_like(cls, array: Any) -> Any:
        """Allocate memory for results that no caller sees, with the shape, dtype and memory order of an array."""
        return cls.empty_like(array)

    @staticmethod
    def as_upstream(array: Any) -> Any:
        """Convert an upstream gradient with one number for each group to a form that kernels read."""
        raise NotImplementedError

    @staticmethod
    def warn_of_empty_mean(counted: Any) -> None:
        """Warn if a mean divides by 0. A count that only the device knows is not checked."""
        raise NotImplementedError

    def compute(self) -> tuple[Any, list[Any]]:
        """Compute the requested quantities: return the reduced value or None, and the written arrays."""
        raise NotImplementedError

    def run(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Any], scale: Any = 1.0, validate: bool = False
    ) -> Any:  # fmt: skip
        """Make one pass over memory and return the sums: each a number, or an array with one number for each group."""
        raise NotImplementedError

    @property
    def entries(self) -> tuple[int, ...]:
        """The shape of the values before they are reduced: the input's, without the axis of classes."""
        return self.shape[:-1] if self.loss.classes else self.shape

    # --- sorting the arguments

    def add(self, name: str, value: Any) -> None:
        """Add an array to the arrays to read."""
        if isinstance(value, str):  # callers used to PyTorch's regression losses may pass a reduction here
            raise TypeError(f"{name} is {value!r}; accepted: an array or a number (pass a reduction by keyword, reduction={value!r})")
        self.names += (name,)
        self.arrays.append(self.as_array(name, value))

    def sort(self, options: Mapping[str, Any]) -> None:
        """Sort the options into arrays and numbers."""
        refuse_unknown(options, self.loss.options)
        self.take_parameters(options)
        if (mask := options.get("mask")) is not None:
            self.add("mask", mask)
        if (scale := options.get("target_scale")) is not None:
            self.numbers["target_scale"] = self.to_number("target_scale", scale)
        if (ignored := options.get("ignore_index")) is not None:
            self.take_ignore_index(to_float("ignore_index", ignored))
        if (upstream := options.get("grad_output")) is not None:
            self.take_grad_output(upstream)
        self.validate = bool(to_validate(options.get("validate")) and self.loss.probabilities)
        has_class_weights = self.loss.classes and "weight" in self.names and not is_float(self.arrays[1].dtype)
        self.must_count = (self.excludes or has_class_weights) and self.reduction in ("mean", "sample_mean")

    def take_parameters(self, values: Mapping[str, Any]) -> None:
        """Take the formula's parameters, as numbers or arrays. A parameter equal to its default becomes a constant of the kernel."""
        given = []
        for name, default in self.loss.formula.defaults.items():
            if (value := values.get(name)) is None:
                continue
            if not self.is_number(value):
                self.add(name, value)
            elif (number := self.to_number(name, value)) != default:
                self.numbers[name] = number
            else:
                continue
            given.append(name)
        self.parameters = tuple(given)

    def take_ignore_index(self, ignored: float) -> None:
        """Take the target value that excludes elements, rounded to the targets' dtype. It is dropped if no target can equal it."""
        dtype = self.arrays[1].dtype
        if can_hold(dtype, ignored):
            self.numbers["ignore_index"] = float(np.asarray(ignored, dtype)) if is_float(dtype) else ignored

    def take_grad_output(self, grad_output: Any) -> None:
        """Take the upstream gradient: a number, or an array of the loss's shape."""
        if self.is_number(grad_output):
            self.upstream = to_float("grad_output", grad_output)
            return
        array = self.as_array("grad_output", grad_output)
        shape = self.entries if self.reduction == "none" else self.shape[: self.group_axes]
        check_grad_output(array, shape, self.reduction)
        if self.reduction == "none" and array.ndim:
            self.add("grad_output", array[..., None] if self.loss.classes else array)
        else:
            self.upstream = self.as_upstream(array)

    def to_number(self, name: str, value: Any) -> float:
        """Convert an option to a float and check it against the bounds of the loss."""
        return to_bounded(name, value, self.loss.bounds.get(name, ANY_NUMBER))

    # --- outputs and passes

    def buffers(self) -> tuple[Any, ...]:
        """Return the caller's output buffers; an empty tuple if `out` was not passed."""
        if self.out is None:
            return ()
        if self.loss.gradients > 1:
            return to_buffers(self.out, self.loss.gradients, self.check_buffer)
        self.check_buffer("out", self.out)
        return (self.out,)

    def make_outputs(self, wanted: tuple[str, ...]) -> list[Any]:
        """Return one array for each quantity to write: first the caller's buffers, then new arrays."""
        if not self.loss.classes:
            check_target(self.shape, self.arrays[1].shape)  # before an array of the input's size is allocated
        outputs = [] if self.out is None else list(self.buffers())
        for name in wanted[len(outputs) :]:
            like = self.arrays[self.names.index(operand_of(name))]
            outputs.append(self.empty_like(like[..., :1] if self.loss.classes and name == "value" else like))
        return outputs

    def request(self, summed: tuple[str, ...], wanted: tuple[str, ...], arrays: list[Any], validate: bool = False) -> tuple[Any, ...]:
        """Return the fields of a pass's `Request` as a tuple.

        A cached launch is looked up by this tuple, which takes less time than making a `Request` would. `arrays` holds the
        arrays to read, followed by the outputs.
        """
        layouts = tuple(map(get_layout, arrays))
        checked = self.loss.probabilities if validate else self.always_checked if wanted or summed != COUNT else ()
        names, numbers = self.names, tuple(self.numbers)
        return (
            self.loss.formula, self.shape, self.group_axes, summed, checked, wanted, self.parameters, numbers, self.loss.classes, names,
            layouts,
        )  # fmt: skip

    @property
    def always_checked(self) -> tuple[str, ...]:
        """The operands that are checked without `validate`: class indices, and integer targets, where 255 is no probability."""
        if self.loss.classes:
            return () if is_float(self.arrays[1].dtype) else TARGET
        if "target" not in self.loss.probabilities or "target_scale" in self.numbers or "target" not in self.names:
            return ()
        return TARGET if self.arrays[self.names.index("target")].dtype.kind in "iu" else ()

    def copy(self) -> Self:
        """Make a copy of the call whose attributes can be replaced without changing the original."""
        other = object.__new__(type(self))
        for name in Call.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    def narrowed(self, *needed: str) -> Self:
        """Make a call that computes no loss and reads only the arrays and numbers named in `needed`."""
        other = self.copy()
        chosen = [k for k, name in enumerate(self.names) if name in needed]
        other.names, other.arrays = tuple(self.names[k] for k in chosen), [self.arrays[k] for k in chosen]
        other.numbers = {name: x for name, x in self.numbers.items() if name in needed}
        other.parameters = ()
        return other

    @property
    def counted(self) -> tuple[str, ...]:
        """The names of the arrays and numbers that decide which elements count."""
        if self.loss.classes:
            return "input", "target", "mask", "ignore_index", "weight"  # the input decides the type of the arithmetic
        return ("target", "mask", "ignore_index") if "ignore_index" in self.numbers else ("mask",)

    def derive(self, loss: Definition, arrays: Mapping[str, Any]) -> Call:
        """Make a call of another formula on the same arrays and options, with `arrays` as the formula's parameters."""
        other = self.copy()
        other.loss, other.parameters, other.group_axes = loss, tuple(arrays), 0
        given = [self.as_array(name, x) for name, x in arrays.items()]
        other.names, other.arrays = (*self.names, *arrays), [*self.arrays, *given]
        return other

    @property
    def excludes(self) -> bool:
        """Whether a mask or an ignored target value excludes elements."""
        return "mask" in self.names or "ignore_index" in self.numbers

    def count(self) -> Any:
        """Return the number that the reduction divides by: one number, or an array with one for each group."""
        if self.must_count:
            return self.narrowed(*self.counted).run(COUNT, (), [])[0]
        if self.reduction == "mean":
            return math.prod(self.entries)
        if self.reduction == "sample_mean":
            return math.prod(self.entries[1:])
        return self.shape[0] if self.reduction == "batchmean" else 1
