"""`DeviceCall`: a call of CuPy's arrays. The host never waits: whatever depends on an element stays on the device."""

from __future__ import annotations

import functools
import math
from typing import Any

import cupy
import numpy as np

from fastloss.core.call import Call
from fastloss.core.checks import describe_bad_element, warn_of_empty_mean
from fastloss.core.dtypes import code_of
from fastloss.core.overlap import share_memory, span_of
from fastloss.core.plan import Request
from fastloss.cuda import workspace
from fastloss.cuda.launch import LAUNCHES, Launch, Outcome


class DeviceCall(Call):
    """One call's arrays and options on the current device, and the launches on its current stream that are made for it."""

    __slots__ = ()
    value_dtype: Any = np.float64  # of reduced values

    @staticmethod
    def as_array(name: str, value: Any) -> Any:
        """Return the caller's array; numbers and lists become one."""
        if not isinstance(value, cupy.ndarray):
            if isinstance(value, (int, float, np.generic)) or (isinstance(value, np.ndarray) and not value.ndim):
                number = np.asarray(value)
                return cupy.full((), number[()], number.dtype)  # by a kernel, without a copy
            if not isinstance(value, (list, tuple)):
                found = f"{type(value).__module__}.{type(value).__qualname__}"
                raise TypeError(f"{name} is a {found}, and the input a cupy.ndarray; accepted: cupy.ndarray (cupy.asarray makes one)")
            return cupy.asarray(value)
        check_device(name, value)
        return value

    @staticmethod
    def is_number(value: Any) -> bool:
        """Whether an option is a number of the host; one of the device is an array, which the host does not wait for."""
        return isinstance(value, (int, float)) or (not isinstance(value, cupy.ndarray) and np.ndim(value) == 0)

    @staticmethod
    def check_buffer(name: str, out: Any) -> None:
        """Refuse what cannot be written to."""
        if not isinstance(out, cupy.ndarray):
            raise TypeError(f"{name} must be a cupy.ndarray, as the input is, not {type(out).__name__}")
        check_device(name, out)

    @staticmethod
    def address_of(array: Any) -> int:
        """Return the address of an array's first element."""
        return int(array.data.ptr)

    @staticmethod
    def empty_like(array: Any) -> Any:
        """Allocate an output with the shape, dtype and memory order of an array."""
        return cupy.empty_like(array)

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array for a value."""
        return cupy.ndarray(shape, dtype)

    @staticmethod
    def as_upstream(array: Any) -> Any:
        """Return what gradients are multiplied by: kernels read any dtype."""
        return array

    @staticmethod
    def warn_of_empty_mean(counted: Any) -> None:
        """Warn where a mean is of no element, as far as the host knows."""
        if not isinstance(counted, cupy.ndarray) and not np.all(counted):
            warn_of_empty_mean()

    def compute(self) -> tuple[Any, list[Any]]:
        """Compute what the arguments ask for: the reduced value or None, and the arrays that are wanted."""
        summed, wanted = self.arguments.summed, self.arguments.wanted
        is_mean = self.must_count and not wanted  # gradients have to know the count beforehand
        counted = 1 if is_mean else self.count()
        outputs = self.make_outputs(wanted)
        value = self.empty(self.shape[: self.group_axes], self.value_dtype) if summed else None
        self.launch((*summed, "count") if is_mean else summed, wanted, outputs, value, counted, is_mean, self.validate)
        if summed:
            self.warn_of_empty_mean(counted)
        return value, outputs

    def run(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Any], scale: Any = 1.0, validate: bool = False
    ) -> Any:  # fmt: skip
        """Make one pass; return the sums, as arrays on the device."""
        sums = cupy.ndarray((len(summed), *self.shape[: self.group_axes]), np.float64) if summed else None
        self.launch(summed, wanted, outputs, sums, 1, False, validate)
        return sums

    def launch(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Any], results: Any, counted: Any, is_mean: bool,
        validate: bool
    ) -> None:  # fmt: skip
        """Launch one pass, which divides sums and gradients by what is counted."""
        upstream: Any
        upstream, has_counts = self.upstream if wanted else 1.0, isinstance(counted, cupy.ndarray)
        if (
            self.out is not None
            and isinstance(upstream, cupy.ndarray)
            and any(share_memory(span_of(upstream, upstream.data.ptr), span_of(out, out.data.ptr)) for out in outputs)
        ):
            upstream = upstream.copy()  # it is read while they are written
        is_array = isinstance(upstream, cupy.ndarray)
        outcome = Outcome(code_of(results.dtype) if summed else "f8", is_mean, code_of(upstream.dtype) if is_array else "", has_counts)
        arrays = self.arrays + outputs
        launch = find_launch(outcome, *self.request(summed, wanted, arrays, validate))
        if not launch.plan.size:
            if summed:
                results.fill(0.0 / counted if not (is_mean or has_counts) and counted else math.nan)
            return
        addresses = [self.address_of(a) for a in arrays]
        if self.out is not None and wanted:
            launch.plan.check_overlap(arrays, addresses)
        if launch.request.checked:
            raise_recorded()
        launch.run(
            addresses,
            self.numbers.values(),
            results.data.ptr if summed else 0,
            1.0 if is_array else upstream,
            1.0 if has_counts else counted,
            (upstream.data.ptr, upstream.strides[0] if upstream.ndim else 0) if is_array else (0, 0),
            counted.data.ptr if has_counts else 0,
            counted,
        )


@functools.lru_cache(maxsize=1024)
def find_launch(outcome: Outcome, *request: Any) -> Launch:
    """Return what runs a request, given by its fields."""
    return Launch(Request(*request), outcome)


def check_device(name: str, array: Any) -> None:
    """Refuse arrays on another device than the current one."""
    here, there = workspace.current_device(), array.data.device_id
    if here != there:
        raise ValueError(
            f"{name} is on CUDA device {there}, and the current device is {here}; accepted: arrays on the current device "
            f"(with cupy.cuda.Device({there}): ...)"
        )


def raise_recorded() -> None:
    """Raise the error of a bad element, if a launch that has ended found one."""
    if (record := workspace.take_record()) is None:
        return
    launch = LAUNCHES.get(record.launch)
    if launch is None:
        raise ValueError("an earlier call with validate has found an element outside [0, 1]")
    name, index = launch.bad_element(record.key)
    dtype = launch.request.layouts[launch.request.operands.index(name)][0]
    message = describe_bad_element(name, index, as_stored(record.found, dtype), "target_scale" in launch.request.numbers)
    raise ValueError(f"{message} (found on the GPU, by an earlier call)")


def as_stored(found: float, dtype: np.dtype[Any]) -> Any:
    """Return a number as it is stored; integers beyond 2**53 were rounded on their way."""
    if dtype.kind not in "iu":
        return dtype.type(found)
    return dtype.type(min(max(int(found), np.iinfo(dtype).min), np.iinfo(dtype).max))


def raise_deferred() -> None:
    """Wait for the current device, and raise the error of a bad element, if there was one."""
    cupy.cuda.runtime.deviceSynchronize()
    raise_recorded()
