"""Compare `fastloss.linear` with a linear layer and a loss one after the other: time, memory, sparse targets, and accuracy.

python -m bench.linear                                  (needs the extras torch and bench, 16 GiB of memory; ten minutes)
python -m bench.linear --json FILE --write docs/linear.md --png docs/linear.png
python -m bench.linear --show FILE --write docs/linear.md --png docs/linear.png    (measures nothing)

The loss is binary cross-entropy, with the gradients of input, weight and bias. Rows take turns in random order. Memory is the peak of
a process of its own, without its inputs and gradients.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import track

import fastloss as fl
from bench.measure import no_garbage_collection
from bench.page import Measurement
from bench.pictures import COLOURS, OURS, tidy
from bench.report import Table, duration

mpl.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt

LOSS = fl.binary_cross_entropy_with_logits
SAMPLES, ONES = 512, 20  # ONES: labels of a sample
SHAPES = ((64, 3072), (256, 3072), (512, 3072), (64, 100_000), (256, 100_000), (512, 100_000))  # features and outputs
OF_NUMPY = ((256, 3072), (256, 100_000))
OF_PIECES, PIECES = (256, 100_000), (1, 2, 4, 8, 16, 32)  # MiB
OF_SPARSE, OF_ACCURACY = (64, 1_000_000), (256, 3072)
FEATURES = 256  # where memory is measured
LABELS = tuple((SAMPLES, outputs) for outputs in (10_000, 30_000, 100_000, 300_000, 1_000_000))
BATCHES = tuple((samples, 100_000) for samples in (128, 512, 2048, 4096))
PRODUCTS, OURS_NAME, APART, EAGER, COMPILED = (
    "three products",
    "fastloss.linear",
    "layer, fastloss",
    "layer, PyTorch",
    "layer, torch.compile",
)
MEMORY_WAYS = {"dense": "fastloss.linear", "sparse": "fastloss.linear, sparse target", "eager": EAGER}
MIB = 1 << 20


def inputs(samples: int, features: int, outputs: int) -> tuple[Any, Any, Any]:
    """Return input, weight and bias of a layer, which require gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, generator=generator)
    w = torch.randn(outputs, features, generator=generator) / features**0.5
    return x.requires_grad_(), w.requires_grad_(), torch.zeros(outputs, requires_grad=True)


