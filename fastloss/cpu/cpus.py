"""The CPUs that this process may use: those of its affinity, and no more than its control groups grant it time on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def count_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    cpus = len(affinity(os.getpid()) or ()) or os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, quota())))


def affinity(thread: int) -> set[int] | None:
    """Return the CPUs on which a thread may run; None where the system does not tell. 0 is the caller, the process's id its main thread."""
    return os.sched_getaffinity(thread) if hasattr(os, "sched_getaffinity") else None


def quota(groups: Path = GROUPS, mounted: Path = MOUNTED) -> float:
    """Return how many CPUs' time the control groups of this process grant it: the least of its own group and of those around it."""
    return min(map(read_quota, group_folders(groups, mounted)), default=math.inf)


def group_folders(groups: Path, mounted: Path) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, and of those around them, of version 1 and of version 2.

    In a container, the path may be that of the host, and the container's own group be mounted at the root.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # not Linux
        return
    for _, controllers, path in (fields for fields in lines if len(fields) == 3):
        roots = [mounted, mounted / "unified"] if not controllers else [mounted / controllers] if "cpu" in controllers.split(",") else []
        inner = PurePosixPath(path.lstrip("/"))
        for root in roots:
            yield from (root / group for group in (inner, *inner.parents))


def read_quota(folder: Path) -> float:
    """Return how many CPUs' time a control group is granted; infinity if it has no limit."""
    try:
        if (folder / "cpu.max").exists():  # version 2
            granted, period = (folder / "cpu.max").read_text().split()
        else:
            granted, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
        return int(granted) / int(period) if int(granted) > 0 else math.inf
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return math.inf
