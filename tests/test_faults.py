"""Processes that fork, spawn, and are killed; threads beside other libraries' threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import fastloss as fl
from fastloss.kernel.cache import Cache

LOSS = fl.binary_cross_entropy_with_logits
NAME, CODE = "a" * 64, b"machine code"
AROUND = """
import os, sys, threading
import numpy as np
import fastloss as fl
z = np.linspace(-3, 3, 400_000, dtype=np.float32).reshape(4, 10, -1)
def work(k):
    value, grad = fl.binary_cross_entropy_with_logits.value_and_grad(z, z > 0, reduction="sample_mean")
    return value.tolist(), grad.tobytes()
def beside(busy):  # computes in another thread all the time
    while not busy.is_set():
        work(0)
if __name__ == "__main__":
    want = work(0)
    done = threading.Event()
    threading.Thread(target=beside, args=(done,)).start()
    try:
        print(all(tuple(got) == want for got in compute()))
    finally:
        done.set()
"""


def run_file(folder, code, **environment):
    """Run a program from a file, which spawned processes import."""
    (folder / "program.py").write_text(code)
    command = [sys.executable, "-W", "ignore", str(folder / "program.py")]  # of forks in a process with threads
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


METHODS = ["spawn", *(["fork", "forkserver"] if hasattr(os, "fork") else [])]


@pytest.mark.parametrize("method", METHODS)
def test_processes_of_a_pool(tmp_path, method):
    code = f"""
from multiprocessing import get_context
def compute():
    with get_context({method!r}).Pool(3) as pool:
        return pool.map(work, range(12))
"""
    assert run_file(tmp_path, code + AROUND, FASTLOSS_NUM_THREADS="3") == "True"


@pytest.mark.parametrize(
    "method", [method if method == "fork" else pytest.param(method, marks=pytest.mark.exhaustive) for method in METHODS]
)
def test_workers_of_a_data_loader(tmp_path, method):
    pytest.importorskip("torch")
    code = f"""
import torch.utils.data
class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, k):
        return work(k)
def compute():
    loader = torch.utils.data.DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context={method!r})
    return [item for _ in range(2) for item in loader]
"""
    assert run_file(tmp_path, code + AROUND, FASTLOSS_NUM_THREADS="2") == "True"


@pytest.mark.slow
def test_threads_of_other_libraries_beside_ours(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    code = """
import torch
from sklearn.cluster import KMeans
def cluster(done):
    while not done.is_set():
        KMeans(3, n_init=1, random_state=0).fit(np.random.default_rng(0).random((2000, 4)))
def multiply(done):
    x = torch.ones(300, 300)
    while not done.is_set():
        x = (x @ x).clamp(0, 1)
def compute():
    done = threading.Event()
    others = [threading.Thread(target=f, args=(done,)) for f in (cluster, multiply)]
    for thread in others:
        thread.start()
    try:
        found = []
        for n in (1, 2, 3, 4) * 10:
            fl.set_num_threads(n)
            found.append(work(0))
        return found
    finally:
        done.set()
        for thread in others:
            thread.join()
"""
    for kind in ("openmp", "pool"):
        assert run_file(tmp_path, code + AROUND, FASTLOSS_THREADS=kind) == "True"


def test_32_threads_while_the_number_of_threads_changes(rng):
    sizes = [100, 5_000, 70_001, 300_003]
    batches = [(rng.normal(0, 3, (2, n)).astype(np.float32), rng.random((2, n)).astype(np.float32)) for n in sizes]
    want = [LOSS.value_and_grad(*batch, reduction="sample_sum") for batch in batches]
    before, wrong, changes = fl.get_num_threads(), [], threading.Event()

    def call(first):
        for k in range(40):
            value, grad = LOSS.value_and_grad(*batches[(first + k) % len(sizes)], reduction="sample_sum")
            true_value, true_grad = want[(first + k) % len(sizes)]
            if not (np.array_equal(value, true_value) and np.array_equal(grad, true_grad)):
                wrong.append((first, k))

    def change():
        n = 1
        while not changes.is_set():
            n = n % 9 + 1
            fl.set_num_threads(n)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(32)]
    changer = threading.Thread(target=change)
    try:
        for thread in (*callers, changer):
            thread.start()
        for thread in callers:
            thread.join()
    finally:
        changes.set()
        changer.join()
        fl.set_num_threads(before)
    assert wrong == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_process_killed_at_every_stage_of_writing_the_cache(tmp_path):
    """A stage ends at each event that Python audits: files that are opened, locked, renamed, and listed."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from fastloss.kernel.cache import Cache
        left = int(sys.argv[2])
        def watch(event, arguments):
            global left
            left -= event.startswith(("open", "os.", "fcntl."))
            if left < 0 and event != "os.kill":
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        assert Cache(Path(sys.argv[1])).find_or_make({NAME!r}, lambda: {CODE!r}) == {CODE!r}
        os._exit(0)""")
    for stage in range(100):
        folder = tmp_path / str(stage)
        killed = subprocess.run([sys.executable, "-c", code, str(folder), str(stage)]).returncode
        assert Cache(folder).find_or_make(NAME, lambda: CODE) == CODE
        assert Cache(folder).find_or_make(NAME, lambda: b"not made again") == CODE
        if killed == 0:
            break
        assert killed == -signal.SIGKILL
    assert 5 < stage < 99
