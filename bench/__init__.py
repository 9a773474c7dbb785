"""The benchmark suite. It compares every loss with NumPy, other libraries, and the limit that memory bandwidth sets.

`python -m bench` compares libraries and draws pictures; `pytest bench` times the same cases with pytest-benchmark.
"""
