"""Parts of a kernel's text: functions, types, and the lines that load and store arrays."""

from __future__ import annotations

from collections.abc import Iterable

from fastloss.core.plan import Operand


def function(head: str, lines: Iterable[str]) -> str:
    """Write a function from its head and its lines."""
    return f"DEVICE {head} {{\n" + "".join(f"    {line}\n" for line in lines) + "}\n"


def structure(name: str, members: Iterable[str]) -> str:
    """Write a type from its members."""
    return f"struct {name} {{\n" + "".join(f"    {member};\n" for member in members) + "};\n"


def move(verb: str, whole: str, k: int, operand: Operand) -> str:
    """Write the line that loads or stores array k of a pack or of the constants."""
    width = f"<WIDTH_{k}>" if operand.access == "contiguous" else ""
    return f"{verb}_{operand.access}{width}({whole}.x{k}, a, pos, {k});"
