"""The CPU: formulas become LLVM vector code, Numba compiles the loops around them, and a pool of threads calls the kernels."""
