"""Losses of overlap, for segmentation: not elementwise, but made of sums over a channel, on which every element's slope depends.

Two passes over memory through the same loops as every other loss: the first sums, the second writes the gradient, with what
became of the sums as parameters that broadcast.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.core.abstract_loss import AbstractLoss, signature
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
from fastloss.core.definition import Definition
from fastloss.core.plan import Array
from fastloss.formula import OPTIONS, Formula
from fastloss.loss import SLOPE, VALUE, evaluate
from fastloss.losses.logistic import probability_missed, tail, times, variance
from fastloss.ops import abs, add_log1p, where

_SETTINGS: dict[str, Any] = {"smooth": 1.0, "per_channel": True, "per_sample": True}
_WEIGHTS: dict[str, Any] = {"dice_weight": 1.0, "bce_weight": 1.0}


def _sums(z: Any, t: Any) -> Any:
    """Return p t, the probability missed, t (1 - p) + (1 - t) p, and the binary cross-entropy."""
    e, s = tail(z)
    wrong = where(z > 0.0, 1.0 - t, t)
    return where(z > 0.0, 1.0 - s, s) * t, probability_missed(s, wrong), add_log1p(times(abs(z), wrong), e)


def _slopes(z: Any, t: Any, score: Any = None, rate: Any = None, entropy_rate: Any = None) -> Any:
    """Return rate p (1 - p) (score - 2 t), and the slope of the cross-entropy times its rate; what is not given is left out.

    And by the target: rate (score - 2 p), and -z times the rate of the cross-entropy.
    """
    _, s = tail(z)
    slope: Any = 0.0
    target_slope: Any = 0.0
    if score is not None and rate is not None:
        slope = rate * variance(s) * (score - 2.0 * t)
        target_slope = rate * (score - 2.0 * where(z > 0.0, 1.0 - s, s))
    if entropy_rate is not None:
        slope = slope + entropy_rate * where(z > 0.0, (1.0 - t) - s, s - t)
        target_slope = target_slope - entropy_rate * z
    return slope, target_slope


_SUMS, _SLOPES = Formula(_sums, ("overlap", "missed", "entropy")), Formula(_slopes, ("slope", "target_slope"))


class _Dice(NamedTuple):
    """What the first pass found, one number a group: a sample's channel, a sample, a channel, or all."""

    loss: Array  # missed / size
    score: Array  # 1 - loss, but from its own sum: neither is a difference
    size: Array  # sum of p + t, and smooth


