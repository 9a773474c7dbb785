"""`python -m bench --device cuda`: the losses on a GPU, against what a device copy takes and against the peers.

It needs CuPy and what fastloss needs, and is content without anything else: peers that are not there are left out, and the
tables and pictures can be made elsewhere (`--show`). In every round each row runs once, in an order drawn anew: as many calls as
fill some milliseconds, then a wait for the device. What is long is so measured as the device takes it, and what is short with
what Python takes to launch it.
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
ROUNDS, ROUND = 15, 10e-3  # how many, and seconds of calls in one
MOST_CALLS = 1000
COMPARED = 1 << 22  # elements of a gradient that are compared with the CPU's
WIDE = "huge"  # 256 x 3 x 256 x 256
COMPILED = (BCE, MSE)  # losses that the compilers of others, which take seconds a case, are asked for


def cases() -> list[Case]:
    """Return what is measured."""
    return unique([
        *select(loss=(BCE, MSE), part=("value_and_grad", "value"), size=(WIDE,)),
        *select(loss=(BCE, MSE), size=("1Ki", "mnist", "large")),
        *select(loss=(BCE, MSE), dtype=("float16", "bfloat16", "uint8 targets"), size=(WIDE,)),
        *select(loss=tuple(SUBJECTS), size=(WIDE,)),
        *select(option=("weight", "weight per channel", "mask", "pos_weight per channel"), size=(WIDE,)),
        *select(layout=("channels-last",), size=(WIDE,)),
        *select(dtype=("float64",), size=(WIDE,)),
    ])  # fmt: skip


class OnDevice:
    """A batch's arrays on the device, and its rows."""

    def __init__(self, batch: Batch) -> None:
        import cupy

        self.cp, self.batch, self.case = cupy, batch, batch.case
        self.arrays = tuple(map(cupy.asarray, batch.arrays))
        self.options: dict[str, Any] = batch.options | {name: cupy.asarray(x) for name, x in batch.extra.items()}
        if self.case.subject.reduction is None:
            self.options["reduction"] = self.case.reduction

    def call(self, **options: Any) -> Callable[[], Any]:
        """Return the call of fastloss that the case is."""
        loss = getattr(fl, self.case.loss)
        method = loss if self.case.part == "value" else getattr(loss, self.case.part)
        options |= self.options
        return lambda: method(*self.arrays, **options)

    def ours(self) -> list[Row]:
        """Return fastloss with `out`, with a fresh gradient, and replayed from a CUDA graph."""
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
        """Return the row that launches a captured call: what is left of a launch without Python.

        Not where a call makes arrays between its launches: their memory would have to be kept as long as the graph.
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
        """Return value and gradients on the host."""
        value, grads = split(self.case.part, result)
        value = getattr(value, "total", value)
        return None if value is None else float(value), [leading(x).get().astype(np.float64) for x in as_tuple(grads)]

    def limits(self) -> list[Row]:
        """Return what moves as many bytes as the case does, and the launch of a kernel that does nothing."""
        read = sum(x.nbytes for x in (*self.arrays, *(x for x in self.options.values() if isinstance(x, self.cp.ndarray))))
        written = sum(self.arrays[k].nbytes for k in self.case.subject.gradients)
        empty = self.cp.RawKernel('extern "C" __global__ void empty() {}', "empty")
        launch = Row("an empty kernel", lambda: empty((1,), (1,), ()))
        if self.case.part == "value":
            numbers = self.cp.ones(read // 4, np.float32)
            return [Row("limit: read", numbers.sum), launch]  # by CUB
        passes = 1 + ("dice" in self.case.loss) * read / (read + written)  # Dice reads twice
        source = self.cp.ones(int(passes * (read + written)) // 2, np.uint8)
        target = self.cp.empty_like(source)
        return [Row("limit: copy", lambda: target.data.copy_from_device_async(source.data, source.nbytes)), launch]

    def cupy(self) -> list[Row]:
        """Return the formula as one writes it down in CuPy: a kernel an operation."""
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
        """Return PyTorch, eager and compiled, and fastloss on its tensors: forward, and backward through autograd."""
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
        """Return the row of one way to run the loss."""
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
        """Return JAX, compiled by XLA."""
        if self.case.loss not in COMPILED or self.case.option:
            return []
        import jax

        from bench.peers import with_jax
        from bench.peers.formulas import FORMULAS

        if jax.devices()[0].platform != "gpu":
            raise RuntimeError("this JAX has no GPU")
        compiled, arrays = with_jax.compiled(self.batch, functools.partial(FORMULAS[self.case.loss], with_jax.XP))

        def read(result: Any) -> Any:
            value, grads = split(self.case.part, result)
            return value, [leading(np.asarray(x)).astype(np.float64) for x in grads]

        return [Row("JAX", lambda: compiled(*arrays), read)]


def run(record: Record, case: Case, rounds: int = ROUNDS) -> None:
    """Measure a case."""
    batch = Batch(case)
    rows = record.check(case, rows_of(record, OnDevice(batch)), on_the_cpu(batch))
    times = measure([row for row, _ in rows], rounds)
    record.add(case, rows, times, {})
    for line in lines(case, times):
        record.say(line)


def rows_of(record: Record, device: OnDevice) -> Iterator[Row]:
    """Yield the rows of a case: fastloss's, and what can be had of the others'."""
    yield from device.ours()
    yield from device.limits()
    for name, make in {"CuPy": device.cupy, "torch": device.torch, "JAX": device.jax}.items():
        yield from record.attempt(name, device.case, make)


def on_the_cpu(batch: Batch) -> tuple[Any, list[Any]]:
    """Return value and gradients by the kernels of the CPU, which the tests compare with the textbook."""
    case = batch.case
    reduction = {"reduction": case.reduction} if case.subject.reduction is None else {}
    value, grads = getattr(fl, case.loss).value_and_grad(*batch.arrays, **batch.options, **batch.extra, **reduction)
    return getattr(value, "total", value), [leading(x).astype(np.float64) for x in as_tuple(grads)]


def leading(x: Any) -> Any:
    """Return the elements of a gradient that are compared, of any library's array."""
    return x[: max(1, COMPARED * len(x) // math.prod(x.shape))]


def measure(rows: list[Row], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a call of every row in every round."""
    rng = np.random.default_rng(0)
    calls = {row.name: calls_of(row) for row in rows}
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(rounds):
        for k in rng.permutation(len(rows)):
            times[rows[k].name].append(timed(rows[k], calls[rows[k].name]))
    return {name: [float(f"{s:.4g}") for s in seconds] for name, seconds in times.items()}


def calls_of(row: Row) -> int:
    """Return how many calls make a round."""
    timed(row, 3)
    return int(np.clip(ROUND / timed(row, 10), 3, MOST_CALLS))


def timed(row: Row, calls: int) -> float:
    """Return the seconds of a call, from several that follow each other; the device is idle before and after."""
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
    """Wait for the device."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


def lines(case: Case, seconds: dict[str, list[float]]) -> Iterator[str]:
    """Yield a table as text."""
    yield f"\n{case}"
    limit = next((float(np.median(s)) for name, s in seconds.items() if name.startswith("limit")), float("nan"))
    for name, s in sorted(seconds.items(), key=lambda item: float(np.median(item[1]))):
        median = float(np.median(s))
        yield f"  {name:28s} {median * 1e6:10.2f} us   {median / limit:6.2f} x the limit"


def description() -> dict[str, Any]:
    """Return the GPU and what runs on it."""
    import cupy

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


def dotted(number: int) -> str:
    """Return CUDA's 13010 as 13.1."""
    return f"{number // 1000}.{number % 1000 // 10}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return what is asked for; refuse, before minutes are spent, files that could not be written."""
    parser = argparse.ArgumentParser(prog="python -m bench --device cuda", description="Time the losses on a GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there, with hardware, versions and date")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="draw the pictures there too (needs fastloss[bench])")
    parser.add_argument("--loss", action="append", choices=tuple(SUBJECTS), metavar="LOSS", help="only cases of this loss")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each case (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    for folder in filter(None, (chosen.json and chosen.json.parent, chosen.png)):
        if not folder.is_dir():
            parser.error(f"the folder {folder} does not exist")
    return chosen


def main(arguments: list[str]) -> int:
    """Measure, print, and write what was measured after every case; the exit status is 1 if a case of fastloss's failed."""
    chosen = parse(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes the memory of the others
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
        except Exception as error:  # nobody may be there: the others are measured
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
