"""The Dice losses for segmentation, of the softmax of logits and one class index for each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from fastloss.core.abstract_loss import signature
from fastloss.core.call import Arguments
from fastloss.core.checks import check_class_target
from fastloss.core.definition import Definition, classes_second
from fastloss.core.docstrings import OPTIONS, complete
from fastloss.core.plan import Array
from fastloss.formula import Formula
from fastloss.losses.classes import OPERANDS, OPTIONS_OF_CLASSES, OWN, ROW, call_of_classes, is_integer, with_buffer
from fastloss.losses.regions import SETTINGS, SETTINGS_DOC, Passes, RegionLoss
from fastloss.losses.table import row

__all__ = ["dice_cross_entropy_loss", "dice_softmax_loss"]

_SETTINGS = {**SETTINGS, "background": True, "squared": False, "zero_absent": False}
_OPERANDS = {**OPERANDS, "input": OPERANDS["input"].replace(" or (C,)", "")}
_ROW = ROW | {"axes": 3}  # regions of several entries
_WEIGHTS = {"dice_weight": 1.0, "ce_weight": 1.0}
_RETURNS = (
    "The call itself returns a float64 number, or arrays for the reductions that keep an axis. `grad` returns an array of the input's "
    "shape and dtype; `value_and_grad` returns the value and the gradient."
)


def _sums(p: Any, q: Any) -> Any:
    """Return p, which is overlap for the entry's class and false positive for others, and q = 1 - p, the false negative."""
    return p, p, q


def _squared_sums(p: Any, q: Any) -> Any:
    """Return the same, where false positives and false negatives are squared."""
    return p, p * p, q * q


def _slopes(p: Any, q: Any, own: Any = 0.0, others: Any = 0.0, entropy_rate: Any = 0.0) -> Any:
    """Return the derivatives of the loss by p, for the entry's class and for others, and by the entry's cross-entropy."""
    return own, others, entropy_rate


def _squared_slopes(p: Any, q: Any, own: Any = 0.0, own_missed: Any = 0.0, others: Any = 0.0, entropy_rate: Any = 0.0) -> Any:
    """Return the same for squared sums, where the slope for other classes is proportional to p."""
    return own + own_missed * q, others * p, entropy_rate


_FORMULAS = {  # of both passes, by whether false positives and false negatives are squared
    False: (Formula(_sums, ("overlap", "false_positives", "false_negatives")), Formula(_slopes, ("own", "others", "entropy"))),
    True: (
        Formula(_squared_sums, ("overlap", "false_positives", "false_negatives")),
        Formula(_squared_slopes, ("own", "others_by_p", "entropy")),
    ),
}


