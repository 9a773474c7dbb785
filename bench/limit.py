"""The limit that memory bandwidth sets, measured with a triad and a dot product that are written in LLVM IR.

The triad writes with non-temporal stores. The loops share no code with fastloss. Each iteration handles two cache lines of the
first array, and as many elements of the second. Elements that do not fill a whole iteration on every thread are left out. The loops
for one array take it for the second too, without reading it twice.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from string import Template
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from bench.machine import allowed_cpus

Array = npt.NDArray[Any]

LOADS = Template("""%pa = getelementptr $a, ptr %a, i64 %i
  %pb = getelementptr $b, ptr %b, i64 %i
  %x = load <$lanes x $a>, ptr %pa, align 1
  %raw = load <$lanes x $b>, ptr %pb, align 1
  %y = $widen""")

LOADS_OF_ONE = Template("""%pa = getelementptr $a, ptr %a, i64 %i
  %x = load <$lanes x $a>, ptr %pa, align 1
  %y = bitcast <$lanes x $a> %x to <$lanes x $a>""")

TRIAD = Template("""
define void @$name(ptr %out, ptr %a, ptr %b, i64 %n) {
  br label %check
check:
  %i = phi i64 [0, %0], [%next, %loop]
  %next = add i64 %i, $lanes
  %more = icmp sle i64 %next, %n
  br i1 %more, label %loop, label %done
loop:
  $prefetch
  $loads
  %po = getelementptr $a, ptr %out, i64 %i
  %z = $add <$lanes x $a> %x, %y
  store <$lanes x $a> %z, ptr %po, align 64, !nontemporal !0
  br label %check
done:
  fence seq_cst
  ret void
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
!0 = !{i32 1}
""")

DOT = Template("""
define void @dot(ptr %out, ptr %a, ptr %b, i64 %n) {
  br label %check
check:
  %i = phi i64 [0, %0], [%next, %loop]
  %s = phi <$lanes x $a> [zeroinitializer, %0], [%t, %loop]
  %next = add i64 %i, $lanes
  %more = icmp sle i64 %next, %n
  br i1 %more, label %loop, label %done
loop:
  $loads
  %xy = $mul <$lanes x $a> %x, %y
  %t = $add <$lanes x $a> %s, %xy
  br label %check
done:
  store <$lanes x $a> %s, ptr %out, align 1
  ret void
}
""")

AHEAD = """%ahead = add i64 %i, $distance
  %fa = getelementptr $a, ptr %a, i64 %ahead
  %fb = getelementptr $b, ptr %b, i64 %ahead
  call void @llvm.prefetch.p0(ptr %fa, i32 0, i32 3, i32 1)
  call void @llvm.prefetch.p0(ptr %fb, i32 0, i32 3, i32 1)"""

# numbers of 8 and 16 bits are added as integers, so that the loop waits only for memory
_TYPES = {1: "i8", 2: "i16", 4: "float", 8: "double"}
_LINE, _PREFETCH = 64, 2048  # bytes


class Limit:
    """The compiled loops for two arrays with elements of given sizes in bytes, or for one array, and the threads that run them."""

    def __init__(self, width: int, target_width: int, threads: int) -> None:
        self.width, self.target_width, self.threads = width, target_width, threads
        self.lanes = 2 * _LINE // width
        self.pool = ThreadPoolExecutor(threads, initializer=pin_thread, initargs=(iter(allowed_cpus()),))
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault", jit=True
        )
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for text in self._texts():
            self.engine.add_module(llvm.parse_assembly(text))
        self.engine.finalize_object()
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
        names = ("triad", "prefetched", "dot")
        self._triad, self._prefetched, self._dot = (prototype(self.engine.get_function_address(name)) for name in names)

    def _texts(self) -> list[str]:
        a, b = _TYPES[self.width], _TYPES[self.target_width or self.width]
        is_float = self.width > 2
        operations = {"add": "fadd", "mul": "fmul"} if is_float else {"add": "add", "mul": "mul"}
        same = f"bitcast <{self.lanes} x {b}> %raw to <{self.lanes} x {a}>"
        widen = same if a == b else f"{'uitofp' if is_float else 'zext'} <{self.lanes} x {b}> %raw to <{self.lanes} x {a}>"
        words = {"a": a, "b": b, "lanes": self.lanes, **operations}
        words["loads"] = LOADS.substitute(words, widen=widen) if self.target_width else LOADS_OF_ONE.substitute(words)
        ahead = Template(AHEAD).substitute(words, distance=_PREFETCH // self.width)
        triads = [TRIAD.substitute(words, name=name, prefetch=text) for name, text in (("triad", ""), ("prefetched", ahead))]
        return [*triads, DOT.substitute(words)]

    def _run(self, function: Any, outs: list[int], a: Array, b: Array) -> None:
        size = self.share(a)
        if self.threads == 1:
            function(outs[0], a.ctypes.data, b.ctypes.data, size)
            return
        starts = range(0, size * self.threads, size)
        calls = [
            self.pool.submit(function, out, a.ctypes.data + self.width * start, b.ctypes.data + self.target_width * start, size)
            for out, start in zip(outs, starts, strict=True)
        ]
        for call in calls:
            call.result()

    def share(self, a: Array) -> int:
        """Return the number of elements that each thread handles."""
        return a.size // self.threads // self.lanes * self.lanes

    def _outs(self, out: Array, a: Array) -> list[int]:
        return [out.ctypes.data + self.width * self.share(a) * k for k in range(self.threads)]

    def triad(self, out: Array, a: Array, b: Array) -> None:
        """Compute out = a + b with non-temporal stores. The address of `out` must be a multiple of 64 bytes."""
        self._run(self._triad, self._outs(out, a), a, b)

    def prefetched(self, out: Array, a: Array, b: Array) -> None:
        """Compute out = a + b as `triad` does, and prefetch 2 KiB ahead. On some machines this is faster."""
        self._run(self._prefetched, self._outs(out, a), a, b)

    def dot(self, a: Array, b: Array) -> Any:
        """Compute the dot product of two arrays."""
        sums = aligned(self.lanes * self.threads, summed(a.dtype))
        self._run(self._dot, [sums.ctypes.data + 2 * _LINE * k for k in range(self.threads)], a, b)
        return sums.sum()


def pin_thread(cpus: Iterator[int]) -> None:
    """Pin the calling thread to the next CPU, so that the limit does not depend on the scheduler."""
    if (cpu := next(cpus, None)) is not None:
        os.sched_setaffinity(0, {cpu})


def aligned(size: int, dtype: Any) -> Array:
    """Allocate zeros at an address that is a multiple of 64 bytes."""
    memory = np.zeros(size * dtype.itemsize + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size * dtype.itemsize].view(dtype)


def summed(dtype: Any) -> Any:
    """Return the dtype in which numbers of a dtype are added: integers for numbers of 8 and 16 bits."""
    return dtype if dtype.itemsize > 2 else np.dtype(f"i{dtype.itemsize}")


def check(limit: Limit, dtype: Any, target_dtype: Any = None) -> None:
    """Raise RuntimeError if a loop for two arrays, or without `target_dtype` for one, computes a wrong result."""
    size, numbers = limit.lanes * limit.threads * 8, summed(dtype)
    a, out = np.full(size, 2, numbers), aligned(size, numbers)
    b = a if target_dtype is None else np.full(size, 3, target_dtype if target_dtype.itemsize != 2 else numbers)
    for triad in (limit.triad, limit.prefetched):
        out[:] = 0
        triad(out, a, b)
        if not (out == 2 + b[0]).all():
            raise RuntimeError("the triad of the limit computes a wrong result, so its time is meaningless")
    if limit.dot(a, b) != 2 * int(b[0]) * size:
        raise RuntimeError("the dot product of the limit computes a wrong result, so its time is meaningless")
