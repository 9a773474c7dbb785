"""The checks of all arguments that a caller may pass, and the error messages. No check reads an element of an array."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastloss.core.definition import entries_of, operand_of
from fastloss.core.dtypes import FLOATS, NAMES, is_float

REDUCTIONS = ("mean", "sum", "none", "batchmean", "sample_mean", "sample_sum")
SMALLEST, LARGEST = math.nextafter(0.0, 1.0), sys.float_info.max  # bounds of "positive" and "finite"
INTERNAL = ("fastloss", "torch")  # packages whose lines no warning names: torch.nn.Module calls a loss for its user
WRITTEN = " (the output has already been written)"  # ends the error of an element that is found while the output is written

ArrayInfo = tuple[str, np.dtype[Any], tuple[int, ...], tuple[int, ...]]  # name, dtype, shape, strides


# --- options ----------------------------------------------------------------------------------------------------------


def refuse_unknown(options: Iterable[str], accepted: tuple[str, ...]) -> None:
    """Raise TypeError for options that a loss does not have."""
    if unknown := sorted(name for name in options if name not in accepted):
        raise TypeError(f"unknown option {', '.join(unknown)}; accepted: {', '.join(accepted)}")


def refuse_grad_output(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an upstream gradient in a call that returns no gradient."""
    if options.get("grad_output") is not None:
        raise ValueError("grad_output scales a gradient, and the value alone has none: use grad or value_and_grad")


def check_reduction(reduction: Any, accepted: Sequence[str]) -> None:
    """Raise ValueError for a reduction that a loss does not have."""
    if not isinstance(reduction, str) or reduction not in accepted:
        problem = "not supported here" if isinstance(reduction, str) and reduction in REDUCTIONS else "unknown"
        shown = f"of type {type(reduction).__name__}" if hasattr(reduction, "__array__") else repr(reduction)  # an array may be large
        raise ValueError(f"reduction {shown} is {problem}; accepted: {', '.join(map(repr, accepted))}")


def is_none(reduction: Any) -> bool:
    """Whether a reduction is "none". A caller may have passed an array, which is not compared with a string element by element."""
    return isinstance(reduction, str) and reduction == "none"


def count_group_axes(reduction: Any, shape: tuple[int, ...]) -> int:
    """Return the number of group axes: leading axes along which a reduction has a value of its own for each entry."""
    check_reduction(reduction, REDUCTIONS)
    if reduction in ("mean", "sum", "none"):
        return 0
    if not shape:
        raise ValueError(f"reduction {reduction!r} needs a first axis, but the input has shape ()")
    return 0 if reduction == "batchmean" else 1


def check_grad_output(array: Any, shape: tuple[int, ...], reduction: str) -> None:
    """Raise an error for an upstream gradient that is neither a number nor an array of the loss's shape."""
    if array.ndim and array.shape != shape:
        raise ValueError(f"grad_output has shape {array.shape}; with reduction {reduction!r} the loss has shape {shape}")
    check_dtype("grad_output", array.dtype)


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError for an option that is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def to_validate(value: Any) -> bool:
    """Return whether to check elements. "defer" means True, and accepts that a GPU reports the error in a later call."""
    if value is None or (isinstance(value, str) and value == "defer"):
        return value is not None
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"validate is {value!r}; accepted: True, False, 'defer'")
    return bool(value)


def to_float(name: str, value: Any) -> float:
    """Convert an option to a float; raise an error if it is not a single number."""
    plain = isinstance(value, (int, float))
    if not plain and (isinstance(value, (str, bytes)) or np.ndim(value) != 0 or np.iscomplexobj(value)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} is too large for a float64") from None


def to_bounded(name: str, value: Any, bounds: tuple[float, float]) -> float:
    """Convert an option to a float; raise an error if it is not a single number within bounds."""
    number, (low, high) = to_float(name, value), bounds
    if not low <= number <= high:
        least = "more than 0" if low == SMALLEST else f"{low:g} or more" if low > -math.inf else "any number but NaN"
        least = f"{least}, and finite" if high == LARGEST else least
        accepted = least if high >= LARGEST else f"from {low:g} to {high:g}" if low > -math.inf else f"{high:g} or less"
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
    return number


def can_hold(dtype: np.dtype[Any], ignored: float) -> bool:
    """Whether a target of this dtype can equal `ignore_index`; if not, no element is ignored."""
    if math.isnan(ignored):
        raise ValueError("ignore_index is NaN, which equals nothing; pass mask=~numpy.isnan(target)")
    if is_float(dtype):
        return True
    if abs(ignored) > 2.0**53 or not ignored.is_integer():
        raise ValueError(f"ignore_index is {ignored!r}; accepted for {dtype} targets: whole numbers up to 2**53")
    if dtype.kind == "b":
        return ignored in (0.0, 1.0)
    return dtype.kind in "iu" and bool(np.iinfo(dtype).min <= ignored <= np.iinfo(dtype).max)


# --- arrays -----------------------------------------------------------------------------------------------------------


def check_arrays(
    arrays: Iterable[ArrayInfo], shape: tuple[int, ...], outputs: tuple[str, ...], is_scaled: bool, classes: bool = False
) -> None:
    """Raise an error for arrays that no kernel accepts, given the input's shape and whether `target_scale` was passed.

    `classes` is whether the last axis is that of classes, whose length is 1 in class indices and values.
    """
    arrays, entries = list(arrays), (*shape[:-1], 1) if classes else shape
    dtypes = {name: dtype for name, dtype, _, _ in arrays}
    for name, dtype, found, strides in arrays:
        if name in outputs:
            check_output("out", (dtype, found, strides), entries if name == "value" else shape, dtypes[operand_of(name)])
        else:
            check_dtype(name, dtype)
        if name == "target":
            check_target(shape if is_float(dtype) else entries, found)
    if is_scaled and is_float(dtypes["target"]):
        raise ValueError(f"target_scale multiplies integer targets, and target is {dtypes['target']}: scale it before the call")


