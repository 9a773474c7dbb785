"""Speed of the losses: `pytest bench/test_speed.py --benchmark-json=FILE`, then `python -m bench.report FILE`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fastloss as fl
from bench import limit as limits
from bench.conftest import THREADS, Row
from fastloss import reference
from tests.ulp import NUMPY, PROBABILITY, assert_close

BCE, MSE = fl.binary_cross_entropy_with_logits, fl.mse_loss
SHAPE, F4 = (64, 3, 256, 256), np.dtype(np.float32)


class Batch:
    """Arrays of one size, and every call that is timed on them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self.shape = shape
        self.logits = 3 * rng.standard_normal(shape, np.float32)
        self.bytes = rng.integers(0, 256, shape, np.uint8)
        self.targets = self.bytes * np.float32(1 / 255)
        self.out, self.in_place = np.zeros_like(self.logits), self.logits.copy()
        self.weight = rng.random(shape, np.float32)
        self.mask = rng.random(shape, np.float32) < 0.8
        self.per_channel = np.linspace(0.5, 2, shape[1], dtype=np.float32).reshape(-1, 1, 1) if len(shape) == 4 else None
        self.probabilities = reference.sigmoid(self.logits)
        self.flat = limits.aligned(self.logits.size)

    def both(self, loss=BCE, **options):
        return lambda: loss.value_and_grad(self.logits, self.targets, out=self.out, **options)

    def on_probabilities(self):
        return fl.binary_cross_entropy.value_and_grad(self.probabilities, self.targets, out=self.out)

    def halves(self, dtype, loss=BCE):
        z, t, out = (x.astype(dtype) for x in (self.logits, self.targets, self.out))
        return lambda: loss.value_and_grad(z, t, out=out)

    def value(self, loss=BCE, **options):
        return lambda: loss(self.logits, self.targets, **options)

    def with_bytes(self):
        return BCE.value_and_grad(self.logits, self.bytes, target_scale=1 / 255, out=self.out)

    def overwrite(self):
        return BCE.value_and_grad(self.in_place, self.targets, out=self.in_place)

    def restore(self):
        np.copyto(self.in_place, self.logits)

    def channels_last(self):
        views = [np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (self.logits, self.targets)]
        out = np.zeros_like(views[0])
        return lambda: BCE.value_and_grad(*views, out=out)

    def channels_last_weight(self):
        views = [np.ascontiguousarray(a.transpose(0, 2, 3, 1)) for a in (self.logits, self.targets)]
        out, weight = np.zeros_like(views[0]), self.per_channel.ravel()
        return lambda: BCE.value_and_grad(*views, weight, out=out)

    def vae(self):
        mu, logvar = np.random.default_rng(1).standard_normal((2, self.shape[0], 256), np.float32)
        latents = np.zeros_like(mu), np.zeros_like(mu)
        return lambda: fl.vae_loss.value_and_grad(self.logits, self.targets, mu, logvar, out=(self.out, *latents))

    def numpy(self, loss):
        return lambda: reference.value_and_grad(loss, self.logits, self.targets)


PLAIN = "BCE value_and_grad(out=)"
TIMED = (
    "binary_cross_entropy_with_logits",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "log_cosh_loss",
    "mse_with_logits_loss",
    "sigmoid_focal_loss",
)


