"""NumPy's arrays, and everything that `numpy.asarray` makes one of, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.backends.protocol import ArrayBackend
from fastloss.core.dtypes import is_float
from fastloss.cpu.call import HostCall


class NumpyBackend(ArrayBackend):
    """NumPy."""

    call = HostCall

    def unread_input(self, target: Any) -> Any:
        """Make an input of the target's shape that occupies one element: of the target's dtype, or float32 for integers."""
        t = self.as_array("target", target)
        return np.broadcast_to(np.zeros((), t.dtype if is_float(t.dtype) else np.float32), t.shape)


BACKEND = NumpyBackend()
