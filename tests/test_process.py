"""What a process pays: imports, compilations, memory."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import fastloss as fl
from tests.test_threads import run_python

PACKAGE = Path(fl.__file__).parent
FIRST_CALL = """
import sys, numpy as np, fastloss as fl
z = np.linspace(-3, 3, 100)
value, grad = fl.binary_cross_entropy_with_logits.value_and_grad(z, z > 0)
from fastloss.cpu import jit
print(jit.statistics["compiled"], jit.statistics["loaded"], "numba" in sys.modules, value.hex(), grad[3].hex())"""


def test_import_brings_no_compiler_and_no_framework():
    loaded = run_python("import sys, fastloss; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert "numpy" in loaded
    assert not {"numba", "llvmlite", "torch", "cupy", "dask", "sklearn", "matplotlib", "rich"} & set(loaded)


def test_a_second_process_compiles_nothing_and_does_not_load_numba(tmp_path):
    first = run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path)).split()
    second = run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path)).split()
    assert first[:3] == ["1", "0", "True"]
    assert second[:3] == ["0", "1", "False"]
    assert first[3:] == second[3:]


def test_an_edited_formula_is_compiled_anew(tmp_path):
    module = tmp_path / "mine.py"
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import numpy as np, mine
print(mine.loss(np.ones(3), np.zeros(3)))
from fastloss.cpu import jit
print(jit.statistics["compiled"])"""
    for factor, compiled in ((2.0, 1), (3.0, 1), (2.0, 0)):
        module.write_text(f"import fastloss\n@fastloss.elementwise_loss\ndef loss(z, t):\n    return {factor} * z, {factor}\n")
        assert run_python(code, FASTLOSS_CACHE_DIR=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1").split() == [
            str(factor),
            str(compiled),
        ]


def test_an_edited_package_is_compiled_anew(tmp_path, monkeypatch):
    from fastloss.cpu import jit

    assert {"loops.py", "simd.py", "ops.py", "step.py", "vmath.py"} <= {path.name for path in jit.sources()}
    source = tmp_path / "loops.py"
    monkeypatch.setattr(jit, "sources", lambda: [source])
    fingerprints = []
    for text in ("a = 1", "a = 2"):
        source.write_text(text)
        fingerprints.append(jit._fingerprint.__wrapped__())
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize("content", [b"", b"cut off", None])
def test_a_damaged_cache_is_replaced(tmp_path, content):
    run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    assert run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path)).startswith("1 0 ")
    assert run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path)).startswith("0 1 ")


def test_no_folder_for_the_cache(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(blocked / "cache")).startswith("1 0 ")


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


# who may import whom: the layers from the bottom up; a module imports from lower layers, or from its own folder
LAYERS = [["ops", "disk"], ["formula"], ["vmath", "plan"], ["step"], ["cpu"], ["call"], ["cuda"], ["loss"], ["losses"], ["__init__"]]
LAYERS += [["torch"], ["demo", "bench"], ["__main__"]]
ALONE = ["reference"]
DOORS = {("fastloss.loss", "fastloss.torch")}  # the one import upwards, made when the first tensor comes


def layer_of(module):
    first = module.split(".")[1] if "." in module else "__init__"
    return next((k for k, names in enumerate(LAYERS) if first in names), None)


def names_imported(node):
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"fastloss.{a.name}" for a in node.names] if node.module == "fastloss" else [node.module]
    return []


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = ".".join(parts)
        nodes = ast.walk(ast.parse(path.read_text()))
        imported = {name for node in nodes for name in names_imported(node) if name.split(".")[0] == "fastloss"}
        if parts[1] in ALONE:
            assert not imported, f"{module} imports {imported}"
            continue
        assert layer_of(module) is not None, f"{module} has no layer"
        for other in imported - {"fastloss"}:
            if other.split(".")[1] in ALONE or (module, other) in DOORS:
                continue
            same_folder = other.split(".")[1] == parts[1]
            assert layer_of(other) < layer_of(module) or same_folder, f"{module} imports {other}"


def test_the_package_names_what_it_exports():
    assert sorted(fl.__all__) == fl.__all__
    assert all(getattr(fl, name).__doc__ for name in fl.__all__)


def test_what_a_formula_looks_up_is_read_once(tmp_path):
    """A global that changes between the decoration and the first call does not put the wrong kernel into the cache."""
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


def test_without_a_home_nothing_is_kept(monkeypatch):
    from fastloss import disk

    for name in ("FASTLOSS_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(disk.Path, "home", no_home)
    folder = disk.cache_folder.__wrapped__()
    disk.write(folder / "name", b"code")
    assert disk.read(folder / "name") is None


def test_help_runs():
    shown = subprocess.run([sys.executable, "-m", "fastloss", "--help"], capture_output=True, text=True, check=True).stdout
    assert "demo" in shown


def test_numba_may_be_asked_for_another_cpu():
    """Then nothing of this one's may be used: LLVM would end the process."""
    code = """
import numpy as np, fastloss as fl
z = np.linspace(-3, 3, 100, dtype=np.float32)
print(fl.binary_cross_entropy_with_logits.value_and_grad(z, z > 0)[0].round(5))"""
    assert run_python(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == run_python(code)
