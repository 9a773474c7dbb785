"""Parts of a kernel that are the same on the CPU and the GPU: one element's arithmetic, and the cache of machine code."""
