"""Tensors on a GPU for the tests, or on a machine without one, tensors on the CPU that fastloss is made to treat as CUDA tensors."""

from __future__ import annotations

import importlib
import types

import numpy as np
import torch

from tests.cuda import on_cpu

obstacles = importlib.import_module("fastloss.torch.obstacles")
BACKEND = importlib.import_module("fastloss.backends.torch.backend").BACKEND
ASK_WHERE_TENSORS_ARE = [
    obstacles,
    *(importlib.import_module(f"fastloss.backends.torch.{name}") for name in ("autograd", "bound_loss", "memory_views")),
]
STREAM, CPU = 77, torch.device("cpu")
BLOCKS: list[np.ndarray] = []  # allocated memory; workspaces outlive a test


def place_of_tensors(cp, monkeypatch):
    """Return the device of the tensors, given CuPy or the stand-in for it. With the stand-in it is the CPU."""
    if cp is not on_cpu:
        return torch.device("cuda")
    for module in ASK_WHERE_TENSORS_ARE:
        monkeypatch.setattr(module, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(obstacles, "has_cupy", lambda: True)
    monkeypatch.setattr(BACKEND, "bound", {})  # without the losses that are bound to tensors on the CPU

    def allocate(size, device, stream):
        block = np.empty(size + 64, np.uint8)
        address = -(-block.ctypes.data // 64) * 64
        BLOCKS.append(block)
        return address

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", allocate)
    monkeypatch.setattr(torch, "device", lambda *args: args[0] if not isinstance(args[0], str) else CPU)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", lambda address: None)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    return CPU
