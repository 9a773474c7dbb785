"""Behaviour of devices alone: streams, alignment, ranges over blocks, deferred errors, a host that never waits."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from tests.devices import asks_the_stand_in
from tests.ulp import PEER, SUM, ULP, assert_close, assert_ulp, half_unit

LOGISTIC = fl.binary_cross_entropy_with_logits
ODD = [1, 2, 3, 5, 63, 1023, 1024, 1025, 4099, 262_147]


def batch(cp, rng, shape, dtype=np.float32, target_dtype=np.float32):
    """Return logits and targets on the host, and on the device."""
    z, t = (3 * rng.standard_normal(shape)).astype(dtype), rng.random(shape)
    t = (255 * t).astype(target_dtype) if np.dtype(target_dtype).kind == "u" else t.astype(target_dtype)
    return z, t, cp.asarray(z), cp.asarray(t)


@pytest.fixture
def fresh(monkeypatch):
    """Clear the remembered launches, so that patched values take effect."""
    from fastloss.cuda import call

    call.find_launch.cache_clear()
    yield monkeypatch
    call.find_launch.cache_clear()


@asks_the_stand_in
@pytest.mark.parametrize(
    ("driver", "told"),
    [
        (13020, "the driver is of CUDA 13.2, and CuPy is for CUDA 13.1"),
        (12040, "the driver is of CUDA 12.4, and CuPy is for CUDA 13.1; accepted: a newer driver, or pip install 'fastloss[cuda12]'"),
        (0, "there is no driver, and CuPy is for CUDA 13.1"),
    ],
)
def test_errors_of_the_driver_say_which_versions_were_found(cp, rng, monkeypatch, driver, told):
    from fastloss.cuda.compile import kernel
    from fastloss.cuda.workspace import current_device

    def fail(*args):
        raise cp.cuda.runtime.CUDARuntimeError("it failed")

    monkeypatch.setattr(cp.cuda.runtime, "driverGetVersion", lambda: driver)
    monkeypatch.setattr(cp.cuda.function.Module, "load", fail)
    with pytest.raises(RuntimeError, match=re.escape(told) + "$") as caught:
        kernel(f"not compiled before {driver}", "name", 0)
    assert "the driver does not load the kernel that NVRTC 0.0 has compiled for compute capability 0: it failed" in str(caught.value)
    monkeypatch.setattr(cp.cuda.runtime, "getDevice", fail)
    with pytest.raises(RuntimeError, match=f"no GPU can be used: it failed; {re.escape(told)}$"):
        current_device()


@pytest.mark.first
def test_results_are_arrays_of_the_device(cp, rng):
    _, _, z, t = batch(cp, rng, (4, 3, 5))
    value, grad = LOGISTIC.value_and_grad(z, t)
    assert isinstance(value, cp.ndarray)
    assert (value.shape, value.dtype, grad.shape, grad.dtype) == ((), np.float64, z.shape, z.dtype)
    assert LOGISTIC(z, t, reduction="sample_mean").shape == (4,)
    total, grads = fl.vae_loss.value_and_grad(z, t, z[:, 0], t[:, 0])
    assert all(isinstance(x, cp.ndarray) for x in (*total, *grads))


def test_the_host_never_waits(cp, rng):
    _, _, z, t = batch(cp, rng, (4, 3, 50))
    mask, out = cp.asarray(rng.random((4, 3, 50)) < 0.5), cp.empty_like(z)
    upstream = cp.asarray(np.array(0.5, np.float32))
    LOGISTIC(z, t)  # the first call of a stream waits once, when it makes a workspace
    before = cp.waits
    LOGISTIC.value_and_grad(z, t, mask=mask, out=out, validate=True, grad_output=upstream, pos_weight=upstream)
    LOGISTIC(z, t, mask=mask)
    LOGISTIC.grad(z, t, mask=mask, reduction="sample_mean", grad_output=cp.asarray(np.ones(4)))
    fl.dice_bce_with_logits_loss.value_and_grad(z, t, mask=mask, grad_output=upstream)
    fl.vae_loss.value_and_grad(z, t, z[:, 0], t[:, 0], mask=mask, grad_output=2.0)
    weight, index = cp.asarray(rng.random(3)), cp.zeros((4, 50), np.int64)
    fl.cross_entropy.value_and_grad(z, index, weight, mask=mask[:, 0], grad_output=upstream)
    fl.focal_cross_entropy_loss(z, index, weight, reduction="sample_mean")
    fl.dice_cross_entropy_loss.value_and_grad(z, index, weight, mask=mask[:, 0], grad_output=upstream, zero_absent=True)
    fl.dice_softmax_loss.value_and_grad(z, index, per_channel=False, per_sample=False, reduction="none", grad_output=upstream)
    assert cp.waits == before


@asks_the_stand_in
@pytest.mark.parametrize("options", [{}, {"mask": True}, {"ignore_index": 3}, {"mask": True, "reduction": "sample_mean"}], ids=str)
def test_each_pass_is_one_launch(cp, rng, options):
    _, _, z, t = batch(cp, rng, (4, 3, 50_000), np.float32, np.uint8)
    options = {**options, "mask": cp.asarray(rng.random(z.shape) < 0.5)} if "mask" in options else options
    del cp.launches[:]
    LOGISTIC.value_and_grad(z, t, target_scale=1 / 255, **options)
    assert cp.launches == ["fastloss_binary_cross_entropy_with_logits"]


@asks_the_stand_in
@pytest.mark.parametrize("loss", [fl.dice_softmax_loss, fl.dice_cross_entropy_loss])
def test_losses_of_regions_of_classes_take_two_launches(cp, rng, loss):
    z, t = cp.asarray(rng.random((4, 3, 5000)).astype(np.float32)), cp.asarray(rng.integers(0, 3, (4, 5000)).astype(np.uint8))
    del cp.launches[:]
    loss(z, t, mask=t != 1)
    assert cp.launches == ["fastloss_sums"]
    loss.value_and_grad(z, t, [1.0, 2.0, 3.0])
    assert cp.launches == ["fastloss_sums", "fastloss_sums", "fastloss_slopes"]


@asks_the_stand_in
@pytest.mark.parametrize("reduction", ["mean", "sample_mean"])
def test_weights_of_classes_are_added_up_before_gradients_are_computed(cp, rng, reduction):
    z, t, weight = cp.asarray(rng.standard_normal((4, 3, 500))), cp.asarray(rng.integers(0, 3, (4, 500))), cp.asarray(rng.random(3))
    del cp.launches[:]
    fl.cross_entropy.value_and_grad(z, t, weight, reduction)
    assert cp.launches == 2 * ["fastloss_cross_entropy"]
    fl.cross_entropy(z, t, weight, reduction)
    fl.cross_entropy.value_and_grad(z, t, weight, "sum")
    assert cp.launches == 4 * ["fastloss_cross_entropy"]


@pytest.mark.first
@pytest.mark.filterwarnings("ignore:mean of no elements")
@pytest.mark.parametrize("reduction", ["mean", "sample_mean"])
@pytest.mark.parametrize(
    ("shape", "masked"),
    [
        ((3, 2, 200, 701), (3, 2, 200, 701)),  # several ranges in a group
        ((3, 2, 200, 701), (3, 1, 200, 701)),
        ((3, 2, 200, 701), (701,)),
        ((2000, 37), (2000, 37)),  # more groups than counters
        ((2000, 37), (2000, 1)),
    ],
    ids=str,
)
def test_elements_are_counted_before_gradients_are_computed(cp, rng, shape, masked, reduction):
    a, b, z, t = batch(cp, rng, shape, np.float32, np.uint8)
    mask = rng.random(masked) < 0.3
    mask[: len(mask) // 5] = False  # some samples have no element that counts
    for ignored in (None, 3):
        given = {"reduction": reduction, "ignore_index": ignored}
        counted = np.broadcast_to(mask, shape) & (b != ignored)
        want = fl.mse_loss.value_and_grad(a, b, mask=counted, reduction=reduction)
        for _ in range(2):  # the counters are 0 again
            value, grad = fl.mse_loss.value_and_grad(z, t, mask=cp.asarray(mask), **given)
            assert_close(np.nan_to_num(value.get()), np.nan_to_num(want[0]), SUM[z.dtype])
            np.testing.assert_array_equal(grad.get(), want[1])
        np.testing.assert_array_equal(fl.mse_loss.grad(z, t, mask=cp.asarray(mask), **given).get(), want[1])


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize(("dtype", "target_dtype"), [(np.float32, np.float32), (np.float16, np.uint8), (np.float64, np.float32)])
def test_any_size(cp, rng, size, dtype, target_dtype):
    a, b, z, t = batch(cp, rng, size, dtype, target_dtype)
    options = {"target_scale": 1 / 255} if b.dtype.kind == "u" else {}
    value, grad = LOGISTIC.value_and_grad(z, t, **options)
    want, want_grad = LOGISTIC.value_and_grad(a, b, **options)
    assert_close(value.get(), want, SUM[np.result_type(dtype, np.float32)])
    if dtype == np.float16:  # either neighbour where the exact slope is close to the middle
        assert np.abs(grad.get() - want_grad).max() <= half_unit(np.abs(want_grad).max(), np.float16)
    else:
        assert_close(grad.get(), want_grad, SUM[np.dtype(np.float32)])
    assert_close(LOGISTIC(z, t, **options).get(), want, SUM[np.result_type(dtype, np.float32)])


@pytest.mark.parametrize("offsets", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize(("dtype", "target_dtype"), [(np.float32, np.uint8), (np.float16, np.float16), (np.float64, np.float64)])
def test_any_alignment(cp, rng, offsets, dtype, target_dtype):
    size = 4097
    a, b, z, t = batch(cp, rng, size + 3, dtype, target_dtype)
    first, second, third = (slice(k, k + size) for k in offsets)
    memory = cp.zeros(size + 5, dtype)
    grad = fl.mse_loss.grad(z[first], t[second], out=memory[1:-1][third])
    want = fl.mse_loss.grad(a[first], b[second])
    np.testing.assert_array_equal(grad.get(), want)
    whole = memory.get()
    assert not whole[: third.start + 1].any()
    assert not whole[third.stop + 1 :].any()


@asks_the_stand_in
def test_sums_do_not_depend_on_the_device(cp, fresh, rng):
    a, b, z, t = batch(cp, rng, (3, 2, 200, 701))
    found = []
    for processors in (1, 3, 1000):
        fresh.setattr("fastloss.cuda.workspace.count_multiprocessors", lambda device, n=processors: n)
        found += [LOGISTIC(z, t).get(), LOGISTIC(z, t, reduction="sample_sum").get().sum()]
    assert len(set(map(float, found[::2]))) == len(set(map(float, found[1::2]))) == 1
    assert_close(found[0], LOGISTIC(a, b), SUM[z.dtype])


@asks_the_stand_in
@pytest.mark.parametrize("shape", [(3, 4, 90, 111), (700, 600)])
def test_sums_over_classes_do_not_depend_on_the_device(cp, fresh, rng, shape):
    a, b = rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[1], (shape[0], *shape[2:]))
    weight, z, t, found = rng.random(shape[1]).astype(np.float32), cp.asarray(a), cp.asarray(b), []
    for processors in (1, 3, 1000):
        fresh.setattr("fastloss.cuda.workspace.count_multiprocessors", lambda device, n=processors: n)
        found.append(float(fl.cross_entropy(z, t, cp.asarray(weight)).get()))
    assert len(set(found)) == 1
    assert_close(found[0], fl.cross_entropy(a, b, weight), SUM[z.dtype])


@asks_the_stand_in
@pytest.mark.parametrize(
    ("shape", "most"), [((2, 4, 90, 111), 1024), ((3, 2, 1200), 1024), ((700, 6), 1024), ((2, 3, 4000), 2)],
    ids=["many ranges", "few ranges", "many samples", "ranges of several turns"],
)  # fmt: skip
def test_sums_of_each_class_do_not_depend_on_the_device(cp, fresh, rng, shape, most):
    fresh.setattr("fastloss.cuda.launch.MAX_RANGES", most)
    a, b = rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[1], (shape[0], *shape[2:]))
    z, t, want = cp.asarray(a), cp.asarray(b), fl.dice_cross_entropy_loss.value_and_grad(a, b)
    found = []
    for processors in (1, 3, 1000):
        fresh.setattr("fastloss.cuda.workspace.count_multiprocessors", lambda device, n=processors: n)
        found.append([x.get() for x in fl.dice_cross_entropy_loss.value_and_grad(z, t)])
        for got, first, true in zip(found[-1], found[0], want, strict=True):
            np.testing.assert_array_equal(got, first)
            assert_close(got, true, SUM[z.dtype])


def test_sums_of_each_class_over_many_ranges_keep_their_digits(cp, rng):
    for _ in range(5):
        z, t = rng.standard_normal((1, 3, 2)), rng.integers(0, 3, (1, 2))
        want = fl.dice_softmax_loss(z, t, smooth=1 / 32768, reduction="none")
        many = [cp.asarray(np.repeat(x, 32768, axis=-1)) for x in (z, t)]
        got = fl.dice_softmax_loss(*many, reduction="none").get()
        assert_ulp(got, want, want, ULP["dice_softmax_loss", "value"], z.dtype)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("most", [1, 3])
def test_ranges_of_many_packs(cp, fresh, rng, most, is_masked):
    """A thread visits many packs of a range, which otherwise takes millions of elements."""
    fresh.setattr("fastloss.cuda.launch.MAX_RANGES", most)
    a, b, z, t = batch(cp, rng, 50_001)
    mask = rng.random(a.shape) < 0.3 if is_masked else None
    value, grad = fl.mse_loss.value_and_grad(z, t, mask=mask if mask is None else cp.asarray(mask))
    want, want_grad = fl.mse_loss.value_and_grad(a, b, mask=mask)
    assert_close(value.get(), want, SUM[z.dtype])
    np.testing.assert_array_equal(grad.get(), want_grad)


@pytest.mark.first
def test_sums_do_not_depend_on_the_address(cp, rng):
    _, _, z, t = batch(cp, rng, 100_000)
    other = cp.zeros(100_001, np.float32)
    other[1:] = z
    assert float(LOGISTIC(z, t).get()) == float(LOGISTIC(other[1:], t).get())


@pytest.mark.first
def test_elements_counted_in_64_bits(cp, fresh, rng):
    __, _, z, t = batch(cp, rng, (5, 3, 41, 33))
    w = rng.random((3, 1, 1)).astype(np.float32)
    want = LOGISTIC.value_and_grad(z, t, cp.asarray(w), "sample_mean")
    fresh.setattr("fastloss.cuda.launch.INT32", 0)
    from fastloss.cuda import call

    call.find_launch.cache_clear()
    got = LOGISTIC.value_and_grad(z, t, cp.asarray(w), "sample_mean")
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x.get(), y.get())


@pytest.mark.first
@pytest.mark.parametrize("shape", [(5, 3, 41, 33), (5, 1000)])
def test_classes_counted_in_64_bits(cp, fresh, rng, shape):
    z, t = cp.asarray(rng.standard_normal(shape).astype(np.float32)), cp.asarray(rng.integers(0, shape[1], (shape[0], *shape[2:])))
    want, of_regions = fl.cross_entropy.value_and_grad(z, t, reduction="sample_mean"), fl.dice_softmax_loss.value_and_grad(z, t)
    fresh.setattr("fastloss.cuda.launch.INT32", 0)
    from fastloss.cuda import call

    call.find_launch.cache_clear()
    got = fl.cross_entropy.value_and_grad(z, t, reduction="sample_mean")
    for x, y in zip((*got, *fl.dice_softmax_loss.value_and_grad(z, t)), (*want, *of_regions), strict=True):
        np.testing.assert_array_equal(x.get(), y.get())


@pytest.mark.parametrize(("size", "is_wide"), [(2**30, False), (3 * 2**30, True)])
def test_large_batches_are_counted_in_64_bits(size, is_wide):
    from bench.static import launch
    from fastloss.cuda.source import source

    z = np.broadcast_to(np.float32(0), size)
    made = launch(LOGISTIC.definition, z, z, ("value",))
    variant = made.variant(tuple(made.alignments))
    assert variant.is_wide is is_wide
    assert ("#define index_t unsigned long long\n" in source(variant)) is is_wide


@pytest.mark.first
def test_many_samples_and_few_of_many_ranges(cp, rng):
    for shape in ((3000, 5), (2, 700_001), (1500, 700)):
        a, b, z, t = batch(cp, rng, shape)
        value, grad = fl.mse_loss.value_and_grad(z, t, reduction="sample_mean")
        want, want_grad = fl.mse_loss.value_and_grad(a, b, reduction="sample_mean")
        assert_close(value.get(), want, SUM[z.dtype])
        np.testing.assert_array_equal(grad.get(), want_grad)


@pytest.mark.first
@pytest.mark.parametrize("length", [2048, 5001])
def test_ranges_of_one_segment(cp, rng, length):
    """Segments that are long and few are cut into ranges each."""
    from bench.static import launch

    a, b, z, t = batch(cp, rng, (2, 3, length))
    weight = rng.random((3, 1)).astype(np.float32)
    sizes = launch(LOGISTIC.definition, a, b, ("value",), ("slope",), weight=weight).cut
    assert (sizes.is_local, sizes.group_segments, sizes.segment_ranges > 1) == (True, 6, True)
    for reduction in ("mean", "sample_sum"):
        value, grad = LOGISTIC.value_and_grad(z, t, cp.asarray(weight), reduction)
        want, want_grad = LOGISTIC.value_and_grad(a, b, weight, reduction)
        assert_close(value.get(), want, SUM[z.dtype])
        assert_close(grad.get(), want_grad, SUM[z.dtype])
    t[1, 2, length - 2] = 7.0
    LOGISTIC(z, t, cp.asarray(weight), validate="defer")
    with pytest.raises(ValueError, match=rf"target\[1, 2, {length - 2}\] is 7.0"):
        fl.raise_deferred()


def test_teams_compute_classes_side_by_side():
    from bench.static import array, class_launch
    from fastloss.cuda.launch import THREADS

    def team(shape, last=False):
        z = array("float32", shape)
        z = z.transpose(0, 3, 1, 2) if last else z
        one = class_launch(fl.cross_entropy, z, array("uint8", (z.shape[0], *z.shape[2:])), ("value",))
        return one.variant(tuple(one.alignments)).team, one.ranges

    assert team((4096, 1000)) == (THREADS, 1024)
    assert team((40, 1000)) == (THREADS, 40)
    assert team((2, 8, 8, 600), last=True) == (THREADS, 128)
    assert team((2, 600, 8, 8))[0] == team((4096, 100))[0] == 1


def launches(shape):
    """Return launches of every kind of walk over a batch, none of whose elements is touched."""
    from bench.static import array, launch, second_launch

    z = array("float32", shape)
    one, both = LOGISTIC.definition, {"summed": ("value",), "wanted": ("slope",)}
    yield launch(one, z, z, **both)
    yield launch(one, z, z, **both, weight=array("float32", (shape[1], 1, 1)))
    yield launch(one, z, z, **both, reduction="sample_mean")
    regions = array("float32", (shape[0] * shape[1], *shape[2:]))
    yield launch(fl.dice_with_logits_loss.first, regions, regions, ("overlap", "missed", "count"), reduction="sample_sum")
    yield second_launch(fl.dice_with_logits_loss, z, ("slope",))


@pytest.mark.parametrize("processors", [108, 132, 148])
@pytest.mark.parametrize("shape", [(256, 3, 256, 256), (16, 20, 512, 512), (1, 1, 4096, 4096), (64, 1, 28, 28)], ids=str)
def test_blocks_do_the_same_work(shape, processors):
    from fastloss.cuda.source import THREADS

    for one in launches(shape):
        sizes, blocks = one.cut, one.blocks(processors)
        parts, packs = (sizes.segment_ranges, sizes.segment_packs) if sizes.is_local else (sizes.group_ranges, sizes.group_packs)
        ranges = np.minimum(sizes.range_packs, packs - np.arange(one.ranges) % parts * sizes.range_packs)
        assert ranges.sum() == sizes.groups * sizes.group_packs
        work = np.bincount(np.arange(one.ranges) % blocks, ranges)
        assert work.max() <= 1.05 * work.mean()
        assert blocks >= min(processors, sum(work) // THREADS)  # no processor is idle that could have work


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_more_ranges_than_are_computed_at_once_have_a_turn_for_each_thread(dtype):
    from bench.static import array, launch
    from fastloss.cuda.launch import AT_ONCE
    from fastloss.cuda.source import THREADS, pack_of, packs_of

    for size in (1 << 16, 3 << 16, 1 << 18, 1 << 19, 1 << 20, 3 << 20, 1 << 22):
        z = array(dtype, (size,))
        one = launch(LOGISTIC.definition, z, z, summed=("value",), wanted=("slope",))
        turn = THREADS * packs_of(one.plan.spec)
        assert one.ranges <= AT_ONCE or one.cut.range_packs >= turn
        assert one.ranges >= min(AT_ONCE, size // pack_of(one.plan.spec) // THREADS) * 0.9


@pytest.mark.first
def test_errors_of_targets_are_deferred(cp, rng):
    _, b, z, t = batch(cp, rng, (3, 40, 50))
    t[1, 2, 3] = 7.0
    t[2, 0, 0] = -1.0
    LOGISTIC(z, t, validate="defer")
    with pytest.raises(
        ValueError, match=r"^target\[(1, 2, 3\] is 7|2, 0, 0\] is -1).0; accepted: targets in \[0, 1\] \(found on the GPU, by an"
    ):
        fl.raise_deferred()
    fl.raise_deferred()  # raises each error only once
    LOGISTIC(z, cp.asarray(b), validate=True)
    fl.raise_deferred()
    probabilities = cp.asarray(b)
    probabilities[0, 0, 1] = 1.5
    fl.binary_cross_entropy.grad(probabilities, cp.asarray(b), validate=True, out=probabilities)
    with pytest.raises(ValueError, match=r"input\[0, 0, 1\] is 1.5; .*; for logits use binary_cross_entropy_with_logits"):
        fl.raise_deferred()
    t = cp.asarray(b)
    t[2, 1, 0] = -2.0
    fl.binary_cross_entropy(cp.asarray(b), t, validate=True)
    with pytest.raises(ValueError, match=r"^target\[2, 1, 0\] is -2.0"):
        fl.raise_deferred()


@pytest.mark.parametrize("is_last", [False, True], ids=["classes first", "classes last"])
@pytest.mark.parametrize(
    ("dtype", "bad", "hint"), [(np.uint8, 255, ""), (np.int64, -1, ", and ignore_index"), (np.uint64, 2**64 - 1, ""), (np.int8, 5, "")]
)
def test_errors_of_class_indices_are_deferred(cp, rng, dtype, bad, hint, is_last):
    z, t = rng.standard_normal((3, 5, 70, 90)).astype(np.float32), rng.integers(0, 5, (3, 70, 90)).astype(dtype)
    z = np.moveaxis(np.moveaxis(z, 1, -1).copy(), -1, 1) if is_last else z
    want = fl.cross_entropy.grad(z, t, reduction="sum")
    z, t = cp.asarray(z), cp.asarray(t)
    assert_close(fl.cross_entropy.grad(z, t, reduction="sum").get(), want, SUM[z.dtype])
    fl.raise_deferred()
    t[1, 68, 7] = bad
    grad = fl.cross_entropy.grad(z, t, reduction="sum", ignore_index=-100 if hint else None).get()
    told = "18446744073709551615" if bad > 255 else str(bad)
    with pytest.raises(ValueError, match=rf"^target\[1, 68, 7\] is {told}; accepted: class indices from 0 to 4{hint} \(found on the GPU"):
        fl.raise_deferred()
    fl.raise_deferred()
    want[1, :, 68, 7] = 0
    assert_close(grad, want, SUM[z.dtype])
    fl.cross_entropy.grad(z, t, mask=t != bad)
    fl.cross_entropy.grad(z, t, ignore_index=bad if bad < 255 else None, mask=None if bad < 255 else t != bad)
    fl.raise_deferred()


def test_the_first_of_several_bad_targets_of_a_thread_is_named(cp):
    t = cp.zeros(64, np.float32)
    t[4:8] = cp.asarray(np.array([2.0, 3.0, 4.0, 5.0]))
    LOGISTIC(cp.zeros(64, np.float32), t, validate="defer")
    with pytest.raises(ValueError, match=r"^target\[4\] is 2.0"):
        fl.raise_deferred()


def test_deferred_errors_of_dice_and_vae_losses(cp, rng):
    _, b, z, _ = batch(cp, rng, (2, 3, 5, 7))
    b[1, 2, 0, 3] = np.nan
    t = cp.asarray(b)
    for loss in (fl.dice_with_logits_loss, fl.dice_bce_with_logits_loss):
        loss(z, t, validate=True)
        with pytest.raises(ValueError, match=r"^target\[1, 2, 0, 3\] is nan; accepted: targets in \[0, 1\] \(found"):
            fl.raise_deferred()
    fl.vae_loss(z, t, z[:, :, 0, 0], z[:, :, 0, 0], validate=True)
    with pytest.raises(ValueError, match=r"^target\[1, 2, 0, 3\] is nan"):
        fl.raise_deferred()


def test_zero_dimensional_arrays(cp):
    z, t = cp.zeros((), np.float32), cp.full((), 1.0, np.float32)
    value, grad = fl.dice_with_logits_loss.value_and_grad(z, t, per_channel=False, per_sample=False)
    assert_close(value.get(), 0.2, SUM[np.dtype(np.float64)])
    assert_close(grad.get(), -0.12, SUM[z.dtype])


def test_gradients_have_the_strides_of_the_input(cp, rng):
    _, _, z, t = batch(cp, rng, (4, 5, 6, 7))
    order = (1, 3, 0, 2)
    grad = LOGISTIC.grad(z.transpose(order), t.transpose(order))
    assert grad.strides == z.transpose(order).strides
    np.testing.assert_array_equal(grad.get(), LOGISTIC.grad(z, t).get().transpose(order))


@pytest.mark.parametrize("view", [np.s_[:], np.s_[::-1, :, ::-2], np.s_[:, None, 1:]])
def test_the_bad_element_is_found_through_any_view(cp, rng, view):
    b = rng.random((5, 9, 8))
    b[3, 4, 3] = 2.0
    t = cp.asarray(b)[view]
    place = tuple(int(k) for k in np.argwhere(b[view] == 2.0)[0])
    LOGISTIC(cp.zeros(t.shape, np.float32), t, validate=True, reduction="sample_sum")
    with pytest.raises(ValueError, match=rf"target\[{', '.join(map(str, place))}\] is 2.0"):
        fl.raise_deferred()


def test_a_scaled_target_is_shown_as_it_is_stored(cp):
    images = cp.asarray(np.array([[3, 255]], np.uint8))
    LOGISTIC(cp.zeros((1, 2), np.float32), images, target_scale=1 / 100, validate=True)
    with pytest.raises(ValueError, match=r"target\[0, 1\] is 255; accepted: targets in \[0, 1\] \(found"):
        fl.raise_deferred()
    LOGISTIC(cp.zeros((1, 2), np.float32), images, validate=True)
    with pytest.raises(ValueError, match=r"target\[0, 0\] is 3; .* pass target_scale=1/255"):
        fl.raise_deferred()


def test_the_next_validated_call_raises_a_deferred_error(cp):
    zeros = cp.zeros(3, np.float32)
    LOGISTIC(zeros, cp.asarray(np.array([0.0, 5.0, 0.0])), validate=True)
    cp.cuda.runtime.deviceSynchronize()
    with pytest.raises(ValueError, match=r"target\[1\] is 5.0"):
        LOGISTIC(zeros, zeros, validate=True)


def test_arrays_of_host_and_device_do_not_mix(cp):
    z, host = cp.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match=r"target is a numpy.ndarray, but the input is a cupy.ndarray; accepted: cupy.ndarray"):
        fl.mse_loss(z, host)
    with pytest.raises(TypeError, match=r"target is a cupy.ndarray; accepted: numpy.ndarray"):
        fl.mse_loss(host, z)
    with pytest.raises(TypeError, match=r"weight is a numpy.ndarray, but the input is a cupy.ndarray"):
        fl.mse_loss(z, z, weight=host)
    with pytest.raises(TypeError, match=r"out must be a cupy.ndarray like the input, not ndarray"):
        fl.mse_loss.grad(z, z, out=host)


@asks_the_stand_in
def test_another_device_than_the_current_one(cp):
    z = cp.zeros(3, np.float32)
    with cp.cuda.Device(1), pytest.raises(ValueError, match=r"input is on CUDA device 0, but the current device is 1; .*Device\(0\)"):
        fl.mse_loss(z, z)
    with cp.cuda.Device(1):
        t = cp.zeros(3, np.float32)
    with pytest.raises(ValueError, match="target is on CUDA device 1, but the current device is 0"):
        fl.mse_loss(z, t)
    with pytest.raises(ValueError, match="out is on CUDA device 1, but the current device is 0"):
        fl.mse_loss.grad(z, z, out=t)


@asks_the_stand_in
def test_out_of_memory(cp, monkeypatch, rng):
    _, _, z, t = batch(cp, rng, 100)
    del cp.launches[:]
    monkeypatch.setattr(cp.current, "is_full", True)
    with pytest.raises(MemoryError, match="Out of memory allocating 400 bytes"):
        LOGISTIC.value_and_grad(z, t)
    assert not cp.launches


@asks_the_stand_in
def test_each_stream_has_a_workspace_and_each_captured_launch(cp, rng):
    from fastloss.cuda import workspace as device

    a, b, z, t = batch(cp, rng, (2, 300, 211))
    found = []
    for pointer in (0, 111, 222, 111):
        with cp.cuda.Stream(pointer):
            LOGISTIC(z, t)
            found.append(device.find_workspace(0))
    assert len(set(map(id, found))) == 3
    assert found[1] is found[3]
    with cp.cuda.Stream(111) as stream:
        stream.begin_capture()
        values = [LOGISTIC(z, t) for _ in range(2)]
        graph = stream.end_capture()
        graph.launch()
    assert graph.nodes == 2
    for value in values:
        assert_close(value.get(), LOGISTIC(a, b), SUM[z.dtype])
    found += device._captured[-2:]
    assert len({memory.ptr for x in found for memory in (x.partials, x.counters)}) == 10
    assert np.diff(sorted({x.counters.ptr for x in found})).min() >= device.COUNTERS
    assert len({x.slot.address for x in found}) == 5


@asks_the_stand_in
def test_a_graph_without_spare_counters_sets_its_own_to_0(cp, monkeypatch, rng):
    from fastloss.cuda import workspace

    monkeypatch.setattr(workspace, "_spare", {})
    a, b, z, t = batch(cp, rng, (2, 300, 211))
    with cp.cuda.Stream(111) as stream:
        stream.begin_capture()
        value = LOGISTIC(z, t)
        graph = stream.end_capture()
    assert graph.nodes == 2
    for _ in range(2):
        graph.launch()
        assert_close(value.get(), LOGISTIC(a, b), SUM[z.dtype])


@asks_the_stand_in
def test_threads_with_default_streams_of_their_own_share_no_workspace(cp):
    from fastloss.cuda import workspace as device

    def of_a_thread():
        with cp.cuda.Stream(device.PER_THREAD):
            return device.find_workspace(0)

    with ThreadPoolExecutor(1) as pool:
        assert of_a_thread() is of_a_thread() is not pool.submit(of_a_thread).result()


@asks_the_stand_in
def test_workspaces_are_small_and_few(cp, rng):
    from fastloss.cuda import workspace as device

    _, _, z, t = batch(cp, rng, 10)
    for pointer in range(1000, 1000 + 2 * device.STREAMS):
        with cp.cuda.Stream(pointer):
            LOGISTIC(z, t)
    assert len(device._workspaces) <= device.STREAMS
    assert device.PARTIALS <= 256 << 10


def test_calls_with_numpy_arrays_do_not_import_cupy():
    from tests.test_process import run_python

    assert (
        run_python("import sys, fastloss as fl; fl.mse_loss(1.0, 2.0); fl.raise_deferred(); print('cupy' in sys.modules)").strip()
        == "False"
    )


@pytest.mark.parametrize("name", ["scale", "ignored", "double", "template", "PACK", "NONE", "linear", "v0", "δ"])
def test_parameters_may_have_any_name(cp, rng, name):
    code = f"def größe(z, t, {name}=1.0):\n    return {name} * (z - t) * (z - t), 2.0 * {name} * (z - t)"
    scope: dict = {}
    exec(code, scope)
    loss = fl.elementwise_loss(scope["größe"])
    a, b, z, t = batch(cp, rng, (5, 7), target_dtype=np.uint8)
    for given in (2.0, rng.random(7)):
        options = {name: given, "reduction": "sum", "grad_output": 3.0, "ignore_index": 3}
        want = loss.value_and_grad(a, b, **options)
        got = loss.value_and_grad(z, t, **options | {name: cp.asarray(given) if np.ndim(given) else given})
        assert_close(got[0].get(), want[0], SUM[a.dtype])
        np.testing.assert_array_equal(got[1].get(), want[1])


def test_out_may_overwrite_grad_output(cp, rng):
    a, b, z, t = batch(cp, rng, (4, 3000))
    want = fl.mse_loss.grad(a, b, reduction="sample_sum", grad_output=a[:, 0])
    np.testing.assert_array_equal(fl.mse_loss.grad(z, t, reduction="sample_sum", grad_output=z[:, 0], out=z).get(), want)
    z = cp.asarray(a)
    want = fl.mse_loss.grad(a, b, reduction="sum", grad_output=a[1, 5])
    np.testing.assert_array_equal(fl.mse_loss.grad(z, t, reduction="sum", grad_output=z[1, 5], out=z).get(), want)


@pytest.mark.parametrize("reduction", ["mean", "none", "sample_mean", "sample_sum", "batchmean"])
def test_grad_output_may_be_a_number_on_the_device(cp, rng, reduction):
    a, b, z, t = batch(cp, rng, (4, 3, 5))
    upstream = cp.asarray(np.float16(2.5))
    for loss in (fl.mse_loss, fl.dice_with_logits_loss):
        want = loss.grad(a, b, reduction=reduction, grad_output=2.5)
        assert_close(loss.grad(z, t, reduction=reduction, grad_output=upstream).get(), want, PEER[a.dtype])


@pytest.mark.first
def test_arrays_that_are_not_aligned_are_refused(cp):
    bytes_of = cp.zeros(64, np.uint8)
    odd = cp.ndarray((6,), np.float32, bytes_of.data + 1)
    with pytest.raises(
        ValueError, match="input is not aligned; accepted on a GPU: addresses and strides that are multiples of the element size, 4 bytes"
    ):
        fl.mse_loss(odd, cp.zeros(6, np.float32))
    steps = cp.ndarray((6,), np.float32, bytes_of.data, (6,))
    with pytest.raises(ValueError, match="target is not aligned"):
        fl.mse_loss(cp.zeros(6, np.float32), steps)


@pytest.mark.parametrize("largest", [np.int64(2**63 - 1), np.uint64(2**64 - 1), np.int64(-(2**63)), np.uint8(255)])
def test_errors_show_integer_targets_exactly(cp, largest):
    t = np.zeros(5, largest.dtype)
    t[3] = largest
    LOGISTIC(cp.zeros(5, np.float32), cp.asarray(t), validate=True)
    with pytest.raises(ValueError, match=rf"target\[3\] is {largest}; accepted"):
        fl.raise_deferred()


def test_errors_of_overlapping_windows_name_an_existing_element(cp):
    memory = cp.zeros(9, np.float32)
    memory[6] = 2.0
    windows = cp.ndarray((4, 5), np.float32, memory.data, (4, 4))
    LOGISTIC(cp.zeros((4, 5), np.float32), windows, validate=True)
    with pytest.raises(ValueError, match=r"target\[3, 3\] is 2.0"):
        fl.raise_deferred()


@asks_the_stand_in
def test_subnormal_numbers_are_not_flushed_to_zero(cp):
    from fastloss.cuda import compile as compiler

    compiler.compiled("", "sm_0")
    options = cp.nvrtc.options[-1]
    assert [option for option in options if "ftz" in option] == ["--ftz=false"]


@asks_the_stand_in
@pytest.mark.skipif(sys.platform != "linux", reason="protects a page by Linux's mprotect")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_no_memory_behind_an_array_is_accessed(cp, rng, dtype):
    """The arrays end where a page does, and the next one is forbidden: a wrong address ends the process."""
    pages = [mmap.mmap(-1, 2 * mmap.PAGESIZE) for _ in range(3)]
    size, arrays = 1023, []
    for k, page in enumerate(pages):
        address = ctypes.addressof(ctypes.c_char.from_buffer(page)) + mmap.PAGESIZE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
        kind = np.dtype(np.float32 if dtype is np.uint8 and k != 1 else dtype)  # only targets may be integers
        memory = cp.cuda.UnownedMemory(address - size * kind.itemsize, size * kind.itemsize, page, 0)
        arrays.append(cp.ndarray((size,), kind, cp.cuda.MemoryPointer(memory, 0)))
    a, b, z, t = batch(cp, rng, size, arrays[0].dtype, arrays[1].dtype)
    arrays[0][...], arrays[1][...] = z, t
    grad = fl.mse_loss.grad(*arrays[:2], out=arrays[2], reduction="sum")
    np.testing.assert_array_equal(grad.get(), fl.mse_loss.grad(a, b, reduction="sum"))


@pytest.mark.first
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_ties_are_rounded_to_even(cp, dtype):
    place = np.float32(ml_dtypes.finfo(dtype).eps)
    z, t = 1 + place * np.arange(64), np.full(64, -place / 2)
    grad = fl.mse_loss.grad(cp.asarray(z.astype(dtype)), cp.asarray(t.astype(dtype)), reduction="sum").get()
    np.testing.assert_array_equal(grad.astype(np.float32), 2 * (1 + place * 2 * np.repeat(np.arange(33), 2)[1:65]))


def test_a_nan_with_only_low_bits_is_rounded_to_nan(cp):
    loss = fl.elementwise_loss(lambda z, t: (t, t))
    t = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert np.isnan(loss(cp.asarray(np.zeros(2, dtype)), cp.asarray(t), reduction="none").get().astype(np.float32)).all()


def test_latents_and_images_on_different_devices_are_refused(cp, rng):
    a, b, z, t = batch(cp, rng, (4, 3))
    with pytest.raises(TypeError, match=r"mu is a cupy.ndarray; accepted: numpy.ndarray"):
        fl.vae_loss(a, b, z, t)
    with pytest.raises(TypeError, match=r"mu is a numpy.ndarray, but the input is a cupy.ndarray"):
        fl.vae_loss(z, t, a, b)
    want = fl.vae_loss(a, b, a.tolist(), b.tolist())
    assert_close(fl.vae_loss(z, t, a.tolist(), b.tolist()).total.get(), want.total, SUM[a.dtype])
    grads = fl.vae_loss.grad(z, t, a.tolist(), b.tolist())
    assert all(isinstance(x, cp.ndarray) for x in grads)


def test_numbers_beside_arrays(cp, rng):
    a, b, z, t = batch(cp, rng, (2, 3))
    for weight in (2.0, np.float32(2), np.int64(2), np.array(2.0)):
        np.testing.assert_array_equal(fl.mse_loss.grad(z, t, weight=weight).get(), fl.mse_loss.grad(a, b, weight=weight))
    np.testing.assert_array_equal(fl.mse_loss.grad(z, t, mask=np.True_).get(), fl.mse_loss.grad(a, b))
    np.testing.assert_array_equal(fl.mse_loss.grad(z, t, weight=[1.0, 2.0, 3.0]).get(), fl.mse_loss.grad(a, b, weight=[1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(fl.huber_loss.grad(z, t, delta=cp.asarray(0.5)).get(), fl.huber_loss.grad(a, b, delta=0.5))
    assert "cupy" in sys.modules


def test_accumulators(cp, rng):
    a, b, z, t = batch(cp, rng, (7, 3, 40, 50))
    counted = rng.random(a.shape) < 0.7
    mu, logvar = rng.standard_normal((2, 7, 5)).astype(np.float32)
    for loss, options, more in (
        (LOGISTIC, {"reduction": "batchmean"}, ()),
        (fl.dice_bce_with_logits_loss, {"per_sample": False}, ()),
        (fl.dice_with_logits_loss, {}, ()),
        (fl.vae_loss, {"beta": 2.0}, (mu, logvar)),
    ):
        total = fl.Accumulator(loss, **options)
        for part in (slice(2), slice(2, 7)):
            total.update(z[part], t[part], *[cp.asarray(x[part]) for x in more], mask=cp.asarray(counted[part]))
        assert_close(total.compute(), loss(a, b, *more, mask=counted, **options), SUM[z.dtype])
        assert total.count == counted.sum()


@pytest.mark.parametrize("loss", [LOGISTIC, fl.dice_with_logits_loss], ids=lambda loss: loss.__name__)
def test_blocks_of_dask_arrays_stay_on_the_device(cp, rng, loss):
    da = pytest.importorskip("dask.array")
    a, b, _, _ = batch(cp, rng, (5, 3, 4, 6))
    counted = rng.random(a.shape) < 0.5

    def cut(x):
        return da.from_array(cp.asarray(x), chunks=(2, *x.shape[1:]), asarray=False)

    for mask in (None, counted):
        value, grad = loss.value_and_grad(cut(a), cut(b), mask=mask if mask is None else cut(mask))
        blocks = [grad.blocks[k].compute(scheduler="synchronous") for k in range(3)]
        assert all(isinstance(block, cp.ndarray) for block in blocks)
        want, want_grad = loss.value_and_grad(a, b, mask=mask)
        assert_close(value.compute(scheduler="synchronous"), want, SUM[a.dtype])
        assert_close(np.concatenate([block.get() for block in blocks]), want_grad, PEER[a.dtype])
