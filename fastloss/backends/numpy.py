"""The backend for NumPy arrays, and for everything that `numpy.asarray` converts to one, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.backends.protocol import ArrayBackend
from fastloss.core.dtypes import is_float
from fastloss.cpu.call import HostCall


class NumpyBackend(ArrayBackend):
    """The backend for NumPy arrays."""

    call = HostCall

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape and dtype, or float32 for integers, by broadcasting a single element."""
        t = self.as_array("target", target)
        return np.broadcast_to(np.zeros((), t.dtype if is_float(t.dtype) else np.float32), t.shape)


BACKEND = NumpyBackend()
