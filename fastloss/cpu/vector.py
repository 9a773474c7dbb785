"""`Vector`: a SIMD vector in LLVM code. Calling a formula with `Vector` arguments emits the formula's instructions.

LLVM splits a vector into the registers that the CPU has, so nothing depends on the auto-vectoriser. No fast-math flag is set:
`nnan` and `ninf` would delete the handling of NaN and inf, and `contract` would let the same formula round differently in
different kernels. Formulas call `fma` explicitly where it is faster or more accurate.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from llvmlite import ir

from fastloss.core.dtypes import BY_CODE
from fastloss.cpu import features
from fastloss.kernel import elementary
from fastloss.ops import Symbol, estrin, fma, where

HAS_AVX512, HAS_HALF_CONVERSION = features.has("avx512f"), features.has_half_conversion()
FMA = "fmuladd" if features.has_fma() else "fma"  # the intrinsic; without the CPU's instruction, LLVM computes "fmuladd" in two steps

_FLOATS: dict[str, ir.Type] = {"half": ir.HalfType(), "float": ir.FloatType(), "double": ir.DoubleType()}
_SUFFIXES = {"half": "f16", "float": "f32", "double": "f64"}  # in the names of intrinsics


def scalar_type(code: str) -> ir.Type:
    """Return the LLVM type of a stored element, given the code of its element type, such as "f4" or "u1"."""
    name = BY_CODE[code].llvm
    return _FLOATS.get(name) or ir.IntType(int(name[1:]))


def mangle(vector: ir.VectorType) -> str:
    """Return the suffix of the names of LLVM's intrinsics for a vector type, such as v16f32."""
    element = str(vector.element)
    return f"v{vector.count}{_SUFFIXES.get(element, element)}"


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by its full name (llvmlite's declare_intrinsic rejects vector types)."""
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def gather(builder: ir.IRBuilder, vector: ir.VectorType, pointers: ir.Value, size: int, mask: ir.Value) -> ir.Value:
    """Load an element of `size` bytes for each lane from its own pointer, or 0 where the mask is False."""
    name = f"llvm.masked.gather.{mangle(vector)}.v{vector.count}p0"
    return call(builder, name, vector, pointers, ir.IntType(32)(size), mask, ir.Constant(vector, None))


def indices(first: int, count: int) -> ir.Constant:
    """Return the shuffle mask that selects `count` lanes from `first` on."""
    return ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(first, first + count)))


