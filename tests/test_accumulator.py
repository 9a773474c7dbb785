"""Accumulators: the loss of joined batches, the same bits for any split, exact sums, errors."""

from __future__ import annotations

import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

import fastloss as fl
from fastloss.accumulator import MOST_WAITING
from fastloss.core.exact import Exact
from fastloss.losses.vae import VAEValue
from tests.ulp import SUM, assert_close

BCE, DICE = fl.binary_cross_entropy_with_logits, fl.dice_with_logits_loss
SHAPE = (13, 3, 20, 31)
RANGES = (4, 3, 90, 301)  # samples of several ranges
REDUCTIONS = ("mean", "sum", "batchmean")


def batches(arrays, cuts):
    """Cut arrays along their first axes."""
    edges = [0, *cuts, len(arrays[0])]
    return [[x[a:b] for x in arrays] for a, b in itertools.pairwise(edges)]


def accumulated(loss, parts, *, names=(), **options):
    """Return the accumulator of batches; the last arrays of a batch are options with names."""
    total = fl.Accumulator(loss, **options)
    for part in parts:
        operands = part[: len(part) - len(names)]
        total.update(*operands, **dict(zip(names, part[len(operands) :], strict=True)))
    return total


def data(rng, dtype=np.float32, shape=SHAPE):
    """Return logits, targets, weights and a mask."""
    return [
        (3 * rng.standard_normal(shape)).astype(dtype),
        rng.random(shape).astype(dtype),
        rng.random(shape).astype(dtype),
        rng.random(shape) < 0.7,
    ]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.rows("sums_elements")
def test_losses_of_elements_are_those_of_the_joined_batches(row, reduction, rng, dtype):
    operands = row.draw(rng, dtype, SHAPE)
    total = accumulated(row.loss, batches(operands, (1, 5)), reduction=reduction)
    assert_close(total.compute(), row.loss(*operands, reduction=reduction), SUM[np.dtype(dtype)])
    assert (total.samples, total.count) == (SHAPE[0], operands[0].size)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65])
def test_sums_of_many_short_samples_are_those_of_each(size, rng, dtype):
    z, t, w, mask = data(rng, dtype, (1500, size))
    sums = BCE(z, t, w, mask=mask, reduction="sample_sum")
    alone = [BCE(*(x[k : k + 1] for x in (z, t, w)), mask=mask[k : k + 1], reduction="sum") for k in range(len(z))]
    assert_close(sums, np.array(alone), SUM[dtype])
    parts = [BCE(*(x[k] for x in (z, t, w)), mask=mask[k], reduction="sample_sum") for k in (slice(0, 1), slice(1, 700), slice(700, None))]
    np.testing.assert_array_equal(np.concatenate(parts), sums)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_masks_and_ignored_targets(reduction, rng):
    z, t, w, mask = data(rng)
    images = (255 * t).astype(np.uint8)
    images[mask & (z > 1)] = 7
    options = {"target_scale": 1 / 255, "ignore_index": 7, "pos_weight": rng.random((3, 1, 1)).astype(np.float32), "reduction": reduction}
    total = accumulated(BCE, batches([z, images, w, mask], (2, 3, 11)), names=("weight", "mask"), **options)
    assert_close(total.compute(), BCE(z, images, w, mask=mask, **options), SUM[z.dtype])
    assert total.count == np.count_nonzero(mask & (images != 7)) < z.size


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("loss", [DICE, fl.dice_bce_with_logits_loss], ids=lambda loss: loss.__name__)
def test_regions_of_samples_or_of_the_whole_data_set(loss, per_sample, per_channel, rng):
    z, t, w, mask = data(rng)
    mask[4, 1] = mask[:, 2] = False  # empty regions
    options = {"per_sample": per_sample, "per_channel": per_channel, "smooth": 2.0}
    parts = batches([z, t, w, mask], (4, 5))
    none = ("none",) if loss is DICE and not per_sample else ()
    for reduction in (*REDUCTIONS, *none):
        total = accumulated(loss, parts, names=("weight", "mask"), reduction=reduction, **options)
        assert_close(total.compute(), loss(z, t, w, mask=mask, reduction=reduction, **options), SUM[z.dtype])


