"""CUDA tensors as CuPy's arrays on the same memory; what is computed for them runs on PyTorch's stream, in PyTorch's memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastloss.backends.torch.dtypes import numpy_dtype
from fastloss.cuda import cupy
from fastloss.cuda.call import DeviceCall
from fastloss.cuda.rescale import rescale

CODES = {torch.float32: "f4", torch.float64: "f8"}


def to_array(tensor: Any) -> Any:
    """Return an array on a tensor's memory, which it keeps alive."""
    dtype, size, index = numpy_dtype(tensor.dtype), tensor.element_size(), tensor.get_device()
    if not tensor.numel():
        with cupy.cuda.Device(index):
            return cupy.empty(tuple(tensor.shape), dtype)
    strides = tuple([size * stride for stride in tensor.stride()])
    extent = size * (1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)))
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), extent, tensor, index)
    return cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def to_tensor(array: Any) -> Any:
    """Return a tensor on an array's memory: the one that it was made of."""
    owner = getattr(array.data.mem, "_owner", None)
    if isinstance(owner, torch.Tensor) and (owner.data_ptr(), tuple(owner.shape)) == (array.data.ptr, array.shape):
        return owner
    is_bfloat16 = array.dtype.kind == "V"
    # without a look at streams (-1): what was computed was so on PyTorch's
    tensor = torch.utils.dlpack.from_dlpack((array.view(np.int16) if is_bfloat16 else array).__dlpack__(stream=-1))
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


class TensorDeviceCall(DeviceCall):
    """A call of tensors on a GPU, as arrays: what is written are tensors too."""

    __slots__ = ()

    @staticmethod
    def empty_like(array: Any) -> Any:
        """Return an array to write to, like one that was made of a tensor."""
        owner = array.data.mem._owner if array.size else None
        return cupy.empty_like(array) if owner is None else to_array(torch.empty_like(owner.detach()))

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array for a value."""
        if 0 in shape:
            return cupy.empty(shape, dtype)
        kind = torch.bfloat16 if dtype.kind == "V" else getattr(torch, dtype.name)
        return to_array(torch.empty(shape, dtype=kind, device=torch.device("cuda", cupy.cuda.runtime.getDevice())))


@functools.cache
def call_of(dtype: torch.dtype) -> type[DeviceCall]:
    """Return the kind of call whose values have a dtype."""
    return type("TensorDeviceCallOf", (TensorDeviceCall,), {"__slots__": (), "value_dtype": numpy_dtype(dtype)})


@contextlib.contextmanager
def current(tensor: Any) -> Iterator[None]:
    """Let CuPy work on a tensor's device, on PyTorch's current stream there, in memory of PyTorch's allocator."""
    index = tensor.get_device()
    stream = torch.cuda.current_stream(index).cuda_stream
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream), cupy.cuda.using_allocator(allocator().malloc):
        yield


@functools.cache
def allocator() -> Any:
    """Return PyTorch's allocator as CuPy takes one: memory is returned to where graphs and other streams of PyTorch know of it."""
    return cupy.cuda.PythonFunctionAllocator(allocate, lambda address, device: torch.cuda.caching_allocator_delete(address))


def allocate(size: int, device: int) -> int:
    """Return memory on a device, of use to the current stream."""
    return int(torch.cuda.caching_allocator_alloc(size, device, torch.cuda.current_stream(device)))


def scale(slope: Any, upstream: Any) -> Any:
    """Multiply a slope by a number of the device, where it is; the host does not wait to see whether it is 1."""
    if slope.dtype not in CODES or upstream.dtype not in CODES:
        return slope.mul_(upstream)
    with current(slope):
        rescale(slope.data_ptr(), slope.numel(), CODES[slope.dtype], upstream.data_ptr(), CODES[upstream.dtype])
    return slope
