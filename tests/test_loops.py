"""The loops of other libraries: the examples of the pages run, and train what the libraries' own losses train."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

import fastloss as fl
from tests.test_examples_in_docs import ROOT, SYBIL
from tests.ulp import PEER, assert_close

pytestmark = pytest.mark.loops

PAGES = ("jax", "lightgbm", "lightning", "scipy", "skorch", "xgboost")  # Keras needs a process of its own: it has one backend for each
FLOAT32 = PEER[np.dtype(np.float32)]
LIGHTNING_S_OWN = (
    "ignore:.isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:.*does not have many workers",
    "ignore:.*log_every_n_steps",
)
BCE = fl.binary_cross_entropy_with_logits


@functools.cache
def names_of(page):
    """Run the examples of a page, and return the names that they define."""
    document = SYBIL.parse(ROOT / "docs" / "loops" / f"{page}.md")
    for example in document:
        example.evaluate()
    return document.namespace


def test_every_page_is_tested_and_listed():
    pages = {file.stem for file in (ROOT / "docs" / "loops").glob("*.md")} - {"index"}
    assert pages == {*PAGES, "keras"}
    index = (ROOT / "docs" / "loops" / "index.md").read_text()
    assert all(f"]({page}.md)" in index and f"\n{page}\n" in index for page in pages)


@pytest.mark.filterwarnings(*LIGHTNING_S_OWN)
@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_run(page):
    assert len(names_of(page)) > 1


def test_examples_of_keras_run():
    code = "from tests.test_loops import names_of; print(names_of('keras')['keras'].backend.backend())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr


# --- boosted trees ----------------------------------------------------------------------------------------------------


def objective(loss, **given):
    """Return the objective of the pages for a loss with options."""

    def gradients(y_true, y_pred, sample_weight=None):
        options = {"weight": sample_weight, "reduction": "sum", **given}
        return loss.grad(y_pred, y_true, **options), loss.curvature(y_pred, y_true, **options)

    return gradients


def said(x):
    """Name a case by the library's own parameters."""
    return "-".join(map(str, x.values())) if isinstance(x, dict) else x if isinstance(x, str) else "ours"


