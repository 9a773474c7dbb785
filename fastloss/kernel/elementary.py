"""exp, log and related functions, written in the operations that every machine's symbols provide.

Errors: exp, log and pow below 1 ulp, expm1 below 1.5 ulp, log1p below 1.6 ulp, subnormal results included (`tests/test_accuracy.py`).
NaN gives NaN; at infinities and poles the functions return their limits. `docs/minimax.py` computes the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from fastloss.ops import copysign, fma, horner, where

Number = Any  # a symbol: a `cpu.vector.Vector` or a `cuda.scalar.Scalar`

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Format:
    """The constants that the algorithms use for one floating-point format."""

    mantissa: int  # number of stored bits of the mantissa
    bias: int  # of the exponent
    ln2: tuple[float, float]  # log 2 as a sum; the first part has so few bits that integer multiples of it are exact
    exp_range: tuple[float, float]  # outside, exp rounds to 0 or overflows to inf
    exp_terms: tuple[float, ...]  # polynomial for (exp(r) - 1 - r) / r**2
    log_terms: tuple[float, ...]  # polynomial for a function in FORMATS below
    tiny: float  # the smallest normal number
    large: float  # above this, 1 + x is x, and log1p scales x down

    @property
    def shifter(self) -> float:
        """Number that rounds x to an integer when it is added; the integer is then in the low bits of the sum."""
        return 1.5 * 2.0**self.mantissa


FORMATS = {
    32: Format(
        mantissa=23, bias=127,
        ln2=(0.693145751953125, 1.4286068203094173e-06),
        exp_range=(-104.0, 89.0),
        exp_terms=(0.499999930506401433, 0.166665147921380389, 0.0416684568432674612, 0.00836941878129966977, 0.00138131405739139917),
        # for (log(1 + f) - f + f**2 / 2) / f**3
        log_terms=(
            0.33333330665121394, -0.250008551723393629, 0.200013601832602556, -0.166221666612724464,
            0.141976047724205988, -0.131681940339433364, 0.127967344543299994, -0.0765776246545338396,
        ),
        tiny=2.0**-126, large=2.0**100,
    ),
    64: Format(
        mantissa=52, bias=1023,
        ln2=(6.93147180369123816490e-01, 1.90821492927058770002e-10),
        exp_range=(-746.0, 710.0),
        exp_terms=(
            0.50000000000000117, 0.166666666666663863, 0.0416666666665191571, 0.00833333333350765685, 0.00138888889469188972,
            0.000198412694861699913, 0.0000248014893533799021, 2.75575971796438486e-6, 2.76316869549207971e-7, 2.49989947595823107e-8,
        ),
        # for (log((1 + s) / (1 - s)) / s - 2) / s**2, in powers of s**2
        log_terms=(
            0.66666666666667297, 0.399999999994312334, 0.285714287408362028, 0.222221985699758694,
            0.181835712501628886, 0.153137282468068074, 0.148004342241845612,
        ),
        tiny=2.0**-1022, large=2.0**1000,
    ),
}  # fmt: skip

# for float32 arithmetic whose results are rounded to 16 bits: polynomials for (exp(r) - 1 - r) / r**2, for (tanh(x) - x) / x**3 in powers
# of x**2 up to x = 1 / 4, and for log1p(x) / x on [0, 1]
HALF_EXP_TERMS = (0.499992017587, 0.166671332138, 0.04189449931, 0.00831204983433)
HALF_TANH_TERMS = (-0.33324607318, 0.128771130831)
HALF_LOG1P_TERMS = (
    0.999999805673, -0.49997405335, 0.332754787687, -0.244954572919, 0.177452270573, -0.107681519646, 0.0440895017377, -0.00853917389192,
)  # fmt: skip


def polynomial(x: Number, reach: float, *terms: float) -> Number:
    """Evaluate a polynomial for |x| <= reach, without the terms that are too small to change the result."""
    least = 2.0 ** -(FORMATS[x.bits].mantissa + 3) * abs(terms[0])
    last = max((k for k, term in enumerate(terms) if abs(term) * reach**k >= least), default=0)
    return x.match(x.evaluate(x, terms[: last + 1]))


def power_of_two(k: Number, fmt: Format) -> Number:
    """Return 2**(k - bias) for an integer symbol k, a biased exponent."""
    return k.apply("shl", k, fmt.mantissa).as_float()


def two_sum(large: Number, small: Number) -> tuple[Number, Number]:
    """Return the rounded sum and its rounding error, for |large| >= |small| or large = 0."""
    total = large + small
    return total, (large - total) + small


def reduce_argument(x: Number, low: Any, shift: int, fmt: Format) -> tuple[Number, Number, Number, Number]:
    """Return n = round(x / log 2), the integer whose low bits are n + bias + shift, and r = x + low - n log 2 in two parts."""
    shifter = fmt.shifter + fmt.bias + shift
    shifted = fma(x, LOG2_E, shifter)
    n = shifted - shifter
    return n, shifted.as_int(), fma(n, -fmt.ln2[0], x), fma(n, -fmt.ln2[1], low)


def exp_reduced(r: Number, r_low: Number, fmt: Format) -> tuple[Number, Number, Number]:
    """Return e**(r + r_low) as the sum of two parts, and e**(r + r_low) - 1, for |r| <= log(2) / 2."""
    r_sum = r + r_low
    start = r + 1.0
    rest = fma(r_sum * r_sum, r_sum.evaluate(r_sum, fmt.exp_terms), r_low)
    return *two_sum(start, (r - (start - 1.0)) + rest), r + rest


def exp(x: Number, low: Any = 0.0) -> Number:
    """Return e**(x + low) = 2**n e**r. Without AVX-512, 2**n is applied as two factors, so that subnormal results are rounded once."""
    if x.bounds[1] <= 0.0:
        return exp_of_negative(x, low)[0]
    fmt = FORMATS[x.bits]
    least, most = fmt.exp_range
    x = where(x < least, least, where(x > most, most, x))
    n, whole, r, r_low = reduce_argument(x, low, 0, fmt)
    e_r, _, _ = exp_reduced(r, r_low, fmt)
    if x.scales_by_powers:
        return e_r.times_power_of_two(n).within(0.0, inf)
    half = (fmt.bias + 1) // 2
    negative = x < 0.0
    first = power_of_two(whole + where(negative, whole.splat(half), whole.splat(-half)), fmt)
    return (e_r * first * where(negative, e_r.splat(2.0**-half), 2.0**half)).within(0.0, inf)


def exp_of_negative(x: Number, low: Any = 0.0) -> tuple[Number, Number, Number]:
    """Return e**(x + low) for x <= 0, its relative rounding error, and e**(x + low) - 1 for x above -0.34.

    The error is relative to 2**n, and so up to 1.41 times too large or too small, which suffices to correct most of it.
    Functions that call this with the same argument share its instructions, because LLVM merges common subexpressions.
    """
    fmt = FORMATS[x.bits]
    half = (fmt.bias + 1) // 2
    n, whole, r, r_low = reduce_argument(x.at_least(fmt.exp_range[0]), low, half, fmt)
    e_r, rest, minus_1 = exp_reduced(r, r_low, fmt)
    e = e_r.times_power_of_two(n) if x.scales_by_powers else e_r * power_of_two(whole, fmt) * 2.0**-half
    return e.within(0.0, 1.0), rest, minus_1


def exp_of_sum(x: Number, low: Number) -> Number:
    """Return e**(x + low) for x <= 0 with an error below 1 ulp, by fewer operations than `exp`, of which fewer wait for low.

    The number low is at most half a unit in the last place of x, or anything finite where e**x is 0.
    """
    fmt = FORMATS[x.bits]
    half, least = (fmt.bias + 1) // 2, fmt.exp_range[0]
    low = where(x < least, 0.0, low)
    n, whole, r, _ = reduce_argument(x.at_least(least), 0.0, half, fmt)
    r = fma(n, -fmt.ln2[1], r)
    minus_1 = fma(r * r, r.evaluate(r, fmt.exp_terms), r)
    minus_1 = minus_1 + fma(minus_1, low, low)
    if x.scales_by_powers:
        return (minus_1 + 1.0).times_power_of_two(n).within(0.0, 1.0)
    scale = power_of_two(whole, fmt)
    return (fma(minus_1, scale, scale) * 2.0**-half).within(0.0, 1.0)


def sigmoid(x: Number) -> Number:
    """Return 1 / (1 + e**-x), computed as s = e / (1 + e) with e = e**-|x|, or as 1 - s.

    One iteration of Newton's method turns a reciprocal estimate of 14 bits into 28 bits, and corrects the rounding errors of e
    and of 1 + e.
    """
    never_positive = x.bounds[1] <= 0.0
    e, rest, _ = exp_of_negative(x if never_positive else -abs(x))
    r = (1.0 + e).reciprocal_estimate()
    s = e * r
    s = fma(fma(rest, e, fma(-s, e, e - s)), r, s)
    return s if never_positive else where(x > 0.0, 1.0 - s, s)


def half_exp(x: Number) -> Number:
    """Return e**x with a relative error of 3e-7, which does not show in a result that is rounded to 16 bits."""
    if x.bounds[1] > 0.0:
        return exp(x)
    fmt = FORMATS[32]
    x = x.at_least(fmt.exp_range[0])
    if x.has_exp2:
        exponent = x * (LOG2_E / 2.0)
        root = exponent.exp2_estimate()  # of e**x; a normal number where e**x is not
        return (root * fma(root, fma(exponent, -2.0 / LOG2_E, x), root)).within(0.0, 1.0)  # corrects the rounding of the exponent
    half = (fmt.bias + 1) // 2
    n, whole, _, _ = reduce_argument(x, 0.0, half, fmt)
    r = fma(n, -1.0 / LOG2_E, x)
    e_r = fma(r * r, horner(r, HALF_EXP_TERMS), r + 1.0)
    e = e_r.times_power_of_two(n) if x.scales_by_powers else e_r * (power_of_two(whole, fmt) * 2.0**-half)
    return e.within(0.0, 1.0)


def half_sigmoid(x: Number) -> Number:
    """Return the logistic function as `half_exp` returns e**x."""
    never_positive = x.bounds[1] <= 0.0
    e = half_exp(x if never_positive else -abs(x))
    s = e.short_quotient(1.0 + e)
    return s if never_positive else where(x > 0.0, 1.0 - s, s)


def half_log1p(x: Number) -> Number:
    """Return log(1 + x) as `half_exp` returns e**x."""
    return x * x.evaluate(x, HALF_LOG1P_TERMS) if x.bounds == (0.0, 1.0) else log1p(x)


def half_tanh(x: Number) -> Number:
    """Return the hyperbolic tangent as `half_exp` returns e**x. Near 0, where 1 - e**-2|x| cancels, it is a polynomial."""
    square, e = x * x, half_exp(-abs(x + x))
    near = fma(x * square, square.evaluate(square, HALF_TANH_TERMS), x)
    return where(abs(x) < 0.25, near, copysign((1.0 - e).short_quotient(1.0 + e), x))


def tanh(x: Number) -> Number:
    """Return (1 - e) / (1 + e) with e = e**(-2|x|) and the sign of x, by one iteration of Newton's method as in `sigmoid`."""
    minus_2x = -abs(x + x)
    h = -expm1(minus_2x)
    r = (1.0 + exp_of_negative(minus_2x)[0]).reciprocal_estimate()
    q = h * r
    return copysign(fma(fma(q, h, h - 2.0 * q), r, q), x)


