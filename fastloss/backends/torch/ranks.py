"""The loss of a batch whose samples lie on several processes, each of which calls the loss with its own.

Design: a) The value is that of the joined batch, on every process: processes add up the sums over their samples, a few numbers. b) The
gradient is that of the joined value, times the number of processes, because DistributedDataParallel averages the gradients of parameters
over processes, and the average has to be a sum. c) If the loss takes one pass, the numbers of elements cross the network before it, so
that it computes value and gradient together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.autograd.function import once_differentiable

from fastloss.backends.torch.autograd import WANTED, by_argument, times_upstream
from fastloss.backends.torch.bound_loss import VALUE, BoundLoss, machine_of
from fastloss.backends.torch.memory_views import HALVES, to_tensor
from fastloss.core.checks import check_reduction, warn_of_empty_mean
from fastloss.core.plan import Array


class JoinedLoss:
    """One call of a loss, as far as it is this process's."""

    def __init__(self, bound: BoundLoss, settings: Mapping[str, Any], group: Any) -> None:
        if not isinstance(group, distributed.ProcessGroup):
            found = f"process_group is a {type(group).__name__}"
            raise TypeError(f"{found}; accepted: a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD")
        check_reduction(bound.reduction, bound.loss.accumulated_reductions(settings))
        self.bound, self.settings, self.group = bound, settings, group
        self.processes = distributed.get_world_size(group)
        self.sums: dict[str, Array] = {}  # over all processes
        self.samples = 0  # of all processes

    def compute(self, wanted: tuple[str, ...], tensors: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Compute the value, and gradients for an upstream gradient of 1."""
        loss = self.bound.loss
        with machine_of(tensors[0], torch.float64) as call:
            arguments = self.bound.arguments(VALUE, wanted, tensors, self.settings)
            operands = arguments.first, arguments.second
            if len(loss.definitions) == 1:
                self.join(
                    {"count": call.to_host(loss.count(operands, {**arguments.options, "weight": arguments.weight}, call))}, tensors[0]
                )
                scaled = arguments._replace(options={**arguments.options, "grad_output": self.processes})
                value, slopes = loss.compute_part(scaled, call, self.divisor(), "sum")
                self.join({"value": call.to_host(value)}, tensors[0])
            else:
                options = {**arguments.options, "weight": arguments.weight}
                self.join(loss.host_sums(operands, options, call), tensors[0])
                slopes = self.slopes(wanted, tensors, 1.0) if wanted else []
        return self.value(tensors[0]), [x if isinstance(x, torch.Tensor) else to_tensor(x) for x in slopes]

    def slopes(self, wanted: tuple[str, ...], tensors: Sequence[Any], upstream: Any) -> list[Any]:
        """Compute gradients, given the sums of all processes."""
        with machine_of(tensors[0], torch.float64) as call:
            arguments = self.bound.arguments((), wanted, tensors, self.settings, grad_output=upstream * self.processes)
            return [to_tensor(x) for x in self.bound.loss.gradients_of_part(arguments, call, self.sums, self.samples)]

    def divisor(self) -> Any:
        """Return the number that the reduction divides by; warn if it is 0."""
        divisor = self.bound.loss.divisor_of_sums(self.sums, self.samples, self.bound.reduction)
        if not divisor:
            warn_of_empty_mean()
        return divisor

    def value(self, like: Any) -> Any:
        """Return the value as a tensor of the value's dtype."""
        with np.errstate(all="ignore"):
            value = self.bound.loss.value_of_sums(self.sums, self.samples, self.bound.reduction, self.settings)
        return torch.as_tensor(value).to(like.device, self.bound.dtype)

    def join(self, sums: Mapping[str, Any], first: Any) -> None:
        """Add up sums over the samples of every process, together with the number of samples."""
        own = {name: np.atleast_1d(x).sum(axis=0, dtype=np.float64).reshape(-1) for name, x in sums.items()}
        every = np.concatenate([[float(len(first)) if first.dim() else 1.0], *own.values()])
        total = add_over_processes(torch.from_numpy(every).to(first.device), self.group).cpu().numpy()
        self.samples = int(total[0])
        self.sums |= dict(zip(own, np.split(total[1:], np.cumsum([x.size for x in own.values()])[:-1]), strict=True))


class JoinedFunction(torch.autograd.Function):
    """The value of the joined batch, with gradients to the operands of this process."""

    @staticmethod
    def forward(ctx: Any, joined: JoinedLoss, *tensors: Any) -> Any:
        """Compute the value, and the gradients in the same pass unless the upstream gradient may hold a loss scale for 16 bits."""
        wanted = WANTED[ctx.needs_input_grad[1:3]]
        ctx.joined, ctx.wanted, ctx.is_early = joined, wanted, tensors[0].dtype not in HALVES and joined.bound.reduction != "none"
        value, slopes = joined.compute(wanted if ctx.is_early else (), tensors)
        ctx.save_for_backward(*(slopes if ctx.is_early else tensors))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Any) -> Any:
        """Return the gradients, multiplied by the upstream gradient."""
        saved = ctx.saved_tensors
        if ctx.is_early:
            grads = [times_upstream(slope, upstream, 1.0) for slope in saved]
        else:
            grads = ctx.joined.slopes(ctx.wanted, saved, upstream.double())
        return by_argument(ctx, ctx.wanted, grads)


def joined_value(bound: BoundLoss, tensors: Sequence[Any], settings: Mapping[str, Any], group: Any) -> Any:
    """Return the value of the joined batch, with autograd attached."""
    if tensors[1].requires_grad:
        bound.loss.require("target_slope")
    return JoinedFunction.apply(JoinedLoss(bound, settings, group), *tensors)


def add_over_processes(tensor: Any, group: Any) -> Any:
    """Add up a tensor over the processes of a group, in place, and return it."""
    distributed.all_reduce(tensor, group=group)
    return tensor
