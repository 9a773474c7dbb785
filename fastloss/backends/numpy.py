"""The backend for NumPy arrays, and for everything that `numpy.asarray` converts to one, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastloss.backends.protocol import ArrayBackend
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments, get_layout
from fastloss.core.checks import check_target
from fastloss.core.definition import operand_of
from fastloss.core.dtypes import float_of
from fastloss.core.plan import Array
from fastloss.cpu import memory
from fastloss.cpu.call import POINTER_AT, HostCall, read_pointer
from fastloss.cpu.prepared import MOST_PREPARED, PreparedPass, sort_options

UNPREPARED = ("grad_output",)  # options of calls for which no pass is prepared


class NumpyBackend(ArrayBackend):
    """The backend for NumPy arrays."""

    call = HostCall

    def __init__(self) -> None:
        # by everything of a call but the elements of arrays and the values of parameters; None for a call that takes other ways
        self.passes: dict[Any, PreparedPass | None] = {}

    def compute(self, loss: AbstractLoss, arguments: Arguments) -> tuple[Any, list[Array]]:
        """Compute the requested quantities, in a pass that is prepared in the first call with arguments of the same kinds."""
        summed, wanted, first, second, weight, reduction, options = arguments
        if type(first) is not np.ndarray or type(second) is not np.ndarray or type(reduction) is not str:
            return loss.compute(arguments, HostCall)
        out = options.get("out")
        if out is not None and (type(out) is not np.ndarray or not out.flags.writeable):
            return loss.compute(arguments, HostCall)
        form = None if out is None else get_layout(out)
        key: tuple[Any, ...] = loss, summed, wanted, reduction, get_layout(first), get_layout(second), form
        arrays: Sequence[Array] = (first, second)
        settings: dict[str, float] = {}
        names: tuple[str, ...] = ()
        if weight is not None or len(options) > (out is not None):
            if (found := sort_options(loss, weight, options, form_of_option, UNPREPARED, "out")) is None:
                return loss.compute(arguments, HostCall)
            names, others, settings, forms = found
            arrays, key = [*arrays, *others], (*key, forms)
        made = self.passes[key] if key in self.passes else self.prepare(key, arguments, names)
        if made is None:
            return loss.compute(arguments, HostCall)
        outputs = [out] if out is not None else [memory.empty_like(arrays[k]) for k in made.alike]
        every = [*([arrays[k] for k in made.order] if made.order else arrays), *outputs]
        addresses = [read_pointer(id(array) + POINTER_AT).value for array in every]
        if out is not None:
            made.launch.plan.check_overlap(every, addresses)
        value, bad = made.run(addresses, settings, 1.0)
        if bad:
            return loss.compute(arguments, HostCall)  # raises the error that names the element, or warns
        return (value if isinstance(value, np.ndarray) else np.float64(value) if summed else None), outputs

    def prepare(self, key: tuple[Any, ...], arguments: Arguments, names: tuple[str, ...]) -> PreparedPass | None:
        """Prepare the pass of a call and remember it; None if the call divides by several numbers or takes several passes."""
        loss: AbstractLoss = key[0]
        made = None
        if loss.definition is not None and not (loss.definition.classes and "value" in arguments.wanted):
            call, out = loss.bind(arguments, HostCall), arguments.options.get("out")
            divides_groups = call.group_axes and (arguments.wanted or call.reduction != "sample_sum")
            several = divides_groups or (out is not None and (call.validate or len(arguments.wanted) != 1))
            if not call.loss.classes:
                check_target(call.shape, call.arrays[1].shape)  # before an array of the input's size is allocated
            if not several and arguments.first.size:
                operands = {"input": arguments.first, "target": arguments.second}
                outputs = [memory.empty_like(operands[operand_of(name)]) if out is None else out for name in arguments.wanted]
                made = PreparedPass(call, (*loss.operands, *names), outputs)
        if len(self.passes) >= MOST_PREPARED:
            self.passes.clear()
        self.passes[key] = made
        return made

    def placeholder_input(self, target: Any) -> Any:
        """Make an input of the target's shape and dtype, or float32 for integers, by broadcasting a single element."""
        t = self.as_array("target", target)
        return np.broadcast_to(np.zeros((), float_of(t.dtype)), t.shape)


def form_of_option(x: Any) -> Any:
    """Return the dtype, shape and strides of an array that is an option; None if it must be converted, or is a single number."""
    return get_layout(x) if type(x) is np.ndarray and x.ndim else None


BACKEND = NumpyBackend()
