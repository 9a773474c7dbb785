"""Costs of a process: imports, compilations, memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl
from fastloss.kernel import cache
from tests.test_threads import run_python

PACKAGE = Path(fl.__file__).parent
FIRST_CALL = """
import sys, numpy as np, fastloss as fl
z = np.linspace(-3, 3, 100)
value, grad = fl.binary_cross_entropy_with_logits.value_and_grad(z, z > 0)
from fastloss.cpu.compile import statistics
print(statistics["compiled"], statistics["loaded"], "numba" in sys.modules, value.hex(), grad[3].hex())"""


def test_a_tensor_call_does_not_import_fastloss_torch():
    pytest.importorskip("torch")
    code = """
import sys, torch, fastloss
fastloss.mse_loss(torch.ones(3, requires_grad=True), torch.zeros(3)).backward()
print(*(name for name in sys.modules if name.startswith("fastloss.torch")), "done")"""
    assert run_python(code) == "done"


def test_import_loads_no_compiler_and_no_framework():
    loaded = run_python("import sys, fastloss; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert "numpy" in loaded
    assert not {"numba", "llvmlite", "torch", "cupy", "dask", "sklearn", "matplotlib", "rich"} & set(loaded)


def test_a_second_process_compiles_nothing_and_does_not_load_numba(tmp_path):
    first = run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path)).split()
    second = run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path)).split()
    assert first[:3] == ["1", "0", "True"]
    assert second[:3] == ["0", "1", "False"]
    assert first[3:] == second[3:]


def test_a_second_process_finds_the_loop_of_another_loss(tmp_path):
    code = """
import numpy as np, fastloss as fl
from fastloss.cpu import loop
fl.{}.value_and_grad(np.ones(3), np.zeros(3))
print(loop.build.cache_info().misses)"""
    losses = ("mse_loss", "l1_loss", "binary_cross_entropy_with_logits")  # the last has a product of factors besides the sum
    assert [run_python(code.format(name), FASTLOSS_CACHE_DIR=str(tmp_path)) for name in losses] == ["1", "0", "1"]


def test_an_edited_formula_is_compiled_anew(tmp_path):
    module = tmp_path / "mine.py"
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import numpy as np, mine
print(mine.loss(np.ones(3), np.zeros(3)))
from fastloss.cpu.compile import statistics
print(statistics["compiled"])"""
    for factor, compiled in ((2.0, 1), (3.0, 1), (2.0, 0)):
        module.write_text(f"import fastloss\n@fastloss.elementwise_loss\ndef loss(z, t):\n    return {factor} * z, {factor}\n")
        assert run_python(code, FASTLOSS_CACHE_DIR=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1").split() == [
            str(factor),
            str(compiled),
        ]


DECIDES_CODE = [
    "ops.py", "formula.py", "version.py", "core/dtypes.py", "core/plan.py", "kernel/element.py", "kernel/elementary.py", "cpu/abi.py",
    "cpu/compile.py", "cpu/loop.py", "cpu/step.py", "cpu/vector.py",
]  # fmt: skip


