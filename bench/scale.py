"""Compare the loss of files on one process, on two, and on two workers of Dask, from the page cache and from the disk.

python -m bench.scale                         (writes 4 GB to a temporary folder; needs the extras bench, dask and files)
python -m bench.scale --gigabytes 1 --disk    (also empties the page cache before each row, which needs the rights of root)

Rows take turns. The loss is the mean cross-entropy of float32 logits and uint8 images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client, LocalCluster
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastloss as fl
from bench import machine
from bench.score import FILES, read, write_files
from fastloss.core.plan import Array

LOSS, SCALE = fl.binary_cross_entropy_with_logits, 1 / 255
SHAPE = (3, 256, 256)
ROUNDS = 7
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class File:
    """A `.npy` file that is opened where a part of it is read. It takes no memory when it is sent to another process."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, path: Path) -> File:
        """Return a file with its shape and dtype."""
        x = np.load(path, mmap_mode="r")
        return cls(path, x.shape, x.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Array:
        part: Array = np.load(self.path, mmap_mode="r")[index]
        return part

    def lazy(self, block: int) -> Any:
        """Return the file as a Dask array."""
        return da.from_array(self, (block, *self.shape[1:]), inline_array=True, meta=np.empty((0,) * self.ndim, self.dtype))


def main() -> None:
    """Parse the arguments, measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of both files together (default: %(default)s)")
    parser.add_argument("--block", type=int, default=512, help="images in a block (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where a temporary folder is made for the files")
    parser.add_argument("--disk", action="store_true", help="empty the page cache before each row, once more for all rows")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.folder) as name:
        size = write_files(Path(name), SHAPE, options.gigabytes * 1e9)
        for is_cold in (False, True)[: 1 + options.disk]:
            show(size, measure(Path(name), options.block, is_cold), options.block, "from the disk" if is_cold else "from the page cache")


def measure(folder: Path, block: int, is_cold: bool) -> dict[str, list[float]]:
    """Return the seconds of every row in every round."""
    x, y = (File.open(folder / name).lazy(block) for name in FILES)
    images = len(x)
    halves = [(0, images // 2), (images // 2, images)]
    with (
        ProcessPoolExecutor(2, get_context("spawn"), fl.set_num_threads, (1,)) as pool,
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.run(fl.set_num_threads, 1)
        rows: dict[str, Callable[[], Any]] = {
            "reading alone, 1 thread": lambda: read(folder, 1),
            "one process, 1 thread": lambda: pool.submit(part, folder, block, 0, images).result(),
            f"one process, {machine.cpus()} threads": lambda: part(folder, block, 0, images),
            "two processes, each on half of the images": lambda: list(pool.map(partial(part, folder, block), *zip(*halves, strict=True))),
            "Dask, two worker processes": lambda: client.compute(LOSS(x, y, target_scale=SCALE)).result(),
            "Dask, two worker processes, norm of the gradient": lambda: client.compute(
                (LOSS.grad(x, y, target_scale=SCALE) ** 2).sum()
            ).result(),
        }
        for row in rows.values():  # fills the page cache, and compiles
            row()
        found: dict[str, list[float]] = {name: [] for name in rows}
        for _ in track(range(ROUNDS), "rounds", console=Console(stderr=True)):
            for name, row in rows.items():
                if is_cold:
                    DROP_CACHES.write_text("3")
                begin = time.perf_counter()
                row()
                found[name].append(time.perf_counter() - begin)
    return found


def part(folder: Path, block: int, first: int, last: int) -> float:
    """Return the loss of some images."""
    total = fl.Accumulator(LOSS, target_scale=SCALE)
    x, y = (File.open(folder / name) for name in FILES)
    for at in range(first, last, block):
        images = slice(at, min(at + block, last))
        total.update(x[images], y[images])
    return float(total.compute())


def show(size: int, seconds: dict[str, list[float]], block: int, where: str) -> None:
    """Print the median of each row, with its rate."""
    console = Console(highlight=False)
    shape = " x ".join(map(str, SHAPE))
    table = Table(title=f"{size / 1e9:.2f} GB {where}, images of {shape}, blocks of {block} images; medians of {ROUNDS} rounds")
    for heading in ("", "s", "GB/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in seconds.items():
        median = float(np.median(found))
        table.add_row(name, f"{median:.3f}", f"{size / median / 1e9:.2f}")
    console.print(table)
    pair = [seconds[name] for name in seconds if name.startswith(("two processes", "Dask, two worker processes"))][:2]
    ratio = float(np.median([b / a for a, b in zip(*pair, strict=True)]))
    console.print(f"two workers of Dask take {ratio:.2f} x the time of two processes")
    console.print(machine.sentence(machine.description(fl.get_num_threads())))


if __name__ == "__main__":
    main()
