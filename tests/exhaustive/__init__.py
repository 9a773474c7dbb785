"""Every float32 number, and every pair of 16-bit numbers, as an argument of the formulas: `python -m tests.exhaustive`."""

from pathlib import Path

MEASURED = Path(__file__).with_name("measured.json")  # the record that the documentation shows
PATHS = ("AVX-512", "AVX2", "none")  # code paths of the CPU, the best first


def beside_bound(error: float, bound: float) -> str:
    """Return an error with its bound as text, with more digits where the bound is small."""
    return f"{error:.{4 if 0 < bound < 0.5 else 2}f} of {bound:g}"
