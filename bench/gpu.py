"""The command `python -m bench --device cuda`: time the losses on a GPU, and compare them with a device copy and with the peers.

It needs only CuPy and the dependencies of fastloss: peers that are not installed are left out, and tables and pictures can be made
on another machine with `--show`. In every round each row is timed once, in random order: as many calls as fill some milliseconds,
then a wait for the device. The time of a long call is therefore that of the device, and the time of a short call includes the
time that Python takes to launch it.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastloss as fl
from bench.batch import Batch
from bench.cases import BCE, MSE, SUBJECTS, Case, select, unique
from bench.record import Record, first_line, installed
from bench.row import Row, as_tuple, split

PACKAGES = ("fastloss", "numpy", "numba", "cupy-cuda13x", "cupy-cuda12x", "torch", "jax")
ROUNDS, ROUND = 15, 10e-3  # the number of rounds, and the seconds of calls of a row in each
MOST_CALLS = 1000  # of a row in a round
COMPARED = 1 << 22  # elements of a gradient that are compared with the result of the CPU
LARGE = "huge"  # 256 x 3 x 256 x 256
COMPILED = (BCE, MSE)  # losses for which other libraries' compilers are run, which takes seconds for each case


def cases() -> list[Case]:
    """Return the cases that are measured."""
    return unique([
        *select(loss=(BCE, MSE), part=("value_and_grad", "value"), size=(LARGE,)),
        *select(loss=(BCE, MSE), size=("1Ki", "mnist", "large")),
        *select(loss=(BCE, MSE), dtype=("float16", "bfloat16", "uint8 targets"), size=(LARGE,)),
        *select(loss=tuple(name for name, row in SUBJECTS.items() if not row.classes), size=(LARGE,)),
        *select(option=("weight", "weight per channel", "mask", "pos_weight per channel"), size=(LARGE,)),
        *select(layout=("channels-last",), size=(LARGE,)),
        *select(dtype=("float64",), size=(LARGE,)),
    ])  # fmt: skip


class OnDevice:
    """The arrays of a batch on the device, and the rows of its case."""

    def __init__(self, batch: Batch) -> None:
        import cupy

        self.cp, self.batch, self.case = cupy, batch, batch.case
        self.arrays = tuple(map(cupy.asarray, batch.arrays))
        self.options: dict[str, Any] = batch.options | {name: cupy.asarray(x) for name, x in batch.extra.items()}
        if self.case.subject.reduction is None:
            self.options["reduction"] = self.case.reduction

    def call(self, **options: Any) -> Callable[[], Any]:
        """Return a function that computes the case with fastloss."""
        loss = getattr(fl, self.case.loss)
        method = loss if self.case.part == "value" else getattr(loss, self.case.part)
        options |= self.options
        return lambda: method(*self.arrays, **options)

    def ours(self) -> list[Row]:
        """Return the rows of fastloss: with `out`, with a newly allocated gradient, and replayed from a CUDA graph."""
        if self.case.part == "value":
            return [Row("fastloss", self.call(), self.read), *self.replayed(self.call())]
        buffers = tuple(self.cp.empty_like(self.arrays[k]) for k in self.case.subject.gradients)
        with_out = self.call(out=buffers if len(buffers) > 1 else buffers[0])
        return [
            Row("fastloss, out=", with_out, self.read),
            Row("fastloss, fresh gradient", self.call(), self.read),
            *self.replayed(with_out),
        ]

    def replayed(self, call: Callable[[], Any]) -> list[Row]:
        """Return the row that replays a call from a CUDA graph, which launches its kernels without Python.

        Dice and VAE losses have no such row: they allocate arrays between launches, whose memory the graph would have to own.
        """
        if "dice" in self.case.loss or "vae" in self.case.loss:
            return []
        call()
        stream = self.cp.cuda.Stream(non_blocking=True)
        self.cp.cuda.runtime.deviceSynchronize()
        with stream:
            stream.begin_capture()
            result = call()
            graph = stream.end_capture()
        null = self.cp.cuda.Stream.null

        def run() -> Any:
            graph.launch(stream=null)
            return result

        return [Row("fastloss, graph replay", run, self.read)]

    def read(self, result: Any) -> tuple[Any, Any]:
        """Copy the value and the gradients of a result to the host."""
        value, grads = split(self.case.part, result)
        value = getattr(value, "total", value)
        return None if value is None else float(value), [leading(x).get().astype(np.float64) for x in as_tuple(grads)]

    def limits(self) -> list[Row]:
        """Return the row of a copy or read of as many bytes as the case moves, and the row of an empty kernel."""
        bytes_read = sum(x.nbytes for x in (*self.arrays, *(x for x in self.options.values() if isinstance(x, self.cp.ndarray))))
        bytes_written = sum(self.arrays[k].nbytes for k in self.case.subject.gradients)
        empty = self.cp.RawKernel('extern "C" __global__ void empty() {}', "empty")
        launch = Row("an empty kernel", lambda: empty((1,), (1,), ()))
        if self.case.part == "value":
            numbers = self.cp.ones(bytes_read // 4, np.float32)
            return [Row("limit: read", numbers.sum), launch]  # CuPy sums with CUB
        passes = 1 + ("dice" in self.case.loss) * bytes_read / (bytes_read + bytes_written)  # Dice reads its arrays twice
        source = self.cp.ones(int(passes * (bytes_read + bytes_written)) // 2, np.uint8)
        destination = self.cp.empty_like(source)
        return [Row("limit: copy", lambda: destination.data.copy_from_device_async(source.data, source.nbytes)), launch]

    def cupy(self) -> list[Row]:
        """Return the row of the textbook formula in CuPy, which launches a kernel for each operation."""
        if self.case.loss not in COMPILED or self.case.dtype != "float32" or self.case.option:
            return []
        cp, (z, t), mean = self.cp, self.arrays, 1 / self.case.elements

        def run() -> Any:
            if self.case.loss == MSE:
                d = z - t
                return (d * d).mean(), 2 * mean * d
            return (cp.maximum(z, 0) - z * t + cp.log1p(cp.exp(-cp.abs(z)))).mean(), (1 / (1 + cp.exp(-z)) - t) * np.float32(mean)

        def part() -> Any:
            value, grad = run()
            return {"value": value, "grad": grad}.get(self.case.part, (value, grad))

        return [Row("CuPy, naive", part, self.read)]

    def torch(self) -> list[Row]:
        """Return the rows of forward and backward in PyTorch: fastloss on tensors, and PyTorch's own loss, eager and compiled."""
        if self.case.option:
            return []
        import torch

        from bench.peers.with_torch import loss_function
        from fastloss.backends.torch.memory_views import to_tensor

        tensors = [to_tensor(x).cuda() for x in self.batch.arrays]
        options = dict(self.options)

        def own(*given: Any) -> Any:
            result = getattr(fl, self.case.loss)(*given, **options)
            return getattr(result, "total", result)

        theirs = loss_function(self.batch)
        made = [("fastloss on tensors", own), ("torch eager", theirs)]
        if self.case.loss in COMPILED:
            torch.compiler.reset()
            made.append(("torch.compile", torch.compile(theirs, fullgraph=True, dynamic=False)))
        return [self.torch_row(torch, name, loss, tensors) for name, loss in made]

    def torch_row(self, torch: Any, name: str, loss: Any, tensors: list[Any]) -> Row:
        """Return the row of a loss in PyTorch: the value, or the value and the gradients by autograd."""
        tensors = [x.detach() for x in tensors]
        leaves = [tensors[k].requires_grad_() for k in self.case.subject.gradients]

        def value() -> Any:
            with torch.no_grad():
                return loss(*tensors)

        def both() -> Any:
            result = loss(*tensors)
            return result.detach(), torch.autograd.grad(result, leaves)

        def read(result: Any) -> Any:
            number, grads = (result, ()) if self.case.part == "value" else result
            return number.item(), [leading(x).double().cpu().numpy() for x in grads]

        return Row(name, value if self.case.part == "value" else both, read)

    def jax(self) -> list[Row]:
        """Return the row of JAX, compiled by XLA."""
        if self.case.loss not in COMPILED or self.case.option:
            return []
        import jax

        from bench.formulas import FORMULAS
        from bench.peers import with_jax

        if jax.devices()[0].platform != "gpu":
            raise RuntimeError("the installed JAX does not support GPUs")
        compiled, arrays = with_jax.compiled(self.batch, functools.partial(FORMULAS[self.case.loss], with_jax.XP))

        def read(result: Any) -> Any:
            value, grads = split(self.case.part, result)
            return value, [leading(np.asarray(x)).astype(np.float64) for x in grads]

        return [Row("JAX", lambda: compiled(*arrays), read)]