class DiceLoss(AbstractLoss):
    """A Dice loss, alone or with cross-entropy: called for the value; `grad` and `value_and_grad` take the same arguments."""

    def __init__(self, name: str, doc: str, with_entropy: bool) -> None:
        self.__name__ = self.__qualname__ = name
        self.__doc__ = doc
        self.settings = {**_SETTINGS, **(_WEIGHTS if with_entropy else {})}
        self.with_entropy = with_entropy
        options = (*self.settings, "weight", "reduction", *OPTIONS)
        self.first, self.second = (Definition(formula, {}, ("target",), options) for formula in (_SUMS, _SLOPES))
        self.__signature__ = signature(("input", "target"), "mean", {**self.settings, **OPTIONS})
        self.register(self.first, self.second)

    def __repr__(self) -> str:
        return f"<loss {self.__name__}{self.__signature__}>"

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the loss: a float64 number, or an array of them, one a sample or one a group."""
        refuse_grad_output(options)
        if options.get("out") is not None:
            raise ValueError("out takes the gradient, and the value alone has none: use grad or value_and_grad")
        return evaluate(self, Arguments(VALUE, (), input, target, weight, reduction, options))[0]

    def grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Array:
        """Return the gradient with respect to the input, in the input's dtype."""
        return evaluate(self, Arguments((), SLOPE, input, target, weight, reduction, options))[1][0]

    def value_and_grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Any, Array]:
        """Return the loss and its gradient with respect to the input, from two passes over memory."""
        value, outputs = evaluate(self, Arguments(VALUE, SLOPE, input, target, weight, reduction, options))
        return value, outputs[0]

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute what the arguments ask for: sums in one pass, gradients in a second."""
        passes = _Passes(self, arguments._replace(options=dict(arguments.options)), call)
        return passes.value() if arguments.summed else None, passes.slopes(arguments.wanted) if arguments.wanted else []

    def writes_value(self, reduction: str) -> bool:
        """Return False: even with reduction "none" the value is made of sums, one number for each group."""
        return False

    def value_shape(self, shape: tuple[int, ...], reduction: str, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the value; without a reduction (N, C), (N,), (C,) or ()."""
        own = {**self.settings, **options}
        if reduction != "none":
            return shape[:1] if reduction.startswith("sample") else ()
        kept = shape[: leading_axes(own)]
        return kept if own["per_sample"] else kept[1:]

    def take_settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Remove the settings from the options, check them, and return them with the defaults of those that are missing."""
        own = {name: options.pop(name, default) for name, default in self.settings.items()}
        for name, value in own.items():
            if name.startswith("per_"):
                check_flag(name, value)
            else:
                own[name] = to_bounded(name, value, (0.0, LARGEST))
        return own


def leading_axes(settings: Mapping[str, Any]) -> int:
    """Return how many leading axes have sums of their own in the first pass."""
    return 2 if settings["per_channel"] else 1 if settings["per_sample"] else 0


class _Passes:
    """One call: the first pass, made at once, and from its sums the value and the second pass."""

    def __init__(self, loss: DiceLoss, arguments: Arguments, call: Any) -> None:
        self.loss, self.set, self.reduction = loss, loss.take_settings(arguments.options), arguments.reduction
        upstream = arguments.options.pop("grad_output", None)
        self.call = call(loss.first, arguments._replace(reduction="sum"))
        self.shape = self.call.shape
        self.call.group_axes = self.leading_axes()
        self.check_reduction()
        self.upstream = 1.0 if upstream is None else self.take_upstream(upstream)
        self.sum()

    def leading_axes(self) -> int:
        """Return how many leading axes the first pass keeps apart."""
        needed = leading_axes(self.set)
        if len(self.shape) < needed:
            axes, instead = ("two leading axes, samples and channels", "per_channel") if needed == 2 else ("a first axis", "per_sample")
            raise ValueError(f"input has shape {self.shape}; it needs {axes}; or pass {instead}=False")
        return needed

    def check_reduction(self) -> None:
        """Refuse a reduction that these groups do not have."""
        accepted = [r for r in REDUCTIONS if self.set["per_sample"] or not r.startswith("sample")]
        accepted = [r for r in accepted if r in ("mean", "sum", "none") or self.shape]
        accepted = [r for r in accepted if r != "none" or not self.loss.with_entropy]
        check_reduction(self.reduction, accepted)

    def take_upstream(self, grad_output: Any) -> Any:
        """Take the derivative of what follows the loss: a number, or an array of the loss's shape."""
        if self.call.is_number(grad_output):
            return to_float("grad_output", grad_output)
        array = self.call.as_array("grad_output", grad_output)
        check_grad_output(array, self.shape_of_value(), self.reduction)
        return array.astype(np.float64)

    def shape_of_value(self) -> tuple[int, ...]:
        """Return the shape of the value."""
        return self.loss.value_shape(self.shape, self.reduction, self.set)

    def sum(self) -> None:
        """Make the first pass: the Dice losses, which of them are of any element, and the sums of the cross-entropy."""
        names = ("overlap", "missed", *(("entropy",) if self.loss.with_entropy else ()), *(("count",) if self.call.excludes else ()))
        sums = self.call.run(names, (), [], validate=self.call.validate)
        named = {name: np.reshape(x, self.shape[: self.call.group_axes]) for name, x in zip(names, sums, strict=False)}
        if "count" not in named:
            named["count"] = np.full_like(named["missed"], float(prod(self.shape[self.call.group_axes :])))
        self.counted = named["count"]
        self.entropy = named.get("entropy", self.counted)
        overlap, missed, counted = (self.over_batch(x) for x in (named["overlap"], named["missed"], self.counted))
        right = 2 * overlap + self.set["smooth"]
        self.present = counted > 0
        with np.errstate(all="ignore"):
            loss = np.where(self.present, missed / (missed + right), 0.0)  # a group without elements counts nowhere
            self.dice = _Dice(loss, right / (missed + right), missed + right)

    def over_batch(self, x: Array) -> Array:
        """Add up samples where only channels are kept apart."""
        return x.sum(axis=0) if self.set["per_channel"] and not self.set["per_sample"] else x

    def value(self) -> Any:
        """Return the reduced value."""
        if self.reduction == "none":
            return self.dice.loss[()]
        self.call.warn_of_empty_mean(self.divisor(self.counted))
        parts = [("dice_weight", self.dice.loss, self.present), ("bce_weight", self.entropy, self.counted)]
        weights = {"dice_weight": 1.0, "bce_weight": 0.0} | self.set
        with np.errstate(all="ignore"):  # a part of weight 0 does not count, not even where it is infinite
            terms = [weights[name] * self.reduced(*part) for name, *part in parts if weights[name]]
            return functools.reduce(operator.add, terms or [0.0 * self.over_groups(self.present)])[()]

    def reduced(self, sums: Array, counts: Array) -> Any:
        """Return the sum of the groups' sums, over as many elements as the reduction says."""
        return np.divide(self.over_groups(sums), self.divisor(counts))

    def over_groups(self, x: Array) -> Any:
        """Add up groups: all of them, or those of a sample."""
        return np.sum(x, axis=tuple(range(1, x.ndim)) if self.reduction.startswith("sample") else None)

    def divisor(self, counts: Array) -> Any:
        """Return what the reduction divides by, where groups have so many elements."""
        if self.reduction in ("mean", "sample_mean"):
            return self.over_groups(counts)
        return self.shape[0] if self.reduction == "batchmean" else 1

    def slopes(self, wanted: tuple[str, ...]) -> list[Array]:
        """Make the second pass, and return the gradients that are wanted."""
        with np.errstate(all="ignore"):
            call = self.call.derive(self.loss.second, self.slope_parameters())
        outputs: list[Array] = call.make_outputs(wanted)
        call.run((), wanted, outputs)
        return outputs

    def slope_parameters(self) -> dict[str, Array]:
        """Return what the formula of the slope needs to know of the sums, to broadcast with the input."""
        parameters = {}
        if weight := self.set.get("dice_weight", 1.0):
            each = self.spread(np.divide(self.upstream, self.divisor(self.present)))
            # an empty region has slope 0, however steep its p (1 - p) would make it
            steepness = np.minimum(1.0 / self.spread_groups(self.dice.size), self.largest_number())
            parameters = {"score": self.spread_groups(self.dice.score), "rate": weight * each * steepness}
        if weight := self.set.get("bce_weight", 0.0):
            parameters["entropy_rate"] = self.spread(weight * np.divide(self.upstream, self.divisor(self.counted)))
        return parameters

    def largest_number(self) -> float:
        """Return the largest number of the arithmetic."""
        wide = np.float64 in (self.call.arrays[0].dtype, self.call.arrays[1].dtype)
        return float(np.finfo(np.float64 if wide else np.float32).max)

    def spread(self, x: Any) -> Any:
        """Return numbers that go with the value, one for all or one a sample (or group, unreduced), to broadcast with the input."""
        return self.spread_groups(x) if self.reduction == "none" else self.trail(x)

    def spread_groups(self, x: Any) -> Any:
        """Return numbers that go with the groups, to broadcast with the input."""
        by_channel = self.set["per_channel"] and not self.set["per_sample"]
        return self.trail(x[np.newaxis] if by_channel and np.ndim(x) else x)

    def trail(self, x: Any) -> Any:
        """Return the array with axes of length 1 behind its own, as many as the input has."""
        if isinstance(x, np.floating):
            x = self.call.as_array("rate", x)  # beside the arrays
        return x.reshape(x.shape + (1,) * (len(self.shape) - x.ndim))


