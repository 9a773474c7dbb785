"""The parts of kernels that the CPU and the GPU share: the arithmetic of one element, and the cache of machine code on disk."""