def expm1(x: Number) -> Number:
    """Return e**x - 1 = 2**n (e**r - 1) + (2**n - 1). Near 0, n is 0, and the result is e**r - 1 without cancellation."""
    if x.bounds[1] <= 0.0:
        e, rest, minus_1 = exp_of_negative(x)
        return where(x > -0.34, minus_1, fma(rest, e, e - 1.0))
    fmt = FORMATS[x.bits]
    least = -float(fmt.mantissa + 4)  # below this, the result rounds to -1
    _, whole, r, r_low = reduce_argument(x.at_least(least), 0.0, 0, fmt)
    r_sum = r + r_low
    beyond_r = fma(r_sum * r_sum, r_sum.evaluate(r_sum, fmt.exp_terms), r_low)
    scale = power_of_two(whole, fmt)
    result = fma(scale, beyond_r, fma(scale, r, scale - 1.0))
    return where(x > 10.0, exp(x) - 1.0, result)  # for large x, 2**n may overflow where e**x does not


def log1p_of_product(x: Number) -> Number:
    """Return log1p for 0 <= x < 2**100, as accurate for tiny x as for large x, without special cases. NaN gives NaN."""
    fmt = FORMATS[x.bits]
    k = exponent(x + 1.0, fmt)
    scale = power_of_two(k.splat(fmt.bias) - k, fmt)
    f = fma(x, scale, scale - 1.0)  # (1 + x) 2**-k - 1 without the rounding of 1 + x
    return log_near_one(f, k.to_float())


