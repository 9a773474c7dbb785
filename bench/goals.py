"""The goals for the speed of fastloss. Tables list those that are missed as well as those that are met."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.cases import BCE, CROSS_ENTROPY, MSE, Case
from bench.ours import PLAIN
from bench.results import PEERS, Measured, Results, Timing

LIMIT, FASTEST = "the limit", "the fastest peer"
TENSORS = "fastloss on tensors"  # forward and backward
TENSORS_IN_PLACE = f"{TENSORS}, in place"


@dataclass(frozen=True)
class Goal:
    """A bound for the ratio of two rows of a case: fastloss takes at most `most` times as long, or is at least `least` times as fast."""

    case: Case
    against: str
    most: float | None = None
    least: float | None = None
    row: str = ""

    def ratio(self, measured: Measured) -> float | None:
        """Return the measured ratio, a slowdown for `most` and a speed-up for `least`, or None if a row is missing."""
        ours = measured.rows.get(self.row) if self.row else measured.ours
        other = self.rival(measured)
        if ours is None or other is None:
            return None
        return ours.median / other.median if self.most else other.median / ours.median

    def rival(self, measured: Measured) -> Timing | None:
        """Return the row that fastloss is compared with, or None if it is missing."""
        if self.against == LIMIT:
            return measured.limit
        if self.against == FASTEST:
            rows = [row for name, row in measured.rows.items() if name in PEERS]
            return min(rows, key=lambda row: row.median, default=None)
        return measured.rows.get(self.against)

    @property
    def asked(self) -> str:
        """The bound, as text."""
        return f"<= {self.most:g} x" if self.most else f">= {self.least:g} x faster"

    def met(self, ratio: float) -> bool:
        """Whether a ratio is within the bound."""
        return ratio <= self.most if self.most else ratio >= (self.least or 0)


def _limit(most: float, *losses: str, part: str = "value_and_grad") -> list[Goal]:
    return [Goal(Case(loss, part), LIMIT, most=most) for loss in losses]


GOALS = [
    *_limit(1.5, BCE),
    *_limit(1.6, BCE, part="value"),
    *_limit(1.2, MSE, "l1_loss", "smooth_l1_loss", "huber_loss"),
    *_limit(1.2, MSE, part="value"),
    *_limit(1.7, "log_cosh_loss", "mse_with_logits_loss"),
    *_limit(4, "binary_cross_entropy", "sigmoid_focal_loss"),
    *_limit(2, "dice_bce_with_logits_loss", CROSS_ENTROPY),
    Goal(Case(), "NumPy, stable", least=30),
    Goal(Case(), "scikit-learn", least=25),
    Goal(Case(), "torch eager", least=15),
    Goal(Case(), "torch.compile", least=5),
    Goal(Case(), "JAX", least=8),
    *(Goal(Case(), peer, least=least, row=TENSORS) for peer, least in (("torch eager", 8), ("torch.compile", 3))),
    *(Goal(Case(MSE), peer, least=least, row=TENSORS) for peer, least in (("torch eager", 3), ("torch.compile", 2))),
    *(
        Goal(Case(CROSS_ENTROPY, size=size), peer, least=least, row=TENSORS)
        for size in ("large", "volume", "many classes")
        for peer, least in (("torch eager", 8), ("torch.compile", 3))
    ),
    Goal(Case("dice_cross_entropy_loss"), "torch eager", least=15, row=TENSORS),
    *(Goal(Case(loss, size="1Ki"), "torch eager", least=1, row=TENSORS) for loss in (BCE, MSE)),
    Goal(Case(CROSS_ENTROPY, size="mnist"), "torch eager", least=1),
    Goal(Case(size="mnist"), FASTEST, least=4),
    Goal(Case(size="1Ki"), FASTEST, least=2),
    Goal(Case(), "fastloss, out=", most=1, row="fastloss, in place"),
    *(Goal(Case(loss, dtype=dtype), PLAIN, most=1) for loss in (BCE, MSE) for dtype in ("float16", "bfloat16", "uint8 targets")),
    *(Goal(Case(option=option), PLAIN, most=1.5) for option in ("weight", "weight per channel", "mask", "pos_weight")),
    Goal(Case(layout="channels-last"), PLAIN, most=1.05),
]


_GPU = {loss: Case(loss, size="huge") for loss in (BCE, MSE)}
GPU_GOALS = [
    *(Goal(case, LIMIT, most=1 / 0.9) for case in _GPU.values()),
    *(Goal(replace(case, part="value"), LIMIT, most=1 / 0.9) for case in _GPU.values()),
    *(
        Goal(replace(case, dtype=dtype), LIMIT, most=1 / 0.85)
        for case in _GPU.values()
        for dtype in ("uint8 targets", "float16", "bfloat16")
    ),
    *(Goal(case, "torch eager", least=4, row=TENSORS) for case in _GPU.values()),
    *(Goal(case, "torch.compile", least=1.4, row=TENSORS) for case in _GPU.values()),
    *(Goal(case, "JAX", least=1.4) for case in _GPU.values()),
]


def verdicts(results: Results) -> list[tuple[Goal, float]]:
    """Return each goal whose rows were measured, with the measured ratio."""
    found = []
    for goal in GPU_GOALS if results.is_gpu else GOALS:
        measured = results.measured.get(goal.case)
        if measured and (ratio := goal.ratio(measured)) is not None:
            found.append((goal, ratio))
    return found