def sparse_target(samples: int, outputs: int) -> Any:
    """Return a sparse target with `ONES` labels for each sample."""
    columns = np.sort(np.random.default_rng(0).integers(0, outputs // ONES, (samples, ONES)) + outputs // ONES * np.arange(ONES))
    places = torch.from_numpy(np.stack([np.repeat(np.arange(samples), ONES), columns.ravel()]))
    return torch.sparse_coo_tensor(places, torch.ones(samples * ONES), (samples, outputs), is_coalesced=True, check_invariants=True)


def target_of(way: str, samples: int, outputs: int) -> Any:
    """Return the target that a way takes: uint8 or sparse for fastloss, of the dtype of the logits for PyTorch."""
    target = sparse_target(samples, outputs)
    if way == "sparse":
        return target
    dtype = torch.uint8 if way == "dense" else torch.float32
    return torch.zeros(target.shape, dtype=dtype).index_put_(tuple(target.indices()), torch.ones((), dtype=dtype))


def eager(x: Any, w: Any, b: Any, target: Any) -> Any:
    """Return PyTorch's loss of PyTorch's layer."""
    return F.binary_cross_entropy_with_logits(F.linear(x, w, b), target)


def three_products(x: Any, w: Any) -> Callable[[], Any]:
    """Return a call of the products that a layer takes forward and backward, on matrices that exist already."""
    z = x @ w.T
    slopes, by_x, by_w = z.copy() if isinstance(z, np.ndarray) else z.clone(), x * 0, w * 0
    multiply = np.matmul if isinstance(x, np.ndarray) else torch.mm

    def run() -> None:
        multiply(x, w.T, out=z)
        multiply(slopes, w, out=by_x)
        multiply(slopes.T, x, out=by_w)

    return run


def ways(features: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """Return the ways to compute a loss and its gradients from tensors."""
    x, w, b = inputs(SAMPLES, features, outputs)
    target, bytes_ = target_of("eager", SAMPLES, outputs), target_of("dense", SAMPLES, outputs)
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    return {
        PRODUCTS: three_products(x.detach(), w.detach()),
        OURS_NAME: lambda: torch.autograd.grad(fl.linear(LOSS)(x, w, bytes_, b), (x, w, b)),
        APART: lambda: torch.autograd.grad(LOSS(F.linear(x, w, b), bytes_), (x, w, b)),
        EAGER: lambda: torch.autograd.grad(eager(x, w, b, target), (x, w, b)),
        COMPILED: lambda: torch.autograd.grad(compiled(x, w, b, target), (x, w, b)),
    }


def ways_of_numpy(features: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """Return the three products of arrays, and the loss and its gradients."""
    x, w, b = (a.detach().numpy() for a in inputs(SAMPLES, features, outputs))
    target = target_of("dense", SAMPLES, outputs).numpy()
    return {PRODUCTS: three_products(x, w), OURS_NAME: lambda: fl.linear(LOSS).value_and_grad(x, w, target, b)}


def ways_of_pieces(features: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """Return the three products of tensors, and the loss and its gradients in pieces of several sizes."""
    x, w, b = (a.detach() for a in inputs(SAMPLES, features, outputs))
    target = target_of("dense", SAMPLES, outputs)
    losses = {size: fl.linear(LOSS, size * MIB) for size in PIECES}
    made = {f"{size} MiB": partial(loss.value_and_grad, x, w, target, b) for size, loss in losses.items()}
    return {PRODUCTS: three_products(x, w), **made}


def ways_of_sparse(features: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """Return the loss and its gradients from dense and sparse targets."""
    x, w, b = (a.detach() for a in inputs(SAMPLES, features, outputs))
    targets = {name: target_of(name.split(",")[0], SAMPLES, outputs) for name in ("dense, uint8", "sparse")}
    return {name: partial(fl.linear(LOSS).value_and_grad, x, w, target, b) for name, target in targets.items()}


WAYS = {"tensors": ways, "arrays": ways_of_numpy, "pieces": ways_of_pieces, "sparse": ways_of_sparse}


def timed(table: str, shape: tuple[int, int], threads: int) -> dict[str, list[float]]:
    """Return the seconds of every row of a table in every round."""
    torch.set_num_threads(threads)
    fl.set_num_threads(threads)
    rows, rounds = WAYS[table](*shape), 25 if shape[1] < 10_000 else 9
    order, names = np.random.default_rng(0), list(rows)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in rows.values():  # compiles
        run()
    with no_garbage_collection():
        for _ in range(rounds):
            for k in order.permutation(len(names)):
                begin = time.perf_counter()
                rows[names[k]]()
                seconds[names[k]].append(round(time.perf_counter() - begin, 6))
    return seconds


def peak(way: str, samples: int, outputs: int, threads: int) -> tuple[int, int]:
    """Return the bytes that a process takes at most in forward and backward: in all, and without its inputs and gradients."""
    torch.set_num_threads(threads)
    fl.set_num_threads(threads)
    step(way, *inputs(8, FEATURES, 64), target_of(way, 8, 64))  # loads libraries and kernels
    leaves, target = inputs(samples, FEATURES, outputs), target_of(way, samples, outputs)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    step(way, *leaves, target)
    most = status("VmHWM")
    return most, most - before - sum(x.grad.nbytes for x in leaves)


def step(way: str, x: Any, w: Any, b: Any, target: Any) -> None:
    """Compute the loss and its gradients, which are kept."""
    value = eager(x, w, b, target) if way == "eager" else fl.linear(LOSS)(x, w, target, b)
    value.backward()


def status(name: str) -> int:
    """Return a number of bytes from the system's report of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def errors(features: int, outputs: int) -> dict[str, dict[str, float]]:
    """Return the largest error of each gradient over the largest gradient, and the relative error of the value, against float64."""
    x, w, b = inputs(SAMPLES, features, outputs)
    target = target_of("eager", SAMPLES, outputs)
    wide = [a.detach().double().requires_grad_() for a in (x, w, b)]
    value = eager(wide[0], wide[1], wide[2], target.double())
    true = [value.detach(), *torch.autograd.grad(value, wide)]
    found, losses = {}, {OURS_NAME: partial(fl.linear(LOSS), x, w, target, b), EAGER: partial(eager, x, w, b, target)}
    for name, loss in losses.items():
        value = loss()
        found_gradients = torch.autograd.grad(value, (x, w, b))
        pairs = zip(("value", "input", "weight", "bias"), [value.detach(), *found_gradients], true, strict=True)
        found[name] = {key: float((a.double() - c).abs().max() / c.abs().max()) for key, a, c in pairs}
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all results. Each cell has a process of its own."""
    chosen = {"tensors": SHAPES, "arrays": OF_NUMPY, "pieces": (OF_PIECES,), "sparse": (OF_SPARSE,)}
    times, peaks = [], []
    cells = [(way, *shape) for shape in dict.fromkeys((*LABELS, *BATCHES)) for way in MEMORY_WAYS]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for table, shape in track([(t, s) for t in chosen for s in chosen[t]], "times", console=Console(stderr=True)):
            os.environ["FASTLOSS_THREADS"] = "pool" if table == "arrays" else ""  # the pool is that of programs without PyTorch
            times.append({"table": table, "shape": shape, "seconds": pool.submit(timed, table, shape, options.threads).result()})
        for way, samples, outputs in track(cells, "memory", console=Console(stderr=True)):
            whole, beyond = pool.submit(peak, way, samples, outputs, options.threads).result()
            peaks.append({"way": way, "samples": samples, "outputs": outputs, "process": whole, "beyond": beyond})
    return {"times": times, "memory": peaks, "errors": errors(*OF_ACCURACY)}


def medians(content: dict[str, Any], table: str) -> dict[tuple[int, int], dict[str, float]]:
    """Return the medians of a table by shape and row."""
    chosen = (entry for entry in content["times"] if entry["table"] == table)
    return {tuple(e["shape"]): {name: statistics.median(times) for name, times in e["seconds"].items()} for e in chosen}


def tables(content: dict[str, Any]) -> str:
    """Return the tables of results in Markdown."""
    made = (times_table, arrays_table, pieces_table, sparse_table, memory_table, errors_table)
    return "\n\n".join(table(content).markdown() for table in made)


def times_table(content: dict[str, Any]) -> Table:
    """Return the times of tensors."""
    made = Table(
        f"Loss and gradients of {SAMPLES} samples, tensors",
        ["features, outputs", PRODUCTS, OURS_NAME, "over the products", *(f"{name}, over it" for name in (APART, EAGER, COMPILED))],
    )
    for (features, outputs), found in medians(content, "tensors").items():
        ours = found[OURS_NAME]
        ratios = [f"{ours / found[PRODUCTS]:.2f} x", *(f"{found[name] / ours:.2f} x" for name in (APART, EAGER, COMPILED))]
        made.rows.append([f"{features}, {outputs:,}", duration(found[PRODUCTS]), duration(ours), *ratios])
    return made


def arrays_table(content: dict[str, Any]) -> Table:
    """Return the times of NumPy arrays."""
    made = Table(f"Loss and gradients of {SAMPLES} samples, NumPy arrays", ["features, outputs", PRODUCTS, OURS_NAME, "over the products"])
    for (features, outputs), found in medians(content, "arrays").items():
        ours, products = found[OURS_NAME], found[PRODUCTS]
        made.rows.append([f"{features}, {outputs:,}", duration(products), duration(ours), f"{ours / products:.2f} x"])
    return made


def pieces_table(content: dict[str, Any]) -> Table:
    """Return the time over the products, by the size of a piece."""
    ((features, outputs), found), *_ = medians(content, "pieces").items()
    names = [name for name in found if name != PRODUCTS]
    made = Table(f"Time over the products by the size of a piece, {features} features and {outputs:,} outputs, tensors", ["", *names])
    made.rows.append(["over the products", *(f"{found[name] / found[PRODUCTS]:.2f} x" for name in names)])
    return made


def sparse_table(content: dict[str, Any]) -> Table:
    """Return the times of dense and sparse targets."""
    ((features, outputs), found), *_ = medians(content, "sparse").items()
    made = Table(f"Targets of {SAMPLES} samples with {ONES} of {outputs:,} labels, {features} features, tensors", ["target", "time"])
    made.rows += [[name, duration(median)] for name, median in found.items()]
    return made


def memory_table(content: dict[str, Any]) -> Table:
    """Return the peaks of memory."""
    made = Table(
        f"Memory beyond inputs and gradients in MiB, {FEATURES} features; in brackets, all memory of the process in GiB",
        ["samples, outputs", *MEMORY_WAYS.values()],
    )
    found = {(e["samples"], e["outputs"], e["way"]): e for e in content["memory"]}
    for samples, outputs in dict.fromkeys((e["samples"], e["outputs"]) for e in content["memory"]):
        cells = [found[samples, outputs, way] for way in MEMORY_WAYS]
        texts = [f"{max(0, e['beyond']) / MIB:,.0f} ({e['process'] / 2**30:.1f})" for e in cells]
        made.rows.append([f"{samples:,}, {outputs:,}", *texts])
    return made


def errors_table(content: dict[str, Any]) -> Table:
    """Return the largest errors."""
    names = list(content["errors"])
    made = Table("Largest error against float64, over the largest gradient: {}, {:,}".format(*OF_ACCURACY), ["", *names])
    for key in content["errors"][names[0]]:
        made.rows.append([key, *(f"{content['errors'][name][key]:.1e}" for name in names)])
    return made


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw the peaks of memory over the numbers of labels and of samples, and the times."""
    figure, (labels, batches, times) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    colours = dict(zip(MEMORY_WAYS, (OURS, COLOURS[1], COLOURS[0]), strict=True))
    for axes, shapes, axis, title in ((labels, LABELS, "outputs", "labels"), (batches, BATCHES, "samples", "samples")):
        for (way, name), marker in zip(MEMORY_WAYS.items(), "osD", strict=True):
            cells = [e for e in content["memory"] if e["way"] == way and (e["samples"], e["outputs"]) in shapes]
            cells = sorted(cells, key=lambda e: e[axis])
            points = [e[axis] for e in cells], [max(e["beyond"], MIB) / MIB for e in cells]
            axes.plot(*points, color=colours[way], marker=marker, label=name)
        fixed = f"{SAMPLES} samples" if axis == "outputs" else f"{BATCHES[0][1]:,} labels"
        axes.set(
            xscale="log", yscale="log", ylim=(1, None), xlabel=title, ylabel="MiB beyond inputs and gradients", title=f"Memory, {fixed}"
        )
        numbers = list(dict.fromkeys(shape[axis == "outputs"] for shape in shapes))
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd")
    labels.legend(frameon=False)
    found = medians(content, "tensors")
    bars = {OURS_NAME: OURS, APART: COLOURS[4], EAGER: COLOURS[0], COMPILED: COLOURS[1]}
    for k, (name, colour) in enumerate(bars.items()):
        heights = [row[name] / row[PRODUCTS] for row in found.values()]
        times.bar(np.arange(len(found)) + 0.2 * (k - 1.5), heights, 0.18, color=colour, label=name)
    times.axhline(1, color="black", linewidth=1, linestyle=":")
    times.set_xticks(range(len(found)), [f"{features}\n{outputs:,}" for features, outputs in found])
    times.set(xlabel="features, labels", ylabel="time over the three products", title=f"Loss and gradients, {SAMPLES} samples")
    times.set_ylim(0, 1.35 * times.get_ylim()[1])
    times.legend(frameon=False, ncols=2, loc="upper center")
    tidy(times, "y")
    figure.savefig(file, dpi=110)
    plt.close(figure)


MEASUREMENT = Measurement("bench.linear", "Compare fastloss.linear with the layer and the loss apart.", "linear", measure, tables, draw)

if __name__ == "__main__":
    MEASUREMENT.run()