_DICE = """Dice loss of a segmentation: 1 minus the overlap of the predicted and the true region, relative to their sizes.

    With p = sigmoid(input) and sums over one channel of one sample, weighted by `weight`:

        value = 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)
              = sum(m) / (sum(m) + 2 sum(p t) + smooth)                      with m = t (1 - p) + (1 - t) p
        slope = p (1 - p) (1 - value - 2 t) / (sum(p) + sum(t) + smooth)

    The second form is what is computed: where the overlap is nearly perfect, the first cancels. A region of few pixels counts
    as much as a large one, which is why it is taken where one class is rare, usually together with cross-entropy
    (`dice_bce_with_logits_loss`), whose slope is steadier.

    Args:
        input: logits, (N, C, ...); float16, bfloat16, float32 or float64.
        target: the same shape, usually 0 or 1, one channel a class; these, bool, or integers (with `target_scale`).
        weight: multiplies what an element adds to the sums; broadcasts against input.
        reduction: over the losses of the samples' channels: "mean", "sum", "none" (an array of them, (N, C)), "batchmean",
            "sample_mean", "sample_sum".
        smooth: added to numerator and denominator, from 0 on, in elements.
        per_channel: whether channels (the second axis) have sums of their own, or all of a sample's are one region.
        per_sample: whether samples have sums of their own, or the whole batch is one image.
        mask, ignore_index, target_scale, grad_output, out, validate: as for every loss; see `fastloss.Loss`. A channel of
            which a mask leaves nothing counts nowhere: its loss is 0, and a mean is over the others.

    Raises:
        ValueError: shapes differ or lack an axis, an option is out of range, a target is outside [0, 1] (with `validate=True`).
        TypeError: a dtype is not accepted, or an option is unknown.

    Source: Milletari, Navab and Ahmadi, "V-Net", 2016; Dice, "Measures of the Amount of Ecologic Association Between Species",
        1945.
    """
_DICE_BCE = """Dice loss plus binary cross-entropy, from the same two passes over memory.

        value = dice_weight * dice_with_logits_loss + bce_weight * binary_cross_entropy_with_logits
        slope = dice_weight * that of the one + bce_weight * that of the other

    Each part is reduced by the same rule: with "mean", the mean of the channels' Dice losses and the mean of the elements'
    cross-entropies.

    Args:
        input, target, weight, smooth, per_channel, per_sample: as for `dice_with_logits_loss`.
        reduction: "mean", "sum", "batchmean", "sample_mean", "sample_sum"; not "none", under which the parts' shapes differ.
        dice_weight, bce_weight: numbers from 0 on.
        mask, ignore_index, target_scale, grad_output, out, validate: as for every loss; see `fastloss.Loss`.

    Raises:
        ValueError, TypeError: as `dice_with_logits_loss` does.

    Source: Isensee et al., "nnU-Net", 2021.
    """
dice_with_logits_loss = DiceLoss("dice_with_logits_loss", _DICE, with_entropy=False)
dice_bce_with_logits_loss = DiceLoss("dice_bce_with_logits_loss", _DICE_BCE, with_entropy=True)
