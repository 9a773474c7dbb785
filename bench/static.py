"""The command `python -m bench --device cuda --static`: what the GPU's kernels cost, and the speed that this predicts.

The costs are read from machine code, so no GPU is needed: only NVRTC, cuobjdump and nvdisasm (the extra `test`). The prediction is a
model that no device has confirmed: a kernel takes the longer of the time in which memory moves its bytes, at `OF_NOMINAL` of the
nominal bandwidth, and the time in which the multiprocessors issue its instructions, of whose slots `USABLE` can be used. Near the
point where both are equal, the one delays the other: times are added by their fourth powers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from bench import sass
from bench.page import replace_block
from bench.report import Table
from fastloss.core.call import Arguments
from fastloss.core.plan import Request
from fastloss.cpu.call import HostCall
from fastloss.cuda.compile import compiled, compiler_version
from fastloss.cuda.launch import Launch, Outcome
from fastloss.cuda.source import THREADS, source

SHAPE = (8, 3, 32, 32)  # larger batches of whole packs have the same kernels
BLOCK, AUTHOR = "static", "python -m bench --device cuda --static --write"  # the table's marks in a page
OF_NOMINAL, USABLE, MOST = 0.9, 0.85, 0.96  # see above; `MOST` of a copy's speed is reached by a kernel that computes nothing
WARP, SCHEDULERS = 32, 4  # threads of a warp, and warps that a multiprocessor issues an instruction of in each cycle
REGISTERS, RESIDENT = 65536, 2048  # registers and threads of a multiprocessor


class Gpu(NamedTuple):
    """A GPU that the prediction is made for."""

    architecture: int
    processors: int
    clock: float  # Hz that it is assumed to keep up
    bandwidth: float  # nominal, in bytes per second

    def slots(self, moved: int) -> float:
        """Return the issue slots of a warp's instruction, per element, in the time in which memory moves `moved` bytes."""
        return moved / (OF_NOMINAL * self.bandwidth) * self.processors * SCHEDULERS * WARP * self.clock

    def fraction(self, slots: float, moved: int) -> float:
        """Return the predicted speed as a fraction of that of a copy of the same bytes."""
        return float(MOST * (1 + (slots / (USABLE * self.slots(moved))) ** 4) ** -0.25)


GPUS = {  # data sheets of the SXM modules; the clocks are below the highest ones
    "A100": Gpu(80, 108, 1.35e9, 2.04e12),
    "H100": Gpu(90, 132, 1.7e9, 3.35e12),
    "H200": Gpu(90, 132, 1.7e9, 4.8e12),
    "B200": Gpu(100, 148, 1.7e9, 8e12),
}
ARCHITECTURES = (80, 90, 100, 120)


def array(dtype: str, shape: tuple[int, ...] = SHAPE) -> Any:
    """Return an uninitialised array, for kernels that are compiled and not launched."""
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16

        return np.empty(shape, bfloat16)
    return np.empty(shape, dtype)


def launch(
    loss: Any, input: Any, target: Any, summed: tuple[str, ...] = (), wanted: tuple[str, ...] = (), reduction: str = "mean",
    validate: bool = False, outcome: Outcome | None = None, **options: Any
) -> Launch:  # fmt: skip
    """Return the launch of a call, given the definition of its loss."""
    weight = options.pop("weight", None)
    call = HostCall(loss, Arguments(summed, wanted, input, target, weight, reduction, options))
    return launch_of(call, summed, wanted, [target if name.startswith("target_") else input for name in wanted], validate, outcome)


def second_launch(loss: Any, input: Any, wanted: tuple[str, ...]) -> Launch:
    """Return the launch of the second pass of a Dice loss, with groups for each sample and channel."""
    groups = dict.fromkeys(loss.second.formula.defaults, array("float64", (*input.shape[:2], 1, 1)))
    call = HostCall(loss.first, Arguments((), wanted, input, input, None, "sum", {})).derive(loss.second, groups)
    return launch_of(call, (), wanted, [input] * len(wanted))


def class_launch(
    loss: Any, input: Any, target: Any, summed: tuple[str, ...] = (), wanted: tuple[str, ...] = (), reduction: str = "mean",
    outcome: Outcome | None = None, **options: Any
) -> Launch:  # fmt: skip
    """Return the launch of a call of a loss of classes."""
    call = loss.bind(Arguments(summed, wanted, input, target, options.pop("weight", None), reduction, options), HostCall)
    logits = call.arrays[0]
    return launch_of(call, summed, wanted, [logits[..., :1] if name == "value" else logits for name in wanted], outcome=outcome)


