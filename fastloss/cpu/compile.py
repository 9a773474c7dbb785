"""Compile the kernel of a `Spec` with Numba once, and store its machine code on disk.

The first call of a process takes 0.9 s if it loads its function from Numba's own disk cache, which imports all of Numba. It takes
0.1 s with this cache, which only needs llvmlite. The key of a kernel consists of its spec, which contains the operations of the
formula, and a fingerprint of everything else that decides machine code.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from fastloss.core.plan import Spec
from fastloss.cpu import features
from fastloss.kernel.builds import built
from fastloss.kernel.cache import fingerprint, kernel_cache

SYMBOL, LOOP = "fastloss_kernel", "fastloss_loop"  # names of functions: of the one that callers enter, and of the loop that it calls
PROTOTYPE = ctypes.CFUNCTYPE(None)  # called with a ctypes array, unchecked (0.2 us a call, 0.4 us with an address); a call releases the GIL

STATES = {  # by LLVM's name of the processor: declarations, and code that sets the default floating-point state and that restores it
    "x86_64": (
        "declare void @llvm.x86.sse.stmxcsr(ptr)\ndeclare void @llvm.x86.sse.ldmxcsr(ptr)",
        """%found = alloca i32
  %default = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %found)
  store i32 8064, ptr %default
  call void @llvm.x86.sse.ldmxcsr(ptr %default)""",
        "call void @llvm.x86.sse.ldmxcsr(ptr %found)",
    ),
    "aarch64": (
        "declare i64 @llvm.aarch64.get.fpcr()\ndeclare void @llvm.aarch64.set.fpcr(i64)",
        "%found = call i64 @llvm.aarch64.get.fpcr()\n  call void @llvm.aarch64.set.fpcr(i64 0)",
        "call void @llvm.aarch64.set.fpcr(i64 %found)",
    ),
}

statistics = {"compiled": 0, "loaded": 0}  # how many kernels this process has compiled, and loaded from disk
_engines: list[llvm.ExecutionEngine] = []  # they own the machine code, so they must not be freed


def kernel(spec: Spec) -> Any:
    """Return the compiled kernel of a spec."""
    found = built(spec.key, lambda: PROTOTYPE(_load("", [SYMBOL], _object_code(spec))[0]))
    kernel_cache().warn()
    return found


def load_assembly(text: str, *names: str) -> list[int]:
    """Compile LLVM assembly into the process and return the addresses of functions."""
    addresses: list[int] = built(text, lambda: _load(text, names))
    return addresses


def _object_code(spec: Spec) -> bytes:
    """Return the machine code of a spec from the disk, or compile it and store it there."""
    compiled = []

    def make() -> bytes:
        compiled.append(spec)
        return _compile(spec)

    code = kernel_cache().find_or_make(hashlib.sha256(f"{_fingerprint()} {spec.key}".encode()).hexdigest(), make)
    statistics["compiled" if compiled else "loaded"] += 1
    return code


def _compile(spec: Spec) -> bytes:
    """Compile the kernel of a spec to an object file."""
    # these import Numba, which a process that finds its kernels on disk does not need
    from fastloss.cpu import class_loop, classes, loop, step

    _check_numba()
    build, shape_of, emit_functions = (
        (class_loop.build, class_loop.shape_of, classes.emit_functions)
        if spec.walk == "classes"
        else (loop.build, loop.shape_of, step.emit_functions)
    )
    # the LLVM code of Numba's loop, because its machine code refers to addresses of this process
    module = llvm.parse_assembly(_loop(build, shape_of(spec)))
    function = next(f for f in module.functions if not (f.is_declaration or f.name.startswith("cfunc.")))
    function.name = LOOP
    function.add_function_attribute("noinline")  # else its instructions could leave the floating-point state that it runs in
    for text in (emit_functions(spec), _entry()):
        module.link_in(llvm.parse_assembly(text))
    _optimize(module)
    return bytes(_machine().emit_object(module))


def _loop(build: Callable[[Any], str], shape: Any) -> str:
    """Return the LLVM code of a loop from the disk, or have Numba compile it and store it there: many kernels share it."""
    name = hashlib.sha256(f"{_fingerprint()} {shape}".encode()).hexdigest()
    return kernel_cache().find_or_make(name, lambda: build(shape).encode()).decode()


def _entry() -> str:
    """Return the LLVM code of the function that callers enter.

    It sets the default floating-point state (rounding to nearest, subnormal numbers kept, no exception raised), calls the loop, and
    restores the state of the thread.
    """
    declarations, set_state, restore = STATES.get(features.processor(), ("", "", ""))
    return f"""
{declarations}
declare i32 @{LOOP}(ptr, ptr, ptr)
define void @{SYMBOL}(ptr %frame) {{
  %result = alloca ptr
  %error = alloca ptr
  {set_state}
  call i32 @{LOOP}(ptr %result, ptr %error, ptr %frame)
  {restore}
  ret void
}}"""


def _optimize(module: llvm.ModuleRef) -> None:
    """Inline the step into the loop, and drop Numba's wrapper, which calls functions of Python that the kernel must not refer to."""
    for function in module.functions:
        if not function.is_declaration and function.name != SYMBOL:
            function.linkage = "internal"
    builder = llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)


def _check_numba() -> None:
    """Raise RuntimeError if Numba is told not to compile."""
    from numba.core import config

    if config.DISABLE_JIT:
        raise RuntimeError(
            "NUMBA_DISABLE_JIT is set, and fastloss's kernels are compiled by Numba; accepted: NUMBA_DISABLE_JIT=0, or unset"
        )


def _load(text: str, names: Iterable[str], code: bytes = b"") -> list[int]:
    """Load LLVM assembly and an object file into the process and return the addresses of functions."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), _machine(), use_lmm=True)
    if code:
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return [int(engine.get_function_address(name)) for name in names]


def _machine() -> llvm.TargetMachine:
    """Return LLVM's description of the CPU, which compiles and loads code for it."""
    _start_llvm()
    cpu, flags = features.target()
    return llvm.Target.from_default_triple().create_target_machine(cpu, flags, opt=3, reloc="pic", codemodel="small", jit=True)


@cache
def _start_llvm() -> None:
    """Initialise the part of LLVM that generates code for this CPU, and name the functions that the code may call."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if not features.has_fma():
        library = ctypes.CDLL(None if os.name == "posix" else "ucrtbase")
        for name in ("fma", "fmaf"):  # which LLVM calls then
            llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)


@cache
def _fingerprint() -> str:
    """Hash everything besides the spec that the machine code depends on."""
    return fingerprint("cpu", version("numba"), llvmlite.__version__, sys.platform, features.target())