def check_target(shape: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Raise ValueError if the target's shape is not the input's."""
    if found != shape:
        raise ValueError(
            f"input has shape {shape} and target {found}; they must be equal: a weight or a mask may broadcast, a target may not"
        )


def check_class_target(shape: tuple[int, ...], found: tuple[int, ...], has_fractions: bool, takes_probabilities: bool) -> None:
    """Raise an error if targets are neither class indices, one for each entry of an input (N, C, ...) or (C,), nor probabilities."""
    if not shape:
        raise ValueError("input has shape (); accepted: (N, C, ...) with C classes, or (C,)")
    wanted = entries_of(shape)
    accepted = f"class indices, of an integer dtype and shape {wanted}"
    if takes_probabilities:
        accepted += f"; probabilities, of a floating-point dtype and shape {tuple(shape)}"
        wanted = shape if has_fractions else wanted
    elif has_fractions:
        raise TypeError(f"target has a floating-point dtype; accepted: {accepted}")
    if tuple(found) != tuple(wanted):
        raise ValueError(f"input has shape {tuple(shape)} and target {tuple(found)}; accepted as targets: {accepted}")


def check_class_weight(shape: tuple[int, ...], classes: int) -> None:
    """Raise ValueError unless weights have one number for each class."""
    if tuple(shape) != (classes,):
        raise ValueError(
            f"weight has shape {tuple(shape)}; accepted: ({classes},), a weight for each class; pixel_weight is one for each entry"
        )


def check_broadcast(name: str, shape: tuple[int, ...], other: str, to: tuple[int, ...]) -> None:
    """Raise ValueError if an array does not broadcast to the shape of another."""
    missing = len(to) - len(shape)
    if missing < 0 or any(have not in (1, want) for have, want in zip(shape, to[missing:], strict=True)):
        raise ValueError(f"{name} has shape {tuple(shape)}, which does not broadcast to the {other}'s shape {tuple(to)}")


def check_shapes(name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> None:
    """Raise ValueError if two arrays have different shapes."""
    if shape != other_shape:
        raise ValueError(f"{name} has shape {tuple(shape)} and {other} {tuple(other_shape)}; they must be equal")


def check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    """Raise TypeError for a dtype that kernels do not read."""
    accepted = {"input": FLOATS, "mu": FLOATS, "logvar": FLOATS, "mask": ("bool",)}.get(name, NAMES)
    if dtype.name not in accepted:
        raise TypeError(f"{name} has dtype {dtype}; accepted: {', '.join(accepted)}")
    if not dtype.isnative:
        raise TypeError(f"{name} has non-native byte order ({dtype.str}); convert it with .astype({dtype.name!r})")


def check_output(
    name: str, found: tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]], wanted: tuple[int, ...], wanted_dtype: np.dtype[Any]
) -> None:
    """Raise ValueError if a buffer, given by its dtype, shape and strides, cannot hold the result."""
    dtype, shape, strides = found
    if shape != wanted or dtype != wanted_dtype:
        raise ValueError(f"{name} has shape {shape} and dtype {dtype}; the result has shape {wanted} and dtype {wanted_dtype}")
    refuse_shared_elements(name, shape, strides, dtype.itemsize)


def refuse_shared_elements(name: str, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> None:
    """Raise ValueError if elements of an array to write share memory. `size` is that of an element, in the unit of the strides."""
    reach = size
    for stride, length in sorted((abs(stride), length) for stride, length in zip(strides, shape, strict=True) if length > 1):
        if stride < reach and 0 not in shape:
            raise ValueError(f"several elements of {name} share memory: it is a broadcast view or a sliding window")
        reach += stride * (length - 1)


def to_buffers(out: Any, count: int, check: Callable[[str, Any], None]) -> tuple[Any, ...]:
    """Convert `out` to a tuple of `count` arrays and call `check` with each array and its name."""
    if not isinstance(out, (tuple, list)) or len(out) != count:
        raise TypeError(f"out must be {count} arrays, one for each gradient, not {type(out).__name__}")
    for k, buffer in enumerate(out):
        check(f"out[{k}]", buffer)
    return tuple(out)


# --- reports about elements ---------------------------------------------------------------------------------------------


def describe_bad_element(name: str, index: tuple[int, ...], found: Any, is_scaled: bool) -> str:
    """Compose the error message for an element outside [0, 1]."""
    hint = "; for images stored as whole numbers pass target_scale=1/255" if found.dtype.kind in "iu" and not is_scaled else ""
    logits = "; for logits use binary_cross_entropy_with_logits" if name == "input" else ""
    return f"{name}[{', '.join(map(str, index))}] is {found!s}; accepted: {name}s in [0, 1]{hint}{logits}"


def describe_bad_class(index: tuple[int, ...], found: Any, classes: int, ignored: float | None) -> str:
    """Compose the error message for a class index that no class has."""
    hint = "" if ignored is None else f", and ignore_index={ignored:g}"
    return f"target[{', '.join(map(str, index))}] is {found!s}; accepted: class indices from 0 to {classes - 1}{hint}"


def warn_of_empty_mean() -> None:
    """Warn that the mean of no elements is NaN; the warning names the line of the user's call."""
    warnings.warn("mean of no elements: the input is empty, or all of it is masked", RuntimeWarning, stacklevel=caller_level())


def caller_level() -> int:
    """Return the stack level, for `warnings.warn`, of the first caller outside this package and outside PyTorch's modules."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INTERNAL:
        level, frame = level + 1, frame.f_back
    return level
