"""Processes on parts of a batch, under DistributedDataParallel, take the steps that one process takes on the whole of it."""

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

import fastloss as fl  # noqa: E402
import fastloss.torch as ft  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this PyTorch lacks gloo, the backend for CPUs"
)
PARTS = {  # rows of each process, by the number of processes; of different lengths, to test how means are weighted
    2: (slice(0, 5), slice(5, 8)),
    3: (slice(0, 1), slice(1, 8), slice(8, 8)),  # the last has no sample
}
BATCH = 8


def bce_batchmean(z, t):
    return nn.functional.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)


LOSSES = {  # a loss of fastloss, and the same loss by PyTorch
    "BCE, mean": (ft.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss()),
    "BCE, mean, in place": (ft.BCEWithLogitsLoss(inplace_grad=True), nn.BCEWithLogitsLoss()),
    "BCE, batchmean": (ft.BCEWithLogitsLoss(reduction="batchmean"), bce_batchmean),
    "MSE, sum": (ft.MSELoss(reduction="sum"), nn.MSELoss(reduction="sum")),
    "cross-entropy of probabilities": (ft.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
}


def bce(z, t, **options):
    return ft.binary_cross_entropy_with_logits(z, t, mask=t > 0.25, **options)


def ignoring(z, t, **options):
    return ft.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0), ignore_index=2)(z, (3 * t).to(torch.uint8).clamp(max=2), **options)


def weighted(z, t, **options):
    return ft.mse_loss(z, t, weight=t, **options)


def vae(z, t, **options):
    return ft.VAELoss(beta=0.5)(z, t, z.mean((2, 3)), z.amax((2, 3)), **options).total


def divergence(z, t, **options):
    return ft.gaussian_kl_loss(z, z.square(), mask=t > 0.25, **options)


def indices(t):
    """Return the class of each pixel, from 0 to 2. How often a class occurs differs from sample to sample."""
    return (6 * t[:, 0] * t[:, 0, :1, :1]).clamp(max=2).to(torch.uint8)


def weighted_classes(z, t, **options):
    return ft.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), ignore_index=1)(z, indices(t), **options)


def excluded_pixels(z, t, **options):
    return ft.cross_entropy(z, indices(t), mask=t[:, 1] > 0.25, pixel_weight=t[:, 2], label_smoothing=0.1, **options)


def weighted_probabilities(z, t, **options):
    return ft.cross_entropy(z, t.softmax(1), torch.tensor([0.5, 2.0, 1.0]), mask=t[:, 1] > 0.25, **options)


def regions_of_classes(z, t, **options):
    return ft.DiceSoftmaxLoss(per_sample=False)(z, indices(t), weight=torch.tensor([0.5, 2.0, 1.0]), **options)


def regions_and_pixels(z, t, **options):
    return fl.dice_cross_entropy_loss(z, indices(t), torch.tensor([0.5, 2.0, 1.0]), mask=t[:, 1] > 0.25, **options)


JOINED = {  # losses that take a process_group; without one, they are computed on the whole batch
    "BCE, mask": bce,
    "BCE, ignored": ignoring,
    "MSE, weighted mean": weighted,
    "MSE, sum of all": ft.MSELoss(reduction="sum"),
    "L1, batchmean": ft.L1Loss(reduction="batchmean"),
    "KL, mask": divergence,
    "VAE": vae,
    "Dice": lambda z, t, **options: ft.dice_with_logits_loss(z, t, mask=t > 0.25, **options),
    "Dice of the batch": lambda z, t, **options: ft.dice_with_logits_loss(z, t, per_sample=False, weight=t, **options),
    "Dice by channel": lambda z, t, **options: ft.dice_with_logits_loss(z, t, per_sample=False, reduction="none", **options).square().sum(),
    "Dice and BCE": lambda z, t, **options: ft.DiceBCEWithLogitsLoss(bce_weight=0.3)(z, t, mask=t > 0.25, **options),
    "cross-entropy": lambda z, t, **options: ft.cross_entropy(z, indices(t), **options),
    "cross-entropy, weights and ignored": weighted_classes,
    "cross-entropy, mask": excluded_pixels,
    "cross-entropy, probabilities": weighted_probabilities,
    "focal cross-entropy, sum of all": lambda z, t, **options: ft.FocalCrossEntropyLoss(reduction="sum")(z, indices(t), **options),
    "focal cross-entropy, ignored": lambda z, t, **options: fl.focal_cross_entropy_loss(z, indices(t), ignore_index=2, **options),
    "Dice of classes of the batch": regions_of_classes,
    "Dice and cross-entropy": regions_and_pixels,
    "both gradients": lambda z, t, **options: ft.mse_loss(z, z.sin(), **options),
}


