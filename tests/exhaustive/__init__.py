"""Every float32 number, and every pair of 16-bit numbers, as an argument of the formulas: `python -m tests.exhaustive`."""