@pytest.mark.parametrize("weights", [(0.5, 2.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_parts_of_weight_0_do_not_count(weights, rng):
    z, t, _, _ = data(rng)
    z[0, 0, 0, 0] = -np.inf  # with a target above 0 an infinite cross-entropy
    options = dict(zip(("dice_weight", "bce_weight"), weights, strict=True))
    total = accumulated(fl.dice_bce_with_logits_loss, batches([z, t], (6,)), **options)
    assert_close(total.compute(), fl.dice_bce_with_logits_loss(z, t, **options), SUM[z.dtype]) if not weights[1] else None
    assert math.isinf(total.compute()) == bool(weights[1])


@pytest.mark.parametrize("reconstruction", ["bce", "mse"])
def test_the_objective_of_a_variational_autoencoder(reconstruction, rng):
    z, t, w, mask = data(rng)
    mu, logvar = rng.standard_normal((2, SHAPE[0], 8))
    options = {"reconstruction": reconstruction, "beta": 0.5}
    total = accumulated(fl.vae_loss, batches([z, t, mu, logvar, w, mask], (1, 12)), names=("weight", "mask"), **options)
    found = total.compute()
    assert isinstance(found, VAEValue)
    assert_close(found, fl.vae_loss(z, t, mu, logvar, weight=w, mask=mask, **options), SUM[z.dtype])


def test_the_entropy_of_targets(rng):
    _, t, _, mask = data(rng)
    total = fl.Accumulator(fl.binary_entropy, label_smoothing=0.1)
    for x, counted in batches([t, mask], (6,)):
        total.update(x, mask=counted)
    assert_close(total.compute(), fl.binary_entropy(t, mask=mask, label_smoothing=0.1), SUM[t.dtype])


def test_a_loss_of_ones_own_with_its_reduction(rng):
    own = fl.elementwise_loss(reduction="sum")(lambda z, t, power=2.0: (fl.ops.pow(abs(z - t), power), t))
    z, t, _, _ = data(rng)
    assert_close(accumulated(own, batches([z, t], (6,)), power=3.0).compute(), own(z, t, power=3.0), SUM[z.dtype])


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, RANGES, (300, 10), (500,), (20, 7, 7)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "options", "regions", "transposed"])
def test_any_split_and_any_order_of_merges_gives_the_same_bits(shape, kind, rng, dtype):
    if kind == "regions" and len(shape) < 2:
        return
    z, t, w, mask = data(rng, dtype, shape)
    names = () if kind == "plain" else ("weight", "mask")
    arrays = [z, t] if kind == "plain" else [z, t, w, mask]
    if kind == "transposed":
        arrays = [np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1) if x.ndim > 1 else x for x in arrays]
    loss, options = (DICE, {"per_sample": False}) if kind == "regions" else (BCE, {})
    want = accumulated(loss, [arrays], names=names, **options)
    threads = fl.get_num_threads()
    for turn in range(4):
        cuts = np.sort(rng.choice(np.arange(1, len(z)), rng.integers(1, min(len(z), 9)), replace=False))
        fl.set_num_threads(1 + turn % 2)
        parts = [accumulated(loss, [part], names=names, **options) for part in batches(arrays, cuts)]
        fl.set_num_threads(threads)
        rng.shuffle(parts)
        total = fl.Accumulator(loss, **options)
        total.merge_state(*parts[:2])
        for part in parts[2:]:
            total.merge_state(pickle.loads(pickle.dumps(part)))
        assert total._sums == want._sums
        assert (total.samples, total.count, total.compute()) == (want.samples, want.count, want.compute())


NUMBERS = {
    "ordinary": lambda rng, n: rng.standard_normal(n),
    "every exponent": lambda rng, n: np.ldexp(rng.standard_normal(n), rng.integers(-1070, 1010, n)),
    "subnormal": lambda rng, n: rng.integers(-9, 9, n) * 5e-324,
    "huge": lambda rng, n: rng.choice([-1.0, 1.0], n) * 1.7e308,
    "cancelling": lambda rng, n: np.concatenate([x := rng.standard_normal(n), -x, [1e-300]]),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("count", [1, 2, 1000, 70_001])
def test_sums_are_exact(kind, count, rng):
    x = NUMBERS[kind](rng, count)
    want = sum(map(Fraction, x.tolist()), Fraction(0))
    found = Exact.over_first_axis(x)
    assert Fraction(found.units[0], 1 << 1074) == want
    parts = [Exact.over_first_axis(part) for part in np.array_split(rng.permutation(x), 3)]
    assert parts[2].plus(parts[0]).plus(parts[1]) == found
    with np.errstate(over="ignore"):
        assert found.rounded() == [float(want)] if abs(want) < 2**1024 else math.isinf(found.rounded()[0])


def test_infinities_and_nan_add_as_in_float64():
    inf, nan = math.inf, math.nan
    x = np.array([[inf, -inf, inf, 1.0], [1.0, 2.0, -inf, nan], [inf, 3.0, 2.0, 2.0]])
    np.testing.assert_array_equal(Exact.over_first_axis(x).rounded(), [inf, -inf, nan, nan])
    total = accumulated(fl.mse_loss, [[np.full((2, 3), k, np.float32), np.zeros((2, 3), np.float32)] for k in (1.0, inf, 2.0)])
    assert total.compute() == inf


def test_a_state_is_small(rng):
    total = accumulated(BCE, batches(data(rng)[:2], range(1, 13)))
    assert len(pickle.dumps(total)) < 1000


# --- states -----------------------------------------------------------------------------------------------------------


def test_reset_and_no_batch(rng):
    total = accumulated(BCE, [data(rng)[:2]])
    total.reset()
    assert (total.samples, total.count) == (0, 0)
    for loss in (BCE, DICE, fl.vae_loss):
        with pytest.warns(RuntimeWarning, match="mean"):
            assert np.isnan(fl.Accumulator(loss).compute()).any()
    assert fl.Accumulator(BCE, reduction="sum").compute() == fl.Accumulator(DICE, reduction="sum").compute() == 0
    total.update(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))
    assert (total.samples, total.count) == (0, 0)


