"""Tests that need a GPU: `pytest -m gpu`."""

from __future__ import annotations

import numpy as np
import pytest

import fastloss as fl
from tests.ulp import PEER, SUM, assert_close

LOGISTIC = fl.binary_cross_entropy_with_logits
SPIN = """extern "C" __global__ void spin(const long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}"""


pytestmark = pytest.mark.only_on("gpu", reason="needs captured graphs, concurrent streams or much memory")


@pytest.fixture
def batch(cp, rng):
    z, t = 3 * rng.standard_normal((64, 3, 65, 63)).astype(np.float32), rng.random((64, 3, 65, 63)).astype(np.float32)
    return z, t, cp.asarray(z), cp.asarray(t)


@pytest.mark.first
@pytest.mark.parametrize("options", [{}, {"mask": True}, {"reduction": "sample_mean"}], ids=str)
def test_captured_and_replayed(cp, batch, rng, options):
    _, t, x, u = batch
    options = {**options, "mask": cp.asarray(rng.random(x.shape) < 0.5)} if "mask" in options else options
    LOGISTIC.value_and_grad(x, u, **options)  # compile the kernel now
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.runtime.deviceSynchronize()
    with stream:
        stream.begin_capture()
        value, grad = LOGISTIC.value_and_grad(x, u, **options)
        graph = stream.end_capture()
    for _ in range(3):
        x[...] = cp.asarray(rng.standard_normal(t.shape).astype(np.float32))
        scratch = [cp.full(50_000, 7.0) for _ in range(20)]  # overwrites free memory, in case the graph uses it
        graph.launch(stream=cp.cuda.Stream.null)
        want, want_grad = LOGISTIC.value_and_grad(x, u, **options)
        np.testing.assert_array_equal(value.get(), want.get())
        np.testing.assert_array_equal(grad.get(), want_grad.get())
        assert all(float(s.sum()) == 350_000.0 for s in scratch)


@pytest.mark.first
def test_two_streams_at_once(cp, batch):
    _, _, x, u = batch
    want = [LOGISTIC(x, u).get(), LOGISTIC(u, x, reduction="sum").get()]
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    cp.cuda.runtime.deviceSynchronize()
    got: list[list] = [[], []]
    for _ in range(200):
        for k, (stream, (z, t), reduction) in enumerate(zip(streams, ((x, u), (u, x)), ("mean", "sum"), strict=True)):
            with stream:
                got[k].append(LOGISTIC(z, t, reduction=reduction))
    cp.cuda.runtime.deviceSynchronize()
    for k in range(2):
        assert {float(value) for value in got[k]} == {float(want[k])}


@pytest.mark.first
def test_a_call_does_not_wait(cp, batch):
    _, _, x, u = batch
    mask, upstream = x > 0, cp.asarray(np.float32(2.0))
    spin = cp.RawKernel(SPIN, "spin")
    calls = [
        lambda: LOGISTIC.value_and_grad(x, u, mask=mask, validate=True, grad_output=upstream),
        lambda: LOGISTIC(x, u, mask=mask, reduction="sample_mean"),
        lambda: fl.dice_bce_with_logits_loss.value_and_grad(x, u),
        lambda: fl.vae_loss.value_and_grad(x, u, x[:, 0, 0], u[:, 0, 0]),
    ]
    for call in calls:
        call()  # compile the kernel now
        cp.cuda.runtime.deviceSynchronize()
        spin((1,), (1,), (10**9,))  # about half a second
        call()
        event = cp.cuda.Event()
        event.record()
        assert not event.done
        event.synchronize()


def test_results_are_bit_identical_in_every_call(cp, batch):
    _, _, x, u = batch
    found = {tuple(float(v) for v in (LOGISTIC(x, u).get(), fl.mse_loss(x, u, reduction="sum").get())) for _ in range(50)}
    assert len(found) == 1


def test_memory_stays_flat(cp, batch):
    _, _, x, u = batch
    pool, out = cp.get_default_memory_pool(), cp.empty_like(x)

    def call():
        LOGISTIC.value_and_grad(x, u, out=out, mask=x > 0)
        fl.dice_with_logits_loss.value_and_grad(x, u)

    call()
    used, total = pool.used_bytes(), pool.total_bytes()
    for _ in range(1000):
        call()
    assert pool.used_bytes() == used
    assert pool.total_bytes() <= total + (64 << 20)


def test_more_than_2_to_the_31_elements(cp):
    size = 2**31 + 12_345
    z, t = cp.full(size, 0.5, np.float16), cp.zeros(size, np.uint8)
    z[-3:], t[-1] = 2.0, 1
    value, grad = LOGISTIC.value_and_grad(z, t, reduction="sum")
    last = LOGISTIC.value_and_grad(z[-5:].get(), t[-5:].get(), reduction="sum")
    one = LOGISTIC.value_and_grad(z[:1].get(), t[:1].get(), reduction="sum")
    assert_close(value.get(), float(one[0]) * (size - 5) + float(last[0]), SUM[np.dtype(np.float32)])
    np.testing.assert_array_equal(grad[-5:].get(), last[1])
    assert bool((grad[:-3] == grad[0]).all())
    assert float(grad[0].get()) == float(one[1][0])


def test_a_second_device(cp, batch):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a second device")
    _, _, x, u = batch
    want = LOGISTIC(x, u).get()
    with cp.cuda.Device(1):
        assert float(LOGISTIC(cp.asarray(batch[0]), cp.asarray(batch[1])).get()) == float(want)
        with pytest.raises(ValueError, match="input is on CUDA device 0, but the current device is 1"):
            LOGISTIC(x, u)


@pytest.mark.first
def test_captured_by_a_graph_of_pytorch(cp, batch):
    torch = pytest.importorskip("torch")
    z, t = (torch.from_numpy(x).cuda() for x in batch[:2])
    leaf = z.clone().requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            (grad,) = torch.autograd.grad(LOGISTIC(leaf, t), leaf)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = LOGISTIC(leaf, t)
        (grad,) = torch.autograd.grad(value, leaf)
    for factor in (1.0, -2.0):
        with torch.no_grad():
            leaf.copy_(factor * z)
        graph.replay()
        torch.cuda.synchronize()
        want, want_grad = LOGISTIC.value_and_grad(leaf.detach(), t)
        assert float(value) == float(want)
        assert torch.equal(grad, want_grad)


@pytest.mark.first
def test_streams_of_pytorch(cp, batch):
    torch = pytest.importorskip("torch")
    z, t = (torch.from_numpy(x).cuda() for x in batch[:2])
    want = float(LOGISTIC(z, t))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        values = [LOGISTIC(z * 1.0, t) for _ in range(50)]
    torch.cuda.synchronize()
    assert {float(v) for v in values} == {want}


@pytest.mark.first
def test_compiled_by_pytorch(cp, batch):
    torch = pytest.importorskip("torch")
    z, t = (torch.from_numpy(x).cuda() for x in batch[:2])
    leaf = z.requires_grad_()
    compiled = torch.compile(lambda z, t: LOGISTIC(torch.tanh(z), t), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(leaf, t), leaf)
    (want,) = torch.autograd.grad(LOGISTIC(torch.tanh(leaf), t), leaf)
    assert_close(got.cpu().numpy(), want.cpu().numpy(), PEER[np.dtype(np.float32)])
