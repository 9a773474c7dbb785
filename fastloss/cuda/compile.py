"""From a kernel's text to a function that launches it: compiled by NVRTC once, then kept on disk as machine code.

Not by `cupy.RawModule`, which adds `-ftz=true` behind all options: subnormal numbers would be 0, and the tails of a
cross-entropy with them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from typing import Any

import cupy

from fastloss.kernel.cache import cache_folder, read, write
from fastloss.version import __version__

OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
HIP_OPTIONS = ("--std=c++17", "-ffp-contract=off")


@functools.cache
def kernel(text: str, name: str, device: int) -> Any:
    """Return what launches a kernel on the current device."""
    if cupy.cuda.runtime.is_hip:
        return cupy.RawModule(code=text, options=HIP_OPTIONS).get_function(name)
    module = cupy.cuda.function.Module()
    module.load(machine_code(text, architecture(cupy.cuda.Device(device).compute_capability)))
    return module.get_function(name)


def architecture(capability: str) -> str:
    """Return what to compile for: the device itself, or where NVRTC is older, the newest that it knows, for the driver to translate."""
    known = nvrtc().getSupportedArchs()
    if int(capability) in known:
        return f"sm_{capability}"
    return f"compute_{max(arch for arch in known if arch <= int(capability))}"


def machine_code(text: str, architecture: str) -> bytes:
    """Return the machine code of a text, from the disk if it is there."""
    digest = hashlib.sha256(f"cuda {__version__} {nvrtc().getVersion()} {architecture} {OPTIONS} {text}".encode()).hexdigest()
    path = cache_folder() / digest
    if (code := read(path)) is None:
        code = compiled(text, architecture)
        write(path, code)
    return code


def compiled(text: str, architecture: str) -> bytes:
    """Compile a text."""
    compiler = nvrtc()
    program = compiler.createProgram(text, "fastloss.cu", (), ())
    try:
        compiler.compileProgram(program, (f"-arch={architecture}", *OPTIONS))
        if architecture.startswith("compute"):
            return bytes(compiler.getPTX(program))
        return bytes(compiler.getCUBIN(program)) + b"\0"  # CuPy 14 leaves out the last byte
    except compiler.NVRTCError:
        raise RuntimeError(f"NVRTC does not compile this kernel:\n{compiler.getProgramLog(program)}") from None
    finally:
        compiler.destroyProgram(program)


@functools.cache
def nvrtc() -> Any:
    """Return CuPy's binding of NVRTC."""
    return importlib.import_module("cupy_backends.cuda.libs.nvrtc")
