"""GPUs: formulas become CUDA code, NVRTC compiles it, and CuPy launches the kernels."""

try:
    import cupy as cupy
except ImportError as error:
    raise ImportError(
        "losses on a GPU need CuPy, which cannot be imported; install fastloss[cuda12] or fastloss[cuda13], whichever matches the CUDA "
        f"version of the driver ({error})"
    ) from error
