"""`RegionLoss`: losses that are functions of sums over regions, such as Dice, on which the slope of each of a region's elements depends.

They take two passes over memory, with the same loops as other losses. The first computes the sums. The second writes the
gradient; its formula receives numbers computed from the sums as parameters that broadcast.

With the overlap p t of a prediction p and a target t, the false positives (1 - t) p, and the false negatives t (1 - p):

    missed = 2 alpha sum(false positives) + 2 beta sum(false negatives)
    loss = (missed + smooth_denominator - smooth) / (missed + 2 sum(overlap) + smooth_denominator)

This is the Dice loss for alpha = beta = 1/2, the Jaccard loss for alpha = beta = 1, and otherwise a Tversky loss.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends.find import find_backend
from fastloss.core.abstract_loss import AbstractLoss
from fastloss.core.call import Arguments
from fastloss.core.checks import (
    LARGEST,
    REDUCTIONS,
    check_flag,
    check_grad_output,
    check_reduction,
    refuse_grad_output,
    to_bounded,
    to_float,
)
from fastloss.core.plan import Array
from fastloss.loss import SLOPE, VALUE

SETTINGS: dict[str, Any] = {
    "smooth": 1.0, "smooth_denominator": None, "alpha": 0.5, "beta": 0.5, "per_channel": True, "per_sample": True,
}  # fmt: skip
SETTINGS_DOC = """
        smooth: number added to the numerator, and to the denominator, 0 or more, in elements.
        smooth_denominator: number added to the denominator; None for that of `smooth`.
        alpha, beta: weights of false positives and of false negatives, 0 or more. 1/2 and 1/2 is the Dice loss, 1 and 1 the Jaccard
            loss; others are Tversky losses.
        per_channel: whether each {channel} is a region of its own; if not, all {channels} of a sample are one region.
        per_sample: whether each sample has regions of its own; if not, the whole batch is one image.
