"""Arrays of any shape and strides give the results of a contiguous copy, and no memory outside them is touched."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")  # which a machine with a GPU may lack

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastloss as fl
from tests.devices import is_long_on_the_stand_in, only_on
from tests.ulp import SUM, assert_close, assert_same, flat

pytestmark = pytest.mark.usefixtures("device")

LOSS = fl.binary_cross_entropy_with_logits

VIEWS = {
    "contiguous": lambda a: a,
    "channels last": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "fortran": np.asfortranarray,
    "flipped": lambda a: np.ascontiguousarray(a[:, ::-1, ::-1])[:, ::-1, ::-1],
    "flipped batch": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "every second": lambda a: a.repeat(2, axis=3)[..., ::2],
    "cropped": lambda a: np.pad(a, ((0, 0), (0, 0), (2, 3), (5, 1)))[:, :, 2:-3, 5:-1],
    "off by one element": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
}


@pytest.mark.parametrize("target_view", VIEWS)
@pytest.mark.parametrize("input_view", VIEWS)
def test_views(input_view, target_view, rng):
    z, t = rng.normal(0, 3, (3, 2, 9, 37)).astype(np.float32), rng.random((3, 2, 9, 37)).astype(np.float32)
    a, b = VIEWS[input_view](z), VIEWS[target_view](t)
    assert (a.shape, b.shape) == (z.shape, t.shape)
    want, want_grad = LOSS.value_and_grad(z, t)
    value, grad = LOSS.value_and_grad(a, b)
    assert_close(value, want, SUM[z.dtype])
    np.testing.assert_array_equal(grad, want_grad)
    sums, _ = LOSS.value_and_grad(a, b, reduction="sample_sum")
    assert_close(sums, LOSS(z, t, reduction="sample_sum"), SUM[z.dtype])
    overwritten = VIEWS[input_view](z.copy())
    LOSS.grad(overwritten, b, out=overwritten)
    np.testing.assert_array_equal(overwritten, want_grad)


@only_on("cpu", reason="gradients copied back to the host lose their strides; test_device.py checks them on the device")
def test_two_arrays_in_the_same_odd_order_are_walked_in_memory_order(rng):
    z = VIEWS["channels last"](rng.normal(0, 3, (3, 5, 9, 37)))
    value, grad = LOSS.value_and_grad(z, (z > 0).astype(np.float64))
    assert grad.strides == z.strides
    assert value > 0


@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 1), (7,), (1, 9, 1), (3, 1, 5), (31,), (32,), (33,), (65, 2), (4095,), (4097,), (140000,), (3, 66001)]
)
def test_shapes(shape, dtype, rng):
    z, t = rng.normal(0, 3, shape).astype(dtype), rng.random(shape).astype(dtype)
    value, grad = LOSS.value_and_grad(z, t, reduction="sum")
    each, each_grad = (
        np.array([f(z.reshape(-1)[k : k + 1], t.reshape(-1)[k : k + 1])[0] for k in range(0, z.size, 97)]) for f in (_value, LOSS.grad)
    )
    np.testing.assert_array_equal(LOSS(z, t, reduction="none").reshape(-1)[::97], each)
    np.testing.assert_array_equal(grad.reshape(-1)[::97], each_grad)
    assert_close(value, LOSS(z, t, reduction="none").sum(dtype=np.longdouble), SUM[np.dtype(dtype)])
    assert grad.shape == shape


def _value(z, t):
    return LOSS(z, t, reduction="none")


@pytest.mark.parametrize("n", [5, 31, 64, 100, 2500])
def test_nothing_outside_the_output_is_written(n, dtype, rng):
    z, t = rng.normal(0, 3, n).astype(dtype), rng.random(n).astype(dtype)
    for offset in range(5):
        buffer = np.full(n + 64, 7, dtype)
        out = buffer[offset + 9 : offset + 9 + n]
        LOSS.grad(z, t, out=out)
        np.testing.assert_array_equal(out, LOSS.grad(z, t))
        buffer[offset + 9 : offset + 9 + n] = 7
        assert (buffer == 7).all()


def test_nothing_outside_the_inputs_is_read(tmp_path, rng):
    """Arrays that end where their memory does: a read past the end would be a bus error."""
    n = 4096 // 4 - 5
    (tmp_path / "z").write_bytes(rng.normal(0, 3, 1024).astype(np.float32).tobytes())
    z = np.memmap(tmp_path / "z", np.float32, "r")[5:]
    assert z.size == n
    t = np.zeros(n, np.float32)
    assert LOSS(z, t) == LOSS(np.array(z), t)
    value, grad = LOSS.value_and_grad(z, t)
    assert type(grad) is np.ndarray
    assert value == LOSS(z, t)


@pytest.mark.alike
def test_read_only_and_memory_mapped_arrays(row, rng, dtype, tmp_path):
    arrays = row.draw(rng, dtype, (4, 3, 5, 7))
    weight, mask = rng.random(row.entries((4, 3, 5, 7))[1:]), rng.random((5, 7)) < 0.5
    options = {row.entry_weight: weight, "mask": mask}
    want, want_grads = row.loss.value_and_grad(*arrays, **options)
    first = arrays[0]
    first.tofile(tmp_path / "first")
    arrays[0] = np.memmap(tmp_path / "first", dtype, "r+", shape=first.shape)
    for array in (*arrays[1:], weight, mask):
        array.flags.writeable = False
    value, grads = row.loss.value_and_grad(*arrays, **options)
    assert_same(flat(value, grads), flat(want, want_grads))
    buffers = [arrays[0], *(np.empty_like(arrays[k]) for k in row.gradients[1:])]
    assert flat(row.loss.grad(*arrays, **options, out=row.out(buffers)))[0] is arrays[0]
    np.testing.assert_array_equal(arrays[0], flat(want_grads)[0])


def test_read_only_parameters_are_read(rng):
    z, t, w = (rng.random((5, 7)) for _ in range(3))
    m = rng.random((5, 7)) < 0.5
    want = LOSS.value_and_grad(z, t, w, mask=m, pos_weight=w)
    for array in (z, t, w, m):
        array.flags.writeable = False
    assert_same(LOSS.value_and_grad(z, t, w, mask=m, pos_weight=w), want)


@is_long_on_the_stand_in
@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 4, (1 << 20) + 1])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_large_outputs_of_any_alignment(size, offset, rng):
    """Outputs of 4 MiB or more are stored past the caches if their alignment allows it."""
    z, t = rng.normal(0, 3, size).astype(np.float32), rng.random(size).astype(np.float32)
    memory = np.full(size + 24, 7, np.float32)
    out = memory[-memory.ctypes.data % 64 // 4 :][: size + 8]  # starts at a cache line
    LOSS.grad(z, t, out=out[offset : offset + size])
    step = 1 << 15
    for start in range(0, size, step):
        part = LOSS.grad(z[start : start + step], t[start : start + step], reduction="sum", grad_output=1 / size)
        np.testing.assert_array_equal(out[offset + start : offset + start + step][: part.size], part)
    assert (out[:offset] == 7).all()
    assert (out[offset + size :] == 7).all()


@is_long_on_the_stand_in
@pytest.mark.parametrize("offset", range(8))
def test_large_outputs_walked_backwards(offset, rng):
    size = (1 << 20) + 1
    z, t = rng.normal(0, 3, size).astype(np.float32), rng.random(size).astype(np.float32)
    memory = np.full(size + 8, 7, np.float32)
    out = memory[offset : offset + size][::-1]
    LOSS.grad(z[::-1], t[::-1], out=out)
    np.testing.assert_array_equal(out[::-1], LOSS.grad(z, t))
    assert (memory[:offset] == 7).all()
    assert (memory[offset + size :] == 7).all()


@is_long_on_the_stand_in
def test_large_samples_and_rows_of_odd_length(rng):
    z, t = rng.normal(0, 3, (3, 400_001)).astype(np.float32), rng.random((3, 400_001)).astype(np.float32)
    value, grad = LOSS.value_and_grad(z, t, reduction="sample_mean")
    wide = np.zeros((3, 400_004), np.float32)
    again, _ = LOSS.value_and_grad(z, t, reduction="sample_mean", out=wide[:, :-3])
    np.testing.assert_array_equal(again, value)
    np.testing.assert_array_equal(wide[:, :-3], grad)
    assert not wide[:, -3:].any()
    for k in range(3):
        assert_close(value[k], LOSS(z[k], t[k]), SUM[z.dtype])
        np.testing.assert_array_equal(grad[k], LOSS.grad(z[k], t[k]))


@is_long_on_the_stand_in
def test_large_rows_of_an_output_with_gaps(rng):
    """Each row has whole cache lines, but the next row begins one element after a cache line."""
    z, t = rng.normal(0, 3, (4, 1 << 18)).astype(np.float32), rng.random((4, 1 << 18)).astype(np.float32)
    for gap in (1, 4, 16):
        memory = np.full((4, (1 << 18) + gap), 7, np.float32)
        LOSS.grad(z, t, out=memory[:, :-gap])
        np.testing.assert_array_equal(memory[:, :-gap], LOSS.grad(z, t))
        assert (memory[:, -gap:] == 7).all()


@st.composite
def views(draw):
    """Draw a layout of a view of four axes in a larger array, with permuted, cropped, strided and reversed axes."""
    order = draw(st.permutations(range(4)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, -1, -2]), min_size=4, max_size=4))
    before = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    return order, steps, before


def lay_out(values, order, steps, before):
    """Return a view with the given memory layout that holds the values."""
    sizes = [n * abs(step) + b for n, step, b in zip(values.shape, steps, before, strict=True)]
    memory = np.zeros([sizes[k] for k in order], values.dtype).transpose(np.argsort(order))
    view = memory[tuple(slice(b, b + n * abs(s), abs(s)) for n, s, b in zip(values.shape, steps, before, strict=True))]
    view = view[tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]
    view[...] = values
    return view


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=st.lists(st.integers(1, 9), min_size=4, max_size=4), data=st.data())
def test_any_strides(shape, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    z, t, w = rng.normal(0, 3, shape), rng.random(shape), rng.random(shape)
    layouts = [data.draw(views()) for _ in range(4)]
    a, b, c, out = (lay_out(x, *layout) for x, layout in zip((z, t, w, np.zeros(shape)), layouts, strict=True))
    want, want_grad = fl.mse_loss.value_and_grad(z, t, w)
    value, grad = fl.mse_loss.value_and_grad(a, b, c, out=out)
    assert grad is out
    assert_close(value, want, SUM[z.dtype])
    np.testing.assert_array_equal(out, want_grad)


def test_broadcast_input_is_read_through_its_strides(rng):
    t = rng.random((5, 6, 7))
    z = np.broadcast_to(rng.normal(size=(6, 1)), t.shape)
    value, grad = LOSS.value_and_grad(z, t)
    want, want_grad = LOSS.value_and_grad(z.copy(), t)
    assert_close(value, want, SUM[t.dtype])
    np.testing.assert_array_equal(grad, want_grad)


@only_on("cpu", reason="takes a minute on the stand-in; test_gpu.py tests as many elements")
def test_more_elements_than_32_bits_can_count():
    """Use a broadcast view, because its 2**32 + 5 elements take the memory of one."""
    n = (1 << 32) + 5
    z, t = np.broadcast_to(np.float32(3), n), np.broadcast_to(np.uint8(1), n)
    assert fl.mse_loss(z, t, reduction="sum") == 4.0 * n
    assert fl.mse_loss(z, t) == 4.0


SHORT_ROWS = {  # shape of the input, and of the array that broadcasts along rows of a few elements
    "per channel, channels last": ((50, 40, 3), (3,)),
    "per sample of a few": ((4000, 10), (4000, 1)),
    "per pixel of a tiny image": ((300, 5, 4), (5, 1)),
    "per row and column": ((7, 900, 3), (7, 1, 3)),
    "longer than a step": ((30, 31), (31,)),
    "no short run": ((40, 33), (33,)),
}


@pytest.mark.alike("stand-in")
@pytest.mark.parametrize("case", SHORT_ROWS)
@pytest.mark.parametrize("reduction", ["sum", "sample_sum"])
def test_short_rows_are_joined(case, reduction, dtype, rng):
    shape, small = SHORT_ROWS[case]
    z, t = rng.normal(0, 3, shape).astype(dtype), rng.random(shape).astype(dtype)
    weight, mask, c = rng.random(small).astype(dtype), rng.random(small) < 0.7, rng.uniform(0.5, 2, small)
    value, grad = LOSS.value_and_grad(z, t, weight, reduction, mask=mask, pos_weight=c)
    full = [np.broadcast_to(x, shape).copy() for x in (weight, mask, c)]
    want, want_grad = LOSS.value_and_grad(z, t, full[0], reduction, mask=full[1], pos_weight=full[2])
    assert_close(value, want, SUM[np.dtype(dtype)])
    np.testing.assert_array_equal(grad, want_grad)


ORDERS = {
    "samples first": lambda x: x,
    "samples last": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, axis=0)[::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "reversed elements": lambda x: x[:, ::-1].copy()[:, ::-1],
    "channels last": lambda x: np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1500, 3, 5), (67, 2, 1), (1, 4, 8)])
def test_short_groups_in_any_memory_order(order, shape, dtype, rng):
    """Sums of short samples, and their gradients with a scale for each, are those of the samples alone."""
    z, t, weight = (3 * rng.standard_normal(shape)).astype(dtype), rng.random(shape).astype(dtype), rng.random(shape[2]).astype(dtype)
    mask, upstream = rng.random(shape) < 0.7, rng.random(shape[0])
    arrays = {"input": z, "target": t, "mask": mask, "out": np.empty_like(z)}
    given = {name: ORDERS[order](x) for name, x in arrays.items()}
    value, grad = LOSS.value_and_grad(**given, weight=weight, reduction="sample_sum", grad_output=upstream)
    for k in range(len(z)):
        one = LOSS.value_and_grad(z[k], t[k], weight, "sum", mask=mask[k], grad_output=upstream[k])
        assert_close(value[k], one[0], SUM[np.dtype(dtype)])
        np.testing.assert_array_equal(grad[k], one[1])
    np.testing.assert_array_equal(LOSS(given["input"], given["target"], weight, "sample_sum", mask=given["mask"]), value)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 31])
def test_narrow_crops_are_read_and_written(width, rng):
    z, t = rng.normal(0, 3, (600, 40)).astype(np.float32), rng.random((600, width)).astype(np.float32)
    out = np.full((600, 50), 7, np.float32)
    LOSS.grad(z[:, 3 : 3 + width], t, out=out[:, 5 : 5 + width])
    np.testing.assert_array_equal(out[:, 5 : 5 + width], LOSS.grad(z[:, 3 : 3 + width].copy(), t))
    out[:, 5 : 5 + width] = 7
    assert (out == 7).all()


@is_long_on_the_stand_in
def test_large_short_rows_with_nontemporal_stores(rng):
    """Rows with a short inner axis are stored past the caches and cut into ranges inside that axis."""
    z, t = rng.normal(0, 3, (700_001, 3)).astype(np.float32), rng.random((700_001, 3)).astype(np.float32)
    weight = np.float32([1, 2, 0.5])
    value, grad = LOSS.value_and_grad(z, t, weight)
    want, want_grad = LOSS.value_and_grad(z, t, np.ascontiguousarray(np.broadcast_to(weight, z.shape)))
    assert_close(value, want, SUM[z.dtype])
    np.testing.assert_array_equal(grad, want_grad)
