"""Sources of images: `.npy` and raw files, Zarr arrays, and folders of pictures, of which a few images at a time are in memory."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastloss.core.plan import Array

CHUNKS = 2  # of a Zarr array, that are decoded at a time


class Source(Protocol):
    """An array on disk. The entries of its first axis are called images."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    together: int  # images that are stored together, and cannot be read one by one without reading all of them
    working_bytes: int  # that reading takes besides the images

    def read(self, first: int, out: Array) -> Array:
        """Return as many images as `out` holds, from the image with index `first` on: in `out`, or where they are."""
        ...

    def names(self) -> list[str] | None:
        """Return the name of each image, if images have names."""
        ...


class FlatFile:
    """Numbers in C order in a file, behind a header or without one."""

    together, working_bytes = 1, 0

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0) -> None:
        self.path, self.dtype, self.shape, self.offset = path, dtype, shape, offset
        found, wanted = path.stat().st_size, offset + math.prod(shape) * dtype.itemsize
        if found != wanted:
            raise ValueError(f"{path} has {found:,} bytes; {dtype} of shape {shape} takes {wanted:,}{' with its header' * bool(offset)}")
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, first: int, out: Array) -> Array:
        """Map images into memory. Their pages count as the process's own until the array is freed.

        Copies by `preadv`, in batches that stay in the caches, took a quarter longer: 215 ms for 1 GB, and maps 174.
        """
        begin = self.offset + first * math.prod(self.shape[1:]) * self.dtype.itemsize
        if os.fstat(self.descriptor).st_size < begin + out.nbytes:  # the system ends a process that reads a map beyond its file's end
            raise ValueError(f"{self.path} was truncated after it had been opened")
        at = begin - begin % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self.descriptor, begin + out.nbytes - at, prot=mmap.PROT_READ, offset=at)
        return np.frombuffer(pages, self.dtype, out.size, begin - at).reshape(out.shape)

    def names(self) -> None:
        """Return None: images have no names."""


def open_npy(path: Path) -> FlatFile:
    """Open a `.npy` file in C order."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with path.open("rb") as file:
        try:
            shape, is_fortran, dtype = headers[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a .npy file, or its header is damaged: {error}") from None
        offset = file.tell()
    if is_fortran and len(shape) > 1:
        raise ValueError(f"{path} is in Fortran order, in which images are interleaved; accepted: C order, numpy.ascontiguousarray(x)")
    if dtype.hasobject:
        raise TypeError(f"{path} holds Python objects; accepted: numbers")
    return FlatFile(path, dtype, shape, offset)


class RawFormat(NamedTuple):
    """The dtype and the shape of the numbers in a raw file, as far as they are known."""

    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None


class ZarrArray:
    """A Zarr array in a folder."""

    def __init__(self, path: Path) -> None:
        import zarr
        from zarr.buffer.cpu import NDBuffer

        zarr.config.set({"async.concurrency": CHUNKS, "threading.max_workers": CHUNKS})
        try:
            self.array = zarr.open_array(path, mode="r")
        except Exception as error:  # of many types
            raise ValueError(f"{path} is not a Zarr array: {error}") from None
        self.path, self.dtype, self.shape = path, np.dtype(self.array.dtype), self.array.shape
        self.working_bytes = 2 * CHUNKS * math.prod(self.array.chunks) * self.dtype.itemsize  # each encoded and decoded
        self.together = self.array.chunks[0] if self.shape else 1
        self.buffer = NDBuffer.from_numpy_array

    def read(self, first: int, out: Array) -> Array:
        """Read images into `out`."""
        try:
            self.array.get_basic_selection(slice(first, first + len(out)), out=self.buffer(out))
            return out
        except Exception as error:  # of the store and of the codecs
            raise ValueError(f"{self.path}: images {first} to {first + len(out) - 1} cannot be read: {error}") from None

    def names(self) -> None:
        """Return None: images have no names."""


class PictureFolder:
    """A folder of pictures of one size and mode, in the order of their names. `like` is the shape that the images should have."""

    together, working_bytes = 1, 0

    def __init__(self, path: Path, like: tuple[int, ...]) -> None:
        from PIL import Image

        accepted = Image.registered_extensions()
        self.path, self.files = path, sorted(file for file in path.iterdir() if file.suffix.lower() in accepted)
        if not self.files:
            raise ValueError(f"{path} is a folder without pictures; accepted: files that Pillow reads, or a Zarr array")
        self._open: Callable[[Path], Any] = Image.open
        first = self.load(self.files[0])
        self.dtype, self.stored = first.dtype, first.shape
        self.arrange = arrangement(first.shape, like[1:])
        self.shape = (len(self.files), *self.arrange(first).shape)
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def load(self, file: Path) -> Array:
        """Decode a picture: the array (height, width) or (height, width, channels)."""
        try:
            with self._open(file) as picture:
                return np.asarray(picture)
        except Exception as error:  # of the decoders
            raise ValueError(f"{file} cannot be read as a picture: {error}") from None

    def read(self, first: int, out: Array) -> Array:
        """Decode pictures into `out`, several at a time."""
        for k, x in enumerate(self.pool.map(self.load, self.files[first : first + len(out)])):
            if (x.shape, x.dtype) != (self.stored, self.dtype):
                found, wanted = f"{x.dtype} of shape {x.shape}", f"{self.dtype} of shape {self.stored}"
                raise ValueError(f"{self.files[first + k]} has {found}; {self.files[0].name} has {wanted}, and all must be alike")
            out[k] = self.arrange(x)
        return out

    def names(self) -> list[str]:
        """Return the pictures' file names."""
        return [file.name for file in self.files]


