"""The backend for CuPy arrays, on a GPU."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from fastloss.backends.protocol import ArrayBackend
from fastloss.core.dtypes import is_float
from fastloss.cuda.call import DeviceCall


class CupyBackend(ArrayBackend):
    """The backend for CuPy arrays."""

    call = DeviceCall

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape and dtype, or float32 for integers, by broadcasting a single element."""
        zero = cupy.zeros((), target.dtype if is_float(target.dtype) else np.float32)
        return cupy.broadcast_to(zero, target.shape)


BACKEND = CupyBackend()
