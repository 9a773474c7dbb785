"""A SIMD vector while LLVM code is being written: calling a formula with `Vector` arguments emits its instructions.

LLVM splits a vector into whatever registers the CPU has; nothing depends on the auto-vectoriser. No fast-math flag is set:
`nnan` and `ninf` would delete the handling of NaN and inf, and `contract` would let the same formula round differently in
different kernels. `fma` is asked for by name where it pays.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import config

from fastloss.core.dtypes import BY_CODE
from fastloss.kernel import elementary
from fastloss.ops import Symbol, where

# Numba compiles for the CPU it runs on, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say otherwise.
_IS_HOST = config.CPU_NAME is None and config.CPU_FEATURES is None
HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f")) if _IS_HOST else "+avx512f" in (config.CPU_FEATURES or "")

_FLOATS: dict[str, ir.Type] = {"half": ir.HalfType(), "float": ir.FloatType(), "double": ir.DoubleType()}
_SUFFIXES = {"half": "f16", "float": "f32", "double": "f64"}  # in the names of intrinsics


def scalar_type(code: str) -> ir.Type:
    """Return the LLVM type of one stored element, given the code of its element type, such as "f4" or "u1"."""
    name = BY_CODE[code].llvm
    return _FLOATS.get(name) or ir.IntType(int(name[1:]))


def mangle(vector: ir.VectorType) -> str:
    """Return the suffix that LLVM gives intrinsics on a vector type: v16f32."""
    element = str(vector.element)
    return f"v{vector.count}{_SUFFIXES.get(element, element)}"


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by its full name (llvmlite's declare_intrinsic rejects vector types)."""
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def indices(first: int, count: int) -> ir.Constant:
    """Return which lanes a shuffle takes: `count` of them, from `first` on."""
    return ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(first, first + count)))


