"""A stand-in for CuPy, for machines without a GPU: arrays in the host's memory, and kernels compiled by the C++ compiler.

It has the functions of CuPy that fastloss uses, and is as strict as CuPy: its arrays do not mix with NumPy's, and are converted
to them only by `get`. Operations that would make the host wait for the device are counted in `waits`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.kernel.cache import cache_folder

FOLDER = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++17", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC")
# Alignment is checked, because a GPU does not support unaligned loads and stores: one of them ends the process. Optimisation is off,
# because with these checks, g++ 12 computes wrong sums under optimisation. A kernel is linked with no library, which halves the time
# that it takes: it finds functions of libm through the library that runs blocks.
OF_KERNELS = ("-O0", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-nostdlib")

waits = 0  # how often the host waited for the device
launches: list[str] = []  # the names of the kernels that were launched
streams: list[int] = []  # the stream of each launch


def wait() -> None:
    """Count that the host waits."""
    global waits
    waits += 1


def submit(work: Any) -> None:
    """Do work on the current stream, or record it if the stream is captured."""
    current.stream.recorded.append(work) if current.stream.captures else work()


class CUDARuntimeError(RuntimeError):
    """Stand in for the exception of the same name in CuPy."""


class MemoryPointer:
    """Memory of the device, at an address."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def copy_from_device_async(self, source: MemoryPointer, size: int) -> None:
        """Copy bytes from other memory of the device."""
        ctypes.memmove(self.ptr, source.ptr, size)

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        """Fill memory with a byte."""
        submit(lambda: ctypes.memset(self.ptr, value, size))


class Memory:
    """Memory filled with garbage, because memory of a device is not initialised."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size + 512, 0xA5, np.uint8)
        self.ptr = -(-self.bytes.ctypes.data // 512) * 512
        self.size, self.device_id = size, current.device


class UnownedMemory:
    """Memory that another library owns."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = 0) -> None:
        self.ptr, self.size, self._owner, self.device_id = ptr, size, owner, device_id


current = types.SimpleNamespace(device=0, stream=None, allocator=None, is_full=False)


def alloc(size: int) -> MemoryPointer:
    """Return memory from the pool."""
    if current.is_full:
        raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes")
    return current.allocator(size) if current.allocator else MemoryPointer(Memory(size), 0)


class OutOfMemoryError(MemoryError):
    """Stand in for the exception of the same name in CuPy."""


class ndarray:  # noqa: N801 (CuPy's name)
    """An array on the device."""

    __module__ = "cupy"

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.data = alloc(max(1, int(np.prod(shape)) * dtype.itemsize)) if memptr is None else memptr
        self._host = view_of(self.data, shape, dtype, strides)

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    T = property(lambda self: wrap(self._host.T, self.data))

    @property
    def flags(self) -> Any:
        """The flags of the memory's order."""
        return self._host.flags

    def get(self) -> Any:
        """Return a copy on the host."""
        wait()
        return self._host.copy()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return wrapped(getattr(ufunc, method)(*map(unwrap, inputs), **{k: unwrap(v) for k, v in kwargs.items()}))

    def __array_function__(self, function: Any, kinds: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("shape") == ():  # CuPy ignores this shape
            kwargs = {name: x for name, x in kwargs.items() if name != "shape"}
        result = function(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})
        if isinstance(result, np.ndarray):
            for x in args:
                if isinstance(x, ndarray) and np.may_share_memory(result, x._host):
                    return wrap(result, x.data)
        return wrapped(result)

    def __dlpack__(self, **options: Any) -> Any:
        return self._host.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._host.__dlpack_device__()

    def __float__(self) -> float:
        wait()
        return float(self._host)

    def tolist(self) -> Any:
        """Return the elements on the host."""
        wait()
        return self._host.tolist()

    def __bool__(self) -> bool:
        wait()
        return bool(self._host)

    def __iter__(self) -> Any:
        return (self[k] for k in range(len(self._host)))

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, index: Any) -> Any:
        index = unwrap(index)
        every = index if isinstance(index, tuple) else (index,)
        part = self._host[index if any(x is Ellipsis for x in every) else (*every, ...)]  # with an ellipsis, a single element is a view too
        return wrap(part, self.data) if isinstance(part, np.ndarray) and part.base is not None else wrapped(part)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[unwrap(index)] = unwrap(value)

    def __getattr__(self, name: str) -> Any:
        if name not in ("astype", "reshape", "sum", "transpose", "copy", "view", "max", "min", "all", "any", "fill"):
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self._host, name)(*args, **kwargs)
            shares = isinstance(result, np.ndarray) and np.may_share_memory(result, self._host)
            return wrap(result, self.data) if shares else wrapped(result)

        return method


