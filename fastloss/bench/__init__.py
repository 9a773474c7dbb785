"""Benchmarks: every loss against NumPy, its peers and what memory allows; `python -m fastloss bench`."""
