"""The Dice losses for segmentation: functions of sums over a region, on which the slope of each of its elements depends.

They take two passes over memory, with the same loops as other losses. The first computes the sums. The second writes the
gradient; its formula receives numbers computed from the sums as parameters that broadcast.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends.find import find_backend
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
from fastloss.core.docstrings import OPERANDS, complete
from fastloss.core.plan import Array
from fastloss.formula import OPTIONS, Formula
from fastloss.loss import SLOPE, VALUE
from fastloss.losses.logistic import probability_missed, tail, times, variance
from fastloss.losses.table import row
from fastloss.ops import abs, add_log1p, where

__all__ = ["dice_bce_with_logits_loss", "dice_with_logits_loss"]

_SETTINGS: dict[str, Any] = {"smooth": 1.0, "per_channel": True, "per_sample": True}
_WEIGHTS: dict[str, Any] = {"dice_weight": 1.0, "bce_weight": 1.0}
_OPERANDS = {"input": OPERANDS["input"].replace("Any shape and", "Shape (N, C, ...), any"), "target": OPERANDS["target"]}
_OWN = {
    "weight": "array that broadcasts against `input`; it multiplies the terms that an element adds to the sums.",
    "reduction": 'of the regions\' losses: "mean", "sum", "none" (an array (N, C)), "batchmean", "sample_mean" or "sample_sum".',
    "out": "array for the gradient. It may be the input, which is then overwritten, and may not overlap any other array.",
}
_REDUCTION_WITH_ENTROPY = 'of both parts: "mean", "sum", "batchmean", "sample_mean" or "sample_sum".'
_RETURNS = (
    "The call itself returns a float64 number, or arrays for the reductions that keep an axis. `grad` returns an array of the input's "
    "shape and dtype; `value_and_grad` returns the value and the gradient."
)


def _sums(z: Any, t: Any) -> Any:
    """Return p t, the probability missed t (1 - p) + (1 - t) p, and the binary cross-entropy."""
    e, s = tail(z)
    wrong = where(z > 0.0, 1.0 - t, t)
    return where(z > 0.0, 1.0 - s, s) * t, probability_missed(s, wrong), add_log1p(times(abs(z), wrong), e)


def _slopes(z: Any, t: Any, score: Any = None, rate: Any = None, entropy_rate: Any = None) -> Any:
    """Return the slopes by the input and by the target, without the parts whose rates are None.

    By the input they are rate p (1 - p) (score - 2 t) and entropy_rate (p - t); by the target, rate (score - 2 p) and
    -entropy_rate z.
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
    """Results of the first pass, one number for each region: a channel of a sample, a sample, a channel, or the batch."""

    loss: Array  # missed / size
    score: Array  # 1 - loss, computed from its own sum and not as a difference
    size: Array  # sum(p) + sum(t) + smooth


def _dice(overlap: Array, missed: Array, count: Array, smooth: float) -> tuple[_Dice, Array]:
    """Return the Dice losses of regions, given their sums, and whether each region has any element; one without does not count."""
    right, present = 2 * overlap + smooth, count > 0
    with np.errstate(all="ignore"):
        loss = np.where(present, missed / (missed + right), 0.0)
        return _Dice(loss, right / (missed + right), missed + right), present


def _add_parts(settings: Mapping[str, Any], dice: Any, entropy: Any) -> Any:
    """Return the weighted sum of the Dice loss and the cross-entropy. A part of weight 0 does not count, even where it is infinite."""
    weights = settings.get("dice_weight", 1.0), settings.get("bce_weight", 0.0)
    terms = [weight * part for weight, part in zip(weights, (dice, entropy), strict=True) if weight]
    return functools.reduce(operator.add, terms or [np.zeros_like(dice)])


