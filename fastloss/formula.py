"""`Formula`: a loss's function of one element, read once with symbols, so that what cannot be compiled fails at once.

Numba could type the same function on scalars, and a SIMD type of its own; reading it with symbols instead gives one front
end for every target, error messages in the user's terms instead of the compiler's, plain Python helpers inside formulas,
and the operations as text, which is all that the kernel cache has to compare.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from fastloss.ops import VOCABULARY, FormulaError, Symbol

# what a formula may return, in this order: the last three are the derivatives by the target, by both, and twice by the target
QUANTITIES = ("value", "slope", "curvature", "target_slope", "cross_curvature", "target_curvature")
OPTIONS = {"mask": None, "ignore_index": None, "target_scale": None, "grad_output": None, "out": None, "validate": False}
RESERVED = {"self", "input", "target", "weight", "reduction", *OPTIONS, *QUANTITIES}

Reference = str | float
Step = tuple[str, tuple[Reference, ...]]
Trace = tuple[tuple[Step, ...], tuple[Reference, ...]]  # the operations, and which of their results are returned

_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
_LOGIC = {"and", "or", "not"}


class _Trace(Symbol):
    """A symbol that writes down the operations it goes through, and knows a number from a condition."""

    def __init__(self, steps: list[Step], name: str, is_condition: bool = False) -> None:
        self.steps, self.name, self.is_condition = steps, name, is_condition

    def apply(self, op: str, *args: Any) -> _Trace:
        """Append the operation."""
        for k, arg in enumerate(args):
            wants_condition = op in _LOGIC or (op == "where" and k == 0)
            if wants_condition != (isinstance(arg, _Trace) and arg.is_condition):
                raise FormulaError(_MIXED[wants_condition])
        self.steps.append((op, tuple(map(_reference, args))))
        return _Trace(self.steps, f"%{len(self.steps)}", op in _COMPARISONS or op in _LOGIC)


_MIXED = {
    True: "&, |, ~ and the first argument of ops.where take conditions such as z > 0, not numbers",
    False: "a condition such as z > 0 is not a number; use ops.where(condition, 1.0, 0.0)",
}


def _reference(arg: Any) -> Reference:
    """Return a symbol's name, or a number."""
    if isinstance(arg, _Trace):
        return arg.name
    if isinstance(arg, (int, float, np.integer, np.floating)):
        return float(arg)
    raise FormulaError(f"a formula computes with elements and numbers, not with {type(arg).__name__}")


class Formula:
    """A function of one element's input `z` and target `t`, and of the loss's parameters, each a number or an element."""

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...] = QUANTITIES, counts: tuple[int, ...] = ()) -> None:
        if not inspect.isfunction(function):
            raise FormulaError(f"a formula is a function (def or lambda), not {function!r}")
        self.function, self._all_names, self._counts = function, names, counts or (len(names),)
        self.defaults = _defaults(function)
        # what a call leaves at its default is a constant, which may ask for less (a power of 2 is a product), or None, of which
        # a formula may ask whether it was given: so it is read in every way it may be called
        self._traces: dict[tuple[str, ...], Trace] = {}
        for given in itertools.product((False, True), repeat=len(self.defaults)):
            parameters = tuple(itertools.compress(self.defaults, given))
            self._traces[parameters] = self._read(parameters)
        found = {len(quantities) for _, quantities in self._traces.values()}
        if len(found) > 1:
            raise FormulaError(f"{function.__name__}: with and without its parameters, a formula returns the same number of quantities")
        self.names = names[: found.pop()]

    def quantities(self, z: Any, t: Any, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return what the formula returns for one element, by name; elements are given as symbols.

        The operations are those that were read, not those the function would do now: what it looks up outside may have
        changed, and the kernel is kept under what was read.
        """
        steps, quantities = self._traces[tuple(parameters)]
        known: dict[Reference, Any] = {"%input": z, "%target": t, **{f"%{name}": x for name, x in parameters.items()}}
        for k, (op, references) in enumerate(steps, 1):
            args = [known.get(reference, reference) for reference in references]
            known[f"%{k}"] = next(arg for arg in args if isinstance(arg, Symbol)).apply(op, *args)
        return dict(zip(self.names, (known.get(reference, reference) for reference in quantities), strict=True))

    def logarithms(self, parameters: tuple[str, ...]) -> set[str]:
        """Return which quantities are an `add_log1p`, of which a sum may be taken by multiplying."""
        steps, quantities = self._traces[parameters]
        ends = {f"%{k}" for k, (op, _) in enumerate(steps, 1) if op == "add_log1p"}
        return {name for name, reference in zip(self.names, quantities, strict=True) if reference in ends}

    @property
    def text(self) -> str:
        """Everything the formula computes, in each way it may be called, and its defaults."""
        return repr((self.defaults, self._traces))

    def trace(self, parameters: tuple[str, ...]) -> str:
        """Return the operations as text, the same for two formulas that compute the same; parameters not named have their default."""
        return repr(self._traces[parameters])

    def _read(self, parameters: tuple[str, ...]) -> Trace:
        """Call the function with symbols; return the operations and the quantities."""
        steps: list[Step] = []
        z, t, *rest = (_Trace(steps, f"%{name}") for name in ("input", "target", *parameters))
        try:
            result = self.function(z, t, **dict(zip(parameters, rest, strict=True)))
            if not isinstance(result, tuple) or len(result) not in self._counts:
                accepted = (", ".join(self._all_names[:n]) for n in self._counts)
                raise FormulaError(f"a formula returns {' or '.join(f'({names})' for names in accepted)}")
            if any(isinstance(quantity, _Trace) and quantity.is_condition for quantity in result):
                raise FormulaError(_MIXED[False])
            return tuple(steps), tuple(map(_reference, result))
        except Exception as error:
            raise FormulaError(self._locate(error)) from error

    def _locate(self, error: Exception) -> str:
        """Return the error's message behind the line of the formula that it came from."""
        code = self.function.__code__
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == code.co_filename]
        line = (lines[-1] if lines else None) or code.co_firstlineno
        source = linecache.getline(code.co_filename, line).strip()
        hint = "" if isinstance(error, FormulaError) else f"; a formula is written with operators and fastloss.ops ({VOCABULARY})"
        return f"{self.function.__name__} ({code.co_filename}:{line}: `{source}`): {error}{hint}"


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the loss's parameters with their defaults, or say why they cannot be a loss's."""
    arguments = list(inspect.signature(function).parameters.values())
    name = function.__name__
    if any(a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise FormulaError(f"{name}: a formula names each of its parameters, without * or **")
    if len(arguments) < 2 or any(a.kind is a.KEYWORD_ONLY for a in arguments[:2]):
        raise FormulaError(f"{name}: a formula takes an element of the input and one of the target, then the loss's parameters")
    for a in arguments[2:]:
        if a.kind is a.POSITIONAL_ONLY or a.name in RESERVED:
            raise FormulaError(f"{name}: the parameter {a.name} is given by name, and may not be called {', '.join(sorted(RESERVED))}")
        if isinstance(a.default, bool) or not isinstance(a.default, (int, float, np.integer, np.floating, type(None))):
            found = "no default" if a.default is a.empty else f"the default {a.default!r}"
            raise FormulaError(f"{name}: the parameter {a.name} has {found}; accepted: a number, or None for one that may be absent")
    return {a.name: a.default for a in arguments[2:]}
