"""The backend for CuPy arrays, on a GPU."""

from __future__ import annotations

from typing import Any

import cupy

from fastloss.backends.protocol import ArrayBackend
from fastloss.core.dtypes import float_of
from fastloss.cuda.call import DeviceCall


class CupyBackend(ArrayBackend):
    """The backend for CuPy arrays."""

    call = DeviceCall

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape and dtype, or float32 for integers, by broadcasting a single element."""
        zero = cupy.zeros((), float_of(target.dtype))
        return cupy.broadcast_to(zero, target.shape)


BACKEND = CupyBackend()
