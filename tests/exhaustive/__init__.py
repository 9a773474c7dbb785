"""Every float32 number, and every pair of 16-bit numbers, as an argument of the formulas: `python -m tests.exhaustive`."""

from pathlib import Path

MEASURED = Path(__file__).with_name("measured.json")  # the record that the documentation shows
PATHS = ("AVX-512", "AVX2", "none")  # code paths of the CPU, the best first