class SoftmaxDiceLoss(RegionLoss):
    """A Dice loss of softmaxes and class indices, alone or with cross-entropy."""

    weights = ("dice_weight", "ce_weight")

    def __init__(self, name: str, doc: str, with_entropy: bool) -> None:
        self.__name__ = self.__qualname__ = name
        self.settings = {**_SETTINGS, **(_WEIGHTS if with_entropy else {})}
        self.with_entropy = with_entropy
        options = (*self.settings, "weight", "reduction", *OPTIONS_OF_CLASSES)
        self.passes = {
            squared: [Definition(formula, {}, (), options, classes=True) for formula in formulas] for squared, formulas in _FORMULAS.items()
        }
        self.__signature__ = signature(("input", "target"), "mean", {**self.settings, **OPTIONS_OF_CLASSES})
        example = f"value, grad = fastloss.{name}.value_and_grad(input, target)"
        own = OWN | (_OWN_WITH_ENTROPY if with_entropy else _OWN)
        self.__doc__ = complete(doc, ("weight", "reduction", *OPTIONS_OF_CLASSES), example, (), _OPERANDS, OPTIONS | own, _RETURNS)
        self.register(*self.passes[False], *self.passes[True])

    def compute(self, arguments: Arguments, call: Any) -> tuple[Any, list[Any]]:
        """Compute the requested quantities: sums in one pass, gradients in a second."""
        value, gradients = super().compute(arguments, call)
        return value, with_buffer(gradients, arguments.options)

    def check_operands(self, first: tuple[int, ...], second: Any) -> None:
        """Raise an error if the targets are not class indices that fit the shape of the input."""
        if len(first) < 2:
            raise ValueError(f"input has shape {tuple(first)}; accepted: (N, C, ...) with N samples and C classes")
        check_class_target(first, second.shape, not is_integer(second.dtype), False)

    def take_settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Remove the settings from the options, check them, and return them, with the weights of classes."""
        settings = super().take_settings(options)
        settings["weight"] = options.get("weight")
        if settings["weight"] is not None and not settings["per_channel"]:
            raise ValueError("weight is that of each class, whose regions per_channel=False joins; accepted: pixel_weight")
        return settings

    def first_call(self, arguments: Arguments, call: Any, settings: dict[str, Any]) -> Any:
        """Make the call of the first pass, and convert the weights of classes, which are checked by then."""
        made = call_of_classes(self, self.passes[settings["squared"]][0], arguments, call)
        made.group_axes = 1
        if settings["weight"] is not None:
            settings["weight"] = made.as_array("weight", settings["weight"]).astype(np.float64)
        return made if self.with_entropy else made.narrowed(*{*made.names, *made.numbers} - {"weight"})

    def shape_of(self, call: Any) -> tuple[int, ...]:
        """Return the shape of the caller's input."""
        return (call.shape[0], call.shape[-1], *call.shape[1:-1])

    def sums(self, call: Any, settings: Mapping[str, Any]) -> dict[str, Array]:
        """Make the first pass, and return its sums over each region of each sample."""
        counts = call.excludes or "weight" in call.names or settings["zero_absent"]
        names = (*_FORMULAS[False][0].names, *(("truth",) if counts else ()), *(("entropy",) if self.with_entropy else ()))
        found = dict(zip(names, call.run(names, (), []), strict=True))
        count = float(prod(call.shape[1:-1]))
        missed = 2.0 * (settings["alpha"] * found["false_positives"] + settings["beta"] * found["false_negatives"])
        by_class = {"overlap": found["overlap"], "missed": missed, "elements": np.full_like(missed, count)}
        counted = np.full_like(missed.sum(axis=1), count)
        if counts:
            truth = found["truth"]
            by_class |= {"truth": truth, "elements": np.repeat(truth.sum(axis=1, keepdims=True), call.shape[-1], axis=1)}
            counted = (truth if "weight" not in call.names else truth * settings["weight"]).sum(axis=1)
        if not settings["background"]:
            by_class["elements"][:, 0] = 0.0
        sums = {name: self.join_classes(x, settings) for name, x in by_class.items()}
        return {**sums, "count": counted, "entropy": found.get("entropy", counted)}

    def join_classes(self, x: Array, settings: Mapping[str, Any]) -> Array:
        """Add up the classes, and the samples, if they are one region."""
        if settings["per_channel"]:
            return x
        each: Array = x[:, 0 if settings["background"] else 1 :].sum(axis=1)
        return each if settings["per_sample"] else each.sum(axis=0)

    def weights_of_regions(self, settings: Mapping[str, Any]) -> Any:
        """Return the weight of each class."""
        return super().weights_of_regions(settings) if settings["weight"] is None else settings["weight"]

    def sample_sums(self, operands: Sequence[Any], options: Mapping[str, Any], call: Any) -> dict[str, Any]:
        """Return the sums of the samples; see `Accumulated`. If the data set is one image, its losses also need the class weights."""
        found = super().sample_sums(operands, options, call)
        if "overlap" in found and options.get("weight") is not None:
            found["weight"] = np.tile(np.asarray(options["weight"], np.float64), (len(operands[0]), 1))
        return found

    def value_of_sums(self, sums: Mapping[str, Any], samples: int, reduction: str, options: Mapping[str, Any]) -> Any:
        """Return the loss, given the sums; see `Accumulated`."""
        weight = sums["weight"] / samples if "weight" in sums else options.get("weight")
        own = {} if weight is None else {"weight": np.asarray(weight, np.float64)}
        return super().value_of_sums(sums, samples, reduction, {**options, **own})

    def slope_call(self, passes: Passes) -> Any:
        """Make the call of the second pass, whose parameters have a number for each class, or for each class of each sample."""
        parameters = {}
        settings, call = passes.settings, passes.call
        if (rate := passes.rate()) is not None:
            by_region = rates_of_classes(*passes.rates(rate), settings["squared"])
            parameters = {name: self.spread(x, settings, call.shape[-1]) for name, x in by_region.items()}
            if not settings["squared"]:  # see `fastloss/kernel/regions.py`; equal slopes of all classes then leave no difference to round
                least = parameters["others"].min(axis=1, keepdims=True)
                parameters = {name: x - least for name, x in parameters.items()}
            parameters = {name: x.astype(passes.arithmetic) for name, x in parameters.items()}
        if (entropy_rate := passes.entropy_rate()) is not None:
            parameters["entropy_rate"] = call.as_array("entropy_rate", entropy_rate).reshape(-1, 1)
        axes = (1,) * (len(call.shape) - 2)
        arrays = {name: x.reshape(x.shape[0], *axes, x.shape[1]) for name, x in parameters.items()}
        return call.derive(self.passes[settings["squared"]][1], arrays)

    def spread(self, x: Array, settings: Mapping[str, Any], classes: int) -> Array:
        """Return numbers of regions as an array whose axes are samples and classes; the first may have length 1."""
        if settings["per_channel"]:
            return np.reshape(x, (-1, classes))
        each = np.repeat(np.reshape(x, (-1, 1)), classes, axis=1)
        each[:, : 0 if settings["background"] else 1] = 0.0
        return each

    def as_given(self, gradient: Array) -> Array:
        """Return a view of a gradient with the axes of the caller's input."""
        view: Array = classes_second(gradient)
        return view


