"""Two processes on parts of a batch, under DistributedDataParallel, take the steps that one process takes on the whole of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tests.ulp import assert_tensor

torch = pytest.importorskip("torch")

from torch import distributed, nn  # noqa: E402

import fastloss.torch as ft  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch lacks gloo, the backend for CPUs"
)
PARTS = (slice(0, 5), slice(5, 8))  # rows of each process; of different lengths, to test how means are weighted
BATCH = PARTS[-1].stop


def bce_batchmean(z, t):
    return nn.functional.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)


LOSSES = {  # a loss of fastloss, and the same loss by PyTorch
    "BCE, mean": (ft.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()),
    "BCE, mean, in place": (ft.BCEWithLogitsLoss(inplace_grad=True), nn.BCEWithLogitsLoss()),
    "BCE, batchmean": (ft.BCEWithLogitsLoss(reduction="batchmean"), bce_batchmean),
    "MSE, sum": (ft.MSELoss(reduction="sum"), nn.MSELoss(reduction="sum")),
}


def train(loss, rows=slice(None), scale=1.0, wrap=lambda model: model):
    """Return a small network's parameters and gradients after a few steps on some rows of the batch."""
    torch.manual_seed(0)
    images, targets = torch.rand(BATCH, 2, 9, 7), torch.rand(BATCH, 3, 9, 7)
    model = wrap(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        (scale * loss(model(images[rows]), targets[rows])).backward()
        optimiser.step()
    return [x.detach() for parameter in model.parameters() for x in (parameter, parameter.grad)]


def work(rank, folder):
    """Train as one of the processes and save its results."""
    store, count = f"file://{folder}/store", len(PARTS)
    distributed.init_process_group("gloo", store, rank=rank, world_size=count, timeout=timedelta(seconds=20))
    rows, results = PARTS[rank], {}
    for name, (loss, _) in LOSSES.items():
        # Gradients are averaged over processes: scale a sum by the number of processes, and a mean also by the part's share of the batch.
        scale = count * (1 if loss.reduction == "sum" else (rows.stop - rows.start) / BATCH)
        results[name] = train(loss, rows, scale, nn.parallel.DistributedDataParallel)
    torch.save({"process": os.getpid(), **results}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of each process."""
    folder, root = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[1]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "FASTLOSS_NUM_THREADS": "1"}
    command, deadline = [sys.executable, "-m", __name__], time.monotonic() + 45
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open(folder / f"{rank}.txt", "w")) for rank in range(len(PARTS))]
        processes = [
            subprocess.Popen([*command, str(rank), str(folder)], cwd=root, env=environment, stdout=log, stderr=log)
            for rank, log in enumerate(logs)
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0, deadline - time.monotonic()))
        for process in processes:
            process.kill()  # in case it hangs
        codes = [process.wait() for process in processes]
    assert codes == [0] * len(PARTS), "\n".join((folder / f"{rank}.txt").read_text() for rank in range(len(PARTS)))
    found = [torch.load(folder / f"{rank}.pt") for rank in range(len(PARTS))]
    assert {x["process"] for x in found} == {process.pid for process in processes}
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_processes_match_one_process_on_the_whole_batch(results, name):
    first, second = (result[name] for result in results)
    assert all(map(torch.equal, first, second))
    for got, want in zip(first, train(LOSSES[name][1]), strict=True):
        assert_tensor(got, want)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