""".strip("\n")


class Scores(NamedTuple):
    """Results of the first pass, one number for each region: a channel of a sample, a sample, a channel, or the batch."""

    loss: Array
    score: Array  # 1 - loss, computed from its own sum and not as a difference
    size: Array  # the denominator
    is_present: Array  # whether the region has any element; one without does not count


class RegionLoss(AbstractLoss):
    """A loss of regions, alone or with cross-entropy. `grad` and `value_and_grad` take the arguments of a call."""

    settings: dict[str, Any]
    weights: tuple[str, str] = ("dice_weight", "bce_weight")  # the settings that are the weights of the two parts
    with_entropy: bool

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the loss: a float64 number, or an array with one number for each sample or region."""
        refuse_grad_output(options)
        if options.get("out") is not None:
            raise ValueError("out takes the gradient, and the value alone has none: use grad or value_and_grad")
        return find_backend(input).compute(self, Arguments(VALUE, (), input, target, weight, reduction, options))[0]

    def grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Array:
        """Return the gradient with respect to the input, in the input's dtype."""
        gradient: Array = find_backend(input).compute(self, Arguments((), SLOPE, input, target, weight, reduction, options))[1][0]
        return gradient

    def value_and_grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Any, Array]:
        """Return the loss and its gradient with respect to the input, from two passes over memory."""
        value, outputs = find_backend(input).compute(self, Arguments(VALUE, SLOPE, input, target, weight, reduction, options))
        return value, outputs[0]

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute the requested quantities: sums in one pass, gradients in a second."""
        passes = Passes(self, arguments, call)
        return passes.value() if arguments.summed else None, passes.slopes(arguments.wanted) if arguments.wanted else []

    # --- methods that each kind of prediction defines

    def first_call(self, arguments: Arguments, call: Any, settings: dict[str, Any]) -> Any:
        """Make the call of the first pass."""
        raise NotImplementedError

    def shape_of(self, call: Any) -> tuple[int, ...]:
        """Return the shape of the caller's input."""
        shape: tuple[int, ...] = call.shape
        return shape

    def sums(self, call: Any, settings: Mapping[str, Any]) -> dict[str, Array]:
        """Make the first pass, and return its sums.

        "overlap", "missed" and "elements", the number of elements that count, are those of each region of each sample. "entropy", and
        "count", by which its mean divides, are those of each sample or of smaller groups. If "elements" is missing, it is "count".
        """
        raise NotImplementedError

    def slope_call(self, passes: Passes) -> Any:
        """Make the call of the second pass."""
        raise NotImplementedError

    def weights_of_regions(self, settings: Mapping[str, Any]) -> Any:
        """Return the weights of regions, which broadcast against their losses."""
        return np.float64(1.0)

    def as_given(self, gradient: Array) -> Array:
        """Return a gradient with the axes of the caller's input."""
        return gradient

    # --- values

    def writes_value(self, reduction: str) -> bool:
        """Return False: even with reduction "none" the value is made of sums, one number for each group."""
        return False

    def value_shape(self, shape: tuple[int, ...], reduction: str, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the value; with reduction "none" it is (N, C), (N,), (C,) or ()."""
        own = {**self.settings, **options}
        if reduction != "none":
            return shape[:1] if reduction.startswith("sample") else ()
        regions = shape[: leading_axes(own)]
        return regions if own["per_sample"] else regions[1:]

    def accumulated_reductions(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the reductions that have a value over a data set: "none" too where the whole data set is one image."""
        has_regions = not self.take_settings(dict(options))["per_sample"] and not self.with_entropy
        return (*super().accumulated_reductions(options), *(("none",) if has_regions else ()))

    def sample_sums(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> dict[str, Any]:
        """Return the sums of the samples; see `Accumulated`. If the data set is one image, they are those that its losses need."""
        options, is_one_image = dict(options), not self.take_settings(dict(options))["per_sample"]
        weight, options["per_sample"] = options.pop("weight", None), True
        passes = Passes(self, Arguments(VALUE, (), operands[0], operands[1], weight, "mean", options), call)
        if is_one_image:
            return passes.sums
        regions = {"dice": passes.losses, "present": passes.scores.is_present, **{name: passes.sums[name] for name in ("entropy", "count")}}
        return {name: x.reshape(-1) for name, x in regions.items()}

    def value_of_sums(self, sums: Mapping[str, Any], samples: int, reduction: str, options: Mapping[str, Any]) -> Any:
        """Return the loss, given the sums; see `Accumulated`."""
        settings = self.take_settings(dict(options))
        sums = sums or dict.fromkeys(("dice", "present", "overlap", "missed", "elements", "truth", "entropy", "count"), np.zeros(1))
        if settings["per_sample"]:
            dice, present = sums["dice"], sums["present"]
        else:
            scores = score(sums, settings)
            dice, present = scores.loss * self.weights_of_regions(settings), scores.is_present
        if reduction == "none":
            return dice if settings["per_channel"] else dice[0]
        divisors = {"mean": (present.sum(axis=-1), sums["count"].sum(axis=-1)), "sum": (1, 1), "batchmean": (samples, samples)}[reduction]
        return self.add_parts(settings, dice.sum(axis=-1) / divisors[0], sums["entropy"].sum(axis=-1) / divisors[1])

    def add_parts(self, settings: Mapping[str, Any], dice: Any, entropy: Any) -> Any:
        """Return the weighted sum of the regions' losses and the cross-entropy. A part of weight 0 does not count, even if infinite."""
        weights = [settings[name] for name in self.weights] if self.with_entropy else (1.0, 0.0)
        terms = [weight * part for weight, part in zip(weights, (dice, entropy), strict=True) if weight]
        return functools.reduce(operator.add, terms or [np.zeros_like(dice)])

    def gradients_of_part(self, arguments: Arguments, call: Any, sums: Mapping[str, Any], samples: int) -> list[Any]:
        """Return the gradients of a part with respect to the loss of all parts, given the sums and the number of samples of all."""
        return Passes(self, arguments, call, sums, samples).slopes(arguments.wanted)

    def take_settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Remove the settings from the options, check them, and return them with the defaults of those that are missing."""
        own = {name: options.pop(name, default) for name, default in self.settings.items()}
        for name, value in own.items():
            if isinstance(self.settings[name], bool):
                check_flag(name, value)
            elif value is not None or self.settings[name] is not None:
                own[name] = to_bounded(name, value, (0.0, LARGEST))
        return own


def leading_axes(settings: Mapping[str, Any]) -> int:
    """Return the number of leading axes for whose entries the first pass computes separate sums."""
    return 2 if settings["per_channel"] else 1 if settings["per_sample"] else 0


def score(sums: Mapping[str, Any], settings: Mapping[str, Any]) -> Scores:
    """Return the losses of regions, given their sums."""
    smooth, more = settings["smooth"], settings["smooth_denominator"]
    right, missed, is_present = 2 * sums["overlap"] + smooth, sums["missed"], sums.get("elements", sums["count"]) > 0
    if more is not None:
        missed = missed + (more - smooth)
    size = missed + right
    counted = is_present
    if settings.get("zero_absent"):
        counted = is_present & (sums["truth"] > 0)
        size = np.where(counted, size, np.inf)
    with np.errstate(all="ignore"):
        return Scores(np.where(counted, missed / size, 0.0), right / size, size, is_present)


class Passes:
    """One call: the first pass, made at once, and from its sums the value and the second pass.

    If the arrays are a part of a batch, the sums and the number of samples of the whole batch are given; see `Accumulated`.
    """

    def __init__(
        self, loss: RegionLoss, arguments: Arguments, call: Any, whole: Mapping[str, Any] | None = None, samples: int | None = None
    ) -> None:
        options = {**arguments.options, "weight": arguments.weight}
        self.loss, self.settings, self.reduction = loss, loss.take_settings(options), arguments.reduction
        upstream, weight = options.pop("grad_output", None), options.pop("weight")
        self.call = loss.first_call(arguments._replace(weight=weight, reduction="sum", options=options), call, self.settings)
        self.shape = loss.shape_of(self.call)
        self.check_shape()
        self.check_reduction()
        self.upstream = 1.0 if upstream is None else self.take_upstream(upstream)
        self.samples = samples
        if whole is None or self.settings["per_sample"]:
            self.sums = loss.sums(self.call, self.settings)
        else:
            self.sums = {name: x.reshape((1, -1) if self.settings["per_channel"] else ()) for name, x in whole.items()}
        self.scores = score({name: self.over_batch(x) for name, x in self.sums.items()}, self.settings)
        weights = loss.weights_of_regions(self.settings)
        self.losses = self.scores.loss * weights
        self.counts = whole if whole is not None and self.settings["per_sample"] else {"present": self.scores.is_present, **self.sums}

    def check_shape(self) -> None:
        """Raise ValueError if the input has fewer axes than its regions need."""
        needed = leading_axes(self.settings)
        if len(self.shape) < needed:
            axes, instead = ("two leading axes, samples and channels", "per_channel") if needed == 2 else ("a first axis", "per_sample")
            raise ValueError(f"input has shape {self.shape}; it needs {axes}; or pass {instead}=False")

    def check_reduction(self) -> None:
        """Raise ValueError for a reduction that these regions do not have."""
        accepted = [r for r in REDUCTIONS if self.settings["per_sample"] or not r.startswith("sample")]
        accepted = [r for r in accepted if r in ("mean", "sum", "none") or self.shape]
        accepted = [r for r in accepted if r != "none" or not self.loss.with_entropy]
        check_reduction(self.reduction, accepted)

    def take_upstream(self, grad_output: Any) -> Any:
        """Convert the upstream gradient: a number, or an array of the loss's shape."""
        if self.call.is_number(grad_output):
            return to_float("grad_output", grad_output)
        array = self.call.as_array("grad_output", grad_output)
        check_grad_output(array, self.loss.value_shape(self.shape, self.reduction, self.settings), self.reduction)
        return array.astype(np.float64)

    def over_batch(self, x: Array) -> Array:
        """Add up the samples if a region is a channel of the whole batch."""
        return x.sum(axis=0) if self.settings["per_channel"] and not self.settings["per_sample"] else x

    def value(self) -> Any:
        """Return the reduced value."""
        if self.reduction == "none":
            return self.losses[()]
        self.call.warn_of_empty_mean(self.divisor("count"))
        with np.errstate(all="ignore"):
            dice, entropy = self.reduced(self.losses, "present"), self.reduced(self.sums["entropy"], "count")
            return self.loss.add_parts(self.settings, dice, entropy)[()]

    def reduced(self, sums: Array, counted: str) -> Any:
        """Return the sum of the regions' sums, divided by the number of regions or elements that the reduction counts."""
        return np.divide(self.over_groups(sums), self.divisor(counted))

    def over_groups(self, x: Array) -> Any:
        """Add up regions: all of them, or those of each sample."""
        return np.sum(x, axis=tuple(range(1, x.ndim)) if self.reduction.startswith("sample") else None)

    def divisor(self, counted: str) -> Any:
        """Return the number that the reduction divides by, where it counts "present" regions or elements by "count"."""
        if self.reduction in ("mean", "sample_mean"):
            return self.over_groups(self.counts[counted])
        if self.reduction != "batchmean":
            return 1
        return self.shape[0] if self.samples is None else self.samples

    def slopes(self, wanted: tuple[str, ...]) -> list[Array]:
        """Make the second pass and return the gradients."""
        with np.errstate(all="ignore"):
            call = self.loss.slope_call(self)
        outputs: list[Array] = call.make_outputs(wanted)
        call.run((), wanted, outputs)
        return list(map(self.loss.as_given, outputs))

    def rate(self) -> Any:
        """Return the derivative of the reduced value by each region's loss, divided by the region's size; None if it has no weight."""
        if not (weight := self.settings[self.loss.weights[0]] if self.loss.with_entropy else 1.0):
            return None
        each = np.divide(self.upstream, self.divisor("present"))
        if self.reduction.startswith("sample") and each.ndim:
            each = each.reshape(-1, *(1,) * (self.scores.size.ndim - 1))
        # the slope of an empty region is 0; without the limit, p (1 - p) = 0 would be multiplied by infinity
        limit = float(np.finfo(self.arithmetic).max) / (2.0 + 2.0 * max(self.settings["alpha"], self.settings["beta"]))
        weights = self.scores.is_present * self.loss.weights_of_regions(self.settings)
        return weight * each * weights * np.minimum(1.0 / self.scores.size, limit)

    def rates(self, rate: Any, misses: str = "alpha", others: str = "beta") -> tuple[Any, Any, Any]:
        """Return the derivatives of the reduced value by p: those of (1 - t) p, of t (1 - p), and of t p. The last two are not positive.

        `misses` names the weight of (1 - t) p, and `others` that of t (1 - p).
        """
        missed, other = (2.0 * self.settings[name] * self.scores.score * rate for name in (misses, others))
        return missed, -other, -2.0 * self.scores.loss * rate

    def entropy_rate(self) -> Any:
        """Return the derivative of the reduced value by each element's cross-entropy; None if it has no weight."""
        if not (weight := self.settings[self.loss.weights[1]] if self.loss.with_entropy else 0.0):
            return None
        return weight * np.divide(self.upstream, self.divisor("count"))

    @property
    def arithmetic(self) -> Any:
        """The type of the arithmetic."""
        return np.float64 if np.float64 in (self.call.arrays[0].dtype, self.call.arrays[1].dtype) else np.float32
