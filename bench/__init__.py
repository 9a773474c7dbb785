"""The benchmark suite: every loss against NumPy, other libraries and the limit that memory sets.

`python -m bench` compares libraries and draws pictures; `pytest bench` times the same cases with pytest-benchmark.
"""
