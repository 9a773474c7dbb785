"""The autograd function of a loss of a linear layer, whose gradients are computed in the forward pass; see `fastloss/layer.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastloss.backends.torch.autograd import times_upstream

Compute = Callable[..., tuple[Any, tuple[Any, ...]]]  # returns the value and the wanted gradients


class LayerFunction(torch.autograd.Function):
    """The value of a loss of a linear layer, as a function of input, weight and bias."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, has_samples: bool, *tensors: Any) -> Any:
        """Compute the value and the gradients; only the value if there is one for each sample, whose upstream gradients differ."""
        ctx.compute, ctx.has_samples, ctx.wanted = compute, has_samples, ctx.needs_input_grad[2:]
        value, gradients = compute(wanted=(False,) * 3 if has_samples else ctx.wanted)
        if not has_samples:
            ctx.compute = None
            ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the gradients, multiplied by the upstream gradient."""
        if torch.is_grad_enabled():  # `create_graph=True`
            raise NotImplementedError("fastloss.linear has no second derivatives; accepted: the layer and the loss one after the other")
        if ctx.has_samples:
            return None, None, *ctx.compute(wanted=ctx.wanted, grad_output=upstream)[1]
        return None, None, *(None if x is None else times_upstream(x, upstream, 1.0) for x in ctx.saved_tensors)