def test_an_error_leaves_the_accumulator_as_it_was(rng):
    z, t, _, _ = data(rng)
    total = accumulated(BCE, [[z, t]])
    before = total.compute(), total.samples, total.count
    t[3, 1, 2, 2] = 2.0
    with pytest.raises(ValueError, match=r"target\[3, 1, 2, 2\] is 2"):
        total.update(z, t, validate=True)
    channels = accumulated(DICE, [[z, t]], per_sample=False)
    with pytest.raises(ValueError, match="the batch has 2 channels; those before had 3"):
        channels.update(z[:, :2], t[:, :2])
    before_merge = channels.compute(), channels.samples
    with pytest.raises(ValueError, match="the batch has 2 channels; those before had 3"):
        channels.merge_state(accumulated(DICE, [[z, t]], per_sample=False), accumulated(DICE, [[z[:, :2], t[:, :2]]], per_sample=False))
    assert (channels.compute(), channels.samples) == before_merge
    assert (total.compute(), total.samples, total.count) == before


def test_batches_wait_to_be_added(rng):
    """Sums of many batches are added at once, some of which have a count for each sample, and can be read at any time."""
    total, samples = fl.Accumulator(BCE, reduction="sum"), MOST_WAITING // 4 + 1
    z, t, _, mask = data(rng, shape=(7 * samples, 2))
    counted = 0
    for k, part in enumerate(batches([z, t, mask], [samples * k for k in range(1, 7)])):
        options = {"mask": part[2]} if k % 3 == 1 else {}
        total.update(*part[:2], **options)
        counted += part[2].sum() if options else part[0].size
        if k % 2:
            assert total.count == counted
    assert (total.samples, total.count) == (len(z), counted)
    counts = ~(np.arange(len(z)) // samples % 3 == 1)[:, None] | mask
    assert total.compute() == math.fsum(BCE(z, t, mask=counts, reduction="sample_sum"))


def of(loss=BCE, **options):
    """Return a new accumulator."""
    return fl.Accumulator(loss, **options)


X = np.zeros(3)
WRONG = {
    "no loss": (TypeError, "loss is <function .*; accepted: a loss of fastloss", lambda: of(np.mean)),
    "reduction of samples": (
        ValueError, "'sample_mean' is not supported here; accepted: 'mean', 'sum', 'batchmean'", lambda: of(reduction="sample_mean"),
    ),
    "regions of samples": (ValueError, "'none' is not supported here", lambda: of(DICE, reduction="none")),
    "reduction of the VAE": (
        ValueError, "'mean' is not supported here; accepted: 'batchmean'", lambda: of(fl.vae_loss, reduction="mean"),
    ),
    "unknown option": (TypeError, "unknown option gamma; accepted: pos_weight", lambda: of(gamma=2)),
    "out": (TypeError, "unknown option out", lambda: of().update(X, X, out=X)),
    "reduction of a batch": (TypeError, "unknown option reduction", lambda: of().update(X, X, reduction="sum")),
    "setting of a batch": (TypeError, "unknown option smooth; accepted: weight, mask", lambda: of(DICE).update(X, X, smooth=2)),
    "beta of a batch": (TypeError, "unknown option beta; accepted: weight, mask", lambda: of(fl.vae_loss).update(X, X, X, X, beta=2)),
    "one array": (TypeError, "update got 1 array; accepted: input, target, and options by keyword", lambda: of().update(X)),
    "no array": (TypeError, "update got 0 arrays; accepted: input, target, and", lambda: of().update()),
    "no first axis": (ValueError, "needs a first axis", lambda: of().update(X[0], X[0])),
    "no shape of a batch": (ValueError, r"input has shape \(3,\) and target \(4,\)", lambda: of().update(X, np.zeros(4))),
    "flag": (TypeError, "per_sample must be True or False, not 1", lambda: of(DICE, per_sample=1)),
    "no accumulator": (
        TypeError, "merge_state got a float; accepted: accumulators of the same loss and options", lambda: of().merge_state(1.0),
    ),
    "another loss": (ValueError, "merge_state got <Accumulator of mse_loss", lambda: of().merge_state(of(fl.mse_loss))),
    "other options": (
        ValueError, "with {'pos_weight': 2}; this is <Accumulator of binary", lambda: of().merge_state(of(pos_weight=2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case):
    error, message, make = WRONG[case]
    with pytest.raises(error, match=message):
        make()


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors(rng):
    torch = pytest.importorskip("torch")
    z, t, w, mask = data(rng, shape=(8, 3, 40, 50))
    want = accumulated(BCE, [[z, t, w, mask]], names=("weight", "mask"))
    total = fl.Accumulator(BCE)
    for part in batches([z, t, w, mask], (3,)):
        x, y, weight, counted = map(torch.from_numpy, part)
        total.update(x.requires_grad_(), y, weight=weight, mask=counted)
    assert total._sums == want._sums
    half = fl.Accumulator(fl.mse_loss)
    half.update(torch.full((100_000, 4), 200, dtype=torch.float16), torch.zeros((100_000, 4), dtype=torch.float16))
    assert half.compute() == 40_000