def rates_of_classes(misses: Array, others: Array, overlap: Array, squared: bool) -> dict[str, Array]:
    """Return the slopes by p of a class, for its own entries and for those of other classes, given those by the sums."""
    if squared:
        return {"own": overlap, "own_missed": 2.0 * others, "others": 2.0 * misses}
    return {"own": others + overlap, "others": misses}


_OWN = {
    "weight": "array (C,) with the weight of each class. It multiplies the losses of the class's regions; their mean is divided by their "
    "number.",
    "pixel_weight": "array that broadcasts against `target`. It multiplies the terms that an entry adds to the sums.",
    "reduction": 'of the regions\' losses: "mean", "sum", "none" (an array (N, C)), "batchmean", "sample_mean" or "sample_sum".',
    "out": "array for the gradient. It may be the input, which is then overwritten, and may not overlap any other array.",
}
_OWN_WITH_ENTROPY = {
    **_OWN,
    "weight": "array (C,) with the weight of each class, as in `cross_entropy` and in `dice_softmax_loss`.",
    "reduction": 'of both parts: "mean", "sum", "batchmean", "sample_mean" or "sample_sum".',
}
_SETTINGS_DOC = (
    SETTINGS_DOC.format(channel="class", channels="classes")
    + """
        background: whether class 0 has a region.
        squared: whether each false positive and false negative counts by its square.
        zero_absent: whether a class that a region's target lacks has loss 0 there.
""".rstrip("\n")
)
_DICE = """Dice loss of a segmentation with several classes, from the index of each pixel's class.

    With p the softmax of an entry's logits along the axis of classes, and sums over the entries of one sample, weighted by
    `pixel_weight`, where t = 1 for the entries of class c and 0 for others:

        value[c] = 1 - (2 sum(p[c] t) + smooth) / (sum(p[c]) + sum(t) + smooth)
        slope = p (g - sum(p g)), the sum over the classes, where g is the derivative of the value by p

    The value is computed from 1 - p, so that it keeps its digits where the overlap is nearly perfect, and so does the gradient
    where logits are saturated. Neither softmax nor one-hot arrays are formed.

    Other packages' losses of softmaxes are these settings:

        monai.losses.DiceLoss(softmax=True, to_onehot_y=True)
            smooth=1e-5; include_background is `background`, squared_pred is `squared`, batch=True is per_sample=False,
            jaccard=True is alpha=1, beta=1
        monai.losses.TverskyLoss(softmax=True, to_onehot_y=True)
            smooth=2e-5, with its alpha and beta
        nnU-Net's MemoryEfficientSoftDiceLoss
            smooth=1e-5, background=False, per_sample=False for batch_dice; its value is less by 1
        segmentation_models_pytorch.losses.DiceLoss("multiclass")
            smooth=0, per_sample=False, zero_absent=True
        segmentation_models_pytorch.losses.JaccardLoss and TverskyLoss
            the same with alpha=1, beta=1, or with their alpha and beta; smooth is twice theirs

    Args:
        input: logits.
        target: class indices.
{settings}

    Source: Milletari, Navab and Ahmadi, "V-Net", 2016; Salehi, Erdogmus and Gholipour, "Tversky Loss Function for Image Segmentation
        Using 3D Fully Convolutional Deep Networks", 2017.
    """
_DICE_CROSS_ENTROPY = """Dice loss plus cross-entropy, from the same two passes over memory.

        value = dice_weight * dice_softmax_loss + ce_weight * cross_entropy
        slope = dice_weight * (slope of the Dice loss) + ce_weight * (slope of the cross-entropy)

    Both parts have the same reduction: "mean" is the mean of the regions' Dice losses plus the mean of the entries' cross-entropies.
    Reduction "none" is refused, because the parts differ in shape. This is monai.losses.DiceCELoss, and the loss of nnU-Net plus 1,
    with the settings that `dice_softmax_loss` lists.

    Args:
        input: logits.
        target: class indices.
{settings}
        dice_weight: weight of the Dice loss, 0 or more.
        ce_weight: weight of the cross-entropy, 0 or more.

    Source: Isensee et al., "nnU-Net", 2021.
    """
dice_softmax_loss = row(
    "Dice of classes", "segmentation into several classes where small regions should count as much as large ones",
    module="DiceSoftmaxLoss", ulp={"value": 4, "slope": 12}, reduction="mean", **_ROW
)(SoftmaxDiceLoss("dice_softmax_loss", _DICE.format(settings=_SETTINGS_DOC), with_entropy=False))  # fmt: skip
dice_cross_entropy_loss = row(
    "Dice + cross-entropy", "segmentation into several classes as a first choice: Dice, with a gradient that does not vanish",
    module="DiceCrossEntropyLoss", reduction="mean", **_ROW
)(SoftmaxDiceLoss("dice_cross_entropy_loss", _DICE_CROSS_ENTROPY.format(settings=_SETTINGS_DOC), with_entropy=True))  # fmt: skip
