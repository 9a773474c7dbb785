"""The sweeps: which arguments a formula is given, and what its results are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.core.call import Arguments
from fastloss.cpu.call import HostCall
from tests import oracle
from tests.exhaustive.compare import COLUMNS, RESULTS, compare, compare_cross_entropy
from tests.table import LOSSES
from tests.test_accuracy import FUNCTION_LOSSES, FUNCTIONS
from tests.ulp import HALF, QUANTITIES, ULP

FLOAT32, FLOAT16 = 1 << 32, 1 << 16  # how many numbers there are
CHUNK = 1 << 14  # arguments at a time: everything stays in the caches
ONE = 0x3F800000  # the bits of 1.0
IN_01 = ((0, ONE + 1),)  # the bits of the float32 numbers from 0 to 1
IMAGE_TARGETS = (0.0, 1 / 255, 0.5, 254 / 255, 1.0)
DOUBLE = SimpleNamespace(**{**vars(oracle.LONG), "number": np.float64})
Worst = np.ndarray  # a row for each quantity: the largest error, and the input and the target at which it occurs


@dataclass(frozen=True)
class Sweep:
    """All arguments of one formula, in blocks."""

    name: str
    run: Callable[[Sweep, int, int, Worst], None]  # compare the results of the bits from one number to another
    bounds: tuple[float, ...]  # of the largest error of each quantity
    targets: tuple[float, ...] = (0.0,)
    ranges: tuple[tuple[int, int], ...] = ((0, FLOAT32),)  # of the bits of the inputs
    parameters: Mapping[str, float] = field(default_factory=dict)
    every_path: bool = False  # whether to run on every code path, and not on the CPU's own alone

    @property
    def size(self) -> int:
        """Number of pairs of an input and a target."""
        return sum(stop - start for start, stop in self.ranges) * len(self.targets)

    def blocks(self, size: int, every: int = 1) -> list[tuple[int, int]]:
        """Cut the ranges into blocks of at most `size` inputs, and return one block of `every`."""
        return [(at, min(at + size, stop)) for start, stop in self.ranges for at in range(start, stop, size * every)]

    def largest_errors(self, start: int, stop: int) -> Worst:
        """Return the largest errors of the inputs with the bits from `start` to `stop`."""
        worst = np.zeros((RESULTS, COLUMNS))
        with np.errstate(all="ignore"):
            for at in range(start, stop, CHUNK):
                self.run(self, at, min(at + CHUNK, stop), worst)
        return worst


def results_of(loss: Any, quantities: tuple[str, ...], z: Any, t: Any, **parameters: float) -> list[Any]:
    """Return quantities of every element, from one pass."""
    # slopes and curvatures are those of a sum, and the value is that of each element
    return loss.compute(Arguments((), quantities, z, t, None, "none", parameters), HostCall)[1]


def of_cross_entropy(sweep: Sweep, start: int, stop: int, worst: Worst) -> None:
    """Compare value, slope and curvature of the cross-entropy of logits."""
    z, loss = np.arange(start, stop, dtype=np.uint64).astype(np.uint32).view(np.float32), fl.binary_cross_entropy_with_logits
    results = np.empty((RESULTS, len(sweep.targets), z.size))
    targets = np.array(sweep.targets, np.float32)
    for j, target in enumerate(targets):
        results[:, j] = results_of(loss, QUANTITIES, z, np.broadcast_to(target, z.shape))
    compare_cross_entropy(z.astype(np.float64), targets.astype(np.float64), results, worst, False)


def of_halves(sweep: Sweep, start: int, stop: int, worst: Worst) -> None:
    """Compare the cross-entropy of float16 logits with every finite float16 target."""
    z = np.arange(start, stop, dtype=np.uint32).astype(np.uint16).view(np.float16)
    targets = np.array(sweep.targets, np.float16)
    for part in np.array_split(targets, max(1, z.size * targets.size // CHUNK)):
        shape = (part.size, z.size)
        pairs = np.broadcast_to(z, shape), np.broadcast_to(part[:, np.newaxis], shape)
        results = np.stack(results_of(fl.binary_cross_entropy_with_logits, QUANTITIES, *pairs)).astype(np.float64)
        compare_cross_entropy(z.astype(np.float64), part.astype(np.float64), results, worst, True)


def of_loss(sweep: Sweep, start: int, stop: int, worst: Worst) -> None:
    """Compare a loss with the oracle in float64."""
    row = LOSSES[sweep.name.partition(",")[0]]
    z = np.arange(start, stop, dtype=np.uint64).astype(np.uint32).view(np.float32)
    wide = z.astype(np.float64)
    for target in np.float32(sweep.targets):
        quantities = QUANTITIES[: len(sweep.bounds)]
        results = results_of(row.loss, quantities, z, np.broadcast_to(target, z.shape), **sweep.parameters)
        wanted = row.oracle(wide, np.full(wide.shape, target, np.float64), DOUBLE, **sweep.parameters)
        for k, (got, (want, magnitude)) in enumerate(zip(results, wanted, strict=False)):
            want, magnitude = np.where(np.isnan(wide), np.nan, want), np.where(np.isinf(wide), np.abs(want), np.abs(magnitude))
            compare(wide, float(target), k, got.astype(np.float64), want, magnitude, worst)


def of_function(sweep: Sweep, start: int, stop: int, worst: Worst) -> None:
    """Compare a function of the vocabulary with NumPy's in float64."""
    z = np.arange(start, stop, dtype=np.uint64).astype(np.uint32).view(np.float32)
    want = FUNCTIONS[sweep.name](z.astype(np.float64))
    got = results_of(FUNCTION_LOSSES[sweep.name], ("value",), z, z)[0]
    compare(z.astype(np.float64), 0.0, 0, got.astype(np.float64), want, np.abs(want), worst)