def train(loss, rows=slice(None), scale=1.0, wrap=lambda model: model, accumulated=1, **options):
    """Return a small network's parameters and gradients after a few steps on some rows of the batch, and the last value."""
    torch.manual_seed(0)
    images, targets = torch.rand(BATCH, 2, 9, 7), torch.rand(BATCH, 3, 9, 7)
    model = wrap(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        optimiser.zero_grad()
        for k in range(accumulated):
            with model.no_sync() if options and k + 1 < accumulated else contextlib.nullcontext():
                value = scale * loss(model(images[rows]), targets[rows], **options)
                value.backward()
        optimiser.step()
    return [*(x.detach() for parameter in model.parameters() for x in (parameter, parameter.grad)), value.detach()]


def work(rank, count, folder):
    """Train as one of the processes and save its results."""
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=count, timeout=timedelta(seconds=20))
    rows, results = PARTS[count][rank], {}
    for name, (loss, _) in LOSSES.items() if count == 2 else ():
        # Gradients are averaged over processes: scale a sum by the number of processes, and a mean also by the part's share of the batch.
        scale = count * (1 if loss.reduction == "sum" else (rows.stop - rows.start) / BATCH)
        results[name] = train(loss, rows, scale, nn.parallel.DistributedDataParallel)[:-1]
    for name, loss in JOINED.items():
        options = {"wrap": nn.parallel.DistributedDataParallel, "process_group": distributed.group.WORLD}
        results[name] = train(loss, rows, accumulated=2, **options)
    halves = [x[rows].requires_grad_() for x in torch.rand(2, BATCH, 1000, generator=torch.Generator().manual_seed(1)).half()]
    (ft.mse_loss(*halves, process_group=distributed.group.WORLD) * 2**13).backward()
    results["halves"] = [x.grad for x in halves]
    torch.save({"process": os.getpid(), **results}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    """Return the results of each process."""
    folder, root, ranks = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[1], range(request.param)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "FASTLOSS_NUM_THREADS": "1"}
    command, deadline = [sys.executable, "-m", __name__], time.monotonic() + 120
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open(folder / f"{rank}.txt", "w")) for rank in ranks]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(request.param), str(folder)], cwd=root, env=environment, stdout=logs[rank], stderr=logs[rank]
            )
            for rank in ranks
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0, deadline - time.monotonic()))
        for process in processes:
            process.kill()  # in case it hangs
        codes = [process.wait() for process in processes]
    assert codes == [0] * len(ranks), "\n".join((folder / f"{rank}.txt").read_text() for rank in ranks)
    found = [torch.load(folder / f"{rank}.pt") for rank in ranks]
    assert {x["process"] for x in found} == {process.pid for process in processes}
    return found


@pytest.mark.parametrize("results", [2], indirect=True)
@pytest.mark.parametrize("name", LOSSES)
def test_processes_match_one_process_on_the_whole_batch(results, name):
    first, second = (result[name] for result in results)
    assert all(map(torch.equal, first, second))
    for got, want in zip(first, train(LOSSES[name][1])[:-1], strict=True):
        assert_tensor(got, want)


@pytest.mark.parametrize("name", JOINED)
def test_a_process_group_gives_the_loss_of_the_joined_batch(results, name):
    for other in results[1:]:
        assert all(map(torch.equal, results[0][name], other[name]))
    for got, want in zip(results[0][name], train(JOINED[name], accumulated=2), strict=True):
        assert_tensor(got, want)


def test_a_loss_scale_reaches_gradients_in_16_bits_before_they_are_rounded(results):
    halves = [x.requires_grad_() for x in torch.rand(2, BATCH, 1000, generator=torch.Generator().manual_seed(1)).half()]
    (ft.mse_loss(*halves) * 2**13 * len(results)).backward()
    for k, x in enumerate(halves):
        assert torch.equal(torch.cat([result["halves"][k] for result in results]), x.grad)


def test_wrong_use_of_a_process_group():
    z, t = torch.rand(3, 4, requires_grad=True), torch.rand(3, 4)
    with pytest.raises(TypeError, match=r"process_group is a str; accepted: a torch\.distributed\.ProcessGroup, such as"):
        ft.mse_loss(z, t, process_group="gloo")
    with pytest.raises(TypeError, match="process_group is an option of calls for the value"):
        fl.mse_loss.value_and_grad(z, t, process_group="gloo")
    with pytest.raises(TypeError, match="without out, inplace_grad, and reductions that keep an axis"):
        ft.mse_loss(z, t, reduction="none", process_group="gloo")
    with pytest.raises(TypeError, match="unknown option process_group"):
        fl.mse_loss(z.detach().numpy(), t.numpy(), process_group="gloo")


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
