"""Losses of the difference between an input `z` and a target `t`."""

from __future__ import annotations

from typing import Any

from fastloss.loss import elementwise_loss


@elementwise_loss
def mse_loss(z: Any, t: Any) -> Any:
    """Squared error between input and target.

    Per element:

        value     = (input - target)**2
        slope     = 2 (input - target)
        curvature = 2

    Args:
        input: any shape; float32 or float64.
        target: the same shape; float32, float64, bool, or integers (with `target_scale`).
        weight, reduction, mask, ignore_index, target_scale, grad_output, out, validate: as for every loss; see `fastloss.Loss`.

    Raises:
        ValueError: shapes differ, or an option is out of range.
        TypeError: a dtype is not accepted, or an option is unknown.

    Source: Legendre, "Nouvelles méthodes pour la détermination des orbites des comètes", 1805.
    """
    d = z - t
    return d * d, 2.0 * d, 2.0
