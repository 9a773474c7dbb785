"""Run calls of losses with NumPy arrays on a device and return NumPy arrays, so that the CPU's tests run there too.

Arrays that share memory on the host share it on the device, at the same distances and with the same alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

import fastloss as fl
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.loss import TargetLoss
from fastloss.losses.vae import VAELoss

METHODS = ("__call__", "grad", "value_and_grad", "curvature")


class Carrier:
    """Carries calls to the device and counts them."""

    def __init__(self, cp: Any) -> None:
        self.cp, self.calls, self.is_away = cp, 0, False

    def carry(self, method: Any) -> Any:
        """Wrap a loss's method so that it computes on the device."""

        @functools.wraps(method)
        def carried(loss: Any, *args: Any, **options: Any) -> Any:
            if self.is_away:  # one loss calls another
                return method(loss, *args, **options)
            trip = Trip(self.cp, [*args, *options.values()])
            self.calls, self.is_away = self.calls + 1, True
            try:
                result = method(loss, *map(trip.there, args), **{name: trip.there(x) for name, x in options.items()})
                if options.get("validate") or has_classes(loss):  # whose indices are always checked
                    fl.raise_deferred()
            finally:
                self.is_away = False
            return trip.back(result)

        return carried


def has_classes(loss: Any) -> bool:
    """Whether a loss's targets are class indices."""
    return isinstance(loss, AbstractLoss) and loss.definitions[0].classes


def methods() -> Iterator[tuple[type, str]]:
    """Yield every method that takes arrays, as a class of losses and a name."""
    classes: list[type] = [AbstractLoss, TargetLoss, VAELoss]
    for kind in classes:
        classes += kind.__subclasses__()
        yield from ((kind, name) for name in METHODS if name in vars(kind))


class Trip:
    """The arrays of one call, on the host and on the device."""

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
        """Copy bytes to the device or back."""
        runtime = self.cp.cuda.runtime
        first, second, way = (there, here, 1) if to_device else (here, there, 2)  # 1: cudaMemcpyHostToDevice, 2: cudaMemcpyDeviceToHost
        runtime.memcpy(first, second, size, way)

    def there(self, x: Any) -> Any:
        """Return an argument with its arrays on the device."""
        if isinstance(x, tuple) or (isinstance(x, list) and any(isinstance(item, np.ndarray) for item in x)):
            return type(x)(map(self.there, x))
        if not isinstance(x, np.ndarray):
            return x
        if not x.size:
            return self.cp.empty(x.shape, x.dtype)
        address = x.ctypes.data
        start, _, memory = next(block for block in self.blocks if block[0] <= address < block[1])
        made = self.cp.ndarray(x.shape, x.dtype, memory + (address - start), x.strides)
        self.pairs.append((x, made))
        return made

    def back(self, result: Any) -> Any:
        """Copy a result to the host. For a buffer of the caller, return the buffer."""
        if isinstance(result, tuple):
            items = tuple(map(self.back, result))
            return type(result)(*items) if hasattr(result, "_fields") else items
        if not isinstance(result, self.cp.ndarray):
            return result
        for x, made in self.pairs:
            if (made.data.ptr, made.shape, made.dtype) == (result.data.ptr, result.shape, result.dtype):  # a view of it, for some losses
                x[...] = result.get()
                return x
        host = result.get()
        return host[()] if host.ndim == 0 and host.dtype == np.float64 else host


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges of memory that overlap."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if joined and low < joined[-1][1]:
            low, last = joined[-1][0], joined.pop()[1]
            high = max(high, last)
        joined.append((low, high))
    return joined
