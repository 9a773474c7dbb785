"""The CPU: formulas become LLVM vector code, Numba compiles the loops around them, a pool of threads runs them."""