def log1p_of_fraction(x: Number) -> Number:
    """Return log1p for 0 <= x <= 1, where the exponent of 1 + x is 0 or 1, so that masked additions replace products with the exponent.

    A polynomial of nine terms on all of [0, 1] is shorter, but the error of BCE's value is then 2.2 ulp instead of 1.8.
    """
    high, low = FORMATS[x.bits].ln2
    beyond = x > 2.0**0.5 - 1.0
    f = where(beyond, fma(x, 0.5, -0.5), x)
    return log_with(f, lambda rest: where(beyond, rest + low, rest), lambda near: where(beyond, near + high, near))


def log1p(x: Number) -> Number:
    """Return log(1 + x) for every x."""
    fmt = FORMATS[x.bits]
    if x.bounds == (0.0, 1.0):
        return log1p_of_fraction(x)
    huge, shift = x > fmt.large, fmt.bias // 2
    result = log1p_of_product(where(huge, x * 2.0**-shift, x))
    result = where(huge, result + shift / LOG2_E, result)
    return at_poles(x + 1.0, result)


def add_log1p(x: Number, e: Number, log1p: Callable[[Number], Number] = log1p) -> Number:
    """Return x + log1p(e) for 0 <= e <= 1, and store x and e as its `log_term`. A sum that uses this term makes the logarithm dead code."""
    result = x + log1p(copy(e).within(0.0, 1.0))  # a copy, because the bounds hold only here
    result.log_term = (x, e)
    return result


