"""Compile the kernel of a `Spec` with Numba once, and store its machine code on disk.

The first call of a process takes 0.9 s if it loads its function from Numba's own disk cache, which imports all of Numba. It takes
0.1 s with this cache, which only needs llvmlite. The key of a kernel consists of its spec, which contains the operations of the
formula, and a fingerprint of everything else that decides machine code. A kernel takes 5 to 20 KB. Kernels are never deleted.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from functools import cache
from importlib.metadata import version
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from fastloss.core.plan import Spec
from fastloss.kernel.cache import cache_folder, fingerprint, read, write

SYMBOL = "fastloss_kernel"
PROTOTYPE = ctypes.CFUNCTYPE(None)  # called with a ctypes array, unchecked (0.2 us a call, 0.4 us with an address); a call releases the GIL

statistics = {"compiled": 0, "loaded": 0}  # how many kernels this process has compiled, and loaded from disk
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a fork while another thread compiles would leave the child's lock locked for ever
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_kernels: dict[str, Any] = {}
_engines: list[llvm.ExecutionEngine] = []  # they own the machine code, so they must not be freed


def kernel(spec: Spec) -> Any:
    """Return the compiled kernel of a spec."""
    with _lock:
        key = spec.key
        if key not in _kernels:
            _kernels[key] = PROTOTYPE(_load(_object_code(spec)))
        return _kernels[key]


def _object_code(spec: Spec) -> bytes:
    """Return the machine code of a spec from the disk, or compile it and store it there."""
    name = hashlib.sha256(f"{_fingerprint()} {spec.key}".encode()).hexdigest()
    folder = cache_folder()
    if (code := read(folder / name)) is not None:
        statistics["loaded"] += 1
        return code
    code = _compile(spec)
    statistics["compiled"] += 1
    write(folder / name, code)
    return code


def _compile(spec: Spec) -> bytes:
    """Compile the kernel of a spec to an object file."""
    from fastloss.cpu import loop  # imports Numba, which a process that finds its kernels on disk does not need

    loop.SPECS[spec.key] = spec
    # Numba's machine code refers to addresses of this process; compiling its LLVM text again gives code without such references
    module = llvm.parse_assembly(loop.build(spec.key).inspect_llvm())
    entry = next(f for f in module.functions if f.name.startswith("cfunc."))
    entry.name = SYMBOL
    return bytes(_machine().emit_object(module))


def _load(code: bytes) -> int:
    """Load an object file into the process and return the address of its kernel."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(), use_lmm=True)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(SYMBOL))


def load_assembly(text: str, *names: str) -> list[int]:
    """Compile LLVM assembly into the process and return the addresses of functions."""
    _start_llvm()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), _machine(), use_lmm=True)
    engine.finalize_object()
    _engines.append(engine)
    return [int(engine.get_function_address(name)) for name in names]


def _machine() -> llvm.TargetMachine:
    """Return LLVM's description of this CPU, which compiles and loads code for it."""
    _start_llvm()
    cpu, features = _cpu()
    return llvm.Target.from_default_triple().create_target_machine(cpu, features, opt=3, reloc="pic", codemodel="small", jit=True)


@cache
def _start_llvm() -> None:
    """Initialise the part of LLVM that generates code for this CPU."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def _cpu() -> tuple[str, str]:
    """Return LLVM's name for this CPU, and the CPU's features."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


@cache
def _fingerprint() -> str:
    """Hash everything besides the spec that the machine code depends on."""
    settings = [os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    return fingerprint("cpu", version("numba"), llvmlite.__version__, sys.platform, _cpu(), settings)