def run(record: Record, case: Case, rounds: int = ROUNDS) -> None:
    """Check and time all rows of a case, and record and print the times."""
    batch = Batch(case)
    rows = record.check(case, rows_of(record, OnDevice(batch)), on_the_cpu(batch))
    times = measure([row for row, _ in rows], rounds)
    record.add(case, rows, times, {})
    for line in lines(case, times):
        record.say(line)


def rows_of(record: Record, device: OnDevice) -> Iterator[Row]:
    """Yield the rows of a case: those of fastloss, the limits, and those of the installed peers."""
    yield from device.ours()
    yield from device.limits()
    for name, make in {"CuPy": device.cupy, "torch": device.torch, "JAX": device.jax}.items():
        yield from record.attempt(name, device.case, make)


def on_the_cpu(batch: Batch) -> tuple[Any, list[Any]]:
    """Compute the expected value and gradients of a case with fastloss's CPU kernels, which the tests compare with the textbook."""
    case = batch.case
    reduction = {"reduction": case.reduction} if case.subject.reduction is None else {}
    value, grads = getattr(fl, case.loss).value_and_grad(*batch.arrays, **batch.options, **batch.extra, **reduction)
    return getattr(value, "total", value), [leading(x).astype(np.float64) for x in as_tuple(grads)]


