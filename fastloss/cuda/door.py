"""The door for CuPy's arrays, which `fastloss.loss.find_door` finds by their type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cupy
import numpy as np

from fastloss.cuda.call import DeviceCall
from fastloss.plan import is_float

CALL = DeviceCall  # the kind of call that takes these arrays


def run(
    loss: Any,
    summed: tuple[str, ...],
    wanted: tuple[str, ...],
    first: Any,
    second: Any,
    weight: Any,
    reduction: str,
    options: dict[str, Any],
) -> Any:
    """Return the reduced value, if it is summed, and the arrays that are wanted."""
    return loss._compute(summed, wanted, first, second, weight, reduction, options, CALL)


def through_arrays(method: Callable[..., Any], operands: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Call a method that takes arrays of any kind."""
    return method(**operands, **options, call=CALL)


def unread_like(target: Any) -> Any:
    """Return an input for a loss of the target alone, which does not read it: one element, of the target's shape."""
    zero = cupy.zeros((), target.dtype if is_float(target.dtype) else np.float32)
    return cupy.broadcast_to(zero, target.shape)