class Vector(Symbol):
    """An LLVM vector value, and the builder to which its operations append instructions."""

    scales_by_powers = HAS_AVX512  # whether the CPU has an instruction for x 2**n
    has_exp2 = False  # whether the machine has an instruction for 2**x
    evaluate = staticmethod(estrin)  # a polynomial: a long chain would wait for each of its operations

    def __init__(self, builder: ir.IRBuilder, value: ir.Value, number_type: ir.VectorType | None = None) -> None:
        self.builder = builder
        self.value = value
        self.number_type = number_type or value.type  # of plain numbers in operations with this vector; for a mask, its operands' type
        self.bounds = (-inf, inf)  # of the lanes, as far as they are known; exp and log1p need fewer instructions for some bounds
        self.log_term: tuple[Vector, Vector] | None = None  # (x, e) if this is x + log1p(e), for sums that accumulate products

    @property
    def type(self) -> ir.VectorType:
        """LLVM's type of the vector."""
        return self.value.type

    @property
    def bits(self) -> int:
        """Number of bits of a lane."""
        return {"float": 32, "double": 64}.get(str(self.type.element)) or self.type.element.width

    @property
    def is_float(self) -> bool:
        """Whether the lanes are floating-point numbers."""
        return str(self.type.element) in ("float", "double")

    def like(self, value: ir.Value) -> Vector:
        """Make a vector of another LLVM value, with the same builder."""
        is_mask = value.type.element == ir.IntType(1)
        return Vector(self.builder, value, self.number_type if is_mask else None)

    def within(self, low: float, high: float) -> Vector:
        """Set the known bounds of the lanes and return this vector."""
        self.bounds = low, high
        return self

    def splat(self, number: float) -> Vector:
        """Return a vector with the same number in every lane."""
        element = self.number_type.element
        constant = ir.Constant(element, float(number) if str(element) in ("float", "double") else int(number))
        return self.like(ir.Constant(self.number_type, [constant] * self.number_type.count))

    def intrinsic(self, name: str, *others: Any) -> Vector:
        """Call the intrinsic `llvm.<name>` on this vector and others of its type."""
        args = [self.value, *(self.match(x).value for x in others)]
        return self.like(call(self.builder, f"llvm.{name}.{mangle(self.type)}", self.type, *args))

    def halves(self) -> tuple[Vector, Vector]:
        """Return the lower half and the upper half of the lanes."""
        half = self.type.count // 2
        low, high = (self.like(self.builder.shuffle_vector(self.value, self.value, indices(first, half))) for first in (0, half))
        return low, high

    def at_least(self, low: float) -> Vector:
        """Return the larger of the lanes and a number; NaN if a lane is NaN."""
        return where(self < low, low, self)

    def match(self, other: Any) -> Vector:
        """Return another operand as a vector; a number is put into every lane."""
        return other if isinstance(other, Vector) else self.splat(other)

    def bitcast(self, element: ir.Type) -> Vector:
        """Reinterpret the bits of the lanes as another type of the same width."""
        return self.like(self.builder.bitcast(self.value, ir.VectorType(element, self.type.count)))

    def as_int(self) -> Vector:
        """Reinterpret the bits of the lanes as integers."""
        return self.bitcast(ir.IntType(self.bits))

    def as_float(self) -> Vector:
        """Reinterpret the bits of integer lanes as floating-point numbers."""
        return self.bitcast(scalar_type(f"f{self.bits // 8}"))

    def to_float(self) -> Vector:
        """Convert integer lanes to floating-point numbers of the same width."""
        return self.like(self.builder.sitofp(self.value, ir.VectorType(scalar_type(f"f{self.bits // 8}"), self.type.count)))

    def convert(self, code: str, to: str) -> Vector:
        """Convert lanes stored with type code `code` to the type `to`, rounded once to nearest even."""
        if code == "B2":  # the upper half of a float32
            bits = self.cast("zext", "u4")
            return bits.apply("shl", bits, 16).as_float().convert("f4", to)
        if code == to:
            return self
        if code == "f2":  # CPUs only have the conversion to float32
            # the fence keeps LLVM from comparing the half itself, which takes another conversion
            single = self.cast("fpext", "f4").intrinsic("arithmetic.fence") if HAS_HALF_CONVERSION else self.widen_float16()
            return single.convert("f4", to)
        if to in ("f2", "B2"):
            single = self.round_to_odd() if code == "f8" else self
            if to == "B2":
                return single.round_to_bfloat16()
            return single.cast("fptrunc", "f2") if HAS_HALF_CONVERSION else single.round_to_float16()
        return self.cast({"i": "sitofp", "f": "fpext" if to > code else "fptrunc"}.get(code[0], "uitofp"), to)

    def cast(self, method: str, to: str) -> Vector:
        """Convert the lanes to the type `to` by a conversion method of the builder."""
        return self.like(getattr(self.builder, method)(self.value, ir.VectorType(scalar_type(to), self.type.count)))

    def widen_float16(self) -> Vector:
        """Convert float16 lanes to float32 without the CPU's instruction."""
        bits = self.bitcast(ir.IntType(16)).cast("zext", "u4")
        moved = bits.apply("shl", bits & 0x7FFF, 13)  # exponent and mantissa at their places in float32
        finite = (moved.as_float() * 2.0**112).as_int()  # the difference between the biases of the exponents; exact
        magnitude = where(moved < 0x1F << 23, finite, moved | 0xFF << 23)  # the largest exponent is that of inf and NaN
        return (magnitude | bits.apply("shl", bits & 0x8000, 16)).as_float()

    def round_to_float16(self) -> Vector:
        """Round float32 lanes to nearest even float16 without the CPU's instruction."""
        bits, sign = self.as_int() & 0x7FFFFFFF, self.as_int() & -(1 << 31)
        odd = bits.apply("shr", bits, 13) & 1
        normal = bits.apply("shr", bits + odd + (0xFFF - (112 << 23)), 13)
        subnormal = (bits.as_float() + 0.5).as_int() - (126 << 23)  # the last bit of 0.5 is worth a float16's smallest number
        special = where(bits > 0xFF << 23, bits.splat(0x7E00), bits.splat(0x7C00))  # NaN, or too large
        rounded = where(bits < 113 << 23, subnormal, where(bits < 143 << 23, normal, special))
        return (rounded | sign.apply("shr", sign, 16) & 0x8000).cast("trunc", "u2").bitcast(ir.HalfType())

    def round_to_bfloat16(self) -> Vector:
        """Round float32 lanes to nearest even bfloat16, returned as bits. Every NaN becomes the same one."""
        bits = self.as_int()
        odd = bits.apply("shr", bits, 16) & 1
        rounded = where(self != self, bits.splat(0x7FC00000), bits + odd + 0x7FFF)
        return rounded.apply("shr", rounded, 16).cast("trunc", "u2")

    def round_to_odd(self) -> Vector:
        """Convert float64 lanes to float32; a number between two float32 numbers becomes the one whose last bit is 1.

        Rounding the result to 16 bits then gives the same number as rounding the float64 number once.
        """
        single = self.cast("fptrunc", "f4")
        error, bits = self - single.cast("fpext", "f8"), single.as_int()
        grows = where(bits < 0, error < 0.0, error > 0.0)
        odd = bits + where(grows, bits.splat(1), bits.splat(-1))
        inexact = (error < 0.0) | (error > 0.0)  # inf is exact, although its error is NaN
        return where(inexact & ((bits & 1) == 0), odd, bits).as_float()

    def reciprocal_estimate(self) -> Vector:
        """Return 1 / x for 1 <= x <= 2, to at least 14 bits; AVX-512's instruction takes a fifth of the time of a division."""
        if self.bits == 64 or not HAS_AVX512:
            return self.splat(1.0) / self
        return self.by_register("llvm.x86.avx512.rcp14.ps.512", (self, self), ir.IntType(16)(0xFFFF))

    def short_quotient(self, y: Vector) -> Vector:
        """Return x / y for 1 <= y <= 2, to at least 22 bits."""
        if not HAS_AVX512:
            return self / y
        r = y.reciprocal_estimate()
        q = self * r
        return fma(fma(-y, q, self), r, q)

    def times_power_of_two(self, n: Vector) -> Vector:
        """Return x 2**n, rounded once also if the result is subnormal, by an instruction of AVX-512."""
        name = {32: "llvm.x86.avx512.mask.scalef.ps.512", 64: "llvm.x86.avx512.mask.scalef.pd.512"}[self.bits]
        all_lanes, current_rounding = ir.IntType(512 // self.bits)((1 << 512 // self.bits) - 1), ir.IntType(32)(4)
        return self.by_register(name, (self, n, self), all_lanes, current_rounding)

    def by_register(self, name: str, vectors: tuple[Vector, ...], *rest: ir.Value) -> Vector:
        """Call an intrinsic for one AVX-512 register on each register of the vectors."""
        builder, width = self.builder, 512 // self.bits
        parts = []
        for first in range(0, self.type.count, width):
            args = [builder.shuffle_vector(x.value, x.value, indices(first, width)) for x in vectors]
            parts.append(call(builder, name, args[0].type, *args, *rest))
        while len(parts) > 1:
            parts = [builder.shuffle_vector(a, b, indices(0, 2 * a.type.count)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return self.like(parts[0])

    def apply(self, op: str, *args: Any) -> Vector:
        """Emit the instructions of `op` and return the result."""
        if op == "polynomial":
            return elementary.polynomial(*args)
        vector = next(a for a in args if isinstance(a, Vector))
        return _OPS[op](*(vector.match(a) for a in args))


def _binary(method: str) -> Callable[[Vector, Vector], Vector]:
    """Make an operation from a method of the builder; for floats, from the method whose name starts with f."""

    def emit(x: Vector, y: Vector) -> Vector:
        name = "f" + method if x.is_float else {"div": "sdiv"}.get(method, method)
        return x.like(getattr(x.builder, name)(x.value, y.value))

    return emit


def _compare(sign: str) -> Callable[[Vector, Vector], Vector]:
    """Make a comparison, which is False for NaN, but True for != with NaN."""

    def emit(x: Vector, y: Vector) -> Vector:
        if not x.is_float:
            return x.like(x.builder.icmp_signed(sign, x.value, y.value))
        compare = x.builder.fcmp_unordered if sign == "!=" else x.builder.fcmp_ordered  # NaN differs from every number
        return x.like(compare(sign, x.value, y.value))

    return emit


def _bitwise(method: str) -> Callable[[Vector, Vector], Vector]:
    return lambda x, y: x.like(getattr(x.builder, method)(x.value, y.value))


def _where(condition: Vector, x: Vector, y: Vector) -> Vector:
    return x.like(x.builder.select(condition.value, x.value, y.value))


def _extremum(sign: str) -> Callable[[Vector, Vector], Vector]:
    """Make the minimum or the maximum from its comparison."""

    def emit(x: Vector, y: Vector) -> Vector:
        # As in NumPy, the result is NaN if x or y is NaN; `x + y` is that NaN.
        chosen = _where(_compare(sign)(x, y), x, y)
        unordered = x.like(x.builder.fcmp_unordered("uno", x.value, y.value))
        return _where(unordered, x + y, chosen)

    return emit


_OPS: dict[str, Callable[..., Any]] = {
    "neg": lambda x: x.like(x.builder.fneg(x.value)).within(-x.bounds[1], -x.bounds[0]),
    "abs": lambda x: x.intrinsic("fabs").within(0.0, inf),
    "sqrt": lambda x: x.intrinsic("sqrt"),
    "fma": lambda x, y, z: x.intrinsic(FMA, y, z),
    "copysign": lambda x, y: x.intrinsic("copysign", y),
    "add": _binary("add"),
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "div": _binary("div"),
    "quotient": lambda x, y: where(y == 0.0, 0.0, x / y),
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
    **elementary.FUNCTIONS,
}