@pytest.fixture(scope="module")
def samples():
    """Return features, labels 0 and 1, soft labels, numbers and weights."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((400, 6)).astype(np.float32)
    numbers = features[:, 0] * features[:, 1] + rng.standard_normal(400)
    soft = 1 / (1 + np.exp(-3 * numbers))
    return features, {"labels": (soft > rng.random(400)).astype(int), "soft": soft, "numbers": numbers}, rng.random(400)


def assert_same_leaves(ours, theirs):
    """Assert that every tree of two models sends every sample to the same leaf, and that the trees are no stumps."""
    np.testing.assert_array_equal(ours, theirs)
    assert all(len(np.unique(tree)) > 4 for tree in ours.T)


XGBOOST = [  # our objective, XGBoost's with its parameters, and the kind of label
    (objective(BCE), {"objective": "binary:logistic"}, "labels"),
    (objective(BCE, pos_weight=3), {"objective": "binary:logistic", "scale_pos_weight": 3}, "labels"),
    (objective(fl.mse_loss, grad_output=0.5), {"objective": "reg:squarederror"}, "numbers"),
    (objective(fl.charbonnier_loss, eps=2, grad_output=2), {"objective": "reg:pseudohubererror", "huber_slope": 2}, "numbers"),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("ours", "theirs", "kind"), XGBOOST, ids=said)
def test_trees_of_xgboost(samples, ours, theirs, kind, weighted):
    import xgboost

    x, y, w = samples
    model = functools.partial(
        xgboost.XGBClassifier if kind == "labels" else xgboost.XGBRegressor, n_estimators=15, n_jobs=1, base_score=0.4
    )
    weight = w if weighted else None
    pair = [model(**o).fit(x, y[kind], sample_weight=weight) for o in ({"objective": ours}, theirs)]
    assert_same_leaves(*(m.apply(x) for m in pair))
    assert_close(*(m.predict(x, output_margin=True) for m in pair), FLOAT32)


def test_several_targets_of_xgboost(samples):
    import xgboost

    x, y, _ = samples
    targets = np.stack([y["numbers"], -2 * y["soft"]], axis=1)
    for ours, theirs, _ in XGBOOST[2:]:
        pair = [xgboost.XGBRegressor(n_estimators=15, n_jobs=1, base_score=0, **o).fit(x, targets) for o in ({"objective": ours}, theirs)]
        assert_close(*(m.predict(x) for m in pair), FLOAT32)


def test_the_native_interface_metrics_and_first_prediction_of_xgboost(samples):
    import xgboost

    x, y, _ = samples
    data, found = xgboost.DMatrix(x, y["labels"]), [{}, {}]
    logistic = names_of("xgboost")["logistic"]
    parameters = {"objective": "binary:logistic", "eval_metric": "logloss", "nthread": 1}
    native = [
        xgboost.train(parameters | start, data, 15, evals=[(data, "all")], obj=own, evals_result=log, verbose_eval=False)
        for own, start, log in zip(
            (lambda p, d: logistic(d.get_label(), p), None), ({"base_score": y["labels"].mean()}, {}), found, strict=True
        )
    ]
    assert_close(*(m.predict(data, output_margin=True) for m in native), FLOAT32)
    assert_close(*(log["all"]["logloss"] for log in found), FLOAT32)


LIGHTGBM = [
    (objective(BCE), {"objective": "binary"}, "labels"),
    (objective(BCE, pos_weight=3), {"objective": "binary", "scale_pos_weight": 3}, "labels"),
    (objective(BCE), {"objective": "cross_entropy"}, "soft"),
    (objective(fl.mse_loss, grad_output=0.5), {"objective": "regression"}, "numbers"),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("ours", "theirs", "kind"), LIGHTGBM, ids=said)
def test_trees_of_lightgbm(samples, ours, theirs, kind, weighted):
    import lightgbm

    x, y, w = samples
    model = lightgbm.LGBMClassifier if kind == "labels" else lightgbm.LGBMRegressor
    options = {"n_estimators": 15, "n_jobs": 1, "verbose": -1, "boost_from_average": False}
    weight = w if weighted else None
    pair = [model(**options, **o).fit(x, y[kind], sample_weight=weight) for o in ({"objective": ours}, theirs)]
    assert_same_leaves(*(m.predict(x, pred_leaf=True) for m in pair))
    assert_close(*(m.predict(x, raw_score=True) for m in pair), FLOAT32)


def test_the_native_interface_of_lightgbm(samples):
    import lightgbm

    x, y, w = samples
    logistic = names_of("lightgbm")["logistic"]
    native = {"objective": lambda p, d: logistic(d.get_label(), p, d.get_weight())}
    pair = [
        lightgbm.train(o | {"num_threads": 1, "verbose": -1, "boost_from_average": False}, lightgbm.Dataset(x, y["labels"], weight=w), 15)
        for o in (native, {"objective": "binary"})
    ]
    assert_close(*(m.predict(x, raw_score=True) for m in pair), FLOAT32)


def test_the_metric_of_lightgbm_s_page():
    page = names_of("lightgbm")
    (results,) = page["watched"].evals_result_.values()
    assert list(results) == ["log loss"]
    assert_close(results["log loss"][-1], BCE(page["logits"], page["y"]), FLOAT32)


# --- gradient methods -------------------------------------------------------------------------------------------------


def test_the_minimum_of_scikit_learn():
    page = names_of("scipy")
    model, newton = page["model"], page["newton"]
    _, slope = page["objective"](page["coefficients"])
    assert np.abs(slope).max() / len(page["y"]) <= model.tol  # scikit-learn's criterion, of a mean
    assert np.abs(newton.jac).max() <= 1e-8  # the page's own
    assert page["found"].success


def test_products_with_the_hessian(rng):
    page = names_of("scipy")
    w, v = rng.standard_normal((2, page["X"].shape[1]))
    curvature = np.diag(BCE.curvature(page["X"] @ w, page["y"], reduction="sum"))
    hessian = page["X"].T @ curvature @ page["X"] + np.diag(page["penalty"])
    assert_close(page["hessian_product"](w, v), hessian @ v, PEER[np.dtype(np.float64)])


@pytest.mark.parametrize("transform", ["none", "jit", "vmap", "jit of vmap"])
def test_jax_has_the_gradient_of_optax(transform):
    import jax
    import optax

    ours = names_of("jax")["cross_entropy"]
    logits, target = (draw(jax.random.key(k), (5, 7, 3)) for k, draw in enumerate((jax.random.normal, jax.random.uniform)))

    def scaled(loss):
        return jax.value_and_grad(lambda z, t: 3 * loss(2 * z, t))

    found, want = scaled(ours), scaled(lambda z, t: optax.sigmoid_binary_cross_entropy(z, t).mean())
    for kind in ("vmap", "jit"):
        found, want = (getattr(jax, kind)(f) if kind in transform else f for f in (found, want))
    for got, expected in zip(found(logits, target), want(logits, target), strict=True):
        assert got.dtype == np.float32
        assert_close(got, expected, FLOAT32)


def test_what_jax_does_not_differentiate():
    import jax

    loss = names_of("jax")["cross_entropy"]
    z = jax.numpy.ones((2, 3))
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(loss, (z, z), (z, z))
    for second in (lambda z: jax.hessian(loss)(z, z), jax.grad(lambda z: jax.grad(loss)(z, z).sum())):
        with pytest.raises(ValueError, match="do not support JVP"):
            second(z)
    np.testing.assert_array_equal(jax.grad(loss, argnums=1)(z, z), np.zeros((2, 3)))


def test_jax_between_two_halves_of_a_step():
    import jax

    page = names_of("jax")
    images = page["images"] / np.float32(255)
    _, want = jax.value_and_grad(lambda w: page["cross_entropy"](page["model"](w, images), images))(page["weights"])
    assert_close(page["step"], want, FLOAT32)


@pytest.mark.filterwarnings(*LIGHTNING_S_OWN)
def test_lightning_and_skorch_train_as_with_torch_s_loss():
    lightning, skorch = names_of("lightning"), names_of("skorch")
    assert_close(lightning["by_fastloss"], lightning["by_torch"], FLOAT32)
    assert_close(*(skorch[by].history[:, "train_loss"] for by in ("by_fastloss", "by_torch")), FLOAT32)
    assert skorch["net"].history[-1]["valid_loss"] > 0
