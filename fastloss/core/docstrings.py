"""The parts that the docstrings of all losses share: every option with its meaning, dtypes, errors, and an example call."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping

WIDTH = 100  # characters a line

OPERANDS = {
    "input": "Any shape and strides; float16, bfloat16 (`ml_dtypes`), float32 or float64.",
    "target": "The shape of the input; these dtypes, bool, or integers of 8 to 64 bits.",
}
OPTIONS = {
    "weight": "array that broadcasts against `{first}`. It multiplies value and gradient; a mean still divides by the number of elements.",
    "reduction": '"mean", "sum", "none" (an array of values), "batchmean" (the sum divided by the length of the first axis), '
    '"sample_mean" or "sample_sum" (one number for each entry of the first axis).',
    "mask": "bool array that broadcasts against `{first}`. Elements where it is False have gradient 0 and do not count, "
    "also in the number that a mean divides by.",
    "ignore_index": "target value whose elements are excluded as if by `mask`.",
    "target_scale": "number that multiplies integer targets, such as 1/255 for uint8 images.",
    "grad_output": "upstream gradient, a number or an array of the loss's shape. It multiplies gradients and curvatures.",
    "out": 'array for the gradient or curvature, or with reduction "none" for the value. It may be the input, which is then '
    "overwritten, and may not overlap any other array.",
    "validate": "True raises an error if {probabilities} has an element outside [0, 1]; without `out` the check costs no further "
    "pass over memory. Integer targets other than 0 and 1 are always an error, unless `target_scale` is passed. "
    "On a GPU the error is raised by a later call that checks, or by `fastloss.raise_deferred()`; "
    '"defer" means the same and documents that this is known.',
}
NOT_VALIDATED = "has no effect on this loss, whose operands may be any numbers."
RETURNS = (
    "The call itself returns a float64 number, or arrays for the reductions that keep an axis. `grad` and `curvature` return an array "
    "of the input's shape and dtype; `value_and_grad` returns the value and the gradient."
)
RAISES = {
    "ValueError": "shapes that do not fit, an unknown reduction, a number out of its bounds, an `out` that is read-only or overlaps, "
    "integer targets other than 0 and 1 of a loss whose targets are probabilities, or an element that `validate` refuses.",
    "TypeError": "a dtype or a type that is not accepted, or an unknown option.",
}


def complete(
    doc: str | None,
    options: Iterable[str],
    example: str,
    probabilities: tuple[str, ...] = (),
    operands: Mapping[str, str] = OPERANDS,
    own: Mapping[str, str] | None = None,
    returns: str = RETURNS,
) -> str:
    """Complete a loss's docstring with the parts that losses share.

    The text of an operand is appended to its line under "Args". Options follow the arguments that are there, each with its text
    from OPTIONS or from `own`. "Returns", "Raises" and "Example" go before "Source".
    """
    named = {"first": next(iter(operands)), "probabilities": " or ".join(probabilities)}
    texts = OPTIONS | ({} if probabilities else {"validate": NOT_VALIDATED}) | dict(own or {})
    body, _, source = inspect.cleandoc(doc or "").partition("\nSource:")
    body, _, arguments = body.partition("\nArgs:\n")
    lines = [line if line.startswith("     ") else _with_operand(line, operands) for line in arguments.rstrip().splitlines()]
    lines += [_item(name, texts[name].format_map(named)) for name in options]
    sections = [
        f"{body.rstrip()}\n\nArgs:\n" + "\n".join(lines),
        "Returns:\n" + textwrap.indent(textwrap.fill(returns, WIDTH - 4), "    "),
        "Raises:\n" + "\n".join(_item(name, text) for name, text in RAISES.items()),
        f"Example:\n    {example}",
    ]
    return "\n\n".join([*sections, f"Source:{source.rstrip()}"] if source else sections)


def _with_operand(line: str, operands: Mapping[str, str]) -> str:
    """Append the shared text to the line of an operand."""
    name, _, text = line.strip().partition(": ")
    return _item(name, f"{text} {operands[name]}") if name in operands else line


def _item(name: str, text: str) -> str:
    """Format one entry of a section."""
    return textwrap.fill(f"{name}: {text}", WIDTH, initial_indent="    ", subsequent_indent="        ")
