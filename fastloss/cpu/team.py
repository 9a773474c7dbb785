"""The OpenMP team of threads that PyTorch uses, on which kernels run too where PyTorch is loaded.

PyTorch's threads stay awake for some milliseconds after each of its operators. Threads of a pool of our own would have to wake
first, and compete with them for the cores.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

ENTRY = "GOMP_parallel"  # in libgomp, and in libomp and libiomp5 on Linux: calls a function of one argument on each thread of a team


class Team:
    """The team of an OpenMP runtime. Each Python thread that enters has a team of its own."""

    def __init__(self, parallel: Callable[[Any, Any, int, int], object], limit: Callable[[], int]) -> None:
        self._parallel, self.limit = parallel, limit  # `limit` returns how many threads PyTorch is set to use

    def run(self, kernel: Any, frame: Any, threads: int) -> None:
        """Call `kernel(frame)` on so many threads; return when all have."""
        self._parallel(kernel, frame, threads, 0)


def find_team() -> Team | None:
    """Return the team of the OpenMP runtime that PyTorch has loaded; None if PyTorch is not loaded, or was built without OpenMP.

    The runtime is looked for among the loaded libraries as the dynamic linker does for PyTorch: first among the global ones, with
    those of LD_PRELOAD, and then among those that PyTorch was linked to. No library is loaded.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.backends.openmp.is_available():
        return None
    for name in (None, torch._C.__file__):
        parallel = getattr(ctypes.CDLL(name), ENTRY, None)
        if parallel is not None:
            parallel.restype = None
            return Team(parallel, torch.get_num_threads)
    return None
