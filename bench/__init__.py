"""Benchmarks: `pytest bench`, and `python -m bench.report` for the README's table."""
