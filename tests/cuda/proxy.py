"""Losses that take NumPy's arrays, compute on a device, and hand NumPy's arrays back: so that every test can run there.

Arrays that share memory share it on the device, at the same distances and with the same alignment.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

import fastloss as fl


class OnDevice:
    """A loss whose methods are called with NumPy's arrays."""

    def __init__(self, loss: Any, cp: Any) -> None:
        self._loss, self._cp = loss, cp
        self.__name__, self.__signature__ = loss.__name__, loss.__signature__

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._carry(self._loss, args, options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._loss, name)
        if name not in ("grad", "value_and_grad", "curvature"):
            return method
        return lambda *args, **options: self._carry(method, args, options)

    def _carry(self, method: Any, args: Any, options: Any) -> Any:
        trip = Trip(self._cp, [*args, *options.values()])
        result = method(*map(trip.there, args), **{name: trip.there(x) for name, x in options.items()})
        if options.get("validate"):
            fl.raise_deferred()
        return trip.back(result)


class Trip:
    """The arrays of one call, on both sides."""

    def __init__(self, cp: Any, values: list[Any]) -> None:
        self.cp, self.pairs = cp, list[Any]()
        arrays = [x for value in values for x in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(x, np.ndarray)]
        self.blocks = []  # (first byte, bytes after the last, memory of the device)
        for low, high in merged([byte_bounds(x) for x in arrays if x.size]):
            start, stop = low - low % 64, high
            memory = cp.cuda.alloc(stop - start)
            self.copy(memory.ptr + low - start, low, high - low, to_device=True)
            self.blocks.append((start, stop, memory))

    def copy(self, there: int, here: int, size: int, to_device: bool) -> None:
        """Copy bytes."""
        runtime = self.cp.cuda.runtime
        first, second, way = (there, here, 1) if to_device else (here, there, 2)  # cudaMemcpyHostToDevice, DeviceToHost
        runtime.memcpy(first, second, size, way)

    def there(self, x: Any) -> Any:
        """Return an array on the device, anything else as it is."""
        if isinstance(x, tuple):
            return tuple(map(self.there, x))
        if not isinstance(x, (np.ndarray, np.generic)) or isinstance(x, (np.floating, np.integer)):
            return x
        x = np.asarray(x)
        if not x.size:
            return self.cp.empty(x.shape, x.dtype)
        address = x.ctypes.data
        start, _, memory = next(block for block in self.blocks if block[0] <= address < block[1])
        made = self.cp.ndarray(x.shape, x.dtype, memory + (address - start), x.strides)
        self.pairs.append((x, made))
        return made

    def back(self, result: Any) -> Any:
        """Return a result on the host; of what the caller gave to be written, that."""
        if isinstance(result, tuple):
            items = tuple(map(self.back, result))
            return type(result)(*items) if hasattr(result, "_fields") else items
        if not isinstance(result, self.cp.ndarray):
            return result
        for x, made in self.pairs:
            if made is result:
                x[...] = result.get()
                return x
        host = result.get()
        return host[()] if host.ndim == 0 and host.dtype == np.float64 else host


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join stretches of memory that meet."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if joined and low < joined[-1][1]:
            low, last = joined[-1][0], joined.pop()[1]
            high = max(high, last)
        joined.append((low, high))
    return joined


def losses() -> list[str]:
    """Return the names of what is called with arrays."""
    return [name for name in fl.__all__ if hasattr(getattr(fl, name), "__signature__") and callable(getattr(fl, name))]