_OPERATORS = """add sub mul truediv radd rsub rmul rtruediv gt ge lt le eq ne pow rpow neg and matmul"""
for _name in _OPERATORS.split():

    def _operator(self: Any, *others: Any, name: str = f"__{_name}__") -> Any:
        return wrapped(getattr(self._host, name)(*map(unwrap, others)))

    setattr(ndarray, f"__{_name}__", _operator)


def view_of(memory: MemoryPointer, shape: Any, dtype: Any, strides: Any = None) -> Any:
    """Return a NumPy array that views memory, and keeps it."""
    if strides is None:
        strides = np.cumprod([dtype.itemsize, *shape[:0:-1]])[::-1].tolist() if shape else ()
    interface = {
        "shape": tuple(shape),
        "typestr": np.dtype(f"V{dtype.itemsize}").str,
        "strides": tuple(strides),
        "data": (memory.ptr, False),
        "version": 3,
    }
    owner = types.SimpleNamespace(__array_interface__=interface, memory=memory)
    return np.asarray(owner).view(dtype) if 0 not in shape else np.empty(shape, dtype)


def wrap(host: Any, owner: MemoryPointer) -> ndarray:
    """Return an array of the device that views memory of the host, which lies in an owner's memory."""
    made = ndarray.__new__(ndarray)
    made._host, made.data = host, owner + (host.ctypes.data - owner.ptr)
    return made


def wrapped(result: Any) -> Any:
    """Copy a result's arrays to the device."""
    if isinstance(result, (tuple, list)):
        return type(result)(map(wrapped, result))
    if isinstance(result, (np.ndarray, np.generic)):
        return asarray(result)
    return result


def unwrap(x: Any) -> Any:
    """Return the operand of an operation as a NumPy array, and refuse arrays of the host."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, (tuple, list)):
        return type(x)(map(unwrap, x))
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


def asarray(x: Any, dtype: Any = None) -> ndarray:
    """Copy an array to the device, in the same memory order."""
    host = np.asarray(x, dtype)
    made = like(host)
    made._host[...] = host
    return made


def like(host: Any) -> ndarray:
    """Return an uninitialised array of the same shape, dtype and memory order as an array of the host."""
    dense = np.empty_like(host)
    return ndarray(dense.shape, dense.dtype, strides=dense.strides)


def empty_like(array: ndarray) -> ndarray:
    """Return an uninitialised array of the same shape, dtype and memory order."""
    return like(array._host)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Return an uninitialised array."""
    return ndarray(shape, dtype)


def broadcast_to(array: ndarray, shape: tuple[int, ...]) -> ndarray:
    """Return a view that repeats an array along broadcast axes."""
    return wrap(np.broadcast_to(array._host, shape), array.data)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    """Return an array of zeros."""
    made = ndarray(shape, dtype)
    made._host[...] = 0
    return made


class NVRTC:
    """The compiler of CUDA text. It returns the text itself, which `Module` compiles."""

    NVRTCError = RuntimeError

    def __init__(self) -> None:
        self.options: list[tuple[str, ...]] = []

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return 0, 0

    def getSupportedArchs(self) -> list[int]:  # noqa: N802
        return [0]

    def createProgram(self, text: str, name: str, headers: Any, names: Any) -> str:  # noqa: N802
        assert text.isascii()  # NVRTC accepts only ASCII
        return text

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:  # noqa: N802
        self.options.append(options)

    def getCUBIN(self, program: str) -> bytes:  # noqa: N802
        return program.encode()

    def destroyProgram(self, program: str) -> None:  # noqa: N802
        pass


nvrtc = NVRTC()