def large_rows() -> dict[str, Row]:
    """Return the rows of the large batch by their ids; made when they are needed, it is 300 MB."""
    batch, limit = Batch(SHAPE), limits.Limit(THREADS)
    limits.check(limit)
    check(batch)
    z, t = batch.logits.reshape(-1), batch.targets.reshape(-1)
    triad = ("triad", lambda: limit.triad(batch.flat, z, t))
    dot = ("dot product", lambda: limit.dot(z, t))
    plain = (PLAIN, batch.both())
    numpy = ("NumPy", batch.numpy(reference.binary_cross_entropy_with_logits))
    numpy_mse = batch.numpy(reference.mse_loss)
    two_passes = ("dot product, then triad", lambda: (limit.dot(z, t), limit.triad(batch.flat, z, t)))
    plain_focal = ("focal, mean", batch.both(fl.sigmoid_focal_loss, reduction="mean"))
    plain_mse = ("MSE value_and_grad(out=)", batch.both(MSE))
    return {
        "ordinary": Row("triad, ordinary stores", lambda: limit.ordinary(batch.flat, z, t), *triad),
        "prefetched": Row("triad, with software prefetch", lambda: limit.prefetched(batch.flat, z, t), *triad),
        "bce": Row(PLAIN, batch.both(), *triad, 1.7, 1.3),
        "bce-value": Row("BCE value", batch.value(), *dot, 1.6, 1.2),
        "mse": Row("MSE value_and_grad(out=)", batch.both(MSE), *triad, 1.2, 1.05),
        "mse-value": Row("MSE value", batch.value(MSE), *dot, 1.2, 1.05),
        "l1": Row("L1", batch.both(fl.l1_loss, reduction="mean"), *triad, 1.2),
        "smooth-l1": Row("smooth L1", batch.both(fl.smooth_l1_loss), *triad, 1.2),
        "huber": Row("Huber", batch.both(fl.huber_loss), *triad, 1.2),
        "log-cosh": Row("log-cosh", batch.both(fl.log_cosh_loss), *triad, 1.7),
        "mse-logits": Row("MSE through a sigmoid", batch.both(fl.mse_with_logits_loss), *triad, 1.7),
        "bce-probabilities": Row("BCE on probabilities", batch.on_probabilities, *triad, 4.0),
        "focal": Row("focal, mean", batch.both(fl.sigmoid_focal_loss, reduction="mean"), *triad, 4.0),
        "focal-power": Row("focal, gamma=1.5", batch.both(fl.sigmoid_focal_loss, reduction="mean", gamma=1.5), *plain_focal),
        "dice-bce": Row("Dice + BCE", batch.both(fl.dice_bce_with_logits_loss), *two_passes, 2.0),
        "dice": Row("Dice", batch.both(fl.dice_with_logits_loss), *two_passes),
        "vae": Row("VAE objective, 256 latents", batch.vae(), *plain),
        "float16": Row("float16", batch.halves(np.float16), *plain, 1.0),
        "bfloat16": Row("bfloat16", batch.halves(ml_dtypes.bfloat16), *plain, 1.0),
        "mse-float16": Row("MSE, float16", batch.halves(np.float16, MSE), *plain_mse, 1.0),
        "mse-bfloat16": Row("MSE, bfloat16", batch.halves(ml_dtypes.bfloat16, MSE), *plain_mse, 1.0),
        "fresh": Row("BCE value_and_grad, a fresh gradient", lambda: BCE.value_and_grad(batch.logits, batch.targets), *triad),
        "uint8": Row("uint8 targets", batch.with_bytes, *plain, 1.0, 0.8),
        "in-place": Row("in place, out=input", batch.overwrite, *plain, 1.0, 0.9, restore=batch.restore),
        "weight": Row("weight, full size", batch.both(weight=batch.weight), *plain, 1.5),
        "weight-channel": Row("weight, per channel", batch.both(weight=batch.per_channel), *plain, 1.5),
        "weight-channels-last": Row("weight, per channel, channels last", batch.channels_last_weight(), *plain),
        "mask": Row("mask, full size", batch.both(mask=batch.mask), *plain, 1.5),
        "pos-weight": Row("pos_weight, full size", batch.both(pos_weight=batch.weight), *plain, 1.5),
        "pos-weight-channel": Row("pos_weight, per channel", batch.both(pos_weight=batch.per_channel), *plain, 1.5),
        "channels-last": Row("channels-last", batch.channels_last(), *plain, 1.05),
        "bce-numpy": Row(PLAIN, batch.both(), *numpy, 30, 40, faster=True),
        "mse-numpy": Row("MSE value_and_grad(out=)", batch.both(MSE), "NumPy", numpy_mse, faster=True),
    }


