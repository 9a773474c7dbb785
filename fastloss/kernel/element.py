"""The arithmetic of one element between its loads and its stores, written once for the CPU and the GPU.

The functions take symbols, each an element or a vector of elements, and return symbols: the results to store, and the terms to
add to the sums. Loads, stores and sums belong to each machine (`cpu/loop.py`, `cuda/source.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastloss.core.plan import Operand, Spec
from fastloss.ops import fma, where


def load(
    spec: Spec, raw: Mapping[str, Any], number: Mapping[str, Any], everywhere: Any, convert: Callable[[Any, str], Any],
    differs: Callable[[Any, Any], Any]
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """Convert the loaded operands to the type of the arithmetic, and return them with the condition that an element counts.

    `convert(raw, code)` converts an element stored as a type code. `differs(raw, converted)` compares a target, stored and
    converted, with `ignore_index`.
    """
    counted = everywhere
    if "mask" in raw:
        counted = counted & (raw["mask"] != 0)
    loaded = {op.name: convert(raw[op.name], op.code) for op in spec.operands if op.name != "mask"}
    if "ignore_index" in number:
        counted = counted & differs(raw["target"], loaded["target"])
    if "target" in loaded:
        loaded["target"] = multiply(loaded["target"], number.get("target_scale"))
    return loaded, counted


def quantities(spec: Spec, loaded: Mapping[str, Any], number: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the formula and return its quantities by name. "count" is what an element adds to the count."""
    if not spec.trace:
        return {"count": 1.0}
    parameters = {name: loaded[name] if name in loaded else number[name] for name in spec.parameters}
    return {"count": 1.0, **spec.formula.quantities(loaded["input"], loaded["target"], parameters)}


def stored(spec: Spec, found: Mapping[str, Any], loaded: Mapping[str, Any], scale: Any, counted: Any) -> Iterator[tuple[Operand, Any]]:
    """Yield each output with the result to store: derivatives with every factor of the chain rule, values with their weight."""
    if not spec.outputs:
        return
    weight = loaded.get("weight")
    factor = multiply(multiply(weight, scale), loaded.get("grad_output"))
    for output in spec.outputs:
        result = multiply(scale.match(found[output.name]), weight if output.name == "value" else factor)
        yield output, where(counted, result, 0.0) if spec.excludes else result


def summands(spec: Spec, found: Mapping[str, Any], weight: Any, counted: Any) -> tuple[list[Any], list[Any]]:
    """Return the term of each sum, and the factors 1 + e, given as e, of those sums whose logarithms are collected as products."""
    values, factors = [], []
    for name in spec.summed:
        value = counted.match(found[name])
        if name in spec.multiplied:
            value, e = value.log_term
            factors.append(where(counted, e, 0.0))
        values.append(where(counted, value if name == "count" else multiply(value, weight), 0.0))
    return values, factors


def is_bad(x: Any, counted: Any) -> Any:
    """Return the condition that an element counts and lies outside [0, 1]."""
    return counted & ~((x >= 0.0) & (x <= 1.0))


def accumulate(x: Any, y: Any, as_factors: bool) -> Any:
    """Return x + y, or as factors (1 + x) (1 + y) - 1, which stays accurate where x and y are tiny."""
    return x + fma(x, y, y) if as_factors else x + y


def multiply(x: Any, y: Any) -> Any:
    """Return x * y, with None standing for 1."""
    return y if x is None else x if y is None else x * y
