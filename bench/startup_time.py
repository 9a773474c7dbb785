"""Measure the wall time of whole processes that import a library, or compute a first result with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory

ARRAYS = "import numpy as np; z = np.linspace(-3, 3, 1000, dtype=np.float32); t = (z > 0).astype(np.float32); "
FIRST = ARRAYS + "import fastloss as fl; fl.binary_cross_entropy_with_logits.value_and_grad(z, t); "
COUNT = FIRST + "from fastloss.cpu.compile import statistics; print(statistics['compiled'], statistics['loaded'])"
LOSSES = ("binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "huber_loss", "log_cosh_loss", "sigmoid_focal_loss")
EACH = ARRAYS + f"import fastloss as fl; [getattr(fl, name).value_and_grad(z, t) for name in {LOSSES}]"
TORCH = ARRAYS + (
    "import torch; F = torch.nn.functional; z, t = torch.from_numpy(z).requires_grad_(), torch.from_numpy(t); "
    "loss = {}; loss(z, t).backward()"
)
CACHED = "fastloss, first call, from the disk cache"
PROGRAMS = {
    "torch": {
        "torch eager, first call": TORCH.format("F.binary_cross_entropy_with_logits"),
        "torch.compile, first call": TORCH.format("torch.compile(lambda z, t: F.binary_cross_entropy_with_logits(z, t))"),
    },
    "optax": {
        "optax and JAX, first call": ARRAYS + "import jax, optax; "
        "f = lambda z, t: optax.sigmoid_binary_cross_entropy(z, t).mean(); jax.block_until_ready(jax.jit(jax.value_and_grad(f))(z, t))"
    },
}


def run(code: str, **environment: str) -> tuple[float, str]:
    """Run code in a Python process, and return its seconds and its output."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, done.stdout


def measure(peers: Sequence[str], rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of every program in every round, and the number of kernels that a first and a second process compile."""
    programs = {
        "import numpy": "import numpy",
        "import fastloss": "import fastloss",
        CACHED: FIRST,
        "fastloss, first call, nothing cached": FIRST,
        "fastloss, six losses, nothing cached": EACH,
    }
    for peer in peers:
        programs |= PROGRAMS.get(peer, {})
    times: dict[str, list[float]] = {name: [] for name in programs}
    with TemporaryDirectory() as filled:
        compiled, again = (int(run(COUNT, FASTLOSS_CACHE_DIR=filled)[1].split()[0]) for _ in range(2))
        for _ in range(rounds):
            for name, code in programs.items():
                with TemporaryDirectory() as empty:
                    folders = {"FASTLOSS_CACHE_DIR": filled if name == CACHED else empty, "TORCHINDUCTOR_CACHE_DIR": empty}
                    times[name].append(run(code, **folders)[0])
    return times, {"first process": compiled, "second process": again}