def log(x: Number) -> Number:
    """Return the natural logarithm as k log 2 + log m, with x = 2**k m and sqrt(1/2) <= m < sqrt(2)."""
    return at_poles(x, log_near_one(*split(x)))


def pow(x: Number, y: Number) -> Number:
    """Return x**y = exp(y log x) for x >= 0.

    The relative error of log x is multiplied by |y log x|, up to a hundred, so both are sums of two parts.
    """
    high, low = log_in_two_parts(*split(x))
    product = y * high
    rest = fma(y, low, fma(y, high, -product))
    least, most = FORMATS[x.bits].exp_range
    result = exp(product, where((product > least) & (product < most), rest, 0.0))
    result = where(x == inf, where(y > 0.0, x, 0.0), where(x == 0.0, where(y > 0.0, x, inf), result))
    result = where(x >= 0.0, result, x.splat(float("nan")))
    return where(y == 0.0, 1.0, where(y == y, result, y))


def split(x: Number) -> tuple[Number, Number]:
    """Return f and k with x = 2**k (1 + f) and sqrt(1/2) <= 1 + f < sqrt(2), for finite x > 0."""
    fmt = FORMATS[x.bits]
    subnormal = x < fmt.tiny
    normal = where(subnormal, x * 2.0**fmt.mantissa, x)
    k = exponent(normal, fmt)
    m = (normal.as_int() - k.apply("shl", k, fmt.mantissa)).as_float()
    k_float = k.to_float()
    return m - 1.0, where(subnormal, k_float - fmt.mantissa, k_float)


