"""GPUs: formulas become CUDA code, NVRTC compiles it, and CuPy launches the kernels."""

try:
    import cupy as cupy
except ImportError as error:
    raise ImportError(
        f"losses of arrays on a GPU need CuPy, which cannot be imported ({error}); pip install 'fastloss[cuda13]', or 'fastloss[cuda12]' "
        "for a driver of CUDA 12"
    ) from error