def bounds_of(name: str, is_soft: bool, count: int = RESULTS) -> tuple[float, ...]:
    """Return the promised bounds of a loss's quantities, for targets 0 and 1 or for others."""
    return tuple(ULP[name, quantity][is_soft] for quantity in QUANTITIES[:count])


def of_row(name: str, targets: tuple[float, ...] = (0.0,), count: int = RESULTS, **fields: Any) -> Sweep:
    """Return the sweep of a loss of the table."""
    parameters = fields.get("parameters", {})
    label = ", ".join([name, *(f"{key}={value:g}" for key, value in parameters.items())])
    return Sweep(label, of_loss, bounds_of(name, not {0.0, 1.0}.issuperset(targets), count), targets, **fields)


HALF_TARGETS = tuple(x for x in np.arange(FLOAT16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(float) if np.isfinite(x))
BCE = "binary_cross_entropy_with_logits"
SIGN, UP_TO_700 = 1 << 31, int(np.float32(700).view(np.uint32)) + 1
FINITE = ((0, 0x7F800000), (0x80000000, 0xFF800000))
SWEEPS = (
    Sweep(BCE, of_cross_entropy, bounds_of(BCE, True), IMAGE_TARGETS, every_path=True),
    Sweep(f"{BCE}, targets 0 and 1", of_cross_entropy, bounds_of(BCE, False), (0.0, 1.0), every_path=True),
    Sweep(f"{BCE}, float16", of_halves, (HALF,) * RESULTS, HALF_TARGETS, ((0, FLOAT16),)),
    of_row("binary_cross_entropy", (0.0, 1.0), ranges=IN_01),
    # up to 700, where float64 still holds exp(-|z|); its curvature keeps no bound where p (1 - p) is subnormal
    of_row("sigmoid_focal_loss", (0.0, 1.0), 2, ranges=((0, UP_TO_700), (SIGN, SIGN + UP_TO_700))),
    of_row("mse_with_logits_loss", (0.0, 1.0)),
    of_row("mse_loss", count=2),  # the curvature of a piecewise polynomial is a constant
    of_row("l1_loss", count=2),
    *(of_row("smooth_l1_loss", count=2, parameters=p) for p in LOSSES["smooth_l1_loss"].settings),
    *(of_row("huber_loss", count=2, parameters=p) for p in LOSSES["huber_loss"].settings),
    of_row("log_cosh_loss"),
    *(of_row("charbonnier_loss", ranges=FINITE, parameters=p) for p in LOSSES["charbonnier_loss"].settings),
    *(Sweep(name, of_function, (ULP[name, "value"],)) for name in FUNCTIONS),
)


def work_on(number: int, start: int, stop: int) -> Worst:
    """Return the largest errors of a block of a sweep."""
    return SWEEPS[number].largest_errors(start, stop)
