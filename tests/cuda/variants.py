"""Compile every kind of kernel with NVRTC for one architecture: `python -m tests.cuda.variants 90` prints their resources.

`python -m tests.cuda.variants 90 1 3` compiles every third kernel, from the second on.

Needs neither a GPU nor a driver. Tests run it in a process of its own, because it imports CuPy itself and not the stand-in for it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product
from typing import Any

import cupy  # noqa: F401 (finds NVRTC)

import fastloss as fl
from bench import sass
from bench.static import array, class_launch, launch, launch_of, region_launches, second_launch
from fastloss.core.call import Arguments
from fastloss.cpu.call import HostCall
from fastloss.cuda.compile import compiled
from fastloss.cuda.launch import Launch, Outcome
from fastloss.cuda.rescale import text_of
from fastloss.cuda.source import source
from tests.table import LOSSES

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
BOTH, OTHERS = ("slope", "target_slope"), ("value", "curvature", "cross_curvature", "target_curvature")
LOGISTIC = fl.binary_cross_entropy_with_logits


def launches() -> Iterator[tuple[str, Launch]]:
    """Yield every kind of launch with a name."""
    single, double = (array(dtype) for dtype in ("float32", "float64"))
    for name, loss in ((case.name, case.loss) for case in LOSSES.values() if case.sums_elements):
        one = loss.definition or loss._definition
        for z in (single, double):
            yield f"{name} {z.dtype}: value and slope", launch(one, z, z, ("value",), ("slope",))
            yield f"{name} {z.dtype}: value", launch(one, z, z, ("value",))
            yield f"{name} {z.dtype}: slopes", launch(one, z, z, (), BOTH)
            yield f"{name} {z.dtype}: value and curvatures of each", launch(one, z, z, (), OTHERS, reduction="none")
    for loss in (fl.dice_with_logits_loss, fl.dice_bce_with_logits_loss):
        for z in (single, double):
            yield f"{loss.__name__} {z.dtype}: sums", launch(loss.first, z, z, ("overlap", "missed", "entropy", "count"), mask=z > 0)
            yield f"{loss.__name__} {z.dtype}: slopes", second_launch(loss, z, BOTH)
    one = LOGISTIC.definition
    for dtype, target in product(FLOATS, (*FLOATS, *INTEGERS)):
        yield f"{dtype} and {target}", launch(one, array(dtype), array(target), ("value",), ("slope",))
    yield from options(one)
    yield from of_classes()


def options(one: Any) -> Iterator[tuple[str, Launch]]:
    """Yield launches with every option and every memory layout."""
    z, images, channel = array("float32"), array("uint8"), array("float32", (3, 1, 1))
    value_and_slope: dict[str, Any] = {"summed": ("value",), "wanted": ("slope",)}
    yield "weight", launch(one, z, z, **value_and_slope, weight=z)
    yield "weight by channel", launch(one, z, z, **value_and_slope, weight=channel)
    yield "weight by channel, transposed", launch(one, z.T.copy().T, z.T.copy().T, **value_and_slope, weight=channel)
    yield "pos_weight", launch(one, z, z, **value_and_slope, pos_weight=channel, label_smoothing=0.1)
    yield "mask", launch(one, z, z, ("value", "count"), mask=z > 0, outcome=Outcome(is_mean=True))
    yield "ignored, counts", launch(one, z, images, **value_and_slope, ignore_index=255, outcome=Outcome(counts=True))
    yield "mask of each sample, counts", launch(one, z, z, **value_and_slope, mask=z[:, :1] > 0, outcome=Outcome(counts=True))
    yield "target_scale, checked", launch(one, z, images, **value_and_slope, validate=True, target_scale=1 / 255)
    yield "samples", launch(one, z, z, **value_and_slope, reduction="sample_mean", outcome=Outcome(upstream="f4", result="f4"))
    yield "samples of 16 bits", launch(one, z, z, **value_and_slope, reduction="sample_mean", outcome=Outcome(upstream="B2", result="f2"))
    yield "grad_output of each", launch(one, z, z, (), ("slope", "value"), reduction="none", grad_output=z)
    yield "strided", launch(one, z[..., ::2], z[..., 1::2], **value_and_slope)
    yield "transposed", launch(one, z, z.transpose(0, 1, 3, 2), **value_and_slope)
    yield "ragged", launch(one, z[..., :31], z[..., 1:], **value_and_slope, weight=channel)
    yield (
        "short rows",
        launch(one, array("float32", (9, 50, 3)), array("float32", (9, 50, 3)), **value_and_slope, weight=array("float32", (3,))),
    )
    yield "six axes", launch(one, *(array("float32", (2, 4, 2, 4, 2, 4))[:, ::2, :, ::2, :, ::2] for _ in range(2)), **value_and_slope)
    everything = {"weight": z, "mask": z > 0, "pos_weight": channel, "label_smoothing": 0.1, "target_scale": 0.5, "ignore_index": 3}
    yield "everything", launch(one, z, images, ("value", "count"), ("slope",), validate=True, **everything)


def of_classes() -> Iterator[tuple[str, Launch]]:
    """Yield launches of the losses of classes, with every option and every memory layout."""
    shape, both = (4, 19, 16, 64), {"summed": ("value",), "wanted": ("slope",)}
    z, index, weight, pixels = array("float32", shape), array("uint8", (4, 16, 64)), array("float32", (19,)), array("float32", (4, 16, 64))
    divided = {**both, "outcome": Outcome(divides=True)}
    for dtype in FLOATS:
        for loss in (fl.cross_entropy, fl.focal_cross_entropy_loss):
            yield f"{loss.__name__} {dtype}", class_launch(loss, array(dtype, shape), index, **both)
        wide = array(dtype, (64, 1000))
        yield f"cross_entropy {dtype}, classes last", class_launch(fl.cross_entropy, wide, array("int64", (64,)), **divided)
        yield f"cross_entropy {dtype}, probabilities", class_launch(fl.cross_entropy, z, array(dtype, shape), **both)
    for dtype in ("bool", "int8", "uint32", "int64"):
        yield f"cross_entropy, {dtype}", class_launch(fl.cross_entropy, z, array(dtype, (4, 16, 64)), ("value",))
    given = {"weight": weight, "mask": pixels > 0, "pixel_weight": pixels, "ignore_index": 3, "label_smoothing": 0.1}
    yield "classes: everything", class_launch(fl.cross_entropy, z, index, **divided, **given)
    yield "classes: value of each", class_launch(fl.cross_entropy, z, index, (), ("slope", "value"), "none", grad_output=pixels, **given)
    mean = Outcome(is_mean=True)
    yield "classes: mean", class_launch(fl.cross_entropy, z, index, ("value", "count"), outcome=mean, weight=weight)
    yield "classes: gamma", class_launch(fl.focal_cross_entropy_loss, z, index, **both, gamma=0.5)
    yield "classes: samples", class_launch(fl.cross_entropy, z, index, **both, reduction="sample_mean", outcome=Outcome(upstream="f4"))
    yield "classes: channels last", class_launch(fl.cross_entropy, z.transpose(0, 3, 1, 2), array("uint8", (4, 19, 16)), **both)
    yield "classes: probabilities, smoothed", class_launch(fl.cross_entropy, z, z, **both, weight=weight, label_smoothing=0.1)
    rows = array("float32", (64, 1000))
    yield "classes: many probabilities", class_launch(fl.cross_entropy, rows, rows, **both, weight=array("float32", (1000,)))
    counted = fl.cross_entropy.bind(Arguments((), (), z, index, weight, "mean", {}), HostCall)
    yield from of_regions_of_classes(shape, index, given)
    yield "classes: counts", launch_of(counted.narrowed(*counted.counted), ("count",), (), [])


def of_regions_of_classes(shape: tuple[int, ...], index: Any, given: dict[str, Any]) -> Iterator[tuple[str, Launch]]:
    """Yield launches of both passes of the Dice losses of classes."""
    dice, both = fl.dice_softmax_loss, fl.dice_cross_entropy_loss
    options = {name: x for name, x in given.items() if name != "label_smoothing"}
    found = {"dice_cross_entropy_loss: everything": region_launches(both, array("float32", shape), index, **options)}
    for dtype in FLOATS:
        z, rows = array(dtype, shape), array(dtype, (64, 1000))
        found[f"dice_softmax_loss {dtype}"] = region_launches(dice, z, index)
        found[f"dice_softmax_loss {dtype}, squared"] = region_launches(dice, z, index, squared=True)
        found[f"dice_cross_entropy_loss {dtype}, classes last"] = region_launches(both, rows, array("int64", (64,)))
    for what, passes in found.items():
        yield from zip((f"{what}: sums", f"{what}: slopes"), passes, strict=True)


def texts() -> Iterator[tuple[str, str, str]]:
    """Yield a description of each kernel, its text, and its name in the text."""
    for what, one in launches():
        variant = one.variant(tuple(one.alignments))
        yield what, source(variant), variant.name
    for what, one in launches():
        if what in ("float32 and float32", "float16 and uint8", "ragged", "cross_entropy float32", "cross_entropy float32, classes last"):
            sizes = tuple(op.size for op in one.plan.spec.arrays)
            variant = one.variant(sizes)
            yield f"{what}, not aligned", source(variant), variant.name
            yield f"{what}, 64 bits", source(replace(variant, is_wide=True)), variant.name
    for codes in (("f4", "f4"), ("f8", "f4")):
        yield f"rescale {codes}", text_of(*codes), "fastloss_rescale"


def main() -> None:
    """Compile kernels, and print a line for each."""
    first, step = map(int, sys.argv[2:] or (0, 1))
    for what, text, name in islice(texts(), first, None, step):
        start = time.perf_counter()
        code = compiled(text, f"sm_{sys.argv[1]}")
        seconds = round(time.perf_counter() - start, 2)
        print(json.dumps({"kernel": what, "name": name, "seconds": seconds, **sass.resources(code)}))


if __name__ == "__main__":
    main()
