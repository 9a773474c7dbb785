"""The Dice losses for segmentation, of the sigmoids of logits and a target for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from fastloss.core.abstract_loss import signature
from fastloss.core.call import Arguments
from fastloss.core.definition import Definition
from fastloss.core.docstrings import OPERANDS, complete
from fastloss.core.plan import Array
from fastloss.formula import OPTIONS, Formula
from fastloss.losses.logistic import probability_missed, tail, times, variance
from fastloss.losses.regions import SETTINGS, SETTINGS_DOC, Passes, RegionLoss, leading_axes
from fastloss.losses.table import row
from fastloss.ops import abs, add_log1p, where

__all__ = ["dice_bce_with_logits_loss", "dice_with_logits_loss"]

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


def _sums(z: Any, t: Any, alpha: Any = None, beta: Any = None) -> Any:
    """Return p t, the probability missed t (1 - p) + (1 - t) p, and the binary cross-entropy.

    With parameters, the probability missed is 2 beta t (1 - p) + 2 alpha (1 - t) p.
    """
    e, s = tail(z)
    wrong = where(z > 0.0, 1.0 - t, t)
    p = where(z > 0.0, 1.0 - s, s)
    if alpha is None or beta is None:
        missed = probability_missed(s, wrong)
    else:
        missed = 2.0 * (alpha * (1.0 - t) * p + beta * t * where(z > 0.0, s, 1.0 - s))
    return p * t, missed, add_log1p(times(abs(z), wrong), e)


def _slopes(
    z: Any, t: Any, miss_rate: Any = None, hit_rate: Any = None, target_miss_rate: Any = None, target_hit_rate: Any = None,
    entropy_rate: Any = None
) -> Any:  # fmt: skip
    """Return the slopes by the input and by the target, without the parts whose rates are None.

    By the input they are p (1 - p) ((1 - t) miss_rate + t hit_rate) and entropy_rate (p - t); by the target,
    (1 - p) target_miss_rate + p target_hit_rate, whose rates are the same if they are None, and -entropy_rate z.
    """
    _, s = tail(z)
    slope: Any = 0.0
    target_slope: Any = 0.0
    if miss_rate is not None and hit_rate is not None:
        slope = variance(s) * ((1.0 - t) * miss_rate + t * hit_rate)
        target_miss_rate = miss_rate if target_miss_rate is None else target_miss_rate
        target_hit_rate = hit_rate if target_hit_rate is None else target_hit_rate
        p, q = where(z > 0.0, 1.0 - s, s), where(z > 0.0, s, 1.0 - s)
        target_slope = q * target_miss_rate + p * target_hit_rate
    if entropy_rate is not None:
        slope = slope + entropy_rate * where(z > 0.0, (1.0 - t) - s, s - t)
        target_slope = target_slope - entropy_rate * z
    return slope, target_slope


_SUMS, _SLOPES = Formula(_sums, ("overlap", "missed", "entropy")), Formula(_slopes, ("slope", "target_slope"))


class DiceLoss(RegionLoss):
    """A Dice loss of sigmoids, alone or with cross-entropy."""

    def __init__(self, name: str, doc: str, with_entropy: bool) -> None:
        self.__name__ = self.__qualname__ = name
        self.settings = {**SETTINGS, **(_WEIGHTS if with_entropy else {})}
        self.with_entropy = with_entropy
        options = (*self.settings, "weight", "reduction", *OPTIONS)
        self.first = Definition(_SUMS, {}, ("target",), options)
        self.second = Definition(_SLOPES, {}, (), options)  # the first pass has checked the targets
        self.__signature__ = signature(("input", "target"), "mean", {**self.settings, **OPTIONS})
        example = f"value, grad = fastloss.{name}.value_and_grad(input, target)"
        own = _OWN | ({"reduction": _REDUCTION_WITH_ENTROPY} if with_entropy else {})
        self.__doc__ = complete(doc, ("weight", "reduction", *OPTIONS), example, ("target",), _OPERANDS, own, _RETURNS)
        self.register(self.first, self.second)

    def first_call(self, arguments: Arguments, call: Any, settings: dict[str, Any]) -> Any:
        """Make the call of the first pass."""
        if not is_plain(settings):
            arguments.options.update({name: settings[name] for name in ("alpha", "beta")})
        made = call(self.first, arguments)
        made.group_axes = min(leading_axes(settings), len(made.shape))
        return made

    def sums(self, call: Any, settings: Mapping[str, Any]) -> dict[str, Array]:
        """Make the first pass, and return its sums over each region of each sample."""
        names = ("overlap", "missed", *(("entropy",) if self.with_entropy else ()), *(("count",) if call.excludes else ()))
        sums = call.run(names, (), [], validate=call.validate)
        named = {name: np.reshape(x, call.shape[: call.group_axes]) for name, x in zip(names, sums, strict=False)}
        if "count" not in named:
            named["count"] = np.full_like(named["missed"], float(prod(call.shape[call.group_axes :])))
        named.setdefault("entropy", named["count"])  # which has no weight then
        return named

    def slope_call(self, passes: Passes) -> Any:
        """Make the call of the second pass, whose parameters broadcast against the input."""
        parameters = {}
        by_channel = passes.settings["per_channel"] and not passes.settings["per_sample"]
        if (rate := passes.rate()) is not None:
            misses, others, overlap = passes.rates(rate)
            regions = {"miss_rate": misses, "hit_rate": others + overlap}
            if passes.settings["alpha"] != passes.settings["beta"]:
                misses, others, overlap = passes.rates(rate, "beta", "alpha")
                regions |= {"target_miss_rate": misses, "target_hit_rate": others + overlap}
            parameters = {name: x[np.newaxis] if by_channel and np.ndim(x) else x for name, x in regions.items()}
        if (entropy_rate := passes.entropy_rate()) is not None:
            parameters["entropy_rate"] = entropy_rate
        axes, as_array = len(passes.shape), passes.call.as_array
        return passes.call.derive(self.second, {name: append_axes(as_array(name, x), axes) for name, x in parameters.items()})


def is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether the settings are those of a Dice loss, which counts every miss alike, once."""
    return (settings["alpha"], settings["beta"]) == (0.5, 0.5)


def append_axes(x: Any, axes: int) -> Any:
    """Append axes of length 1 to an array until it has so many axes."""
    return x.reshape(x.shape + (1,) * (axes - x.ndim))


_SETTINGS_DOC = SETTINGS_DOC.format(channel="channel (the second axis)", channels="channels")
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
