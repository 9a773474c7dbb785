"""Compare the speed of `fastloss score` with that of reading its two files alone, from the page cache, and show its memory.

python -m bench.score                         (writes 4 GB to a temporary folder; needs the extras bench and files)
python -m bench.score --gigabytes 1 --shape 1,28,28

Rows take turns. Reading alone goes through `preadv` into buffers that are used again, by one thread and by one for each CPU.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastloss as fl
from bench import machine
from fastloss.score.arguments import shape as to_shape

STEP = 4 << 20  # bytes of a read
WRITTEN = 8 << 20  # bytes that are written at a time; the memory of this process counts as that of its children when they start
RATE = re.compile(r"GB in ([\d.]+) s")
FILES = ("x.npy", "y.npy")
ROUNDS = 7


def main() -> None:
    """Parse the arguments, measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.score", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of both files together (default: %(default)s)")
    parser.add_argument("--shape", type=to_shape, default=(3, 256, 256), metavar="C,H,W", help="shape of an image")
    parser.add_argument("--folder", type=Path, help="where a temporary folder is made for the files")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.folder) as folder:
        size = write_files(Path(folder), options.shape, options.gigabytes * 1e9)
        show(size, options.shape, measure(Path(folder)))


def write_files(folder: Path, shape: tuple[int, ...], size: float) -> int:
    """Write float32 logits and uint8 images, and return the number of bytes. The same random images are repeated."""
    rng, images = np.random.default_rng(0), round(size / 5 / math.prod(shape))
    block = max(1, WRITTEN // 4 // math.prod(shape))
    logits = 3 * rng.standard_normal((block, *shape), dtype=np.float32)
    drawn: list[Any] = [logits, rng.integers(0, 256, logits.shape, dtype=np.uint8)]
    for name, x in zip(FILES, drawn, strict=True):
        with (folder / name).open("wb") as file:
            header = {"descr": x.dtype.str, "fortran_order": False, "shape": (images, *shape)}
            np.lib.format.write_array_header_2_0(file, header)
            for first in range(0, images, block):
                file.write(x[: images - first].data)
    return sum((folder / name).stat().st_size for name in FILES)


def measure(folder: Path) -> dict[str, list[float]]:
    """Return the seconds of every row in every round, and the most memory that a process of `fastloss score` had, in bytes."""
    rows: dict[str, Callable[[], list[float]]] = {
        "reading alone, 1 thread": lambda: [read(folder, 1)],
        f"reading alone, {machine.cpus()} threads": lambda: [read(folder, machine.cpus())],
        "fastloss score": lambda: score(folder),
    }
    for row in rows.values():  # fills the page cache, and compiles
        row()
    found: dict[str, list[float]] = {name: [] for name in (*rows, "fastloss score, the whole process")}
    for _ in track(range(ROUNDS), "rounds", console=Console(stderr=True)):
        for name, row in rows.items():
            for label, seconds in zip((name, f"{name}, the whole process"), row(), strict=False):
                found[label].append(seconds)
    return found


def read(folder: Path, threads: int) -> float:
    """Read both files, and return the seconds."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for name in FILES:
            list(pool.map(partial(read_every, folder / name, threads), range(threads)))
    return time.perf_counter() - begin


def read_every(path: Path, threads: int, first: int) -> None:
    """Read the parts of a file that fall to a thread."""
    buffer = memoryview(bytearray(STEP))
    with path.open("rb", buffering=0) as file:
        for at in range(first * STEP, path.stat().st_size, threads * STEP):
            os.preadv(file.fileno(), [buffer], at)


def score(folder: Path) -> list[float]:
    """Run `fastloss score`; return the seconds from its first batch to its last, and those of the whole process."""
    options = ["--loss", "binary_cross_entropy_with_logits", "--target-scale", "1/255", "--out", str(folder / "out.csv")]
    command = [sys.executable, "-m", "fastloss", "score", *(str(folder / name) for name in FILES), *options]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    found = RATE.search(done.stdout)
    if found is None:
        raise ValueError(f"fastloss score printed no rate: {done.stdout}")
    return [float(found[1]), seconds]


def show(size: int, shape: tuple[int, ...], seconds: dict[str, list[float]]) -> None:
    """Print the median of each row, with the ratio of its speed to that of reading by one thread, and the memory."""
    console, medians = Console(highlight=False), {name: float(np.median(x)) for name, x in seconds.items()}
    table = Table(title=f"{size / 1e9:.2f} GB in the page cache, images of {' x '.join(map(str, shape))}; medians of {ROUNDS} rounds")
    for heading in ("", "s", "GB/s", "of reading alone"):
        table.add_column(heading, justify="right" if heading else "left")
    alone = next(iter(medians.values()))
    for name, median in medians.items():
        table.add_row(name, f"{median:.3f}", f"{size / median / 1e9:.2f}", f"{alone / median:.2f}")
    console.print(table)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    console.print(
        f"most memory of a process: {memory / 1e6:.0f} MB (ru_maxrss); {machine.sentence(machine.description(fl.get_num_threads()))}"
    )


if __name__ == "__main__":
    main()
