"""Compile the text of a kernel with NVRTC once, and store its machine code on disk.

`cupy.RawModule` is not used, because it appends `-ftz=true` to the options: subnormal numbers would become 0, and so would
the tails of a cross-entropy.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from typing import Any

import cupy

from fastloss.cuda.workspace import versions
from fastloss.kernel.cache import kernel_cache
from fastloss.version import __version__

OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")


@functools.cache
def kernel(text: str, name: str, device: int) -> Any:
    """Return the function that launches a kernel on a device, which must be the current device."""
    module, capability = cupy.cuda.function.Module(), cupy.cuda.Device(device).compute_capability
    code = machine_code(text, architecture(capability))
    try:
        module.load(code)
    except RuntimeError as error:
        what = f"the kernel that NVRTC {compiler_version()} has compiled for compute capability {capability}"
        raise RuntimeError(f"the driver does not load {what}: {error}; {versions()}") from error
    kernel_cache().warn()
    return module.get_function(name)


def architecture(capability: str) -> str:
    """Return the architecture to compile for: the device's, or for an older NVRTC the newest virtual one, which the driver translates."""
    known = nvrtc().getSupportedArchs()
    if int(capability) in known:
        return f"sm_{capability}"
    return f"compute_{max(arch for arch in known if arch <= int(capability))}"


def machine_code(text: str, architecture: str) -> bytes:
    """Return the machine code of a text from the disk, or compile it and store it there."""
    digest = hashlib.sha256(f"cuda {__version__} {nvrtc().getVersion()} {architecture} {OPTIONS} {text}".encode()).hexdigest()
    return kernel_cache().find_or_make(digest, lambda: compiled(text, architecture))


def compiled(text: str, architecture: str) -> bytes:
    """Compile a text to machine code, or to PTX for a virtual architecture."""
    compiler = nvrtc()
    program = compiler.createProgram(text, "fastloss.cu", (), ())
    try:
        compiler.compileProgram(program, (f"-arch={architecture}", *OPTIONS))
        if architecture.startswith("compute"):
            return bytes(compiler.getPTX(program))
        return bytes(compiler.getCUBIN(program)) + b"\0"  # CuPy 14 drops the last byte
    except compiler.NVRTCError:
        raise RuntimeError(f"NVRTC cannot compile this kernel:\n{compiler.getProgramLog(program)}") from None
    finally:
        compiler.destroyProgram(program)


def compiler_version() -> str:
    """Return NVRTC's version."""
    return ".".join(map(str, nvrtc().getVersion()))


@functools.cache
def nvrtc() -> Any:
    """Return the module of CuPy that binds NVRTC."""
    return importlib.import_module("cupy_backends.cuda.libs.nvrtc")
