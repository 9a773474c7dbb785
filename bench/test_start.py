"""What a process pays before its first result, measured from outside: imports, the first call, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np

import fastloss as fl
from bench.conftest import Row

FIRST_CALL = """
import numpy as np, fastloss as fl
z = np.linspace(-3, 3, 1000, dtype=np.float32)
fl.binary_cross_entropy_with_logits.value_and_grad(z, z > 0)"""


def process(code, **environment):
    return lambda: subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True)


def test_import(measure):
    measure(Row("import fastloss", process("import fastloss"), "import numpy", process("import numpy"), must_extra_ms=60))


def test_first_call_from_the_cache(measure, tmp_path):
    call = process(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path))
    call()
    measure(Row("first call, from the disk cache", call, "import numpy", process("import numpy"), must_us=0.8e6))


def test_first_call_with_nothing_cached(measure, tmp_path):
    def forget():
        for file in tmp_path.iterdir():
            file.unlink()

    call = process(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path))
    measure(Row("first call, nothing cached", call, "import numpy", process("import numpy"), must_us=2.5e6, restore=forget))


def test_memory(benchmark):
    """Peak of what one call with `out=` allocates, in bytes, for 3 MB and for 201 MB of logits."""
    peaks = {}
    for images in (4, 256):
        z = np.zeros((images, 3, 256, 256), np.float32)
        t, out = np.zeros_like(z), np.zeros_like(z)
        fl.binary_cross_entropy_with_logits.value_and_grad(z, t, out=out)
        tracemalloc.start()
        fl.binary_cross_entropy_with_logits.value_and_grad(z, t, out=out)
        peaks[z.nbytes] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    benchmark.extra_info.update(row="extra memory with out=", peaks=peaks, must_bytes=1 << 20)
    benchmark.pedantic(lambda: None)
    assert max(peaks.values()) < 1 << 20
