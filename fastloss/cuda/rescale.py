"""Multiply a gradient in place by a number that is on the device."""

from __future__ import annotations

import functools
import struct

import numpy as np

from fastloss.cuda import workspace
from fastloss.cuda.compile import kernel
from fastloss.cuda.launch import BLOCKS
from fastloss.cuda.scalar import TYPES
from fastloss.cuda.source import THREADS, part


def rescale(address: int, size: int, code: str, factor: int, factor_code: str) -> None:
    """Multiply `size` contiguous elements by a number. Elements and number are given by address and type code, "f4" or "f8"."""
    device = workspace.current_device()
    blocks = min(-(-size // THREADS), BLOCKS * workspace.count_multiprocessors(device))
    arguments = np.frombuffer(struct.pack("3q", address, size, factor), np.dtype((np.void, 24)))
    kernel(text_of(code, factor_code), "fastloss_rescale", device)((max(1, blocks),), (THREADS,), (arguments,))


@functools.cache
def text_of(code: str, factor_code: str) -> str:
    """Return the text of the kernel for two type codes."""
    constants = {"THREADS": THREADS, "element_t": TYPES[code], "factor_t": TYPES[factor_code]}
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + part("rescale.cuh")
