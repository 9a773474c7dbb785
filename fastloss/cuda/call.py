"""`DeviceCall`: a call with CuPy arrays, computed on a GPU. All results stay on the device, so the host never waits for it."""

from __future__ import annotations

import functools
import math
from typing import Any

import cupy
import numpy as np

from fastloss.core.call import Call
from fastloss.core.checks import describe_bad_class, describe_bad_element, warn_of_empty_mean
from fastloss.core.dtypes import code_of
from fastloss.core.overlap import share_memory, span_of
from fastloss.core.plan import SUMS_BY_CLASS, Request
from fastloss.cuda import workspace
from fastloss.cuda.launch import LAUNCHES, Launch, Outcome

OUT = ("out",)


class DeviceCall(Call):
    """One call with CuPy arrays on the current device, and its launches on the current stream."""

    __slots__ = ()
    kind = cupy.ndarray

    @staticmethod
    def as_array(name: str, value: Any) -> Any:
        """Return the caller's array without a copy; convert a number or a list to an array on the device."""
        if not isinstance(value, cupy.ndarray):
            if isinstance(value, (int, float, np.generic)) or (isinstance(value, np.ndarray) and not value.ndim):
                number = np.asarray(value)
                return cupy.full((), number[()], number.dtype)  # filled by a kernel, without a copy from the host
            if not isinstance(value, (list, tuple)):
                found = f"{type(value).__module__}.{type(value).__qualname__}"
                raise TypeError(f"{name} is a {found}, but the input is a cupy.ndarray; accepted: cupy.ndarray (use cupy.asarray)")
            return cupy.asarray(value)
        return value

    @staticmethod
    def is_number(value: Any) -> bool:
        """Whether an option is a number on the host. A number on the device counts as an array, because reading it would wait."""
        return isinstance(value, (int, float)) or (not isinstance(value, cupy.ndarray) and np.ndim(value) == 0)

    @staticmethod
    def check_buffer(name: str, out: Any) -> None:
        """Raise TypeError if a buffer is not a CuPy array."""
        if not isinstance(out, cupy.ndarray):
            raise TypeError(f"{name} must be a cupy.ndarray like the input, not {type(out).__name__}")

    @staticmethod
    def address_of(array: Any) -> int:
        """Return the address of an array's first element."""
        return int(array.data.ptr)

    @staticmethod
    def to_host(array: Any) -> Any:
        """Wait for an array of results, and return it as a NumPy array."""
        return array.get() if isinstance(array, cupy.ndarray) else array

    @staticmethod
    def empty_like(array: Any) -> Any:
        """Allocate an output with the shape, dtype and memory order of an array."""
        if array.flags.c_contiguous:  # which takes a third of the time
            return cupy.ndarray(array.shape, array.dtype)
        return cupy.empty_like(array)

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate an array for the reduced value."""
        return cupy.ndarray(shape, dtype)

    @staticmethod
    def as_upstream(array: Any) -> Any:
        """Return the upstream gradient unchanged, because kernels read any dtype."""
        return array

    @staticmethod
    def warn_of_empty_mean(counted: Any) -> None:
        """Warn if a mean divides by 0. A count that only the device knows is not checked."""
        if not isinstance(counted, cupy.ndarray) and not counted:
            warn_of_empty_mean()

    def compute(self) -> tuple[Any, list[Any]]:
        """Compute the requested quantities: return the reduced value or None, and the written arrays."""
        summed, wanted = self.arguments.summed, self.arguments.wanted
        must_count = self.must_count and not (self.loss.classes and wanted)  # class weights are added up by a pass of their own
        divisor = 1 if must_count else self.count()
        outputs = self.make_outputs(wanted)
        value = self.empty(self.shape[: self.group_axes], self.value_dtype) if summed else None
        self.launch(summed, wanted, outputs, value, divisor, must_count, self.validate)
        if summed:
            self.warn_of_empty_mean(divisor)
        return value, outputs

    def run(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Any], scale: Any = 1.0, validate: bool = False
    ) -> Any:  # fmt: skip
        """Make one pass over memory and return the sums, each as an array on the device."""
        groups = self.shape[: self.group_axes]
        names = [name for name in summed if self.loss.classes and name in SUMS_BY_CLASS]
        others = [name for name in summed if name not in names]
        sums: Any = cupy.ndarray((len(others), *groups), np.float64) if others else None
        by_class: Any = cupy.ndarray((len(names), *groups, self.shape[-1]), np.float64) if names else None
        self.launch(summed, wanted, outputs, sums, 1, must_count=False, validate=validate, by_class=by_class)
        return [by_class[names.index(name)] if name in names else sums[others.index(name)] for name in summed]

    def launch(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Any], results: Any, divisor: Any, must_count: bool,
        validate: bool, by_class: Any = None
    ) -> None:  # fmt: skip
        """Launch one pass, which writes the outputs and the results, and those that have a number for each class.

        Sums and gradients are divided by a number, by an array with a number for each group, or if `must_count` is true by the number of
        elements that count.
        """
        upstream: Any = self.upstream if wanted else 1.0
        is_mean, counts = must_count and not wanted, must_count and bool(wanted)  # a gradient needs the count before its first element
        if is_mean:
            summed = (*summed, "count")
        if (
            self.out is not None
            and isinstance(upstream, cupy.ndarray)
            and any(share_memory(span_of(upstream, upstream.data.ptr), span_of(out, out.data.ptr)) for out in outputs)
        ):
            upstream = upstream.copy()  # the kernel reads it while it writes the outputs
        is_array, divides = isinstance(upstream, cupy.ndarray), isinstance(divisor, cupy.ndarray)
        result = "f8" if results is None else code_of(results.dtype)
        outcome = Outcome(result, is_mean, code_of(upstream.dtype) if is_array else "", counts, divides)
        arrays, device = self.arrays + outputs, workspace.current_device()
        for name, array in zip((*self.names, *OUT * len(outputs)), arrays, strict=True):
            check_device(name, array, device)
        if is_array:
            check_device("grad_output", upstream, device)
        launch = find_launch(outcome, *self.request(summed, wanted, arrays, validate))
        if not launch.plan.size:
            for array in (results, by_class):
                if array is not None:
                    array.fill(math.nan if must_count or divides or not divisor else 0.0 / divisor)
            return
        addresses = [a.data.ptr for a in arrays]
        if self.out is not None and wanted:
            launch.plan.check_overlap(arrays, addresses)
        if launch.request.checked:
            raise_recorded()
        partials: Any = None if by_class is None else cupy.ndarray((launch.ranges, *by_class.shape[:1], self.shape[-1]), np.float64)
        launch.run(
            device,
            addresses,
            self.numbers.values(),
            0 if results is None else results.data.ptr,
            1.0 if is_array else upstream,
            1.0 if divides else divisor,
            (upstream.data.ptr, upstream.strides[0] if upstream.ndim else 0) if is_array else (0, 0),
            divisor.data.ptr if divides else 0,
            () if by_class is None else (by_class.data.ptr, partials.data.ptr),
        )


@functools.lru_cache(maxsize=1024)
def find_launch(outcome: Outcome, *request: Any) -> Launch:
    """Return the launch for an outcome and the fields of a `Request`."""
    return Launch(Request(*request), outcome)


def check_device(name: str, array: Any, current: int) -> None:
    """Raise ValueError if an array is not on the current device."""
    if (device := array.data.device_id) != current:
        raise ValueError(
            f"{name} is on CUDA device {device}, but the current device is {current}; accepted: arrays on the current device "
            f"(with cupy.cuda.Device({device}): ...)"
        )


def raise_recorded() -> None:
    """Raise ValueError if a finished launch has recorded an element outside [0, 1], or a class index that no class has."""
    if (record := workspace.take_record()) is None:
        return
    launch = LAUNCHES.get(record.launch)
    if launch is None:
        raise ValueError("an earlier call found an element outside [0, 1], or a class index that no class has")
    raise ValueError(f"{describe_bad(launch, record)} (found on the GPU, by an earlier call)")


def describe_bad(launch: Launch, record: workspace.Record) -> str:
    """Compose the error message for the element that a launch has recorded."""
    request = launch.request
    name, index = launch.bad_element(record.key)
    found = as_stored(record.found, request.layouts[request.operands.index(name)][0])
    if not request.classes:
        return describe_bad_element(name, index, found, "target_scale" in request.numbers)
    hint = ", and ignore_index" if "ignore_index" in request.numbers else ""  # whose value the launch does not know
    return describe_bad_class(index[:-1], found, request.shape[-1], None) + hint


def as_stored(found: float, dtype: np.dtype[Any]) -> Any:
    """Convert a recorded number back to the array's dtype. Integers beyond 2**53 were rounded, and are clipped to the dtype's range."""
    if dtype.kind not in "iu":
        return dtype.type(found)
    return dtype.type(min(max(int(found), np.iinfo(dtype).min), np.iinfo(dtype).max))


def raise_deferred() -> None:
    """Wait for the current device, and raise ValueError if a launch has recorded a bad element, as in `raise_recorded`."""
    cupy.cuda.runtime.deviceSynchronize()
    raise_recorded()
