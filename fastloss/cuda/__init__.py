"""CUDA kernels through CuPy, of the same formulas as the CPU's."""

try:
    import cupy as cupy
except ImportError as error:
    raise ImportError(
        "on a GPU, losses are computed through CuPy, which cannot be imported here; install fastloss[cuda12] or fastloss[cuda13], "
        f"by the version of CUDA that the driver has ({error})"
    ) from error
