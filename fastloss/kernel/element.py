"""The arithmetic of one element between its loads and its stores, written once for the CPU and the GPU.

The functions take symbols, which stand for an element or a vector of elements, and return symbols: the results to store, and
the terms to add to the sums. Loads, stores and sums are written by each machine (`cpu/step.py`, `cuda/source.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastloss.core.plan import Operand, Spec
from fastloss.kernel import elementary
from fastloss.ops import fma, where


def load(
    spec: Spec, raw: Mapping[str, Any], number: Mapping[str, Any], in_row: Any, convert: Callable[[Any, str], Any],
    differs: Callable[[Any, Any], Any]
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """Convert the loaded operands to the type of the arithmetic, and return them with the condition that an element counts.

    `in_row` is the condition that the element does not lie past the end of its row. `convert(raw, code)` converts an element that
    is stored with a type code. `differs(raw, converted)` is the condition that a target, given as stored and as converted, is not
    `ignore_index`.
    """
    counted = in_row
    if "mask" in raw:
        counted = counted & (raw["mask"] != 0)
    loaded = {op.name: convert(raw[op.name], op.code) for op in spec.operands if op.name != "mask"}
    if "ignore_index" in number:
        counted = counted & differs(raw["target"], loaded["target"])
    if "target" in loaded:
        loaded["target"] = multiply(loaded["target"], number.get("target_scale"))
    return loaded, counted


def quantities(spec: Spec, loaded: Mapping[str, Any], number: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the formula and return its quantities by name, with "count", the term 1 of the number of elements."""
    if not spec.trace:
        return {"count": 1.0}
    parameters = {name: loaded[name] if name in loaded else number[name] for name in spec.parameters}
    substitutes = elementary.FOR_HALVES if spec.stores_halves else {}
    return {"count": 1.0, **spec.formula.quantities(loaded["input"], loaded["target"], parameters, substitutes)}


def results_to_store(
    spec: Spec, found: Mapping[str, Any], loaded: Mapping[str, Any], scale: Any, counted: Any
) -> Iterator[tuple[Operand, Any]]:
    """Yield each output with its result: a value times the weight, or a derivative times every factor of the chain rule."""
    if not spec.outputs:
        return
    weight = loaded.get("weight")
    factor = multiply(multiply(weight, scale), loaded.get("grad_output"))
    for output in spec.outputs:
        result = multiply(scale.match(found[output.name]), weight if output.name == "value" else factor)
        yield output, where(counted, result, 0.0) if spec.excludes else result


def summands(spec: Spec, found: Mapping[str, Any], weight: Any, counted: Any) -> tuple[list[Any], list[Any]]:
    """Return the term of each sum, and e for each factor 1 + e of the sums whose logarithms accumulate as products."""
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
    """Return x + y, or for factors (1 + x) (1 + y) - 1, which is accurate for tiny x and y."""
    return x + fma(x, y, y) if as_factors else x + y


def multiply(x: Any, y: Any) -> Any:
    """Return x * y, where None means 1."""
    return y if x is None else x if y is None else x * y
