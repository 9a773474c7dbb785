"""`Formula`: a loss's function of one element, read once with symbols, so that what cannot be compiled fails at once."""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from fastloss.ops import VOCABULARY, FormulaError, Symbol


class _Trace(Symbol):
    """A symbol that writes down the operations it goes through."""

    def __init__(self, lines: list[str], name: str) -> None:
        self.lines, self.name = lines, name

    def apply(self, op: str, *args: Any) -> _Trace:
        """Append the operation."""
        self.lines.append(f"{op} {' '.join(map(_name, args))}")
        return _Trace(self.lines, f"%{len(self.lines)}")


def _name(arg: Any) -> str:
    if isinstance(arg, _Trace):
        return arg.name
    if isinstance(arg, (int, float, np.integer, np.floating)):
        return repr(float(arg))
    raise FormulaError(f"a formula computes with elements and numbers, not with {type(arg).__name__}")


class Formula:
    """A function of one element's input `z` and target `t`, and of the loss's parameters, each a number or an element."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        if len(inspect.signature(function).parameters) < 2:
            raise FormulaError(
                f"{function.__name__}: a formula takes an element of the input and one of the target, then the loss's parameters"
            )
        self.defaults = {p.name: p.default for p in list(inspect.signature(function).parameters.values())[2:]}
        self._traces: dict[tuple[str, ...], str] = {}
        self.given = tuple(name for name, default in self.defaults.items() if default is not None)
        self.numbers = {name: float(self.defaults[name]) for name in self.given}
        self.trace(tuple(self.defaults))  # a formula may look at whether a parameter was given: read it both ways
        self.has_curvature = self.trace(self.given).splitlines()[-1].count(" ") == 3

    def quantities(self, z: Any, t: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return "value", "slope" and, where the formula has one, "curvature" of one element."""
        return dict(zip(("value", "slope", "curvature"), self.function(z, t, **parameters), strict=False))

    def trace(self, parameters: tuple[str, ...]) -> str:
        """Return the operations as text, when these parameters are given and the others are None."""
        if parameters not in self._traces:
            self._traces[parameters] = self._read(parameters)
        return self._traces[parameters]

    def _read(self, parameters: tuple[str, ...]) -> str:
        lines: list[str] = []
        z, t, *rest = (_Trace(lines, name) for name in ("z", "t", *parameters))
        try:
            result = self.function(z, t, **dict(zip(parameters, rest, strict=True)))
            if not isinstance(result, tuple) or len(result) not in (2, 3):
                raise FormulaError("a formula returns (value, slope) or (value, slope, curvature)")
            lines.append("return " + " ".join(map(_name, result)))
        except Exception as error:
            raise FormulaError(self._locate(error)) from error
        return "\n".join(lines)

    def _locate(self, error: Exception) -> str:
        """Return the error's message behind the line of the formula that it came from."""
        code = self.function.__code__
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == code.co_filename]
        line = (lines[-1] if lines else None) or code.co_firstlineno
        source = linecache.getline(code.co_filename, line).strip()
        hint = "" if isinstance(error, FormulaError) else f"; a formula is written with operators and fastloss.ops ({VOCABULARY})"
        return f"{self.function.__name__} ({code.co_filename}:{line}: `{source}`): {error}{hint}"
