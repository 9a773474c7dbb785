"""What becomes of an element between its loads and its stores, written once for all targets.

A step is given symbols, each one element or a vector of them, and hands back symbols: what is stored, what is added to the
sums. How they are loaded, stored and summed is the target's own (`cpu/loops.py`, `cuda/source.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastloss.ops import fma, where
from fastloss.plan import Operand, Spec


def load(
    spec: Spec, raw: Mapping[str, Any], number: Mapping[str, Any], everywhere: Any, convert: Callable[[Any, str], Any],
    differs: Callable[[Any, Any], Any]
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """Return operands in the type of the arithmetic, and which elements count.

    `convert` is given what is stored and as what; `differs` a target as it is stored and as it is converted.
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
    """Return what the formula makes of an element, by name, and what one adds to the count."""
    if not spec.trace:
        return {"count": 1.0}
    parameters = {name: loaded[name] if name in loaded else number[name] for name in spec.parameters}
    return {"count": 1.0, **spec.formula.quantities(loaded["input"], loaded["target"], parameters)}


def stored(spec: Spec, found: Mapping[str, Any], loaded: Mapping[str, Any], scale: Any, counted: Any) -> Iterator[tuple[Operand, Any]]:
    """Yield what each output stores: slopes and curvatures with all the factors of the chain rule, a value with its weight."""
    if not spec.outputs:
        return
    weight = loaded.get("weight")
    factor = multiply(multiply(weight, scale), loaded.get("grad_output"))
    for output in spec.outputs:
        result = multiply(scale.match(found[output.name]), weight if output.name == "value" else factor)
        yield output, where(counted, result, 0.0) if spec.excludes else result


def summands(spec: Spec, found: Mapping[str, Any], weight: Any, counted: Any) -> tuple[list[Any], list[Any]]:
    """Return what elements add to each sum, and for those whose logarithms go into a product, e: there, 1 + e is the factor."""
    values, factors = [], []
    for name in spec.summed:
        value = counted.match(found[name])
        if name in spec.multiplied:
            value, e = value.log_term
            factors.append(where(counted, e, 0.0))
        values.append(where(counted, value if name == "count" else multiply(value, weight), 0.0))
    return values, factors


def is_bad(x: Any, counted: Any) -> Any:
    """Return where elements count and lie outside [0, 1]."""
    return counted & ~((x >= 0.0) & (x <= 1.0))


def accumulate(x: Any, y: Any, as_factors: bool) -> Any:
    """Return x + y, or (1 + x) (1 + y) - 1, which keeps its relative accuracy where both are tiny."""
    return x + fma(x, y, y) if as_factors else x + y


def multiply(x: Any, y: Any) -> Any:
    """Return x * y, where None stands for 1."""
    return y if x is None else x if y is None else x * y