def region_launches(loss: Any, input: Any, target: Any, weight: Any = None, **options: Any) -> tuple[Launch, Launch]:
    """Return the launches of both passes of a Dice loss of classes, with regions for each sample and class."""
    settings = loss.take_settings(options | {"weight": weight})
    options = {name: x for name, x in options.items() if name not in settings}
    call = loss.first_call(Arguments((), (), input, target, weight, "sum", options), HostCall, settings)
    first, second = (definition.formula for definition in loss.passes[settings["squared"]])
    given = {name: array("float32", (len(input), *(1,) * (input.ndim - 2), input.shape[1])) for name in second.defaults}
    given["entropy_rate"] = array("float64", (1,) * input.ndim)
    names = (*first.names, "truth", *["entropy"] * loss.with_entropy)
    second_call = call.derive(loss.passes[settings["squared"]][1], given)
    return launch_of(call, names, (), []), launch_of(second_call, (), ("slope",), [call.arrays[0]])


def launch_of(
    call: Any, summed: tuple[str, ...], wanted: tuple[str, ...], like: list[Any], validate: bool = False, outcome: Outcome | None = None
) -> Launch:
    """Return the launch of a pass, whose outputs are like some arrays."""
    return Launch(Request(*call.request(summed, wanted, [*call.arrays, *map(np.empty_like, like)], validate)), outcome or Outcome())


def kernels() -> Iterator[tuple[str, Launch]]:
    """Yield the launches whose kernels are measured, with names."""
    single, half, bfloat, image = (array(dtype) for dtype in ("float32", "float16", "bfloat16", "uint8"))
    bce, mse, dice = fl.binary_cross_entropy_with_logits.definition, fl.mse_loss.definition, fl.dice_with_logits_loss
    both: dict[str, Any] = {"summed": ("value",), "wanted": ("slope",)}
    yield "BCE", launch(bce, single, single, **both)
    yield "BCE, value", launch(bce, single, single, ("value",))
    yield "BCE, uint8 targets", launch(bce, single, image, **both, target_scale=1 / 255)
    yield "BCE, float16", launch(bce, half, half, **both)
    yield "BCE, bfloat16", launch(bce, bfloat, bfloat, **both)
    yield "BCE, weight per channel", launch(bce, single, single, **both, weight=array("float32", (3, 1, 1)))
    yield "MSE", launch(mse, single, single, **both)
    yield "MSE, bfloat16", launch(mse, bfloat, bfloat, **both)
    yield "focal", launch(fl.sigmoid_focal_loss.definition, single, single, **both)
    yield "BCE on probabilities", launch(fl.binary_cross_entropy.definition, single, single, **both)
    yield "log-cosh", launch(fl.log_cosh_loss.definition, single, single, **both)
    yield "Dice, first pass", launch(dice.first, single, single, ("overlap", "missed", "count"))
    yield "Dice, second pass", second_launch(dice, single, ("slope",))


def measure(one: Launch, architecture: int) -> dict[str, Any]:
    """Return what the kernel of a launch costs on an architecture. The compiler may have unrolled its loop."""
    variant = one.variant(tuple(one.alignments))
    budget = asdict(sass.read(compiled(source(variant), f"sm_{architecture}")))
    elements = budget.pop("moved") / bytes_moved(one)
    return budget | {"slots": round(budget["slots"] / elements, 1)}


def bytes_moved(one: Launch) -> int:
    """Return the bytes that an element takes from and to memory. Arrays without a number for each element stay in the caches."""
    return sum(op.size for op in one.plan.spec.arrays if op.access == "contiguous")


def results() -> dict[str, Any]:
    """Measure every kernel on every architecture."""
    costs = {
        name: {"bytes": bytes_moved(one), "costs": {str(sm): measure(one, sm) for sm in ARCHITECTURES}}
        for name, one in kernels()
    }  # fmt: skip
    return {"nvrtc": compiler_version(), "kernels": costs}


def table(content: dict[str, Any]) -> Table:
    """Return the table of results: costs for compute capability 9.0, and the predictions for all GPUs."""
    origin = f"Costs are those of the machine code that NVRTC {content['nvrtc']} writes for compute capability 9.0."
    headings = ["", "registers", "blocks per multiprocessor", "bytes per element", "issue slots per element", "loads ahead"]
    made = Table("Predicted speed, as a fraction of a copy's", [*headings, *GPUS], note=f"{origin} Speeds are predicted, not measured.")
    for name, kernel in content["kernels"].items():
        cost = kernel["costs"]["90"]
        predicted = [gpu.fraction(kernel["costs"][str(gpu.architecture)]["slots"], kernel["bytes"]) for gpu in GPUS.values()]
        cells = [cost["registers"], blocks(cost["registers"]), kernel["bytes"], cost["slots"], cost["loads_ahead"]]
        made.rows.append([name, *map(str, cells), *(f"{x:.2f}" for x in predicted)])
    return made


def blocks(registers: int) -> int:
    """Return how many blocks a multiprocessor holds, given the registers of a thread, which are given out in multiples of 8."""
    return min(REGISTERS // (THREADS * -(-registers // 8) * 8), RESIDENT // THREADS)


def run(file: Path | None, page: Path | None) -> int:
    """Measure, print the table, write it to a file and between the marks of a page, and return the exit status."""
    content = results()
    shown = table(content).markdown()
    print(shown)
    if file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if page:
        page.write_text(replace_block(page.read_text(encoding="utf-8"), BLOCK, AUTHOR, shown), encoding="utf-8")
    return 0
