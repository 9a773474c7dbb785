"""Bad input raises the right error, with a message that names the found and the accepted values, and writes nothing."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys

import numpy as np
import pytest

import fastloss as fl

LOSS = fl.binary_cross_entropy_with_logits
F4 = np.dtype(np.float32)


def arrays(shape=(2, 3), dtype=np.float32):
    return np.full(shape, 0.5, dtype), np.full(shape, 0.25, dtype)


Z, T = arrays()
READ_ONLY = np.zeros((2, 3), np.float32)
READ_ONLY.flags.writeable = False

CASES = {
    "shapes": (ValueError, "input has shape (2, 3) and target (3,); they must be equal", (Z, T[0]), {}),
    "target of another rank": (ValueError, "input has shape (2, 3) and target (2, 3, 1)", (Z, T[..., None]), {}),
    "reduction": (
        ValueError,
        "reduction 'avg' is unknown; accepted: 'mean', 'sum', 'none', 'batchmean', 'sample_mean', 'sample_sum'",
        (Z, T),
        {"reduction": "avg"},
    ),
    "reduction without an axis": (ValueError, "reduction 'sample_mean' needs a first axis", (1.0, 0.0), {"reduction": "sample_mean"}),
    "integer input": (TypeError, "input has dtype int64; accepted: float16, bfloat16, float32, float64", (np.zeros((2, 3), int), T), {}),
    "complex target": (
        TypeError,
        "target has dtype complex128; accepted: float16, bfloat16, float32, float64, bool, int8",
        (Z, T.astype(complex)),
        {},
    ),
    "byte order": (TypeError, "input has non-native byte order (>f4); convert it with .astype('float32')", (Z.astype(">f4"), T), {}),
    "masked array": (
        TypeError,
        "input is a masked array, whose mask would be lost; pass input.data, and mask=~input.mask",
        (np.ma.array(Z), T),
        {},
    ),
    "mask dtype": (TypeError, "mask has dtype uint8; accepted: bool", (Z, T), {"mask": np.ones((2, 3), np.uint8)}),
    "mask shape": (
        ValueError,
        "mask has shape (2,), which does not broadcast to the input's shape (2, 3)",
        (Z, T),
        {"mask": np.ones(2, bool)},
    ),
    "weight shape": (
        ValueError,
        "weight has shape (4, 3), which does not broadcast to the input's shape (2, 3)",
        (Z, T, np.ones((4, 3))),
        {},
    ),
    "weight of higher rank": (ValueError, "weight has shape (1, 2, 3), which does not broadcast", (Z, T, np.ones((1, 2, 3))), {}),
    "pos_weight shape": (ValueError, "pos_weight has shape (2,), which does not broadcast", (Z, T), {"pos_weight": np.ones(2)}),
    "pos_weight negative": (ValueError, "pos_weight is -1; accepted: 0 or more", (Z, T), {"pos_weight": -1}),
    "label_smoothing": (ValueError, "label_smoothing is 1.5; accepted: from 0 to 1", (Z, T), {"label_smoothing": 1.5}),
    "NaN parameter": (ValueError, "label_smoothing is nan; accepted: from 0 to 1", (Z, T), {"label_smoothing": float("nan")}),
    "parameter type": (TypeError, "label_smoothing must be a number, not 'some'", (Z, T), {"label_smoothing": "some"}),
    "option": (TypeError, "unknown option wieght; accepted: pos_weight, label_smoothing, weight, reduction, mask", (Z, T), {"wieght": Z}),
    "target_scale on floats": (
        ValueError,
        "target_scale multiplies integer targets, and target is float32: scale it before the call",
        (Z, T),
        {"target_scale": 1 / 255},
    ),
    "ignore_index infinite": (
        ValueError,
        "ignore_index is inf; accepted for uint8 targets: whole numbers",
        (Z, T.astype(np.uint8)),
        {"ignore_index": np.inf},
    ),
    "ignore_index type": (TypeError, "ignore_index must be a number, not [1, 2]", (Z, T), {"ignore_index": [1, 2]}),
    "number as text": (TypeError, "pos_weight must be a number, not '2'", (Z, T), {"pos_weight": "2"}),
    "reduction array": (ValueError, "reduction of type ndarray is unknown; accepted: 'mean'", (Z, T), {"reduction": Z}),
    "reduction type": (ValueError, "reduction ['mean'] is unknown", (Z, T), {"reduction": ["mean"]}),
    "ignore_index NaN": (
        ValueError,
        "ignore_index is NaN, which equals nothing; pass mask=~numpy.isnan(target)",
        (Z, T),
        {"ignore_index": float("nan")},
    ),
    "ignore_index fraction": (
        ValueError,
        "ignore_index is 0.5; accepted for uint8 targets: whole numbers",
        (Z, T.astype(np.uint8)),
        {"ignore_index": 0.5},
    ),
}
GRADIENT_CASES = {
    "out masked": (TypeError, "out must be a numpy.ndarray, not MaskedArray", {"out": np.ma.array(np.zeros((2, 3), F4))}),
    "grad_output dtype": (TypeError, "grad_output has dtype complex128", {"grad_output": np.ones(2, complex), "reduction": "sample_sum"}),
    "out type": (TypeError, "out must be a numpy.ndarray, not list", {"out": [0.0]}),
    "out shape": (
        ValueError,
        "out has shape (3, 2) and dtype float32; the result has shape (2, 3) and dtype float32",
        {"out": np.zeros((3, 2), F4)},
    ),
    "out dtype": (
        ValueError,
        "out has shape (2, 3) and dtype float64; the result has shape (2, 3) and dtype float32",
        {"out": np.zeros((2, 3))},
    ),
    "out read-only": (ValueError, "out is read-only", {"out": READ_ONLY}),
    "grad_output shape": (
        ValueError,
        "grad_output has shape (2,); with reduction 'mean' the loss has shape ()",
        {"grad_output": np.ones(2)},
    ),
    "grad_output per sample": (
        ValueError,
        "grad_output has shape (3,); with reduction 'sample_sum' the loss has shape (2,)",
        {"grad_output": np.ones(3), "reduction": "sample_sum"},
    ),
    "grad_output type": (TypeError, "grad_output must be a number, not 'x'", {"grad_output": "x"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["__call__", "grad", "value_and_grad", "curvature"])
def test_bad_input(case, method):
    error, message, args, options = CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        getattr(LOSS, method)(*args, **options)


@pytest.mark.parametrize("case", GRADIENT_CASES)
@pytest.mark.parametrize("method", ["grad", "value_and_grad", "curvature"])
def test_bad_input_of_gradients(case, method):
    error, message, options = GRADIENT_CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        getattr(LOSS, method)(Z, T, **options)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_written_before_an_error(case):
    error, _, args, options = CASES[case]
    out = np.full(np.shape(args[0]), 7, F4)
    with pytest.raises(error):
        LOSS.grad(*args, **options, out=out)
    assert (out == 7).all()


def test_calls_for_the_value_refuse_grad_output_and_out():
    with pytest.raises(ValueError, match="grad_output scales a gradient, and the value alone has none"):
        LOSS(Z, T, grad_output=2.0)
    with pytest.raises(ValueError, match="with reduction 'mean' the value is none; use grad or value_and_grad"):
        LOSS(Z, T, out=np.zeros_like(Z))


FOREIGN = [  # types of arrays, by their modules, and the message about them
    ("jaxlib._jax.ArrayImpl", "numpy.ndarray; pass numpy.from_dlpack({name}), and inside jax.jit call the loss through jax.pure_callback"),
    ("jax._src.core.Tracer", "numpy.ndarray; pass numpy.from_dlpack({name}), and inside jax.jit call the loss through jax.pure_callback"),
    (
        "dask.array.core.Array",
        "numpy.ndarray, or dask.array.Array if the input is one; pass {name}.compute(), or every array through dask.array.asarray",
    ),
    (
        "tensorflow.python.framework.ops.EagerTensor",
        "numpy.ndarray; pass {name}.numpy(), and inside tf.function call the loss through tf.numpy_function",
    ),
    ("torch.Tensor", "numpy.ndarray, or torch.Tensor if the input is one; pass {name}.numpy(force=True), or every array as a tensor"),
    ("cupy.ndarray", "numpy.ndarray, or cupy.ndarray if the input is one; pass cupy.asnumpy({name}), or every array through cupy.asarray"),
]


@pytest.mark.parametrize(("kind", "accepted"), FOREIGN, ids=[kind for kind, _ in FOREIGN])
def test_arrays_of_unsupported_libraries_are_refused(kind, accepted):
    module, _, name = kind.rpartition(".")
    array = type(name, (), {"__module__": module, "shape": Z.shape, "ndim": Z.ndim, "dtype": Z.dtype})()
    calls = [
        ("input", lambda: LOSS(array, T)),
        ("input", lambda: LOSS.grad(array, array)),
        ("target", lambda: LOSS.value_and_grad(Z, array)),
        ("weight", lambda: LOSS(Z, T, array)),
        ("mask", lambda: LOSS(Z, T, mask=array)),
        ("pos_weight", lambda: LOSS(Z, T, pos_weight=array)),
        ("target", lambda: fl.binary_entropy(array)),
        ("mu", lambda: fl.gaussian_kl_loss(array, Z)),
        ("input", lambda: fl.dice_with_logits_loss(array, T)),
        ("reconstruction_logits", lambda: fl.vae_loss(array, T, Z, T)),
        ("logvar", lambda: fl.vae_loss.value_and_grad(Z, T, Z, array)),
    ]
    for argument, call in calls:
        with pytest.raises(TypeError, match="^" + re.escape(f"{argument} is a {kind}; accepted: {accepted.format(name=argument)}") + "$"):
            call()


def test_arrays_of_jax_are_refused_with_a_conversion_that_works():
    jax = pytest.importorskip("jax")
    z, t = jax.numpy.asarray(Z), jax.numpy.asarray(T)
    with pytest.raises(TypeError, match=r"^input is a jaxlib\..*; pass numpy.from_dlpack\(input\)"):
        LOSS(z, t)
    assert LOSS(np.from_dlpack(z), np.from_dlpack(t)) == LOSS(Z, T)
    with pytest.raises(TypeError, match=r"^input is a jax\..*; .* inside jax.jit call the loss through jax.pure_callback"):
        jax.jit(lambda z, t: LOSS(z, t))(z, t)
    value = jax.ShapeDtypeStruct((), np.float32)
    callback = jax.jit(lambda z, t: jax.pure_callback(lambda *x: np.float32(LOSS(*map(np.from_dlpack, x))), value, z, t))
    assert callback(z, t) == np.float32(LOSS(Z, T))


@pytest.mark.parametrize(
    ("package", "module", "message"),
    [
        (
            "torch",
            "fastloss.torch",
            r"^fastloss.torch needs PyTorch, .*; pip install 'fastloss\[torch\]', .* --index-url https://download.pytorch.org/whl/cpu$",
        ),
        (
            "cupy",
            "fastloss.cuda",
            r"^losses of arrays on a GPU need CuPy, .*; pip install 'fastloss\[cuda13\]', or 'fastloss\[cuda12\]' for a driver of CUDA 12$",
        ),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(package, module, message, monkeypatch):
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fl, module.rpartition(".")[2], None, raising=False)  # puts the attribute back that an import sets
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        importlib.import_module(module)


@pytest.mark.usefixtures("device")
@pytest.mark.alike
@pytest.mark.rows("has_one_gradient", "pairs_elements")
def test_overlapping_out(row):
    loss = row.loss
    memory = np.linspace(0, 1, 30, dtype=np.float32)
    z, t = memory[:10].reshape(2, 5), memory[10:20].reshape(2, 5)
    before = memory.copy()
    overlaps = ((t, "target"), (memory[1:11], "input"), (memory[9::-1], "input"), (z[::-1], "input"), (memory[15:25], "target"))
    for out, other in ((out.reshape(2, 5), other) for out, other in overlaps):
        with pytest.raises(ValueError, match=f"out shares memory with {other}; accepted: memory of its own, or out=input itself"):
            loss.grad(z, t, out=out)
        np.testing.assert_array_equal(memory, before)
    weight = np.ones((2, 5), np.float32)
    with pytest.raises(ValueError, match="out shares memory with weight"):
        loss.grad(z, t, weight, out=weight)
    assert (weight == 1).all()


def test_same_elements_with_another_stride_on_an_axis_of_length_1():
    memory = np.linspace(0, 1, 6, dtype=np.float32)
    z = np.lib.stride_tricks.as_strided(memory, (1, 6), (24, 4))
    out = np.lib.stride_tricks.as_strided(memory, (1, 6), (400, 4))
    want = LOSS.grad(z.copy(), np.zeros_like(z))
    np.testing.assert_array_equal(LOSS.grad(z, np.zeros((1, 6), np.float32), out=out), want)


def test_a_nan_in_grad_output_is_propagated():
    assert np.isnan(LOSS.grad(Z, T, grad_output=float("nan"))).all()


def test_first_bad_target_in_a_long_row():
    t = np.zeros(3_000_000, np.float32)
    t[2_999_998] = 2
    with pytest.raises(ValueError, match=re.escape("target[2999998] is 2.0")):
        LOSS(t, t, validate=True)


def test_errors_of_entropy_name_the_target():
    with pytest.raises(TypeError, match="target has dtype complex128"):
        fl.binary_entropy(T.astype(complex))
    with pytest.raises(TypeError, match="binary_entropy has no gradient, and so no grad_output"):
        fl.binary_entropy(T, grad_output=2.0)
    assert list(inspect.signature(fl.binary_entropy).parameters)[:4] == ["target", "weight", "reduction", "pos_weight"]


def test_interleaved_memory_does_not_overlap():
    memory = np.linspace(0, 1, 30, dtype=np.float32)
    z, t, out = memory[::3], memory[1::3], memory[2::3]
    want = LOSS.grad(z.copy(), t.copy())
    np.testing.assert_array_equal(LOSS.grad(z, t, out=out), want)


def test_out_over_the_transposed_input():
    z = np.linspace(0, 1, 9, dtype=np.float32).reshape(3, 3)
    with pytest.raises(ValueError, match="out shares memory with input"):
        LOSS.grad(z, np.zeros_like(z), out=z.T)


def test_outputs_that_overlap_by_a_byte():
    memory = np.zeros(64, np.uint8)
    out = memory[16:40].view(np.float32)
    for first in (16 - 5, 39):  # the last byte of the target is the output's first, and the reverse
        with pytest.raises(ValueError, match="out shares memory with target"):
            LOSS.grad(np.zeros(6, np.float32), memory[first : first + 6], out=out)
    for first in (16 - 6, 40):
        LOSS.grad(np.zeros(6, np.float32), memory[first : first + 6], out=out)


def test_broadcast_out():
    memory = np.zeros(9, np.float32)
    for strides in ((0, 4), (4, 4)):
        out = np.lib.stride_tricks.as_strided(memory, (2, 3), strides)
        with pytest.raises(ValueError, match="several elements of out share memory: it is a broadcast view or a sliding window"):
            LOSS.grad(Z, T, out=out)


@pytest.mark.parametrize("bad", [-0.01, 1.01, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["__call__", "grad", "value_and_grad", "curvature"])
def test_validate_names_the_first_bad_target(bad, method):
    z, t = arrays((3, 40, 50))
    t[1, 2, 3] = t[2, 0, 0] = bad
    getattr(LOSS, method)(z, t)
    with pytest.raises(ValueError, match=re.escape(f"target[1, 2, 3] is {bad}; accepted: targets in [0, 1]") + "$"):
        getattr(LOSS, method)(z, t, validate=True)


def test_validate_accepts_valid_targets():
    z, t = arrays((3, 40, 50))
    t[0, 0, :3] = 0.0, 1.0, np.finfo(np.float32).tiny
    assert LOSS(z, t, validate=True) == LOSS(z, t)
    value, grad = LOSS.value_and_grad(z, t, validate=True, out=z)
    assert grad is z
    assert value > 0


def test_validate_ignores_masked_targets():
    z, t = arrays((3, 4))
    t[1, 2] = 255
    with pytest.raises(ValueError, match=re.escape("target[1, 2] is 255.0")):
        LOSS(z, t, validate=True)
    assert LOSS(z, t, validate=True, ignore_index=255) == LOSS(z, t, mask=t <= 1)
    assert LOSS(z, t, validate=True, mask=t <= 1) == LOSS(z, t, mask=t <= 1)


def test_validate_hints_at_target_scale():
    z, _ = arrays((2, 3))
    images = np.array([[0, 1, 1], [200, 0, 255]], np.uint8)
    with pytest.raises(
        ValueError,
        match=re.escape("target[1, 0] is 200; accepted: targets in [0, 1]; for images stored as whole numbers pass target_scale=1/255"),
    ):
        LOSS(z, images, validate=True)
    assert LOSS(z, images, validate=True, target_scale=1 / 255) > 0
    with pytest.raises(ValueError, match=re.escape("target[1, 0] is 200; accepted: targets in [0, 1]") + "$"):
        LOSS(z, images, validate=True, target_scale=1 / 128)
    with pytest.raises(ValueError, match=re.escape("target[] is 2; accepted")):
        LOSS(np.float32(0), np.uint8(2), validate=True)


@pytest.mark.parametrize("in_place", [True, False])
def test_validate_writes_nothing_to_the_callers_buffer(in_place):
    z, t = arrays((3, 40, 50))
    t[2, 1, 0] = 2
    out = z if in_place else np.full_like(z, 7)
    before = out.copy()
    with pytest.raises(ValueError, match=re.escape("target[2, 1, 0] is 2.0")):
        LOSS.value_and_grad(z, t, validate=True, out=out)
    np.testing.assert_array_equal(out, before)


WHOLE = "target[0, 1] is 255; accepted: targets in [0, 1]; for images stored as whole numbers pass target_scale=1/255"
TO_PROBABILITIES = {"binary_cross_entropy_with_logits": "uint8", "binary_cross_entropy": "int16", "sigmoid_focal_loss": "int64"}


@pytest.mark.parametrize(("name", "dtype"), TO_PROBABILITIES.items())
def test_whole_targets_beyond_0_and_1_are_refused(name, dtype):
    loss, z, images = getattr(fl, name), np.full((1, 3), 0.5, np.float32), np.array([[1, 255, 0]]).astype(dtype)
    images[0, 1] = 255
    out, refused = np.zeros_like(z), re.escape(WHOLE)
    for call in (
        loss.grad,
        loss.value_and_grad,
        functools.partial(loss, reduction="mean"),
        functools.partial(loss, reduction="sample_sum"),
    ):
        with pytest.raises(ValueError, match=f"{refused}$"):
            call(z, images)
    with pytest.raises(ValueError, match=refused + re.escape(" (the output has already been written)") + "$"):
        loss.value_and_grad(z, images, out=out)
    with pytest.raises(ValueError, match=f"{refused}$"):
        loss.value_and_grad(z, images, out=out, validate=True)
    assert loss.grad(z, images, target_scale=1 / 255).all()
    assert loss.grad(z, images, mask=images < 2)[0, ::2].all()
    assert loss.grad(z, images, ignore_index=255)[0, ::2].all()
    loss.grad(z, images.astype(np.float32))
    loss.grad(z, images > 0)
    with pytest.raises(ValueError, match=re.escape("is -1; accepted")):
        loss.grad(z, -(images == 1).astype("int8"))


def test_whole_targets_of_the_other_losses():
    images = np.array([[[1, 255, 0]]], np.uint8)
    z = np.zeros(images.shape, np.float32)
    for loss in (fl.dice_with_logits_loss, fl.dice_bce_with_logits_loss):
        out = np.full_like(z, 7)
        with pytest.raises(ValueError, match=re.escape(WHOLE.replace("[0, 1] is", "[0, 0, 1] is")) + "$"):
            loss.value_and_grad(z, images, out=out)
        assert (out == 7).all()
        loss.value_and_grad(z, images, out=out, mask=images < 255)
        loss.value_and_grad(z, images.astype(np.float64))
    with pytest.raises(ValueError, match=re.escape(WHOLE.replace("[0, 1] is", "[0, 0, 1] is"))):
        fl.binary_entropy(images)
    with pytest.raises(ValueError, match=re.escape(WHOLE.replace("[0, 1] is", "[0, 0, 1] is"))):
        fl.vae_loss(z, images, z[0], z[0])
    for loss in (fl.mse_loss, fl.l1_loss, fl.huber_loss, fl.mse_with_logits_loss):
        assert loss(z, images) > 0


def test_squared_error_has_no_range_to_check():
    assert fl.mse_loss(Z, T + 5, validate=True) == fl.mse_loss(Z, T + 5)


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError)])
def test_number_of_threads(n, error):
    before = fl.get_num_threads()
    with pytest.raises(error, match="the number of threads"):
        fl.set_num_threads(n)
    assert fl.get_num_threads() == before


@pytest.mark.parametrize(
    ("loss", "parameter", "bad", "accepted"),
    [
        ("sigmoid_focal_loss", "gamma", -0.5, "0 or more"),
        ("sigmoid_focal_loss", "alpha", 1.5, "1 or less"),
        ("smooth_l1_loss", "beta", -1, "0 or more"),
        ("huber_loss", "delta", -1, "more than 0"),
        ("huber_loss", "delta", 0, "more than 0"),
        ("huber_loss", "delta", float("nan"), "more than 0"),
        ("dice_with_logits_loss", "smooth", -1, "0 or more, and finite"),
        ("dice_bce_with_logits_loss", "bce_weight", -2.0, "0 or more, and finite"),
    ],
)
def test_numbers_out_of_their_bounds(loss, parameter, bad, accepted):
    for method in ("__call__", "grad", "value_and_grad"):
        with pytest.raises(ValueError, match=re.escape(f"{parameter} is {bad!r}; accepted: {accepted}") + "$"):
            getattr(getattr(fl, loss), method)(Z, T, **{parameter: bad})


def test_validate_checks_probabilities():
    p = Z.copy()
    p[1, 1] = 1.5
    assert np.isnan(fl.binary_cross_entropy(p, T))
    with pytest.raises(ValueError, match=re.escape("input[1, 1] is 1.5; accepted: inputs in [0, 1]; for logits use")):
        fl.binary_cross_entropy.grad(p, T, validate=True)
    with pytest.raises(ValueError, match=re.escape("target[0, 2] is 2.0; accepted: targets in [0, 1]")):
        fl.binary_cross_entropy(Z, np.float32([[0, 0, 2], [0, 0, 0]]), validate=True)


def test_a_reduction_passed_as_weight():
    with pytest.raises(
        TypeError, match=re.escape("weight is 'sum'; accepted: an array or a number (pass a reduction by keyword, reduction='sum')")
    ):
        fl.huber_loss(Z, T, "sum")