def arrangement(stored: tuple[int, ...], wanted: tuple[int, ...]) -> Callable[[Array], Array]:
    """Return a function that moves the channels of a picture to where the input has them; the identity if no place fits."""
    if len(stored) == 2 and wanted in ((1, *stored), (*stored, 1)):
        return lambda x: x.reshape(wanted)
    if len(stored) == 3 and stored != wanted and (stored[2], *stored[:2]) == wanted:
        return lambda x: x.transpose(2, 0, 1)
    return lambda x: x


def open_source(path: Path, name: str, raw: RawFormat | None = None, pictures_like: tuple[int, ...] | None = None) -> Source:
    """Open the array called `name`: a `.npy` file, a Zarr array, a raw file if its format is known, or pictures if they are accepted."""
    if not path.exists():
        raise ValueError(f"{name}: {path} does not exist")
    if path.is_dir():
        if any((path / file).exists() for file in ("zarr.json", ".zarray", ".zgroup")):
            return ZarrArray(path)
        if pictures_like is None:
            raise ValueError(f"{name}: {path} is a folder, but no Zarr array; accepted: a .npy file or a Zarr array; pictures as targets")
        return PictureFolder(path, pictures_like)
    if path.suffix == ".npy":
        return open_npy(path)
    if raw is None or raw.dtype is None or raw.shape is None:
        raise ValueError(f"{name}: {path} is neither .npy nor Zarr; raw numbers, as inputs and targets, need --dtype and --shape")
    return FlatFile(path, raw.dtype, raw.shape)


def to_dtype(text: str) -> np.dtype[Any]:
    """Parse the name of a dtype; bfloat16 is known if `ml_dtypes` is installed."""
    with contextlib.suppress(ModuleNotFoundError):
        import ml_dtypes  # noqa: F401
    try:
        return np.dtype(text)
    except TypeError:
        raise ValueError(f"{text!r} is not a dtype; examples: float32, bfloat16, uint8") from None


def stamp(source: Source) -> str:
    """Describe the files of a source, so that a change of any of them shows."""
    path = source.path.resolve()
    files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    found = [file.stat() for file in files]
    return f"{path}: {source.dtype} {source.shape}, {sum(s.st_size for s in found)} bytes, changed {max(s.st_mtime_ns for s in found)}"
