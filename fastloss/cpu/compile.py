"""From a `Spec` to a function that can be called: compiled by Numba once, then stored on disk as machine code.

Loading a function from Numba's own disk cache starts all of Numba and takes 0.9 s of a process; this cache takes 0.1 s, because
it needs llvmlite alone. The key of a kernel is its spec, which holds the formula operation by operation, and a fingerprint of
everything else that decides machine code. A kernel takes 5 to 20 KB, and none is ever deleted.
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
PROTOTYPE = ctypes.CFUNCTYPE(None)  # takes ctypes arrays, which pass unchecked (0.2 us a call, 0.4 with addresses); frees the GIL

statistics = {"compiled": 0, "loaded": 0}  # kernels of this process, by where they came from
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child must not be born while another thread compiles: its lock would never open
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_kernels: dict[str, Any] = {}
_engines: list[llvm.ExecutionEngine] = []  # they own the machine code


def kernel(spec: Spec) -> Any:
    """Return the compiled kernel of a spec."""
    with _lock:
        key = spec.key
        if key not in _kernels:
            _kernels[key] = PROTOTYPE(_load(_object_code(spec)))
        return _kernels[key]


def _object_code(spec: Spec) -> bytes:
    """Read the machine code of a spec from the disk, or compile it and write it there."""
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
    from fastloss.cpu import loop  # brings Numba, which a process with a warm cache never imports

    loop.SPECS[spec.key] = spec
    # Numba's own machine code refers to Python symbols and to this process; its LLVM text, compiled again, stands alone
    module = llvm.parse_assembly(loop.build(spec.key).inspect_llvm())
    entry = next(f for f in module.functions if f.name.startswith("cfunc."))
    entry.name = SYMBOL
    return bytes(_machine().emit_object(module))


def _load(code: bytes) -> int:
    """Load machine code into the process and return the address of its kernel."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(), use_lmm=True)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(SYMBOL))


def _machine() -> llvm.TargetMachine:
    _start_llvm()
    cpu, features = _cpu()
    return llvm.Target.from_default_triple().create_target_machine(cpu, features, opt=3, reloc="pic", codemodel="small", jit=True)


@cache
def _start_llvm() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def _cpu() -> tuple[str, str]:
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


@cache
def _fingerprint() -> str:
    """Summarise everything besides the spec that the machine code depends on."""
    asked = [os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    return fingerprint("cpu", version("numba"), llvmlite.__version__, sys.platform, _cpu(), asked)