class DiceLoss(AbstractLoss):
    """A Dice loss, alone or with cross-entropy. `grad` and `value_and_grad` take the arguments of a call."""

    def __init__(self, name: str, doc: str, with_entropy: bool) -> None:
        self.__name__ = self.__qualname__ = name
        self.settings = {**_SETTINGS, **(_WEIGHTS if with_entropy else {})}
        self.with_entropy = with_entropy
        options = (*self.settings, "weight", "reduction", *OPTIONS)
        self.first = Definition(_SUMS, {}, ("target",), options)
        self.second = Definition(_SLOPES, {}, (), options)  # the first pass has checked the targets
        self.__signature__ = signature(("input", "target"), "mean", {**self.settings, **OPTIONS})
        example = f"value, grad = fastloss.{name}.value_and_grad(input, target)"
        own = _OWN | ({"reduction": _REDUCTION_WITH_ENTROPY} if with_entropy else {})
        self.__doc__ = complete(doc, ("weight", "reduction", *OPTIONS), example, ("target",), _OPERANDS, own, _RETURNS)
        self.register(self.first, self.second)

    def __call__(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Any:
        """Return the loss: a float64 number, or an array with one number for each sample or region."""
        refuse_grad_output(options)
        if options.get("out") is not None:
            raise ValueError("out takes the gradient, and the value alone has none: use grad or value_and_grad")
        return find_backend(input).compute(self, Arguments(VALUE, (), input, target, weight, reduction, options))[0]

    def grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> Array:
        """Return the gradient with respect to the input, in the input's dtype."""
        return find_backend(input).compute(self, Arguments((), SLOPE, input, target, weight, reduction, options))[1][0]

    def value_and_grad(self, input: Any, target: Any, weight: Any = None, reduction: str = "mean", **options: Any) -> tuple[Any, Array]:
        """Return the loss and its gradient with respect to the input, from two passes over memory."""
        value, outputs = find_backend(input).compute(self, Arguments(VALUE, SLOPE, input, target, weight, reduction, options))
        return value, outputs[0]

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute the requested quantities: sums in one pass, gradients in a second."""
        passes = _Passes(self, arguments._replace(options=dict(arguments.options)), call)
        return passes.value() if arguments.summed else None, passes.slopes(arguments.wanted) if arguments.wanted else []

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
        """Return the sums of the samples; see `Accumulated`. If the data set is one image, they are those that its Dice losses need."""
        options, is_one_image = dict(options), not self.take_settings(dict(options))["per_sample"]
        weight, options["per_sample"] = options.pop("weight", None), True
        passes = _Passes(self, Arguments(VALUE, (), operands[0], operands[1], weight, "mean", options), call)
        if is_one_image:
            return passes.sums
        regions = {"dice": passes.dice.loss, "present": passes.present, **{name: passes.sums[name] for name in ("entropy", "count")}}
        return {name: x.reshape(-1) for name, x in regions.items()}

    def value_of_sums(self, sums: Mapping[str, Any], samples: int, reduction: str, options: Mapping[str, Any]) -> Any:
        """Return the loss, given the sums; see `Accumulated`."""
        settings = self.take_settings(dict(options))
        sums = sums or dict.fromkeys(("dice", "present", "overlap", "missed", "entropy", "count"), np.zeros(1))
        if settings["per_sample"]:
            dice, present = sums["dice"], sums["present"]
        else:
            found, present = _dice(sums["overlap"], sums["missed"], sums["count"], settings["smooth"])
            dice = found.loss
        if reduction == "none":
            return dice if settings["per_channel"] else dice[0]
        divisors = {"mean": (present.sum(axis=-1), sums["count"].sum(axis=-1)), "sum": (1, 1), "batchmean": (samples, samples)}[reduction]
        return _add_parts(settings, dice.sum(axis=-1) / divisors[0], sums["entropy"].sum(axis=-1) / divisors[1])

    def gradients_of_part(self, arguments: Arguments, call: Any, sums: Mapping[str, Any], samples: int) -> list[Any]:
        """Return the gradients of a part with respect to the loss of all parts, given the sums and the number of samples of all."""
        passes = _Passes(self, arguments._replace(options=dict(arguments.options)), call, sums, samples)
        return passes.slopes(arguments.wanted)

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
    """Return the number of leading axes for whose entries the first pass computes separate sums."""
    return 2 if settings["per_channel"] else 1 if settings["per_sample"] else 0


class _Passes:
    """One call: the first pass, made at once, and from its sums the value and the second pass.

    If the arrays are a part of a batch, the sums and the number of samples of the whole batch are given; see `Accumulated`.
    """

    def __init__(
        self, loss: DiceLoss, arguments: Arguments, call: Any, whole: Mapping[str, Any] | None = None, samples: int | None = None
    ) -> None:
        self.loss, self.settings, self.reduction = loss, loss.take_settings(arguments.options), arguments.reduction
        upstream = arguments.options.pop("grad_output", None)
        self.call = call(loss.first, arguments._replace(reduction="sum"))
        self.shape = self.call.shape
        self.call.group_axes = self.leading_axes()
        self.check_reduction()
        self.upstream = 1.0 if upstream is None else self.take_upstream(upstream)
        self.samples = samples
        if whole is None or self.settings["per_sample"]:
            self.take_sums(self.sum())
        else:
            self.take_sums({name: x.reshape((1, -1) if self.settings["per_channel"] else ()) for name, x in whole.items()})
        self.counts = whole if whole is not None and self.settings["per_sample"] else {"present": self.present, **self.sums}

    def leading_axes(self) -> int:
        """Return the number of group axes of the first pass. Raise ValueError if the input has fewer axes."""
        needed = leading_axes(self.settings)
        if len(self.shape) < needed:
            axes, instead = ("two leading axes, samples and channels", "per_channel") if needed == 2 else ("a first axis", "per_sample")
            raise ValueError(f"input has shape {self.shape}; it needs {axes}; or pass {instead}=False")
        return needed

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
        check_grad_output(array, self.shape_of_value(), self.reduction)
        return array.astype(np.float64)

    def shape_of_value(self) -> tuple[int, ...]:
        """Return the shape of the value."""
        return self.loss.value_shape(self.shape, self.reduction, self.settings)

    def sum(self) -> dict[str, Array]:
        """Make the first pass, and return its sums over each region of each sample."""
        names = ("overlap", "missed", *(("entropy",) if self.loss.with_entropy else ()), *(("count",) if self.call.excludes else ()))
        sums = self.call.run(names, (), [], validate=self.call.validate)
        named = {name: np.reshape(x, self.shape[: self.call.group_axes]) for name, x in zip(names, sums, strict=False)}
        if "count" not in named:
            named["count"] = np.full_like(named["missed"], float(prod(self.shape[self.call.group_axes :])))
        named.setdefault("entropy", named["count"])  # which has no weight then
        return named

    def take_sums(self, named: dict[str, Array]) -> None:
        """Take the sums over the regions: find the Dice losses, and whether each region has any element."""
        self.sums = named
        overlap, missed, counted = (self.over_batch(named[name]) for name in ("overlap", "missed", "count"))
        self.dice, self.present = _dice(overlap, missed, counted, self.settings["smooth"])

    def over_batch(self, x: Array) -> Array:
        """Add up the samples if a region is a channel of the whole batch."""
        return x.sum(axis=0) if self.settings["per_channel"] and not self.settings["per_sample"] else x

    def value(self) -> Any:
        """Return the reduced value."""
        if self.reduction == "none":
            return self.dice.loss[()]
        self.call.warn_of_empty_mean(self.divisor("count"))
        with np.errstate(all="ignore"):
            dice, entropy = self.reduced(self.dice.loss, "present"), self.reduced(self.sums["entropy"], "count")
            return _add_parts(self.settings, dice, entropy)[()]

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
            call = self.call.derive(self.loss.second, self.slope_parameters())
        outputs: list[Array] = call.make_outputs(wanted)
        call.run((), wanted, outputs)
        return outputs

    def slope_parameters(self) -> dict[str, Array]:
        """Return the parameters of the slope's formula, computed from the sums and shaped to broadcast against the input."""
        parameters = {}
        if weight := self.settings.get("dice_weight", 1.0):
            each = self.spread(np.divide(self.upstream, self.divisor("present")))
            # the slope of an empty region is 0; without the limit, p (1 - p) = 0 would be multiplied by infinity
            steepness = np.minimum(1.0 / self.spread_groups(self.dice.size), self.largest_number())
            parameters = {"score": self.spread_groups(self.dice.score), "rate": weight * each * steepness}
        if weight := self.settings.get("bce_weight", 0.0):
            parameters["entropy_rate"] = self.spread(weight * np.divide(self.upstream, self.divisor("count")))
        return parameters

    def largest_number(self) -> float:
        """Return the largest number of the arithmetic."""
        wide = np.float64 in (self.call.arrays[0].dtype, self.call.arrays[1].dtype)
        return float(np.finfo(np.float64 if wide else np.float32).max)

    def spread(self, x: Any) -> Any:
        """Shape numbers that belong to the value, one for all, for each sample or for each region, to broadcast against the input."""
        return self.spread_groups(x) if self.reduction == "none" else self.append_axes(x)

    def spread_groups(self, x: Any) -> Any:
        """Shape numbers that belong to the regions to broadcast against the input."""
        by_channel = self.settings["per_channel"] and not self.settings["per_sample"]
        return self.append_axes(x[np.newaxis] if by_channel and np.ndim(x) else x)

    def append_axes(self, x: Any) -> Any:
        """Append axes of length 1 to an array until it has as many axes as the input."""
        if isinstance(x, np.floating):
            x = self.call.as_array("rate", x)
        return x.reshape(x.shape + (1,) * (len(self.shape) - x.ndim))


_SETTINGS_DOC = """
        smooth: number added to numerator and denominator of the Dice loss, 0 or more, in elements.
        per_channel: whether each channel (the second axis) is a region of its own; if not, all channels of a sample are one region.
        per_sample: whether each sample has regions of its own; if not, the whole batch is one image.
""".strip("\n")
_DICE = """Dice loss of a segmentation: 1 minus the overlap of the predicted and the true region, relative to their sizes.

    With p = sigmoid(input) and sums over one channel of one sample, weighted by `weight`:

        value = 1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)
              = sum(m) / (sum(m) + 2 sum(p t) + smooth)                      with m = t (1 - p) + (1 - t) p
        slope = p (1 - p) (1 - value - 2 t) / (sum(p) + sum(t) + smooth)

    The second form is computed; the first cancels where the overlap is nearly perfect. A region of few pixels counts as much as a
    large one, so the loss suits rare classes. It is usually combined with cross-entropy (`dice_bce_with_logits_loss`), whose slope
    is steadier. A channel without any unmasked element has loss 0, and a mean does not count it.

    Args:
        input: logits.
        target: one channel for each class, usually 0 or 1.
{settings}

    Source: Milletari, Navab and Ahmadi, "V-Net", 2016; Dice, "Measures of the Amount of Ecologic Association Between Species",
        1945.
    """
_DICE_BCE = """Dice loss plus binary cross-entropy, from the same two passes over memory.

        value = dice_weight * dice_with_logits_loss + bce_weight * binary_cross_entropy_with_logits
        slope = dice_weight * (slope of the Dice loss) + bce_weight * (slope of the cross-entropy)

    Both parts have the same reduction: "mean" is the mean of the channels' Dice losses plus the mean of the elements'
    cross-entropies. Reduction "none" is refused, because the parts differ in shape.

    Args:
        input: logits.
        target: one channel for each class, usually 0 or 1.
{settings}
        dice_weight: weight of the Dice loss, 0 or more.
        bce_weight: weight of the cross-entropy, 0 or more.

    Source: Isensee et al., "nnU-Net", 2021.
    """
dice_with_logits_loss = row(
    "Dice", "segmentation where small regions should count as much as large ones", input="logits, (N, C, ...)", axes=2, reduction="mean",
    is_elementwise=False, module="DiceWithLogitsLoss",
)(DiceLoss("dice_with_logits_loss", _DICE.format(settings=_SETTINGS_DOC), with_entropy=False))  # fmt: skip
dice_bce_with_logits_loss = row(
    "Dice + BCE", "segmentation as a first choice: Dice, with a gradient that does not vanish in saturated outputs",
    input="logits, (N, C, ...)", axes=2, reduction="mean", is_elementwise=False, module="DiceBCEWithLogitsLoss",
)(DiceLoss("dice_bce_with_logits_loss", _DICE_BCE.format(settings=_SETTINGS_DOC), with_entropy=True))  # fmt: skip
