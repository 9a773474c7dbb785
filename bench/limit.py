"""What memory allows: a triad with non-temporal stores and a dot product, as LLVM text, on two or more Python threads.

They share nothing with fastloss. 64-byte vectors, one element of each array a lane; the last elements that do not fill a
vector are left out.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

TRIAD = """
define void @triad(ptr %out, ptr %a, ptr %b, i64 %n) {
  br label %check
check:
  %i = phi i64 [0, %0], [%next, %loop]
  %next = add i64 %i, 16
  %more = icmp sle i64 %next, %n
  br i1 %more, label %loop, label %done
loop:
  %pa = getelementptr float, ptr %a, i64 %i
  %pb = getelementptr float, ptr %b, i64 %i
  %po = getelementptr float, ptr %out, i64 %i
  %x = load <16 x float>, ptr %pa, align 4
  %y = load <16 x float>, ptr %pb, align 4
  %z = fadd <16 x float> %x, %y
  store <16 x float> %z, ptr %po, align STORE_ALIGN
  br label %check
done:
  fence seq_cst
  ret void
}
"""

PREFETCH = """loop:
  %ahead = add i64 %i, 512
  %fa = getelementptr float, ptr %a, i64 %ahead
  %fb = getelementptr float, ptr %b, i64 %ahead
  call void @llvm.prefetch.p0(ptr %fa, i32 0, i32 3, i32 1)
  call void @llvm.prefetch.p0(ptr %fb, i32 0, i32 3, i32 1)
"""
DECLARE = "\ndeclare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"

DOT = """
define float @dot(ptr %out, ptr %a, ptr %b, i64 %n) {
  br label %check
check:
  %i = phi i64 [0, %0], [%next, %loop]
  %s = phi <32 x float> [zeroinitializer, %0], [%t, %loop]
  %next = add i64 %i, 32
  %more = icmp sle i64 %next, %n
  br i1 %more, label %loop, label %done
loop:
  %pa = getelementptr float, ptr %a, i64 %i
  %pb = getelementptr float, ptr %b, i64 %i
  %x = load <32 x float>, ptr %pa, align 4
  %y = load <32 x float>, ptr %pb, align 4
  %t = call <32 x float> @llvm.fmuladd.v32f32(<32 x float> %x, <32 x float> %y, <32 x float> %s)
  br label %check
done:
  %sum = call reassoc float @llvm.vector.reduce.fadd.v32f32(float 0.0, <32 x float> %s)
  ret float %sum
}
declare <32 x float> @llvm.fmuladd.v32f32(<32 x float>, <32 x float>, <32 x float>)
declare float @llvm.vector.reduce.fadd.v32f32(float, <32 x float>)
"""


class Limit:
    """The compiled loops, and the threads that run them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        past = TRIAD.replace("align STORE_ALIGN", "align 64, !nontemporal !0") + "!0 = !{i32 1}"
        prefetched = past.replace("@triad", "@prefetched").replace("loop:\n", PREFETCH) + DECLARE
        ordinary = TRIAD.replace("@triad", "@ordinary").replace("STORE_ALIGN", "4")
        machine = llvm.Target.from_default_triple().create_target_machine(
            llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault", jit=True
        )
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for text in (past, prefetched, ordinary, DOT):
            self.engine.add_module(llvm.parse_assembly(text))
        self.engine.finalize_object()

    def _run(self, name: str, result: type | None, *arrays: Array) -> list[float]:
        prototype = ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * 4)
        function = prototype(self.engine.get_function_address(name))
        size = arrays[0].size // self.threads // 32 * 32
        starts = range(0, size * self.threads, size)
        calls = [self.pool.submit(function, *(a.ctypes.data + 4 * start for a in arrays), size) for start in starts]
        return [call.result() for call in calls]

    def triad(self, out: Array, a: Array, b: Array) -> None:
        """Compute out = a + b with stores past the caches; `out` starts at a multiple of 64 bytes."""
        assert out.ctypes.data % 64 == 0
        self._run("triad", None, out, a, b)

    def prefetched(self, out: Array, a: Array, b: Array) -> None:
        """Compute what `triad` does, and ask for lines 2 KiB ahead: more than a plain loop gets out of this memory."""
        assert out.ctypes.data % 64 == 0
        self._run("prefetched", None, out, a, b)

    def ordinary(self, out: Array, a: Array, b: Array) -> None:
        """Compute out = a + b with ordinary stores."""
        self._run("ordinary", None, out, a, b)

    def dot(self, a: Array, b: Array) -> float:
        """Return sum a b."""
        return sum(self._run("dot", ctypes.c_float, a, a, b))


def aligned(size: int) -> Array:
    """Return float32 zeros that start at a multiple of 64 bytes."""
    memory = np.zeros(size + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size]


def check(limit: Limit, size: int = 1 << 16) -> None:
    """Assert that the loops compute what they say."""
    a, b, out = np.ones(size, np.float32), np.full(size, 2, np.float32), aligned(size)
    for triad in (limit.triad, limit.prefetched, limit.ordinary):
        out[:] = 0
        triad(out, a, b)
        assert (out == 3).all()
    assert limit.dot(a, b) == 2 * size
