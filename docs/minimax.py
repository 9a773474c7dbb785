"""Compute and print the polynomials of `fastloss/kernel/elementary.py` with their largest errors: `python docs/minimax.py`.

The Remez exchange algorithm runs in 50 digits (mpmath, extra `test`). Each polynomial approximates the remainder of a function
after its first terms, which are exact. The weights make the printed errors relative to the whole function.
"""

from collections.abc import Callable
from itertools import pairwise

from mpmath import cos, exp, linspace, log, lu_solve, matrix, mp, mpf, nstr, pi, sqrt, tanh

mp.dps = 50
TINY = mpf(10) ** -14  # below this, a quotient that would cancel is replaced by its limit
Function = Callable[[mpf], mpf]


def exchange(function: Function, weight: Function, low: mpf, high: mpf, degree: int) -> tuple[list[mpf], mpf]:
    """Return the coefficients that minimise the largest |weight * (polynomial - function)|, and that error."""
    count = degree + 2
    points = [(low + high) / 2 - (high - low) / 2 * cos(pi * k / (count - 1)) for k in range(count)]
    grid = linspace(low, high, 150 * count)
    for _ in range(10):
        system, values = matrix(count, count), matrix(count, 1)
        for row, x in enumerate(points):
            for column in range(degree + 1):
                system[row, column] = x**column
            system[row, degree + 1], values[row] = (-1) ** row / weight(x), function(x)
        solved = list(lu_solve(system, values))[:-1]
        errors = [weight(x) * (mp.polyval(solved[::-1], x) - function(x)) for x in grid]
        sign_changes = [0, *(k for k in range(1, len(grid)) if (errors[k] > 0) != (errors[k - 1] > 0)), len(grid)]
        peaks = [max(range(a, b), key=lambda k: abs(errors[k])) for a, b in pairwise(sign_changes)]
        if len(peaks) != count:
            break
        points = [grid[k] for k in peaks]
    return solved, max(abs(e) for e in errors)


def exp_rest(x: mpf) -> mpf:
    """Return (exp(x) - 1 - x) / x**2."""
    return mpf(1) / 2 if abs(x) < TINY else (exp(x) - 1 - x) / x**2


def log_rest(x: mpf) -> mpf:
    """Return (log(1 + x) - x + x**2 / 2) / x**3."""
    return mpf(1) / 3 if abs(x) < TINY else (log(1 + x) - x + x**2 / 2) / x**3


def atanh_rest(z: mpf) -> mpf:
    """Return (log((1 + s) / (1 - s)) / s - 2) / s**2, given z = s**2."""
    s = sqrt(z)
    return mpf(2) / 3 if z < TINY else (log((1 + s) / (1 - s)) / s - 2) / z


def log1p_share(x: mpf) -> mpf:
    """Return log(1 + x) / x."""
    return mpf(1) if x < TINY else log(1 + x) / x


def tanh_rest(z: mpf) -> mpf:
    """Return (tanh(x) / x - 1) / x**2, given z = x**2."""
    return -mpf(1) / 3 if z < TINY else (tanh(sqrt(z)) / sqrt(z) - 1) / z


def main() -> None:
    """Print the coefficients and the largest error of every polynomial."""
    half = log(mpf(2)) / 2 * mpf("1.01")
    low, high = sqrt(mpf(1) / 2) - mpf("1.002"), sqrt(mpf(2)) - mpf("0.998")
    steepest = (high / (2 + high)) ** 2
    tables = [
        ("EXP f4", exp_rest, lambda x: x**2 / exp(x) + TINY, -half, half, 4),
        ("EXP f8", exp_rest, lambda x: x**2 / exp(x) + TINY, -half, half, 9),
        ("LOG f4", log_rest, lambda x: abs(x**3 / log(1 + x)) + TINY if x else TINY, low, high, 7),
        ("EXP for 16 bits", exp_rest, lambda x: x**2 / exp(x) + TINY, -half, half, 3),
        ("LOG1P for 16 bits", log1p_share, lambda x: 1 / log1p_share(x), mpf(0), mpf(1), 7),
        ("TANH for 16 bits", tanh_rest, lambda z: z + TINY, mpf(0), mpf(1) / 16, 1),
        ("LOG f8", atanh_rest, lambda z: z / 2 + mpf(10) ** -4, mpf(0), steepest, 6),
    ]
    for name, function, weight, start, stop, degree in tables:
        solved, error = exchange(function, weight, start, stop, degree)
        print(f"{name}: largest relative error {nstr(error, 3)}")
        print("   ", ", ".join(nstr(c, 18) for c in solved))


if __name__ == "__main__":
    main()
