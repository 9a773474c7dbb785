"""`Batches`: the loss of the images in files. Several threads read and compute batches of their own at the same time.

With a thread that reads one batch ahead, while the others compute the one before, it takes longer: they wait for each other.
"""

from __future__ import annotations

import math
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

import fastloss as fl
from fastloss.core.checks import check_dtype
from fastloss.core.plan import Array
from fastloss.score.sources import Source

LEAST_BYTES, BATCH_BYTES = 4 << 20, 16 << 20  # of a batch. Smaller ones take longer, because of the time of a call
TOGETHER_BYTES = 32 << 20  # of all batches in memory together, unless an image is larger
MOST_IMAGES = 1 << 17  # in a batch, for which numbers of 8 bytes are kept
MOST_BYTES = 64 << 20  # of an image and the memory to decode it


class Scores(fl.Accumulator):
    """An accumulator that also has the loss of each image of the last batch: NaN if none of its elements counts."""

    values: npt.NDArray[np.float64]
    is_empty: npt.NDArray[np.bool_]

    def _add(self, found: dict[str, Any], samples: int) -> None:
        """Add the numbers of a batch's images, and compute the loss of each."""
        super()._add(found, samples)
        rows = {name: np.full((samples, 1), x / samples) if isinstance(x, int) else x.reshape(samples, -1) for name, x in found.items()}
        with np.errstate(all="ignore"):
            values = self.loss.value_of_sums(rows, 1, self.reduction, self.options)
        self.is_empty = rows["count"].sum(axis=1) == 0
        self.values = np.where(self.is_empty, np.nan, values)


class Batches:
    """The loss of images in files.

    Args:
        loss: a loss of an input and a target.
        sources: the arrays that are read in batches: "input", "target", and arrays that are options, by name.
        whole: arrays that are options and are the same for all images.
        settings: all other arguments of an accumulator.
    """

    def __init__(self, loss: Any, sources: Mapping[str, Source], whole: Mapping[str, Array], settings: Mapping[str, Any]) -> None:
        self.loss, self.sources, self.whole, self.settings = loss, sources, whole, settings
        check_sources(loss, sources)
        self.count = sources["input"].shape[0]
        self.image_bytes = sum(math.prod(source.shape[1:]) * source.dtype.itemsize for source in sources.values())
        working_bytes = sum(source.working_bytes for source in sources.values())
        if self.image_bytes + working_bytes > MOST_BYTES:
            found = f"an image takes {self.image_bytes / 2**20:,.1f} MiB, with its {' and '.join(list(sources)[1:])}"
            found += f", and decoding chunks takes {working_bytes / 2**20:,.1f} MiB" if working_bytes else ""
            raise ValueError(f"{found}; accepted: at most {MOST_BYTES >> 20} MiB, so that the process stays below 300 MB")
        self.step = self.images_in_a_batch()
        self.workers = min(fl.get_num_threads(), max(1, TOGETHER_BYTES // (self.step * self.image_bytes)))
        self.own = threading.local()  # each thread's memory for a batch

    def images_in_a_batch(self) -> int:
        """Return the number of images in a batch: whole chunks of Zarr arrays, if they fit."""
        size = min(BATCH_BYTES, max(LEAST_BYTES, TOGETHER_BYTES // fl.get_num_threads()))
        step = min(max(1, size // self.image_bytes), MOST_IMAGES)
        together = math.lcm(*(source.together for source in self.sources.values()))
        return -(-step // together) * together if together * self.image_bytes <= TOGETHER_BYTES else step

    def prepare(self) -> None:
        """Compile or load the kernels, and check the options: compute the loss of two images of zeros, which take no memory."""
        zeros = {name: np.zeros((2, *source.shape[1:]), source.dtype) for name, source in self.sources.items()}
        self.accumulator().update(zeros.pop("input"), zeros.pop("target"), **self.whole, **zeros)

    def accumulator(self) -> fl.Accumulator:
        """Return an accumulator without images, which batches can be merged into."""
        return fl.Accumulator(self.loss, **self.settings)

    def read(self, first: int, last: int) -> dict[str, Array]:
        """Read images, into this thread's memory, which the next call overwrites, or as maps of files."""
        if not hasattr(self.own, "memory"):
            self.own.memory = self.allocate(self.step)
        return self.fill(first, {name: x[: last - first] for name, x in self.own.memory.items()})

    def read_one(self, image: int) -> dict[str, Array]:
        """Read a single image."""
        return self.fill(image, self.allocate(1))

    def allocate(self, images: int) -> dict[str, Array]:
        """Return arrays for some images."""
        return {name: np.empty((images, *source.shape[1:]), source.dtype) for name, source in self.sources.items()}

    def fill(self, first: int, memory: dict[str, Array]) -> dict[str, Array]:
        """Read images from the one with index `first` on, into this memory or as maps of files."""
        return {name: source.read(first, memory[name]) for name, source in self.sources.items()}

    def score(self, first: int) -> Scores:
        """Read a batch, and compute the loss of its images. Raise ValueError for the first one whose loss is NaN."""
        arrays = self.read(first, min(first + self.step, self.count))
        options = {**self.whole, **{name: x for name, x in arrays.items() if name not in ("input", "target")}}
        scores = Scores(self.loss, **self.settings)
        try:
            scores.update(arrays["input"], arrays["target"], **options)
        except ValueError as error:
            raise ValueError(count_from(first, str(error))) from None
        if (bad := np.isnan(scores.values) & ~scores.is_empty).any():
            k = int(np.argmax(bad))
            raise ValueError(describe_nan(first + k, {name: x[k] for name, x in arrays.items()}))
        return scores

    def from_image(self, first: int) -> Iterator[Scores]:
        """Compute the batches from an image on, several at a time, and yield them in their order."""
        waiting: deque[Future[Scores]] = deque()
        threads = fl.get_num_threads()
        fl.set_num_threads(max(1, threads // self.workers))
        try:
            with ThreadPoolExecutor(self.workers) as pool:
                for start in range(first, self.count, self.step):
                    waiting.append(pool.submit(self.score, start))
                    if len(waiting) > 2 * self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
        finally:
            fl.set_num_threads(threads)


def check_sources(loss: Any, sources: Mapping[str, Source]) -> None:
    """Raise ValueError or TypeError for arrays that a loss does not take, before any image is read."""
    shape = sources["input"].shape
    for name, source in sources.items():
        check_dtype(name, source.dtype)
        if name == "target":
            loss.check_operands(shape, source)
    if not math.prod(shape) or not shape or loss.axes_of("grad_output", 1, len(shape)) != (0,):
        raise ValueError(f"input has shape {shape}; accepted: at least one image, along the first axis, with at least one element")


def count_from(first: int, message: str) -> str:
    """Correct the index in the error message of a batch that starts at an image: `target[0, 2]` is `target[first, 2]` in the file."""
    return re.sub(r"^(input|target)\[(\d+)", lambda match: f"{match[1]}[{first + int(match[2])}", message)


def describe_nan(image: int, arrays: Mapping[str, Array]) -> str:
    """Compose the error message for an image whose loss is NaN."""
    for name, x in arrays.items():
        if x.dtype.kind not in "biu" and (bad := np.isnan(x.astype(np.float32))).any():
            where = ", ".join(map(str, (image, *map(int, np.unravel_index(np.argmax(bad), bad.shape)))))
            found = f"{np.count_nonzero(bad)} of {bad.size} elements of its {name} are NaN"
            return f"the loss of image {image} is NaN: {found}, the first is {name}[{where}]"
    return f"the loss of image {image} is NaN, although no element of its {' or '.join(arrays)} is"