def check(batch: Batch) -> None:
    """Assert, before anything is timed, that what is timed computes what NumPy does in float64, on a part of the batch."""
    z, t = (a[:2].astype(np.float64) for a in (batch.logits, batch.targets))
    tolerance = NUMPY[F4]
    bce = reference.binary_cross_entropy_with_logits

    def agrees(call, loss=bce, weight=1.0, count=batch.logits.size, **parameters):
        assert_close(call()[1][:2], loss(z, t, **parameters)[1] * weight / count, tolerance)

    for name in TIMED:
        loss, numpy = getattr(fl, name), getattr(reference, name)
        agrees(batch.both(loss, reduction="mean"), numpy)
        assert_close(batch.value(loss, reduction="mean")(), numpy(batch.logits, batch.targets)[0].mean(dtype=np.float64), tolerance)
    p = batch.probabilities[:2].astype(np.float64)
    assert_close(batch.on_probabilities()[1][:2], reference.binary_cross_entropy(p, t)[1] / batch.logits.size, PROBABILITY[F4])
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = [x.astype(dtype).astype(np.float64) for x in (batch.logits, batch.targets)]
        assert_close(batch.halves(dtype)()[0], bce(*values)[0].mean(), tolerance)
    agrees(lambda: (None, batch.channels_last_weight()()[1].transpose(0, 3, 1, 2)), weight=batch.per_channel)
    for call in (batch.with_bytes, batch.overwrite, batch.channels_last()):
        agrees(call)
    agrees(batch.both(weight=batch.weight), weight=batch.weight[:2])
    agrees(batch.both(weight=batch.per_channel), weight=batch.per_channel)
    agrees(batch.both(mask=batch.mask), weight=batch.mask[:2], count=batch.mask.sum())
    agrees(batch.both(pos_weight=batch.weight), pos_weight=batch.weight[:2])
    agrees(batch.both(pos_weight=batch.per_channel), pos_weight=batch.per_channel)
    batch.restore()


def small_rows() -> list[Row]:
    """Return the rows of batches that fit a cache."""
    rows = []
    for shape, calls, must, must_us, aim_us in (((1024,), 200, 2.0, 8, 4), ((128, 1, 28, 28), 20, None, 60, 35)):
        batch = Batch(shape)
        numpy = batch.numpy(reference.binary_cross_entropy_with_logits)
        name = f"{PLAIN}, {batch.logits.size:,} elements"
        rows.append(Row(name, batch.both(), "NumPy", numpy, must, faster=True, calls=calls, must_us=must_us, aim_us=aim_us))
    return rows


@pytest.fixture(scope="module")
def large():
    return large_rows()


LARGE = [
    "ordinary",
    "prefetched",
    "bce",
    "bce-value",
    "mse",
    "mse-value",
    "l1",
    "smooth-l1",
    "huber",
    "log-cosh",
    "mse-logits",
    "bce-probabilities",
    "focal",
    "focal-power",
    "dice-bce",
    "dice",
    "vae",
    "float16",
    "bfloat16",
    "mse-float16",
    "mse-bfloat16",
    "fresh",
    "uint8",
    "in-place",
    "weight",
    "weight-channel",
    "weight-channels-last",
    "mask",
    "pos-weight",
    "pos-weight-channel",
    "channels-last",
    "bce-numpy",
    "mse-numpy",
]


def test_every_row_is_timed(large):
    assert list(large) == LARGE


@pytest.mark.parametrize("name", LARGE)
def test_large(measure, large, name):
    measure(large[name])


@pytest.mark.parametrize("row", small_rows(), ids=["1024", "100352"])
def test_small(measure, row):
    measure(row)
