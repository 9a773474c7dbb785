"""The description of a machine in results: hardware, versions and threads, without its name."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
from cpuinfo import get_cpu_info
from llvmlite.binding import get_host_cpu_name

from bench.record import installed

PACKAGES = ("fastloss", "numpy", "numba", "llvmlite", "numexpr", "scikit-learn", "torch", "jax", "optax")


def description(threads: int) -> dict[str, Any]:
    """Describe the CPU, the system and the versions of packages."""
    cpu = get_cpu_info()
    return {
        "cpu": cpu.get("brand_raw", platform.processor() or "unknown"),
        "architecture": get_host_cpu_name(),
        "cache_mib": last_cache_mib(),
        "simd": next((name for name in ("avx512f", "avx2", "asimd") if name in cpu.get("flags", ())), "unknown"),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "versions": {"python": platform.python_version()} | dict(installed(PACKAGES)),
    }


def last_cache_mib() -> int:
    """Return the size of the third-level cache as Linux reports it, or 0 if it is unknown."""
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(file.read_text().strip().removesuffix("K")) >> 10 if file.is_file() else 0


def allowed_cpus() -> list[int]:
    """Return the CPUs that this process may use, or an empty list if the system does not report them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(allowed_cpus()) or os.cpu_count() or 1


def keep_to(threads: int) -> None:
    """Pin the process to as many CPUs as threads, so that libraries without a setting for threads do not use more."""
    if threads < cpus() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, allowed_cpus()[:threads])


def sentence(machine: dict[str, Any]) -> str:
    """Format the description of a machine as one line."""
    used = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    if "gpu" in machine:
        return f"{machine['gpu']} ({machine['processors']} processors, {machine['memory_gib']} GiB); {used}"
    cache = f", {machine['cache_mib']} MiB of third-level cache" if machine["cache_mib"] else ""
    cpu = f"{machine['cpu']} ({machine['architecture']}, {machine['simd']}), {machine['cores']} cores{cache}"
    return f"{cpu}, {machine['threads']} threads; {used}"
