"""Dask arrays: results of any blocks, what is computed when, errors, worker processes."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest

import fastloss as fl
from tests.test_accumulator import data
from tests.test_threads import run_python
from tests.ulp import SUM, assert_close

dask = pytest.importorskip("dask")
import dask.array as da  # noqa: E402 (after the check that it is installed)

BCE, DICE, DICE_BCE = fl.binary_cross_entropy_with_logits, fl.dice_with_logits_loss, fl.dice_bce_with_logits_loss
SHAPE = (13, 3, 9, 11)
CHUNKS = [(13,), (4, 4, 4, 1), (1,) * 13, (2, 0, 11)]  # along the first axis


@fl.elementwise_loss
def cubic(z, t, steepness=1.0):
    d = z - t
    return steepness * d * d * d, 3.0 * steepness * d * d


def cut(x, along=(4, 4, 4, 1)):
    """Return a Dask array whose blocks have these lengths along the first axis."""
    return da.from_array(x, chunks=(along, *[(n,) for n in x.shape[1:]]))


def flat(results):
    """Return the arrays in nested tuples."""
    return [x for part in results for x in flat(part)] if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("along", CHUNKS[1::2], ids=str)
def test_every_loss(row, along, rng, dtype):
    operands = row.draw(rng, dtype, SHAPE)
    lazy = [cut(x, along) for x in operands]
    for reduction in row.reductions or (None,):
        options = {} if reduction is None else {"reduction": reduction}
        got, want = dask.compute(row.loss.value_and_grad(*lazy, **options))[0], row.loss.value_and_grad(*operands, **options)
        for x, y in zip(flat(got[0]), flat(want[0]), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert_close(x, y, SUM[dtype])
        for x, y in zip(flat(got[1]), flat(want[1]), strict=True):
            np.testing.assert_array_equal(x, y)
        for x, y in zip(flat(row.loss(*lazy, **options)), flat(want[0]), strict=True):
            assert_close(x.compute(), y, SUM[dtype])


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [BCE, DICE, DICE_BCE], ids=lambda loss: loss.__name__)
def test_any_blocks_give_the_bits_of_an_accumulator(loss, masked, reduction, rng):
    z, t, w, mask = data(rng, shape=SHAPE)
    total = fl.Accumulator(loss, reduction=reduction)
    total.update(z, t, weight=w, mask=mask if masked else None)
    values, gradients = [], []
    for along in CHUNKS:
        options = {"reduction": reduction, "mask": cut(mask, along) if masked else None}
        value, grad = dask.compute(*loss.value_and_grad(cut(z, along), cut(t, along), cut(w, along), **options))
        values += [value, loss(cut(z, along), cut(t, along), cut(w, along), **options).compute()]
        gradients.append(grad)
    assert set(map(float, values)) == {float(total.compute())}
    for grad in gradients:
        np.testing.assert_array_equal(grad, loss.grad(z, t, w, reduction=reduction, mask=mask if masked else None))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean", "sample_mean", "sample_sum"])
def test_options(reduction, rng):
    z, t, w, mask = data(rng, shape=SHAPE)
    t[rng.random(SHAPE) < 0.1] = 0.5
    channel = rng.random((3, 1, 1)).astype(np.float32)
    upstream = {"none": t, "sample_mean": w[:, 0, 0, 0], "sample_sum": w[:, 0, 0, 0]}.get(reduction, np.float32(0.5))
    cases = [
        {"weight": channel, "pos_weight": channel, "label_smoothing": 0.1},
        {"mask": mask, "ignore_index": 0.5},
        {"mask": mask[:1], "weight": w[:, :1]},
        {"mask": mask[0, 0], "weight": w[:, :1, :1, :1], "validate": True},
        {"grad_output": upstream, "mask": mask},
        {"grad_output": upstream},
    ]
    for options in cases:
        lazy = {name: cut(x) if np.shape(x)[:1] == SHAPE[:1] else x for name, x in options.items()}
        others = {name: da.from_array(x) if np.ndim(x) and not isinstance(x, da.Array) else x for name, x in lazy.items()}
        want, curvature = BCE.grad(z, t, reduction=reduction, **options), BCE.curvature(z, t, reduction=reduction, **options)
        for given in (lazy, others):
            np.testing.assert_array_equal(BCE.grad(cut(z), cut(t), reduction=reduction, **given), want)
            np.testing.assert_array_equal(BCE.curvature(cut(z), cut(t), reduction=reduction, **given), curvature)


def test_upstream_gradients_that_are_lazy_numbers(rng):
    z, t, _, mask = data(rng, shape=SHAPE)
    upstream = da.from_array(np.float64(2.0))
    for options in ({}, {"mask": cut(mask)}):
        got = BCE.grad(cut(z), cut(t), grad_output=upstream, **options)
        np.testing.assert_array_equal(got, BCE.grad(z, t, grad_output=2.0, mask=mask if options else None))


@pytest.mark.parametrize("options", [{"per_channel": False}, {"smooth": 0.5}, {}], ids=str)
@pytest.mark.parametrize("loss", [DICE, DICE_BCE], ids=lambda loss: loss.__name__)
def test_a_data_set_that_is_one_image(loss, options, rng):
    z, t, w, mask = data(rng, shape=SHAPE)
    for reduction in ("mean", "sum", "none"):
        if reduction == "none" and loss is DICE_BCE:
            continue
        given = {"reduction": reduction, "per_sample": False, **options}
        got = dask.compute(*loss.value_and_grad(cut(z), cut(t), cut(w), mask=cut(mask), **given))
        want = loss.value_and_grad(z, t, w, mask=mask, **given)
        assert_close(got[0], want[0], SUM[z.dtype])
        assert_close(got[1], want[1], SUM[z.dtype])


def test_integer_targets_own_losses_and_quantities_of_the_target(rng):
    z, t, _, _ = data(rng, shape=SHAPE)
    images = (255 * t).astype(np.uint8)
    got = dask.compute(*BCE.value_and_grad(cut(z), cut(images), target_scale=1 / 255))
    want = BCE.value_and_grad(z, images, target_scale=1 / 255)
    assert_close(got[0], want[0], SUM[z.dtype])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(cubic.grad(cut(z), cut(t), steepness=2.0), cubic.grad(z, t, steepness=2.0))
    assert_close(fl.binary_entropy(cut(t)).compute(), fl.binary_entropy(t), SUM[z.dtype])
    np.testing.assert_array_equal(BCE.grad(cut(z), t), BCE.grad(z, t))  # a NumPy array beside Dask's


def classes(rng, shape):
    """Return logits of classes, class indices, of which some are ignored, and options by name."""
    z, entries = (3 * rng.standard_normal(shape)).astype(np.float32), (shape[0], *shape[2:])
    t = rng.integers(0, shape[1], entries).astype(np.uint8)
    y = rng.dirichlet(np.ones(shape[1]), entries).astype(np.float32)
    weight, own = rng.uniform(0.5, 2, shape[1]).astype(np.float32), rng.random(entries).astype(np.float32)
    options = {
        "none": {},
        "ignored": {"ignore_index": 0, "weight": weight},
        "excluded": {"mask": rng.random(entries) < 0.7, "pixel_weight": own},
        "the same for all samples": {"mask": rng.random(entries[1:]) < 0.7, "pixel_weight": own[:1], "label_smoothing": 0.1},
        "probabilities": {"target": np.moveaxis(y, -1, 1).copy(), "weight": weight},
    }
    return z, t, options


@pytest.mark.parametrize("case", ["none", "ignored", "excluded", "the same for all samples", "probabilities"])
@pytest.mark.parametrize(
    ("shape", "reduction"),
    [
        *(((13, 5, 9, 11), reduction) for reduction in ("mean", "sum", "none", "batchmean", "sample_mean", "sample_sum")),
        ((13, 13), "mean"),  # as many classes as samples
    ],
    ids=str,
)
def test_losses_of_classes(case, reduction, shape, rng):
    z, t, options = classes(rng, shape)
    given = {"target": t, "reduction": reduction, **options[case]}
    values = fl.cross_entropy(z, t, reduction=reduction)
    if case != "none" and np.ndim(values) in (1, t.ndim):
        given["grad_output"] = rng.random(np.shape(values)).astype(np.float32)
    lazy = {name: cut(x) if np.shape(x)[:1] == (13,) and name != "weight" else x for name, x in given.items()}
    want = fl.cross_entropy.value_and_grad(z, **given)
    got = fl.cross_entropy.value_and_grad(cut(z), **lazy)
    assert (got[0].shape, got[0].dtype) == (np.shape(want[0]), np.asarray(want[0]).dtype)
    assert (got[1].chunks, got[1].dtype) == (cut(z).chunks, z.dtype)
    value, grad = dask.compute(*got)
    assert_close(value, want[0], SUM[z.dtype])
    np.testing.assert_array_equal(grad, want[1])
    lazy.pop("grad_output", None)
    np.testing.assert_array_equal(fl.cross_entropy(cut(z), **lazy), value)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("loss", [fl.cross_entropy, fl.focal_cross_entropy_loss], ids=lambda loss: loss.__name__)
def test_any_blocks_of_classes_give_the_bits_of_an_accumulator(loss, reduction, rng):
    z, t, options = classes(rng, (13, 5, 9, 11))
    given = options["ignored"]
    total = fl.Accumulator(loss, reduction=reduction, **given)
    total.update(z, t)
    values = [loss(cut(z, along), cut(t, along), reduction=reduction, **given).compute() for along in CHUNKS]
    values += [loss.value_and_grad(cut(z, along), cut(t, along), reduction=reduction, **given)[0].compute() for along in CHUNKS]
    assert set(map(float, values)) == {float(total.compute())}


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("loss", [fl.dice_softmax_loss, fl.dice_cross_entropy_loss], ids=lambda loss: loss.__name__)
def test_regions_of_classes(loss, per_sample, rng):
    z, t, options = classes(rng, (13, 5, 9, 11))
    given = {**options["ignored"], **options["excluded"], "per_sample": per_sample}
    lazy = {name: cut(x) if np.shape(x)[:1] == (13,) else x for name, x in given.items()}
    of_samples = ("sample_mean",) if per_sample else ()
    for reduction in ("mean", "sum", "batchmean", *of_samples, *(("none",) if loss is fl.dice_softmax_loss else ())):
        got = dask.compute(*loss.value_and_grad(cut(z), cut(t), reduction=reduction, **lazy))
        want = loss.value_and_grad(z, t, reduction=reduction, **given)
        assert_close(got[0], want[0], SUM[z.dtype])
        assert_close(got[1], want[1], SUM[z.dtype])


def test_wrong_use_of_losses_of_classes(rng):
    z, t, _ = classes(rng, (13, 5, 9, 11))
    x, y = cut(z), cut(t)
    wrong = [
        ("chunks ((13,), (3, 2), (9,), (11,)); accepted: a first axis, along which alone it is cut (input.rechunk(('auto', -1, -1, -1)))",
         lambda: fl.cross_entropy(x.rechunk((13, 3, 9, 11)), y)),
        ("input has shape (5,), a single sample; accepted for Dask arrays: (N, C, ...)",
         lambda: fl.cross_entropy(x[0, :, 0, 0], y[0, 0, 0])),
        ("target (13, 9, 10); accepted as targets: class indices", lambda: fl.cross_entropy(x, y[..., 1:])),
        ("weight has shape (13,); accepted: (5,), a weight for each class", lambda: fl.cross_entropy(x, y, weight=np.ones(13))),
        ("mask has shape", lambda: fl.cross_entropy(x, y, mask=x > 0)),
        ("grad_output has shape (0, 9); with reduction 'none' the loss has shape (0, 9, 11)",  # checked without samples
         lambda: fl.cross_entropy.grad(x, y, reduction="none", grad_output=np.ones((13, 9), np.float32))),
        ("out is not supported for Dask arrays", lambda: fl.cross_entropy.grad(x, y, out=z)),
    ]  # fmt: skip
    for message, call in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.warns(da.PerformanceWarning, match=r"^target has chunks .* and is rechunked to .*, those of input$"):
        fl.cross_entropy(x, cut(t, (6, 7)))
    value = fl.cross_entropy(x, cut(np.where(np.arange(t.size).reshape(t.shape) == 4 * 99 + 2, 5, 0)))
    with pytest.raises(ValueError, match=r"target\[0, 0, 2\] is 5; accepted: class indices from 0 to 4"):  # in its block
        value.compute()


class Source:
    """An array that counts how often each of its parts is read."""

    def __init__(self, x):
        self.x, self.reads, self.lock = x, 0, threading.Lock()
        self.shape, self.dtype, self.ndim = x.shape, x.dtype, x.ndim

    def __getitem__(self, index):
        part = self.x[index]
        with self.lock:
            self.reads += len(part)
        return part

    def lazy(self):
        return da.from_array(self, chunks=(4, *self.shape[1:]), meta=np.empty((0,) * self.ndim, self.dtype))


@pytest.mark.parametrize(("masked", "reads"), [(False, 1), (True, 2)])
def test_nothing_is_read_before_it_is_computed_and_each_block_as_often_as_needed(masked, reads, rng):
    z, t, _, mask = data(rng, shape=SHAPE)
    source = Source(z)
    options = {"mask": cut(mask)} if masked else {}
    value, grad = BCE.value_and_grad(source.lazy(), cut(t), **options)
    assert isinstance(value, da.Array)
    assert isinstance(grad, da.Array)
    assert (value.shape, value.dtype, grad.chunks, grad.dtype) == ((), np.float64, cut(z).chunks, z.dtype)
    assert source.reads == 0
    dask.compute(value, grad)
    # the gradient's own pass reads a block from the first, if Dask keeps it, or from the source again
    assert len(z) <= source.reads <= reads * len(z)


@pytest.mark.parametrize(("options", "reads"), [({}, 1), ({"ignore_index": 1}, 2)], ids=str)
def test_class_indices_that_cannot_be_ignored_are_read_once(options, reads, rng):
    z, t, _ = classes(rng, SHAPE)
    source = Source(z)
    dask.compute(*fl.cross_entropy.value_and_grad(source.lazy(), cut(t), **options))  # no uint8 is -100, the default of ignore_index
    assert len(z) <= source.reads <= reads * len(z)


def test_other_chunks_are_rechunked_with_a_warning_that_names_this_file(rng):
    z, t, _, mask = data(rng, shape=SHAPE)
    with pytest.warns(da.PerformanceWarning, match=r"^target has chunks .* and is rechunked to .*, those of input$") as caught:
        grad = BCE.grad(cut(z), cut(t, (6, 7)))
    assert [warning.filename for warning in caught] == [__file__]
    np.testing.assert_array_equal(grad, BCE.grad(z, t))
    with pytest.warns(da.PerformanceWarning, match="^mask has chunks"):
        BCE.grad(cut(z), cut(t), mask=cut(mask, (6, 7)))


def test_arguments_are_checked_before_anything_is_computed(rng):
    z, t, _, _ = data(rng, shape=SHAPE)
    x, y = cut(z), cut(t)
    wrong = [
        (TypeError, "unknown option wieght", lambda: BCE(x, y, wieght=t)),
        (ValueError, "reduction 'median' is unknown", lambda: BCE(x, y, reduction="median")),
        (ValueError, "input has shape (13, 3, 9, 11) and target (12, 3, 9, 11); they must be equal", lambda: BCE(x, y[:12])),
        (TypeError, "target is a builtins.list, but the input is a dask.array.Array; accepted: Dask and NumPy", lambda: BCE(x, [1.0])),
        (ValueError, "out is not supported for Dask arrays", lambda: BCE.grad(x, y, out=np.empty_like(z))),
        (ValueError, "out is not supported", lambda: fl.vae_loss.value_and_grad(x, y, x, y, out=(z, z, z))),
        (TypeError, "input has dtype int64; accepted: float16", lambda: BCE(x.astype(int), y)),
        (TypeError, "mask has dtype float32; accepted: bool", lambda: BCE(x, y, mask=y)),
        (ValueError, "weight has shape (5,), which does not broadcast", lambda: BCE(x, y, weight=np.ones(5))),
        (ValueError, "smooth is -1", lambda: DICE(x, y, smooth=-1)),
        (ValueError, "grad_output", lambda: BCE.grad(x, y, grad_output=np.ones(13))),
        (
            ValueError,
            "chunks ((13,), (1, 1, 1), (9,), (11,)); accepted: a first axis, along which alone it is cut "
            "(input.rechunk(('auto', -1, -1, -1)))",
            lambda: BCE(x.rechunk((13, 1, 9, 11)), y),
        ),
        (ValueError, "input has chunks of unknown lengths; accepted: known lengths", lambda: BCE(x[x[:, 0, 0, 0] > 0], y)),
        (TypeError, "target is a dask.array.core.Array; accepted: numpy.ndarray, or dask", lambda: BCE(z, y)),
        (TypeError, "input is a Array of Dask; accepted: call the loss itself", lambda: fl.Accumulator(BCE).update(x, y)),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_bad_elements_are_found_when_they_are_computed(rng):
    z, t, _, _ = data(rng, shape=SHAPE)
    t[7, 1, 2, 3] = 1.5
    value = BCE(cut(z), cut(t), validate=True)
    with pytest.raises(ValueError, match=r"target\[3, 1, 2, 3\] is 1\.5"):  # in its block
        value.compute()


WORKERS = """
import os, signal, sys, threading, time
import dask, dask.array as da, numpy as np, fastloss as fl
from distributed import Client, LocalCluster

def slow(x):
    time.sleep(0.2)
    return x

if __name__ == "__main__":
    dask.config.set({"distributed.logging.distributed": "critical"})
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((24, 3, 20, 31), dtype=np.float32), rng.random((24, 3, 20, 31), dtype=np.float32)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, Client(cluster) as client:
        for along in (24, 5, 1):
            lazy = [da.from_array(x, chunks=(along, 3, 20, 31)).map_blocks(slow, dtype=x.dtype) for x in (z, t)]
            loss = fl.binary_cross_entropy_with_logits.value_and_grad(*lazy, mask=lazy[1] > 0.25)
            futures = client.compute(loss)
            if along == 1:
                time.sleep(2)
                os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
            value, grad = client.gather(futures)
            want = fl.binary_cross_entropy_with_logits.grad(z, t, mask=t > 0.25)
            print(value.hex(), np.array_equal(grad, want))
"""


@pytest.mark.slow
def test_two_worker_processes_one_of_which_is_killed(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    lines = run_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')").splitlines()
    values, equal = zip(*(line.split() for line in lines), strict=True)
    assert len(values) == 3
    assert len(set(values)) == 1
    assert set(equal) == {"True"}
