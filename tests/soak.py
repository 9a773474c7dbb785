"""Random calls of every loss, method, dtype and kind of array for minutes, while the resources of the process are watched.

`python -m tests.soak` prints them every ten seconds, after a warm-up in which every kernel is compiled. The exit status is 1 if memory
grew by more than 1 %, or a thread, a file descriptor or a mapping of memory was gained.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastloss as fl
from fastloss.backends.torch.memory_views import to_tensor
from fastloss.cpu import memory
from tests.arguments import EVERY_LOSS, methods_of, options_of
from tests.table import FLOATS, Case

SHAPES = ((2, 3, 5, 7), (1, 2, 40, 33), (4, 3, 64, 64), (3, 1, 300, 301), (8, 3, 128, 128))
KEPT = (16, 3, 256, 256)  # gradients whose memory is kept when they are freed
KINDS = 300  # kinds of calls, of some thousands: a kernel is compiled for most of them
WARM_UP = 2  # times that each call is made before the resources are watched
MOST_GROWTH = 1.01
PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """What a process holds."""

    memory: float  # resident, in MiB
    threads: int
    descriptors: int
    mappings: int
    kept: float  # memory of freed gradients, in MiB


def usage() -> Usage:
    """Return what this process holds, after it has given back what the C library keeps of freed memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    counts = [len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd", "map_files")]
    return Usage(resident / 2**20, *counts, sum(map(len, memory._free)) / 2**20)


# --- calls ------------------------------------------------------------------------------------------------------------


def kinds() -> list[tuple[Case, str, Any, tuple[int, ...], bool, bool]]:
    """Return the kinds of calls: loss, method, dtype, shape, whether with options, and whether with tensors."""
    products = itertools.product(EVERY_LOSS.values(), FLOATS, SHAPES, (False, True), (False, True))
    return [(row, method, *rest) for row, *rest in products for method in methods_of(row)]


def call(rng: Any, row: Case, method: str, dtype: Any, shape: tuple[int, ...], with_options: bool, as_tensors: bool) -> None:
    """Make one call."""
    operands = row.draw(rng, dtype, shape)
    taken, options = options_of(row), {}
    if with_options:
        options = {row.entry_weight: rng.random(row.entries(shape)).astype(dtype), "mask": rng.random(row.entries(shape)) < 0.7}
        options |= {"validate": True} if "validate" in taken else {}
        options = {name: x for name, x in options.items() if name in taken}
    if not as_tensors:
        getattr(row.loss, method)(*operands, **options)
        return
    tensors = [to_tensor(x) for x in operands]
    for k in row.gradients if method == "__call__" else ():
        tensors[k].requires_grad_()
    value = getattr(row.loss, method)(*tensors, **{name: to_tensor(x) if np.ndim(x) else x for name, x in options.items()})
    if method == "__call__" and row.gradients:
        (value[0] if isinstance(value, tuple) else value).sum().backward()


def call_wrongly(rng: Any) -> None:
    """Make calls that raise errors, which hold the arrays of their call until they are gone."""
    z = rng.random((64, 64)).astype(np.float32)
    for t, options in ((z + 2, {"validate": True}), (z[1:], {}), (z, {"reduction": "median"}), (np.full(z.shape, 255), {})):
        try:
            fl.binary_cross_entropy_with_logits(z, t, **options)
        except ValueError:
            continue
        raise AssertionError("an error was expected")


def train(rng: Any) -> None:
    """Make steps whose gradients are so large that their memory is kept."""
    z, t = np.zeros(KEPT, np.float32), rng.integers(0, 256, KEPT, np.uint8)
    for _ in range(3):
        _, grad = fl.binary_cross_entropy_with_logits.value_and_grad(z, t, target_scale=1 / 255)
        z -= grad


def calls(rng: Any) -> list[Callable[[], None]]:
    """Return a sample of the kinds of calls, with calls that raise errors and training steps among them."""
    every = kinds()
    chosen = [every[k] for k in rng.choice(len(every), KINDS, replace=False)]
    return [*(lambda kind=kind: call(rng, *kind) for kind in chosen), lambda: call_wrongly(rng), lambda: train(rng)]


# --- the command ------------------------------------------------------------------------------------------------------


def soak(seconds: float, seed: int, tell: Callable[[float, int, Usage], None]) -> tuple[list[Usage], int]:
    """Make calls for some time after a warm-up; return what the process held since, and the number of calls."""
    rng = np.random.default_rng(seed)
    every = calls(rng)
    for make in track(every * WARM_UP, "warm-up"):
        make()
    start, told, made, seen = perf_counter(), -1e9, 0, list[Usage]()
    while (passed := perf_counter() - start) < seconds:
        if passed - told > min(10.0, seconds / 20):
            told = passed
            seen.append(usage())
            tell(passed, made, seen[-1])
        every[rng.integers(len(every))]()
        made += 1
    return seen, made


def faults(seen: Sequence[Usage]) -> list[str]:
    """Return what grew between the first and the last third of what was seen."""
    third = max(1, len(seen) // 3)
    first, last = seen[:third], seen[-third:]
    found = []
    for name in Usage._fields[:-1]:
        before, after = (max(getattr(one, name) for one in part) for part in (first, last))
        if after > before * (MOST_GROWTH if name == "memory" else 1):
            found.append(f"{name}: from {before:g} to {after:g}")
    most = (memory.MOST_BYTES + 2 * np.zeros(KEPT, np.float32).nbytes) / 2**20
    found += [f"kept memory: {one.kept:.0f} MiB" for one in seen if one.kept > most]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser("python -m tests.soak", description="Make random calls, and watch the resources of the process.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen to a file")
    options = parser.parse_args(arguments)
    console, records = Console(), list[dict[str, float]]()

    def tell(passed: float, made: int, now: Usage) -> None:
        records.append({"seconds": round(passed, 1), "calls": made, **now._asdict()})
        console.print(f"{passed:6.0f} s {made:9,} calls {now.memory:8.1f} MiB, {now.threads} threads, {now.descriptors} files, "
                      f"{now.mappings} mappings, {now.kept:.0f} MiB kept", highlight=False)  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all elements of a small mask may be False
        seen, made = soak(60 * options.minutes, options.seed, tell)
    table = Table("", *Usage._fields)
    for name, of in (("least", min), ("most", max)):
        table.add_row(name, *(f"{of(getattr(one, field) for one in seen):g}" for field in Usage._fields))
    console.print(f"{made:,} calls after the warm-up:", table)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    for fault in (found := faults(seen)):
        console.print(fault, style="red")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