class Module:
    """A kernel's CUDA text, compiled by the C++ compiler."""

    def load(self, code: bytes) -> None:
        """Load the code that NVRTC returned."""
        self.code = code.decode().rstrip("\0")

    def get_function(self, name: str) -> Any:
        """Return the function that launches a kernel."""
        library = compiled(self.code, name)

        def launch(grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
            launches.append(name)
            streams.append(current.stream.ptr)
            (frame,) = args
            assert frame.nbytes == library.size_of_arguments(), (frame.nbytes, library.size_of_arguments())

            def work() -> None:
                library.launch(ctypes.c_void_p(frame.ctypes.data), grid[0], block[0], next(SEEDS))

            submit(work)

        return launch


SEEDS = itertools.count()


@functools.cache
def compiled(code: str, name: str) -> Any:
    """Compile the library of a kernel."""
    blocks()
    library = build(
        f'''#include "{FOLDER}/shim.h"
{code}
extern "C" void body(const void* a) {{ {name}(*(const Arguments*)a); }}
extern "C" long size_of_arguments() {{ return sizeof(Arguments); }}
''',
        OF_KERNELS,
    )
    library.launch = functools.partial(blocks().launch, library.body)
    return library


@functools.cache
def blocks() -> Any:
    """Return the library that runs blocks, and defines the indices of blocks and threads for kernels."""
    return build((FOLDER / "block.cpp").read_text(), ("-O2",), ctypes.RTLD_GLOBAL)


def build(text: str, flags: tuple[str, ...], mode: int = ctypes.DEFAULT_MODE) -> Any:
    """Compile a library, or load it from the cache folder."""
    command = [COMPILER, *FLAGS, *flags]
    digest = hashlib.sha256((text + (FOLDER / "shim.h").read_text() + repr(command)).encode()).hexdigest()
    path = (cache_folder() or Path(tempfile.gettempdir())) / "kernels" / digest
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-x", "c++", "-o", str(own), "-"], input=text.encode(), check=True)
        own.replace(path)
    return ctypes.CDLL(str(path), mode)


class RawKernel:
    """A kernel that does nothing."""

    def __init__(self, code: str, name: str) -> None:
        self.code = code

    def __call__(self, grid: Any, block: Any, args: Any) -> None:
        pass


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(np, name):
        raise AttributeError(name)
    if isinstance(getattr(np, name), type):
        return getattr(np, name)
    return lambda *args, **options: wrapped(getattr(np, name)(*map(unwrap, args), **options))


class Stream:
    """A stream. Without a device, work is done when it is submitted."""

    null: Any = None

    def __init__(self, ptr: int = 0, non_blocking: bool = False) -> None:
        self.ptr, self.captures, self.recorded = ptr, False, list[Any]()

    @classmethod
    def from_external(cls, stream: Any) -> Stream:
        """Return a stream that belongs to another library."""
        version, address = stream.__cuda_stream__()
        assert version == 0
        return cls(address)

    def begin_capture(self) -> None:
        """Capture launches instead of running them."""
        self.captures = True

    def end_capture(self) -> Any:
        """Return a graph of the captured work."""
        self.captures, recorded, self.recorded = False, self.recorded, []

        def launch(stream: Any = None) -> None:
            for work in recorded:
                work()

        return types.SimpleNamespace(launch=launch, nodes=len(recorded))

    def is_capturing(self) -> bool:
        """Whether launches are captured."""
        return self.captures

    def synchronize(self) -> None:
        """Count that the host waits."""
        wait()

    def __enter__(self) -> Stream:
        self.before, current.stream = current.stream, self
        return self

    def __exit__(self, *error: Any) -> None:
        current.stream = self.before


current.stream = Stream.null = Stream()


class Device:
    """A device."""

    compute_capability = "0"

    def __init__(self, id: int = 0) -> None:
        self.id = id

    def __enter__(self) -> Device:
        self.before, current.device = current.device, self.id
        return self

    def __exit__(self, *error: Any) -> None:
        current.device = self.before

    def synchronize(self) -> None:
        """Count that the host waits."""
        wait()


@contextlib.contextmanager
def using_allocator(allocator: Any) -> Any:
    """Use another allocator within a block."""
    before, current.allocator = current.allocator, allocator
    try:
        yield
    finally:
        current.allocator = before


class PythonFunctionAllocator:
    """An allocator made of two functions."""

    def __init__(self, malloc: Any, free: Any) -> None:
        self.malloc_, self.free = malloc, free

    def malloc(self, size: int) -> MemoryPointer:
        """Allocate memory by the first function."""
        return MemoryPointer(UnownedMemory(self.malloc_(size, current.device), size, None, current.device), 0)


def alloc_pinned_memory(size: int) -> Any:
    """Return memory of the host that a device can write to."""
    return Memory(size)


def get_default_memory_pool() -> Any:
    """Return the pool of freed memory."""
    return types.SimpleNamespace(free_all_blocks=lambda: None)


def memcpy(to: int, source: int, size: int, way: int) -> None:
    """Copy bytes between the host and the device."""
    ctypes.memmove(to, source, size)


runtime = types.SimpleNamespace(
    getDevice=lambda: current.device, getDeviceCount=lambda: 2, deviceGetAttribute=lambda attribute, device: 3,
    cudaDevAttrMultiProcessorCount=16, CUDARuntimeError=CUDARuntimeError, deviceSynchronize=wait, memcpy=memcpy,
    runtimeGetVersion=lambda: 13010, driverGetVersion=lambda: 13020,
    getDeviceProperties=lambda device: {"name": b"the stand-in", "multiProcessorCount": 3, "totalGlobalMem": 1 << 30},
)  # fmt: skip
cuda = types.SimpleNamespace(
    function=types.SimpleNamespace(Module=Module),
    runtime=runtime, memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError), alloc=alloc, MemoryPointer=MemoryPointer,
    alloc_pinned_memory=alloc_pinned_memory, UnownedMemory=UnownedMemory, Stream=Stream, Device=Device,
    get_current_stream=lambda: current.stream, using_allocator=using_allocator, PythonFunctionAllocator=PythonFunctionAllocator,
)  # fmt: skip
