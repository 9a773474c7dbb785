"""`patch`: make unchanged code that calls `torch.nn.functional` or modules of `torch.nn` compute losses with fastloss."""

from __future__ import annotations

import atexit
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch._C import _is_torch_function_enabled as is_torch_function_enabled
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling

from fastloss.core.checks import caller_level
from fastloss.torch import functional
from fastloss.torch.obstacles import find_obstacle

NAMES = (
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy", "huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss",
)  # fmt: skip


class Calls:
    """How many calls of one function fastloss has computed, and how many PyTorch, by the obstacle to fastloss.

    Attributes:
        by_fastloss: the number of calls that the function of `fastloss.torch` has computed.
        by_torch: the number of calls that went on to PyTorch's function, for each obstacle.
    """

    lock = threading.Lock()

    def __init__(self) -> None:
        self.by_fastloss = 0  # incremented without the lock: an increment of an attribute is not interrupted by another thread of CPython
        self.by_torch: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Calls(by_fastloss={self.by_fastloss}, by_torch={self.by_torch})"

    def add_obstacle(self, obstacle: str) -> None:
        """Count a call that goes on to PyTorch."""
        with self.lock:
            self.by_torch[obstacle] = self.by_torch.get(obstacle, 0) + 1

    def copy(self) -> Calls:
        """Return the numbers so far."""
        copied = Calls()
        with self.lock:
            copied.by_fastloss, copied.by_torch = self.by_fastloss, dict(self.by_torch)
        return copied


class Patch:
    """An active patch of `torch.nn.functional`. It ends when its `with` block is left, or when `undo` is called."""

    def __init__(self, report: bool = False) -> None:
        self._originals = {name: getattr(torch.nn.functional, name) for name in NAMES}
        self._calls = {name: Calls() for name in NAMES}
        self._installed = {
            name: with_fallback(original, getattr(functional, name), self._calls[name]) for name, original in self._originals.items()
        }
        for name, function in self._installed.items():
            setattr(torch.nn.functional, name, function)
        self._prints_report = report
        if report:
            atexit.register(self._print_report)

    def undo(self) -> None:
        """Restore the functions that the patch replaced. Further calls do nothing.

        Raises:
            RuntimeError: a later patch is still active.
        """
        if changed := [name for name, function in self._installed.items() if getattr(torch.nn.functional, name) is not function]:
            raise RuntimeError(f"torch.nn.functional.{changed[0]} has been replaced since; patches must be undone in the reverse order")
        for name in self._installed:
            setattr(torch.nn.functional, name, self._originals[name])
        self._installed = {}
        if self._prints_report:
            self._prints_report = False
            atexit.unregister(self._print_report)
            self._print_report()

    def calls(self) -> dict[str, Calls]:
        """Return the numbers of calls so far, for each function that the patch replaces. Calls in compiled code are not counted."""
        return {name: calls.copy() for name, calls in self._calls.items()}

    def report(self) -> str:
        """Return a table of the functions that have been called, and of the reasons why calls went on to PyTorch."""
        lines = [("function", "fastloss", "PyTorch", "reason")]
        for name, calls in self.calls().items():
            by_torch = sorted(calls.by_torch.items(), key=lambda item: -item[1])
            if calls.by_fastloss or by_torch:
                obstacle, count = by_torch[0] if by_torch else ("", 0)
                lines.append((name, f"{calls.by_fastloss:,}", f"{count:,}", obstacle))
                lines += [("", "", f"{count:,}", obstacle) for obstacle, count in by_torch[1:]]
        title = "calls under fastloss.torch.patch()" + ("" if lines[1:] else ": none")
        return "\n".join([title, *(f"{a:<34}{b:>11}{c:>11}  {d}".rstrip() for a, b, c, d in lines if lines[1:])])

    def _print_report(self) -> None:
        """Print the report to the standard error stream, which the program's own output does not go to."""
        print(self.report(), file=sys.stderr)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def patch(report: bool = False) -> Patch:
    """Replace the losses of `torch.nn.functional`, which the modules of `torch.nn` call too, with those of fastloss, in all threads.

        patched = fastloss.torch.patch()      # until patched.undo()
        with fastloss.torch.patch(): ...      # only inside the block

    Calls that fastloss does not support still go to PyTorch's functions: other devices (also GPUs if CuPy is not installed), other
    or mixed dtypes, operands of different shapes, subclasses of `torch.Tensor` other than parameters, a weight that requires a
    gradient, transforms of torch.func, and torch.jit.trace. torch.jit.script compiles PyTorch's functions. Functions that were
    imported by name before the patch (`from torch.nn.functional import mse_loss`) are not replaced.

    Args:
        report: whether to print, to the standard error stream, how many calls of each function fastloss has computed, how many PyTorch,
            and why, when the patch ends, or with the process. `Patch.report()` and `Patch.calls()` return the same at any time.

    Returns:
        A `Patch`, whose `undo` puts PyTorch's functions back.
    """
    return Patch(report)


def with_fallback(original: Callable[..., Any], ours: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    """Make a function that calls fastloss's loss if it supports the arguments, and PyTorch's otherwise, and that counts both."""
    names = tuple(inspect.signature(original).parameters)[2:]
    has_classes = ours is functional.cross_entropy

    @functools.wraps(original)
    def dispatch(input: Any, target: Any, *args: Any, **options: Any) -> Any:
        # PyTorch 2.6 compiles `strict=False` as `strict=True`
        given = (*zip(names, args), *options.items()) if args else options.items()  # noqa: B905
        compiling = is_compiling()
        if not (obstacle := find_obstacle(input, target, given, names, compiling, has_classes)):
            if not compiling:
                calls.by_fastloss += 1
            return ours(input, target, *args, **options)
        if compiling:
            return original(input, target, *args, **options)
        if is_torch_function_enabled():  # if not, a subclass of torch.Tensor has been called, and calls the function again
            calls.add_obstacle(obstacle)
        if is_tracing() or getattr(input, "shape", None) == getattr(target, "shape", None):  # a tracer warns of comparisons of shapes
            return original(input, target, *args, **options)
        return call_from_users_line(functools.partial(original, input, target, *args, **options))

    # torch.jit.script compiles the function that this hook returns; under a second patch, `wraps` has copied the hook of the first
    vars(dispatch).setdefault("__prepare_scriptable__", lambda: original)
    return dispatch


def call_from_users_line(function: Callable[[], Any]) -> Any:
    """Call a function from a frame with the file, line and globals of the user's call.

    If the shapes of the operands differ, PyTorch's functions warn with `stacklevel=2`, which names the line of that frame.
    """
    user = sys._getframe(caller_level() - 1)
    code = compile("function()", user.f_code.co_filename, "eval")
    code = code.replace(co_firstlineno=user.f_lineno or 1, co_name=user.f_code.co_name)  # generated code may have no lines
    return eval(code, user.f_globals, {"function": function})
