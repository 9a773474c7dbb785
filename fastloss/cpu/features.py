"""The CPU to compile for, and its features, for Numba's compilation and ours.

It is the CPU that the process runs on, unless the environment variables of Numba say otherwise: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES
name another, and NUMBA_ENABLE_AVX=0 leaves out AVX.
"""

from __future__ import annotations

import os
from functools import cache

import llvmlite.binding as llvm

NEED_AVX = ("avx", "f16c", "fma", "fma4", "xop", "vaes", "vpclmulqdq")  # how the names of the features begin that need AVX's registers


@cache
def target() -> tuple[str, str]:
    """Return LLVM's name for the CPU and its features, such as "+sse2,-avx", as Numba reads them from its environment variables."""
    given = os.environ.get("NUMBA_CPU_NAME")
    name = str(llvm.get_host_cpu_name()) if given is None else given
    features = os.environ.get("NUMBA_CPU_FEATURES", "" if name.lower() == "generic" else None)
    if features is not None:
        return name, features
    found = llvm.get_host_cpu_features()
    if os.environ.get("NUMBA_ENABLE_AVX", "1") == "0":
        for feature in found:
            if feature.startswith(NEED_AVX):
                found[feature] = False
    return name, found.flatten()


def processor() -> str:
    """Return LLVM's name for the kind of processor, such as "x86_64" or "aarch64"."""
    return str(llvm.get_process_triple()).partition("-")[0]


def has(feature: str) -> bool:
    """Whether the CPU has a feature, by LLVM's name for it."""
    return f"+{feature}" in target()[1].split(",")


def is_x86() -> bool:
    """Whether the CPU has the instructions of x86."""
    return processor() in ("x86_64", "i386", "i686")


def has_fma() -> bool:
    """Whether the CPU has a fused multiply-add. Elsewhere the C library computes it, correctly and slowly."""
    return not is_x86() or has("fma") or has("avx512f")


def has_half_conversion() -> bool:
    """Whether the CPU converts between float16 and float32. Elsewhere LLVM would call a function that is not loaded."""
    return not is_x86() or has("f16c") or has("avx512f")
