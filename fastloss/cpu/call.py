"""`HostCall`: a call with NumPy arrays, computed on the CPU.

Launches are cached by request, so that a call with small arrays takes microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from typing import Any

import numpy as np

from fastloss.core.call import Call
from fastloss.core.checks import WRITTEN, describe_bad_class, describe_bad_element, warn_of_empty_mean
from fastloss.core.plan import Array, Request, make_plan
from fastloss.cpu import memory
from fastloss.kernel.builds import built

SEARCHED = 1 << 20  # elements in a part of the batch, when searching for the first element outside [0, 1]
_JAX = "numpy.ndarray; pass numpy.from_dlpack({name}), and inside jax.jit call the loss through jax.pure_callback"
FOREIGN = {  # packages whose arrays NumPy would convert slowly or incorrectly: what is accepted instead, and how to convert {name}
    "torch": "numpy.ndarray, or torch.Tensor if the input is one; pass {name}.numpy(force=True), or every array as a tensor",
    "cupy": "numpy.ndarray, or cupy.ndarray if the input is one; pass cupy.asnumpy({name}), or every array through cupy.asarray",
    "jax": _JAX,
    "jaxlib": _JAX,
    "dask": "numpy.ndarray, or dask.array.Array if the input is one; pass {name}.compute(), or every array through dask.array.asarray",
    "tensorflow": "numpy.ndarray; pass {name}.numpy(), and inside tf.function call the loss through tf.numpy_function",
}

# An array's data pointer is the first field after the object header (NumPy's C API, PyArrayObject). Reading that field takes
# 0.15 us; `array.ctypes.data` makes an object and takes 0.9 us.
POINTER_AT = object.__basicsize__
read_pointer = ctypes.c_size_t.from_address


class HostCall(Call):
    """One call with NumPy arrays, and the passes that it makes over them."""

    __slots__ = ()
    kind = np.ndarray

    @staticmethod
    def as_array(name: str, value: Any) -> Array:
        """Return the caller's array without a copy; convert a number or a list to an array."""
        if type(value) is np.ndarray:
            return value
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array, whose mask would be lost; pass {name}.data, and mask=~{name}.mask")
        if accepted := FOREIGN.get(type(value).__module__.partition(".")[0]):
            raise TypeError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}; accepted: {accepted.format(name=name)}")
        return np.asarray(value)

    @staticmethod
    def is_number(value: Any) -> bool:
        """Whether an option is a single number, not an array or a list."""
        return isinstance(value, (int, float)) or np.ndim(value) == 0

    @staticmethod
    def check_buffer(name: str, out: Any) -> None:
        """Raise TypeError or ValueError if a buffer is not a plain, writable NumPy array."""
        if type(out) is not np.ndarray and (not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray)):
            raise TypeError(f"{name} must be a numpy.ndarray, not {type(out).__name__}")
        if not out.flags.writeable:
            raise ValueError(f"{name} is read-only")

    @staticmethod
    def address_of(array: Any) -> int:
        """Return the address of an array's first element."""
        return read_pointer(id(array) + POINTER_AT).value

    @staticmethod
    def empty_like(array: Any) -> Any:
        """Allocate an output with the shape, dtype and memory order of an array."""
        return memory.empty_like(array)

    @classmethod
    def scratch_like(cls, array: Any) -> Any:
        """Allocate memory that no caller sees from the cache of freed memory, whatever its size: `malloc` may return it to the system."""
        return memory.empty(array.shape, array.dtype, array.strides) if array.nbytes >= mmap.PAGESIZE and memory.CAN_FREE else array

    @staticmethod
    def as_upstream(array: Any) -> Any:
        """Convert an upstream gradient with one number for each group to float64."""
        return array.astype(np.float64)

    @staticmethod
    def warn_of_empty_mean(counted: Any) -> None:
        """Warn if a mean divides by 0."""
        if not (counted.all() if isinstance(counted, np.ndarray) else counted):
            warn_of_empty_mean()

    def compute(self) -> tuple[Any, list[Array]]:
        """Compute the requested quantities: return the reduced value or None, and the written arrays."""
        summed, wanted = self.arguments.summed, self.arguments.wanted
        validate = self.validate
        if validate and self.out is not None:
            self.check_elements()  # a pass of its own before any output is written, so that an error leaves the caller's buffer unchanged
            validate = False
        counting = self.must_count and not wanted  # a gradient is divided by the count, which must then be known before the pass
        counted = 1 if counting else self.count()
        scale = self.scale(counted) if wanted else 1.0
        outputs = self.make_outputs(wanted)
        sums = self.run((*summed, "count") if counting else summed, wanted, outputs, scale, validate)
        if counting:
            counted = sums[1]
        return (self.reduce(sums[0], counted) if summed else None), outputs

    def run(
        self, summed: tuple[str, ...], wanted: tuple[str, ...], outputs: list[Array], scale: Any = 1.0, validate: bool = False
    ) -> Any:  # fmt: skip
        """Make one pass over memory and return the sums: each a number, or an array with one number for each group."""
        arrays = self.arrays + outputs
        launch = find_launch(*self.request(summed, wanted, arrays, validate))
        addresses = [read_pointer(id(array) + POINTER_AT).value for array in arrays]
        if self.out is not None:
            launch.plan.check_overlap(arrays, addresses)
        sums, bad = launch.run(addresses, self.numbers.values(), scale)
        if bad:
            self.refuse_bad_element(launch.plan.spec.checked, has_written=self.out is not None and bool(outputs))
        return sums

    def scale(self, counted: Any) -> Any:
        """Return the factor of the gradients: one number, or an array with one for each group."""
        if not self.group_axes:
            return self.upstream / counted if counted else math.nan  # if no element counts, every gradient is 0 whatever the factor is
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(np.broadcast_to(np.divide(self.upstream, counted), self.shape[:1]))

    def reduce(self, total: Any, counted: Any) -> Any:
        """Divide a sum by the number that the reduction divides by, which may be different for each group."""
        if not self.group_axes and counted:
            return np.float64(total / counted)
        if self.reduction == "sample_sum":
            return total.copy()
        self.warn_of_empty_mean(counted)
        with np.errstate(all="ignore"):
            return np.divide(total, counted)

    def check_elements(self) -> None:
        """Make a pass that writes no array, and raise ValueError if an element is outside [0, 1]."""
        needed = (*self.loss.probabilities, "target", "mask", "ignore_index", "target_scale")
        self.narrowed(*needed).run((), (), [], validate=True)

    def refuse_bad_element(self, checked: tuple[str, ...], has_written: bool) -> None:
        """Find the first element outside [0, 1], searching one part of the batch at a time, and raise the error that names it."""
        arrays = [array[..., 0] if self.loss.classes and array.ndim else array for array in self.arrays]
        shape = self.entries or (1,)
        named = {name: np.broadcast_to(x, self.entries).reshape(shape) for name, x in zip(self.names, arrays, strict=True)}
        entries = max(1, SEARCHED * shape[0] // named["target"].size)
        for first in range(0, shape[0], entries):
            part = {name: array[first : first + entries] for name, array in named.items()}
            for name in checked:
                if (bad := self.find_bad(name, part)).any():
                    where = np.unravel_index(np.argmax(bad), bad.shape)
                    index = (int(where[0]) + first, *map(int, where[1:]))[: len(self.entries)]
                    if self.loss.classes:
                        message = describe_bad_class(index, part[name][where], self.shape[-1], self.numbers.get("ignore_index"))
                    else:
                        message = describe_bad_element(name, index, part[name][where], "target_scale" in self.numbers)
                    raise ValueError(message + WRITTEN * has_written)
        raise ValueError("a target is outside [0, 1] by a rounding error of the arithmetic; accepted: targets in [0, 1]")

    def find_bad(self, name: str, part: dict[str, Array]) -> Any:
        """Return a bool array of the elements of a part of the batch that count and lie outside [0, 1]."""
        x = part[name] * self.numbers.get("target_scale", 1.0) if name == "target" else part[name]
        most = self.shape[-1] - 1 if self.loss.classes else 1
        bad = ~((x >= 0) & (x <= most)) & part.get("mask", np.True_)
        if "ignore_index" in self.numbers:
            bad &= part["target"] != self.numbers["ignore_index"]
        return bad


@functools.lru_cache(maxsize=1024)
def find_launch(*request: Any) -> Any:
    """Return the launch for the fields of a `Request`: its plan with the compiled kernel."""
    plan = make_plan(Request(*request), in_lanes=True)
    launch, empty_launch = built("launch", import_launches)
    return launch(plan) if plan.size else empty_launch(plan)


def import_launches() -> tuple[Any, Any]:
    """Import the kinds of launches, and with them llvmlite."""
    from fastloss.cpu.launch import EmptyLaunch, Launch

    return Launch, EmptyLaunch