def leading(x: Any) -> Any:
    """Return the first entries of a gradient, about `COMPARED` elements. Only they are compared with the expected gradient."""
    return x[: max(1, COMPARED * len(x) // math.prod(x.shape))]


def measure(rows: list[Row], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a call of each row, in each round."""
    rng = np.random.default_rng(0)
    calls = {row.name: calls_of(row) for row in rows}
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(rounds):
        for k in rng.permutation(len(rows)):
            times[rows[k].name].append(timed(rows[k], calls[rows[k].name]))
    return {name: [float(f"{s:.4g}") for s in seconds] for name, seconds in times.items()}


def calls_of(row: Row) -> int:
    """Return the number of calls of a row in a round."""
    timed(row, 3)
    return int(np.clip(ROUND / timed(row, 10), 3, MOST_CALLS))


def timed(row: Row, calls: int) -> float:
    """Return the mean seconds of several calls in sequence, from an idle device to an idle device."""
    wait()
    begin = time.perf_counter()
    for _ in range(calls):
        result = row.run()
    if hasattr(result, "block_until_ready") or (isinstance(result, tuple) and hasattr(result[0], "block_until_ready")):
        import jax

        jax.block_until_ready(result)
    wait()
    return (time.perf_counter() - begin) / calls


def wait() -> None:
    """Wait until the device is idle."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


def lines(case: Case, seconds: dict[str, list[float]]) -> Iterator[str]:
    """Yield the lines of a table of a case's times."""
    yield f"\n{case}"
    limit = next((float(np.median(s)) for name, s in seconds.items() if name.startswith("limit")), float("nan"))
    for name, s in sorted(seconds.items(), key=lambda item: float(np.median(item[1]))):
        median = float(np.median(s))
        yield f"  {name:28s} {median * 1e6:10.2f} us   {median / limit:6.2f} x the limit"


def description() -> dict[str, Any]:
    """Describe the GPU, the system and the versions of packages."""
    import cupy

    from fastloss.cuda.workspace import dotted

    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    versions = {"python": platform.python_version(), "CUDA runtime": dotted(cupy.cuda.runtime.runtimeGetVersion())}
    versions["CUDA driver"] = dotted(cupy.cuda.runtime.driverGetVersion())
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": device.compute_capability,
        "processors": properties["multiProcessorCount"],
        "memory_gib": round(properties["totalGlobalMem"] / 2**30),
        "cpu": platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": os.cpu_count(),
        "versions": versions | dict(installed(PACKAGES)),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments. Refuse files and folders that cannot be written, before anything is measured."""
    parser = argparse.ArgumentParser(prog="python -m bench --device cuda", description="Time the losses on a GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to this file, with hardware, versions and date")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also write pictures to this folder (needs fastloss[bench])")
    parser.add_argument("--loss", action="append", choices=tuple(SUBJECTS), metavar="LOSS", help="time only cases of this loss")
    parser.add_argument("--static", action="store_true", help="measure nothing: predict speeds from machine code; needs no GPU")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="with --static, write the table between the marks of this page")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each case (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    for folder in filter(None, (chosen.json and chosen.json.parent, chosen.png)):
        if not folder.is_dir():
            parser.error(f"the folder {folder} does not exist")
    return chosen


def main(arguments: list[str]) -> int:
    """Measure all cases, write the results after each of them, and return the exit status: 1 if fastloss failed in a case."""
    chosen = parse(arguments)
    if chosen.static:
        from bench import static

        return static.run(chosen.json, chosen.write)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # otherwise JAX takes the memory that other libraries need
    try:
        from fastloss.cuda import cupy, workspace

        workspace.current_device()
    except (ImportError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    record, failed = Record(description(), functools.partial(print, flush=True)), False
    for case in cases():
        if chosen.loss and case.loss not in chosen.loss:
            continue
        try:
            run(record, case, chosen.rounds)
        except Exception as error:  # the command may run unattended: note the failure and measure the other cases
            record.leave_out(f"{case} is left out: {first_line(error)}")
            failed = True
        cupy.get_default_memory_pool().free_all_blocks()
        if chosen.json:
            record.save(chosen.json)
    if chosen.png:
        from bench import pictures
        from bench.results import Results

        for path in pictures.draw(Results(record.content), chosen.png):
            print(f"picture: {path}")
    return int(failed)
