"""CUDA kernels through CuPy, of the same formulas as the CPU's."""