def exponent(u: Number, fmt: Format) -> Number:
    """Return the integer k with sqrt(1/2) <= u 2**-k < sqrt(2)."""
    bits = u.as_int()
    sqrt_half = u.splat(0.5**0.5).as_int()
    return bits.apply("shr", bits - sqrt_half, fmt.mantissa)


def log_near_one(f: Number, k: Number) -> Number:
    """Return k log 2 + log(1 + f)."""
    high, low = FORMATS[f.bits].ln2
    return log_with(f, lambda rest: fma(k, low, rest), lambda near: fma(k, high, near))


def log_with(f: Number, add_low: Callable[[Number], Number], add_high: Callable[[Number], Number]) -> Number:
    """Return log(1 + f) plus a multiple of log 2, whose low part is added to the small terms and whose high part is added last."""
    if f.bits == 32:
        return add_high(add_low(f * f * fma(f, f.evaluate(f, FORMATS[32].log_terms), -0.5)) + f)
    half_square, rest = f * f * 0.5, log_rest(f)
    return add_high(f - (half_square - add_low(rest)))


def log_rest(f: Number) -> Number:
    """Return log(1 + f) - f + f**2 / 2."""
    fmt = FORMATS[f.bits]
    if f.bits == 32:
        return f * f * f * f.evaluate(f, fmt.log_terms)
    # a polynomial in f would need twice the terms of one in s**2, with s = f / (2 + f) and log(1 + f) = 2 atanh(s)
    s = f / (f + 2.0)
    z = s * s
    return s * fma(z, z.evaluate(z, fmt.log_terms), f * f * 0.5)


def log_in_two_parts(f: Number, k: Number) -> tuple[Number, Number]:
    """Return k log 2 + log(1 + f) as the sum of two numbers, about 5 digits more accurate than a single number."""
    fmt = FORMATS[f.bits]
    square = f * f
    near = fma(square, -0.5, f)
    near_low = fma(square, -0.5, f - near) - 0.5 * fma(f, f, -square)
    large = k * fmt.ln2[0]  # exact
    high, rest = two_sum(large, near)
    return two_sum(high, rest + (near_low + fma(k, fmt.ln2[1], log_rest(f))))


def at_poles(x: Number, result: Number) -> Number:
    """Replace the result by the value of log(x) where x is inf, 0, negative or NaN."""
    finite = where(x == float("inf"), float("inf"), result)
    return where(x > 0.0, finite, where(x == 0.0, x.splat(float("-inf")), x.splat(float("nan"))))


FUNCTIONS: dict[str, Callable[..., Number]] = {  # by the names of the operations that symbols apply
    "exp": exp, "expm1": expm1, "log": log, "log1p": log1p, "pow": pow, "sigmoid": sigmoid, "tanh": tanh, "add_log1p": add_log1p,
    "half_exp": half_exp, "half_sigmoid": half_sigmoid, "half_tanh": half_tanh, "half_log1p": half_log1p,
    "half_add_log1p": partial(add_log1p, log1p=half_log1p),
}  # fmt: skip
# those that suffice where results are rounded to 16 bits, by the operations that they take the place of
FOR_HALVES = {name.removeprefix("half_"): name for name in FUNCTIONS if name.startswith("half_")}