class Vector(Symbol):
    """An LLVM vector value and the builder that its operations are appended to."""

    scales_by_powers = HAS_AVX512  # whether there is an instruction for x 2**n

    def __init__(self, builder: ir.IRBuilder, value: ir.Value, numbers: ir.VectorType | None = None) -> None:
        self.builder = builder
        self.value = value
        self.numbers = numbers or value.type  # the type plain numbers take beside this vector: a comparison's operands'
        self.bounds = (-inf, inf)  # no lane is known to lie outside; exp and log1p save instructions where that helps
        self.log_term: tuple[Vector, Vector] | None = None  # (x, e) of x + log1p(e), for sums that collect the logarithms

    @property
    def type(self) -> ir.VectorType:
        """The LLVM vector type."""
        return self.value.type

    @property
    def bits(self) -> int:
        """The width of a lane."""
        return {"float": 32, "double": 64}.get(str(self.type.element)) or self.type.element.width

    @property
    def is_float(self) -> bool:
        """Whether the lanes are floating-point numbers."""
        return str(self.type.element) in ("float", "double")

    def like(self, value: ir.Value) -> Vector:
        """Wrap another LLVM value for the same builder."""
        is_mask = value.type.element == ir.IntType(1)
        return Vector(self.builder, value, self.numbers if is_mask else None)

    def within(self, low: float, high: float) -> Vector:
        """Note the bounds of the lanes."""
        self.bounds = low, high
        return self

    def splat(self, number: float) -> Vector:
        """Return the same number in every lane."""
        element = self.numbers.element
        constant = ir.Constant(element, float(number) if str(element) in ("float", "double") else int(number))
        return self.like(ir.Constant(self.numbers, [constant] * self.numbers.count))

    def intrinsic(self, name: str, *others: Any) -> Vector:
        """Call `llvm.<name>` on vectors of this type."""
        args = [self.value, *(self.match(x).value for x in others)]
        return self.like(call(self.builder, f"llvm.{name}.{mangle(self.type)}", self.type, *args))

    def halves(self) -> tuple[Vector, Vector]:
        """Return the lower and the upper half of the lanes."""
        half = self.type.count // 2
        low, high = (self.like(self.builder.shuffle_vector(self.value, self.value, indices(first, half))) for first in (0, half))
        return low, high

    def match(self, other: Any) -> Vector:
        """Return the other operand as a vector of this type; numbers are spread over the lanes."""
        return other if isinstance(other, Vector) else self.splat(other)

    def bitcast(self, element: ir.Type) -> Vector:
        """Return the same bits with lanes of another type of the same width."""
        return self.like(self.builder.bitcast(self.value, ir.VectorType(element, self.type.count)))

    def as_int(self) -> Vector:
        """Return the bits of the lanes as integers."""
        return self.bitcast(ir.IntType(self.bits))

    def as_float(self) -> Vector:
        """Return integer lanes' bits as floating-point numbers."""
        return self.bitcast(scalar_type(f"f{self.bits // 8}"))

    def to_float(self) -> Vector:
        """Return integer lanes converted to floating-point numbers of the same width."""
        return self.like(self.builder.sitofp(self.value, ir.VectorType(scalar_type(f"f{self.bits // 8}"), self.type.count)))

    def convert(self, code: str, to: str) -> Vector:
        """Return lanes stored as type `code` as the type `to`, rounded once to nearest even."""
        if code == "B2":  # the upper half of a float32
            bits = self.cast("zext", "u4")
            return bits.apply("shl", bits, 16).as_float().convert("f4", to)
        if code == to:
            return self
        if to in ("f2", "B2"):
            single = self.round_to_odd() if code == "f8" else self
            return single.cast("fptrunc", "f2") if to == "f2" else single.round_to_bfloat16()
        if code == "f2" and to == "f8":
            return self.cast("fpext", "f4").cast("fpext", "f8")  # the conversion CPUs have
        return self.cast({"i": "sitofp", "f": "fpext" if to > code else "fptrunc"}.get(code[0], "uitofp"), to)

    def cast(self, method: str, to: str) -> Vector:
        """Convert lanes by one of the builder's methods."""
        return self.like(getattr(self.builder, method)(self.value, ir.VectorType(scalar_type(to), self.type.count)))

    def round_to_bfloat16(self) -> Vector:
        """Return the upper halves of float32 lanes, rounded to nearest even; of a NaN, the upper half with a bit that keeps it NaN."""
        bits = self.as_int()
        odd = bits.apply("shr", bits, 16) & 1
        rounded = where(self != self, bits | (1 << 22), bits + odd + 0x7FFF)
        return rounded.apply("shr", rounded, 16).cast("trunc", "u2")

    def round_to_odd(self) -> Vector:
        """Return float64 lanes as float32, and those between two float32 as the odd one of them.

        Rounded once more, to half precision, that is what rounding once would have given.
        """
        single = self.cast("fptrunc", "f4")
        error, bits = self - single.cast("fpext", "f8"), single.as_int()
        grows = where(bits < 0, error < 0.0, error > 0.0)
        odd = bits + where(grows, bits.splat(1), bits.splat(-1))
        inexact = (error < 0.0) | (error > 0.0)  # not NaN: inf is exact
        return where(inexact & ((bits & 1) == 0), odd, bits).as_float()

    def reciprocal_estimate(self) -> Vector:
        """Return 1 / x for 1 <= x <= 2, right to 14 bits at least: a fifth of a division's time where the CPU has it."""
        if self.bits == 64 or not HAS_AVX512:
            return self.splat(1.0) / self
        return self.by_register("llvm.x86.avx512.rcp14.ps.512", (self, self), ir.IntType(16)(0xFFFF))

    def times_power_of_two(self, n: Vector) -> Vector:
        """Return x 2**n, rounded once, also where it is subnormal: an instruction of AVX-512."""
        name = {32: "llvm.x86.avx512.mask.scalef.ps.512", 64: "llvm.x86.avx512.mask.scalef.pd.512"}[self.bits]
        all_lanes, current_rounding = ir.IntType(512 // self.bits)((1 << 512 // self.bits) - 1), ir.IntType(32)(4)
        return self.by_register(name, (self, n, self), all_lanes, current_rounding)

    def by_register(self, name: str, vectors: tuple[Vector, ...], *rest: ir.Value) -> Vector:
        """Call an instruction of one AVX-512 register on each register's width of lanes."""
        builder, width = self.builder, 512 // self.bits
        parts = []
        for first in range(0, self.type.count, width):
            args = [builder.shuffle_vector(x.value, x.value, indices(first, width)) for x in vectors]
            parts.append(call(builder, name, args[0].type, *args, *rest))
        while len(parts) > 1:
            parts = [builder.shuffle_vector(a, b, indices(0, 2 * a.type.count)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return self.like(parts[0])

    def apply(self, op: str, *args: Any) -> Vector:
        """Emit the instructions for `op`."""
        if op == "polynomial":
            return elementary.polynomial(*args)
        vector = next(a for a in args if isinstance(a, Vector))
        return _OPS[op](*(vector.match(a) for a in args))


def _binary(method: str) -> Callable[[Vector, Vector], Vector]:
    """Make an operation out of the builder's method: the f-form for floats, the plain one for integers."""

    def emit(x: Vector, y: Vector) -> Vector:
        name = "f" + method if x.is_float else {"div": "sdiv"}.get(method, method)
        return x.like(getattr(x.builder, name)(x.value, y.value))

    return emit


def _compare(sign: str) -> Callable[[Vector, Vector], Vector]:
    def emit(x: Vector, y: Vector) -> Vector:
        if not x.is_float:
            return x.like(x.builder.icmp_signed(sign, x.value, y.value))
        ordered = x.builder.fcmp_unordered if sign == "!=" else x.builder.fcmp_ordered  # NaN differs from everything
        return x.like(ordered(sign, x.value, y.value))

    return emit


def _bitwise(method: str) -> Callable[[Vector, Vector], Vector]:
    return lambda x, y: x.like(getattr(x.builder, method)(x.value, y.value))


def _where(condition: Vector, x: Vector, y: Vector) -> Vector:
    return x.like(x.builder.select(condition.value, x.value, y.value))


def _extremum(sign: str) -> Callable[[Vector, Vector], Vector]:
    def emit(x: Vector, y: Vector) -> Vector:
        # NumPy's minimum: NaN if either is. `x + y` is the NaN to return, and costs one add only where it is used.
        chosen = _where(_compare(sign)(x, y), x, y)
        unordered = x.like(x.builder.fcmp_unordered("uno", x.value, y.value))
        return _where(unordered, x + y, chosen)

    return emit


def _add_log1p(x: Vector, e: Vector) -> Vector:
    result = x + elementary.log1p(e.like(e.value).within(0.0, 1.0))  # a copy: elsewhere, e may be anything
    result.log_term = (x, e)  # LLVM drops the logarithm where a sum reads the term instead
    return result


_OPS: dict[str, Callable[..., Vector]] = {
    "neg": lambda x: x.like(x.builder.fneg(x.value)).within(-x.bounds[1], -x.bounds[0]),
    "abs": lambda x: x.intrinsic("fabs").within(0.0, inf),
    "sqrt": lambda x: x.intrinsic("sqrt"),
    "fma": lambda x, y, z: x.intrinsic("fmuladd", y, z),
    "copysign": lambda x, y: x.intrinsic("copysign", y),
    "add": _binary("add"),
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "div": _binary("div"),
    "lt": _compare("<"),
    "le": _compare("<="),
    "gt": _compare(">"),
    "ge": _compare(">="),
    "eq": _compare("=="),
    "ne": _compare("!="),
    "and": _bitwise("and_"),
    "or": _bitwise("or_"),
    "shl": _bitwise("shl"),
    "shr": _bitwise("ashr"),
    "not": lambda x: x.like(x.builder.not_(x.value)),
    "where": _where,
    "minimum": _extremum("<"),
    "maximum": _extremum(">"),
    "exp": elementary.exp,
    "expm1": elementary.expm1,
    "log": elementary.log,
    "log1p": elementary.log1p,
    "pow": elementary.pow,
    "sigmoid": elementary.sigmoid,
    "tanh": elementary.tanh,
    "add_log1p": _add_log1p,
}
