"""`Formula`: a loss's function of one element, traced with symbols when the loss is defined, so that errors appear at once.

Numba could compile the same function for scalars or for a SIMD type. Tracing it instead gives one front end for every machine,
error messages in the terms of the formula, plain Python helpers inside formulas, and the operations as text, by which the
kernel cache compares formulas.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastloss.ops import VOCABULARY, FormulaError, Symbol

# the quantities that a formula may return, in order; the last three are the derivatives by the target, by both operands, and
# twice by the target
QUANTITIES = ("value", "slope", "curvature", "target_slope", "cross_curvature", "target_curvature")
OPTIONS = {"mask": None, "ignore_index": None, "target_scale": None, "grad_output": None, "out": None, "validate": False}
RESERVED = {"self", "input", "target", "weight", "reduction", *OPTIONS, *QUANTITIES}

Reference = str | float
Operation = tuple[str, tuple[Reference, ...]]
Trace = tuple[tuple[Operation, ...], tuple[Reference, ...]]  # the operations, and references to the results that are returned

# how many simple operations, such as a product, take as long as one of these; a rough estimate
COSTS = {
    "add_log1p": 5, "div": 5, "exp": 15, "expm1": 20, "log": 25, "log1p": 25, "polynomial": 8, "pow": 80, "quotient": 5, "sigmoid": 15,
    "sqrt": 5, "tanh": 15,
}  # fmt: skip

_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
_LOGIC = {"and", "or", "not"}


class _TracedSymbol(Symbol):
    """A symbol that records the operations applied to it, and distinguishes numbers from conditions."""

    def __init__(self, operations: list[Operation], name: str, is_condition: bool = False) -> None:
        self.operations, self.name, self.is_condition = operations, name, is_condition

    def apply(self, op: str, *args: Any) -> _TracedSymbol:
        """Append an operation to the record and return the symbol of its result."""
        for k, arg in enumerate(args):
            wants_condition = op in _LOGIC or (op == "where" and k == 0)
            if wants_condition != (isinstance(arg, _TracedSymbol) and arg.is_condition):
                raise FormulaError(_MIXED[wants_condition])
        self.operations.append((op, tuple(map(_reference, args))))
        return _TracedSymbol(self.operations, f"%{len(self.operations)}", op in _COMPARISONS or op in _LOGIC)


_MIXED = {
    True: "&, |, ~ and the first argument of ops.where take conditions such as z > 0, not numbers",
    False: "a condition such as z > 0 is not a number; use ops.where(condition, 1.0, 0.0)",
}


def _reference(arg: Any) -> Reference:
    """Return the name of a symbol, or a number as a float."""
    if isinstance(arg, _TracedSymbol):
        return arg.name
    if isinstance(arg, (int, float, np.integer, np.floating)):
        return float(arg)
    raise FormulaError(f"a formula computes with elements and numbers, not with {type(arg).__name__}")


class Formula:
    """The traced function of one element: of its input `z`, its target `t`, and the loss's parameters."""

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...] = QUANTITIES, counts: tuple[int, ...] = ()) -> None:
        if not inspect.isfunction(function):
            raise FormulaError(f"a formula must be a function (def or lambda), not {function!r}")
        self.function, self._all_names, self._accepted_counts = function, names, counts or (len(names),)
        self.defaults = _defaults(function)
        # Trace every combination of given and omitted parameters. Omitted parameters become constants, which may need fewer
        # operations (a power of 2 is a product), or None, on which a formula may branch.
        self._traces: dict[tuple[str, ...], Trace] = {}
        for given in itertools.product((False, True), repeat=len(self.defaults)):
            parameters = tuple(itertools.compress(self.defaults, given))
            self._traces[parameters] = self._trace(parameters)
        found = {len(quantities) for _, quantities in self._traces.values()}
        if len(found) > 1:
            raise FormulaError(f"{function.__name__}: a formula must return the same number of quantities with and without its parameters")
        self.names = names[: found.pop()]

    def quantities(self, z: Any, t: Any, parameters: dict[str, Any], substitutes: Mapping[str, str]) -> dict[str, Any]:
        """Apply the recorded operations, or their substitutes, to the symbols of one element, and return the quantities by name.

        The function is not called again: global names that it uses may have changed since it was traced, and the kernel cache
        identifies a kernel by the recorded operations.
        """
        operations, quantities = self._traces[tuple(parameters)]
        known: dict[Reference, Any] = {"%input": z, "%target": t, **{f"%{name}": x for name, x in parameters.items()}}
        for k, (op, references) in enumerate(operations, 1):
            args = [known.get(reference, reference) for reference in references]
            known[f"%{k}"] = next(arg for arg in args if isinstance(arg, Symbol)).apply(substitutes.get(op, op), *args)
        return dict(zip(self.names, (known.get(reference, reference) for reference in quantities), strict=True))

    def logarithms(self, parameters: tuple[str, ...]) -> set[str]:
        """Return the names of the quantities computed by `add_log1p`, whose logarithms a sum may accumulate as a product."""
        operations, quantities = self._traces[parameters]
        results = {f"%{k}" for k, (op, _) in enumerate(operations, 1) if op == "add_log1p"}
        return {name for name, reference in zip(self.names, quantities, strict=True) if reference in results}

    def is_zero(self, quantity: str) -> bool:
        """Whether a formula returns a quantity that is the number 0 for every element."""
        return quantity in self.names and all(quantities[self.names.index(quantity)] == 0.0 for _, quantities in self._traces.values())

    def cost(self, parameters: tuple[str, ...]) -> int:
        """Estimate how many simple operations an element takes."""
        return sum(COSTS.get(op, 1) for op, _ in self._traces[parameters][0])

    @property
    def text(self) -> str:
        """The defaults of the parameters, and the operations for every combination of given parameters, as text."""
        return repr((self.defaults, self._traces))

    def trace(self, parameters: tuple[str, ...]) -> str:
        """Return the operations as text, which is the same for formulas with the same operations. Other parameters have their defaults."""
        return repr(self._traces[parameters])

    def _trace(self, parameters: tuple[str, ...]) -> Trace:
        """Call the function with symbols, and return the recorded operations and references to the quantities."""
        operations: list[Operation] = []
        z, t, *rest = (_TracedSymbol(operations, f"%{name}") for name in ("input", "target", *parameters))
        try:
            result = self.function(z, t, **dict(zip(parameters, rest, strict=True)))
            if not isinstance(result, tuple) or len(result) not in self._accepted_counts:
                accepted = (", ".join(self._all_names[:n]) for n in self._accepted_counts)
                raise FormulaError(f"a formula must return {' or '.join(f'({names})' for names in accepted)}")
            if any(isinstance(quantity, _TracedSymbol) and quantity.is_condition for quantity in result):
                raise FormulaError(_MIXED[False])
            return tuple(operations), tuple(map(_reference, result))
        except Exception as error:
            raise FormulaError(self._locate(error)) from error

    def _locate(self, error: Exception) -> str:
        """Return the message of an error, preceded by the line of the formula that raised it."""
        code = self.function.__code__
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == code.co_filename]
        line = (lines[-1] if lines else None) or code.co_firstlineno
        source = linecache.getline(code.co_filename, line).strip()
        hint = "" if isinstance(error, FormulaError) else f"; a formula may use operators and fastloss.ops ({VOCABULARY})"
        return f"{self.function.__name__} ({code.co_filename}:{line}: `{source}`): {error}{hint}"


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters of a formula with their defaults; raise FormulaError if the signature is not accepted."""
    arguments = list(inspect.signature(function).parameters.values())
    name = function.__name__
    if any(a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise FormulaError(f"{name}: a formula must name each of its parameters; *args and **kwargs are not accepted")
    if len(arguments) < 2 or any(a.kind is a.KEYWORD_ONLY for a in arguments[:2]):
        raise FormulaError(f"{name}: a formula must take an element of the input, an element of the target, and then the loss's parameters")
    for a in arguments[2:]:
        if a.kind is a.POSITIONAL_ONLY or a.name in RESERVED:
            reserved = ", ".join(sorted(RESERVED))
            raise FormulaError(f"{name}: the parameter {a.name} must be accepted as a keyword, and must not be named {reserved}")
        if isinstance(a.default, bool) or not isinstance(a.default, (int, float, np.integer, np.floating, type(None))):
            found = "no default" if a.default is a.empty else f"the default {a.default!r}"
            raise FormulaError(f"{name}: the parameter {a.name} has {found}; accepted: a number, or None if the parameter may be omitted")
    return {a.name: a.default for a in arguments[2:]}