@pytest.fixture(scope="module")
def package_copy(tmp_path_factory):
    """Return a folder with a copy of the package."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "fastloss", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run_copy(folder, code):
    """Run code with a copy of the package."""
    copied = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}  # otherwise, Python would import the package of the current folder
    return run_python(code, FASTLOSS_CACHE_DIR=str(folder / "cache"), **copied)


def kernels_compiled(folder):
    """Run FIRST_CALL with a copy of the package; return how many kernels it compiled."""
    return run_copy(folder, FIRST_CALL).split()[0]


def edited(path):
    """Return the text of a source after an edit that changes nothing but the text; of `version.py`, after a new release."""
    text = path.read_text()
    changed = text.replace('"0.1.0"', '"0.1.1"') if path.name == "version.py" else f"{text}\n# edited\n"
    assert changed != text
    return changed


def test_an_edited_package_is_compiled_anew(package_copy):
    path = package_copy / "fastloss" / "cpu" / "step.py"
    text = path.read_text()
    try:
        assert [kernels_compiled(package_copy) for _ in range(2)] == ["1", "0"]
        path.write_text(edited(path))
        assert kernels_compiled(package_copy) == "1"
    finally:
        path.write_text(text)


FINGERPRINT = "from fastloss.cpu import compile; print(compile._fingerprint())"  # a part of the key of each kernel


@pytest.fixture(scope="module")
def fingerprint(package_copy):
    """Return the fingerprint of the unchanged package."""
    return run_copy(package_copy, FINGERPRINT)


@pytest.mark.parametrize("name", DECIDES_CODE)
def test_an_edited_package_has_other_keys(package_copy, fingerprint, name):
    path = package_copy / "fastloss" / name
    text = path.read_text()
    path.write_text(edited(path))
    try:
        assert run_copy(package_copy, FINGERPRINT) != fingerprint
    finally:
        path.write_text(text)


def test_every_source_of_a_machine_is_part_of_the_key():
    names = {machine: {str(path.relative_to(PACKAGE)) for path in cache.sources(machine)} for machine in ("cpu", "cuda")}
    assert names["cpu"] >= set(DECIDES_CODE) - {"version.py"}
    assert names["cuda"] >= {"cuda/elements.cuh", "cuda/loop.cuh", "cuda/scalar.py", "cuda/source.py", "kernel/element.py"}


def test_with_out_nothing_large_is_allocated(rng):
    z = rng.normal(0, 3, (16, 3, 256, 256)).astype(np.float32)
    images = rng.integers(0, 256, z.shape).astype(np.uint8)
    out, mask, weight = np.empty_like(z), images > 10, rng.random((3, 1, 1))
    loss = fl.binary_cross_entropy_with_logits
    options = {"target_scale": 1 / 255, "mask": mask, "ignore_index": 255, "pos_weight": weight, "label_smoothing": 0.1, "validate": True}
    for reduction in ("mean", "sample_mean"):
        loss.value_and_grad(z, images, weight, reduction, out=out, **options)
        tracemalloc.start()
        loss.value_and_grad(z, images, weight, reduction, out=out, **options)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


def test_memory_stays_flat_over_many_calls():
    code = """
import resource, numpy as np, fastloss as fl
z, t = np.zeros((2, 200_000), np.float32)
for n in range(2000):
    if n == 500:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fl.mse_loss.value_and_grad(z, t, out=z)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    assert int(run_python(code, FASTLOSS_NUM_THREADS="3")) < 4096


def test_imports_follow_the_layers_without_a_circle():
    """Check the import contracts of pyproject.toml, which include imports inside functions."""
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    assert lint_imports(config_filename=str(PACKAGE.parent / "pyproject.toml")) == EXIT_STATUS_SUCCESS


def test_exports_are_sorted_and_documented():
    assert sorted(fl.__all__) == fl.__all__
    assert all(getattr(fl, name).__doc__ for name in fl.__all__)


def test_globals_of_a_formula_are_read_once(tmp_path):
    """A global that changes between the decoration and the first call must not put the wrong kernel into the cache."""
    code = """
import sys, numpy as np, fastloss as fl
K = 1.0
@fl.elementwise_loss
def loss(z, t):
    return K * z, K
if sys.argv[1:]:
    K = 5.0
print(loss(np.ones(3), np.zeros(3)), loss.grad(np.ones(1), np.zeros(1))[0])"""
    for arguments in (["changed"], []):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"FASTLOSS_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "1.0 1.0\n"


def test_help_runs():
    shown = subprocess.run([sys.executable, "-m", "fastloss", "--help"], capture_output=True, text=True, check=True).stdout
    assert "demo" in shown


def test_numba_configured_for_another_cpu(tmp_path):
    """No instruction of the host CPU may be used then: LLVM would end the process."""
    code = """
import numpy as np, fastloss as fl
z = np.linspace(-3, 3, 100, dtype=np.float32)
print(fl.binary_cross_entropy_with_logits.value_and_grad(z, z > 0)[0].round(5))"""
    cached = {"FASTLOSS_CACHE_DIR": str(tmp_path)}
    for _ in range(2):  # the second process loads the kernel from the disk
        assert run_python(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", **cached) == run_python(code)
