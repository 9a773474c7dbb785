"""CUDA tensors as CuPy arrays on the same memory. Kernels run on PyTorch's stream and allocate with PyTorch's allocator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from fastloss.backends.torch.dtypes import numpy_dtype
from fastloss.cuda import cupy
from fastloss.cuda.call import DeviceCall
from fastloss.cuda.rescale import rescale

CODES = {torch.float32: "f4", torch.float64: "f8"}


def to_array(tensor: Any) -> Any:
    """Return a CuPy array on a tensor's memory. The array keeps the tensor alive."""
    dtype, size, index = numpy_dtype(tensor.dtype), tensor.element_size(), tensor.get_device()
    if not tensor.numel():
        with cupy.cuda.Device(index):
            return cupy.empty(tuple(tensor.shape), dtype)
    strides = tuple([size * stride for stride in tensor.stride()])
    extent = size * (1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)))
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), extent, tensor, index)
    return cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def to_tensor(array: Any) -> Any:
    """Return a tensor on an array's memory, or the tensor itself that the array was made from."""
    owner = getattr(array.data.mem, "_owner", None)
    if isinstance(owner, torch.Tensor) and (owner.data_ptr(), tuple(owner.shape)) == (array.data.ptr, array.shape):
        return owner
    is_bfloat16 = array.dtype.kind == "V"
    # stream -1 means no synchronisation: the array was computed on PyTorch's current stream
    tensor = torch.utils.dlpack.from_dlpack((array.view(np.int16) if is_bfloat16 else array).__dlpack__(stream=-1))
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


class TensorDeviceCall(DeviceCall):
    """A call on CUDA tensors, viewed as CuPy arrays. Its outputs are allocated as tensors."""

    __slots__ = ()

    @staticmethod
    def empty_like(array: Any) -> Any:
        """Allocate an output with the shape, dtype and memory order of an array, which views a tensor."""
        if not array.size:
            return cupy.empty_like(array)
        viewed, strides = array.data.mem._owner.detach(), [stride // array.dtype.itemsize for stride in array.strides]
        return to_array(torch.empty_like(viewed.as_strided(array.shape, strides)))

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate an array for a reduced value."""
        if 0 in shape:
            return cupy.empty(shape, dtype)
        kind = torch.bfloat16 if dtype.kind == "V" else getattr(torch, dtype.name)
        return to_array(torch.empty(shape, dtype=kind, device=torch.device("cuda", cupy.cuda.runtime.getDevice())))


@functools.cache
def call_of(dtype: torch.dtype) -> type[DeviceCall]:
    """Return the subclass of `TensorDeviceCall` whose values have a dtype."""
    return type("TensorDeviceCallOf", (TensorDeviceCall,), {"__slots__": (), "value_dtype": numpy_dtype(dtype)})


class StreamOfTorch(NamedTuple):
    """A stream of PyTorch in the form of the protocol by which CuPy takes streams of others."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address  # the version of the protocol first


@contextlib.contextmanager
def current(tensor: Any) -> Iterator[None]:
    """Make CuPy use a tensor's device, PyTorch's current stream on it, and PyTorch's allocator."""
    index = tensor.get_device()
    stream = cupy.cuda.Stream.from_external(StreamOfTorch(torch.cuda.current_stream(index).cuda_stream))
    with cupy.cuda.Device(index), stream, cupy.cuda.using_allocator(allocator().malloc):
        yield


@functools.cache
def allocator() -> Any:
    """Wrap PyTorch's allocator for CuPy, so that PyTorch tracks this memory across its streams and CUDA graphs."""
    return cupy.cuda.PythonFunctionAllocator(allocate, lambda address, device: torch.cuda.caching_allocator_delete(address))


def allocate(size: int, device: int) -> int:
    """Allocate memory on a device for the current stream, and return its address."""
    return int(torch.cuda.caching_allocator_alloc(size, device, torch.cuda.current_stream(device)))


def scale(slope: Any, upstream: Any) -> Any:
    """Multiply a gradient in place by an upstream gradient on the device, without making the host wait for its value."""
    if slope.dtype not in CODES or upstream.dtype not in CODES:
        return slope.mul_(upstream)
    with current(slope):
        rescale(slope.data_ptr(), slope.numel(), CODES[slope.dtype], upstream.data_ptr(), CODES[upstream.dtype])
    return slope
