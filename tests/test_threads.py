"""Results do not depend on the number of threads, on concurrent callers, or on forks."""

from __future__ import annotations

import _thread
import ctypes
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastloss as fl
from fastloss.cpu import cpus, pool
from fastloss.cpu.threads import THREADS
from tests.ulp import assert_same, flat

LOSS = fl.binary_cross_entropy_with_logits


@pytest.fixture
def threads():
    before = fl.get_num_threads()
    yield fl.set_num_threads
    fl.set_num_threads(before)


@pytest.fixture
def no_team(monkeypatch):
    """Compute on the pool also where PyTorch is imported."""
    monkeypatch.setattr(THREADS, "team", None)
    monkeypatch.setattr(THREADS, "searches", False)


@pytest.fixture
def large(rng):
    shape = (5, 3, 171, 257)
    return rng.normal(0, 3, shape).astype(np.float32), rng.random(shape).astype(np.float32)


def in_a_thread(work):
    """Call a function on a thread of its own, whose CPU affinity no other thread shares."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


has_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no CPU affinity")


@has_affinity
def test_a_worker_leaves_the_callers_cpu_and_gains_none(monkeypatch):
    given, seen = {2, 3, 5, 7}, []
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: given)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: seen.append(cpus))
    pool.leave(3, 2)
    given = seen[-1]
    pool.leave(3, 2)  # other code has set this affinity since, perhaps the same
    pool.leave(7, 2)
    given = seen[-1]
    pool.leave(2, 2)  # too few would be left
    given = {5}
    pool.leave(5, 0)
    assert seen == [{2, 5, 7}, {2, 5, 7}, {2, 5}]


@has_affinity
def test_a_worker_that_cannot_change_its_affinity_still_works(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    in_a_thread(lambda: pool.leave(min(os.sched_getaffinity(0)), 0))


@has_affinity
@pytest.mark.skipif(cpus.count_cpus() < 2, reason="the process may use one CPU")
@pytest.mark.parametrize("pinned", ["thread", "process"])
def test_a_pool_made_by_a_pinned_thread_is_not_pinned(pinned):
    code = """
import os, sys, threading, time, numpy as np, fastloss as fl
from fastloss.cpu import pool
from fastloss.cpu.threads import THREADS
pool.leave = lambda cpu, least: None
z, cpus = np.zeros(1_000_000), os.sched_getaffinity(0)
fl.set_num_threads(3)
fl.mse_loss(z[:1000], z[:1000])  # compile
before = set(os.listdir("/proc/self/task"))
def wait_for(wanted):  # wait until the threads of the pool may use these CPUs
    until = time.monotonic() + 20
    while True:
        new = set(os.listdir("/proc/self/task")) - before - {str(threading.get_native_id())}
        found = [os.sched_getaffinity(int(thread)) for thread in new]
        if found == wanted:
            return
        assert time.monotonic() < until, found
        time.sleep(0.01)
def call(wanted):
    os.sched_setaffinity(0, {min(cpus)})
    fl.mse_loss(z, z)
    wait_for(wanted)
    done.append(wanted)
done = []
if sys.argv[-1] == "thread":
    thread = threading.Thread(target=call, args=([cpus] * 2,))
    thread.start()
    thread.join()
else:
    call([{min(cpus)}] * 2)
    time.sleep(2 * pool.CHECKED_AFTER)
    os.sched_setaffinity(0, cpus)
    fl.mse_loss(z, z)
    wait_for([cpus] * 2)
assert done
print(THREADS.pool._workers)"""
    assert run_python(code.replace("sys.argv[-1]", repr(pinned)), FASTLOSS_THREADS="pool") == "2"


@has_affinity
def test_a_thread_that_was_pinned_when_it_started_stays_so():
    """Some tools pin each thread of a process when it starts."""
    code = """
import os, time, numpy as np, fastloss as fl
from fastloss.cpu import pool
work = pool.Worker.work
def pinned(self, *sets):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    work(self, *sets)
pool.Worker.work = pinned
kept, set_affinity = [], pool.set_affinity
pool.set_affinity = lambda cpus: kept.append(cpus) or set_affinity(cpus)
z = np.zeros(1_000_000)
fl.set_num_threads(2)
for _ in range(20):
    fl.mse_loss(z, z)
    time.sleep(0.003)
print(kept)"""
    assert run_python(code, FASTLOSS_THREADS="pool") == "[]"


V2, V1 = "0::/a/b\n", "9:name=systemd:/x\n4:cpu,cpuacct:/a/b\n3:cpuset:/y\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "granted"),
    [
        (V2, {}, float("inf")),
        (V2, {"a/b/cpu.max": "max 100000\n"}, float("inf")),
        (V2, {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "20000 10000\n"}, 2.0),
        ("0::/of/the/host\n", {"cpu.max": "20000 10000\n"}, 2.0),
        ("0::/../other\n", {"cpu.max": "20000 10000\n"}, 2.0),
        (V1, {"unified/cpu.max": "20000 10000\n"}, 2.0),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n"}, float("inf")),
        (V1, {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n"}, 3.0),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3.0),
        (V1, {"cpuset/y/cpu.cfs_quota_us": "300000\n", "cpuset/y/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ("", {}, float("inf")),
        ("no group", {}, float("inf")),
        (None, {}, float("inf")),
    ],
)
def test_the_quota_of_a_container(groups, files, granted, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    assert cpus.quota(tmp_path / "groups", tmp_path) == granted


def test_a_quota_limits_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(cpus, "affinity", lambda thread: {0, 1, 2, 3})
    for granted, count in ((float("inf"), 4), (8.0, 4), (1.5, 2), (0.1, 1)):
        monkeypatch.setattr(cpus, "quota", lambda granted=granted: granted)
        assert cpus.count_cpus() == count


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.alike
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample_mean"])
def test_bit_identical_for_any_number_of_threads(row, threads, reduction, rng):
    arrays = row.draw(rng, np.float32, (5, 3, 171, 257))
    mask = rng.random(row.entries(arrays[0].shape)) < 0.7
    results = []
    for n in (1, 2, 4, 7, 2):
        threads(n)
        assert fl.get_num_threads() == n
        results += [row.loss.value_and_grad(*arrays, mask=m, **row.reduced(reduction)) for m in (None, mask)]
    for k, (value, grads) in enumerate(results):
        want, want_grads = results[k % 2]
        assert_same(flat(value, grads), flat(want, want_grads))


def test_bit_identical_from_run_to_run_and_at_any_address(large):
    z, t = large
    want = LOSS(z, t)
    for offset in (1, 3, 17):
        memory = np.zeros(z.size + 64, np.float32)
        moved = memory[offset : offset + z.size].reshape(z.shape)
        moved[...] = z
        assert LOSS(moved, t) == want
    code = """
import numpy as np, fastloss as fl
rng = np.random.default_rng(1)
print(fl.binary_cross_entropy_with_logits(rng.normal(0, 3, 300_001).astype("f4"), rng.random(300_001).astype("f4")).hex())"""
    assert len({run_python(code, FASTLOSS_NUM_THREADS=str(n)) for n in (1, 2, 3)}) == 1


def test_several_python_threads_at_once(large, threads):
    threads(3)
    z, t = large
    want, want_grad = LOSS.value_and_grad(z, t)
    small, small_grad = LOSS.value_and_grad(z[0, 0], t[0, 0])
    failures = []

    def work():
        out = np.empty_like(z)
        for _ in range(20):
            value, grad = LOSS.value_and_grad(z, t, out=out)
            again, again_grad = LOSS.value_and_grad(z[0, 0], t[0, 0])
            if (value, again) != (want, small) or not (np.array_equal(grad, want_grad) and np.array_equal(again_grad, small_grad)):
                failures.append(value)

    callers = [threading.Thread(target=work) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_first_calls_from_several_threads_compile_once(tmp_path):
    code = """
import threading, numpy as np, fastloss as fl
z = np.linspace(-3, 3, 100)
got = []
callers = [threading.Thread(target=lambda: got.append(fl.mse_loss(z, z + 1))) for _ in range(8)]
[c.start() for c in callers]
[c.join() for c in callers]
from fastloss.cpu.compile import statistics
print(len(set(got)), len(got), statistics["compiled"])"""
    assert run_python(code, FASTLOSS_CACHE_DIR=str(tmp_path)) == "1 8 1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_in_a_child_after_fork():
    code = """
import os, numpy as np, fastloss as fl
fl.set_num_threads(4)
z = np.linspace(-3, 3, 500_000)
want = fl.mse_loss(z, z + 1)
child = os.fork()
if child == 0:
    os._exit(0 if all(fl.mse_loss(z, z + 1) == want for _ in range(10)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), fl.mse_loss(z, z + 1) == want)"""
    assert run_python(code) == "0 True"


def test_workers_help_and_hold_no_array_afterwards(large, threads, no_team):
    threads(2)
    z, t = (x.copy() for x in large)
    LOSS(z, t)
    assert THREADS.pool._workers >= 1
    for _ in range(1000):
        if sys.getrefcount(z) <= 2:
            break
        threading.Event().wait(0.001)
    assert sys.getrefcount(z) <= 2


def test_a_pool_that_cannot_start_threads_works_alone(large, threads, no_team, monkeypatch):
    want = LOSS(*large)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    threads((THREADS.pool._workers if THREADS.pool else 0) + 3)
    assert LOSS(*large) == want


def test_numpy_numbers_of_threads(threads):
    threads(np.int64(2))
    assert fl.get_num_threads() == 2


def test_small_inputs_start_no_threads():
    code = """
import threading, numpy as np, fastloss as fl
z = np.zeros(20_000)
fl.mse_loss(z, z)
print(threading.active_count())"""
    assert run_python(code, FASTLOSS_NUM_THREADS="4") == "1"


def test_environment_variable():
    code = "import fastloss; print(fastloss.get_num_threads())"
    assert run_python(code, FASTLOSS_NUM_THREADS="3") == "3"
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    without = {k: v for k, v in os.environ.items() if k != "FASTLOSS_NUM_THREADS"}
    assert subprocess.run([sys.executable, "-c", code], env=without, capture_output=True, text=True, check=True).stdout.strip() == str(
        available
    )
    for bad in ("0", "-2", "many", "1.5", ""):
        with pytest.raises(subprocess.CalledProcessError) as error:
            run_python(code, FASTLOSS_NUM_THREADS=bad)
        assert f"FASTLOSS_NUM_THREADS is {bad!r}; accepted: an integer of 1 or more" in error.value.stderr


TEAM = """
import os, sys, torch, numpy as np, fastloss as fl
from fastloss.cpu.threads import THREADS
torch.set_num_threads(2)
fl.set_num_threads({threads})
z = np.linspace(-3, 3, 1_000_000)
entered = []
fl.mse_loss(z, z)
if THREADS.team is not None:
    run = THREADS.team.run
    THREADS.team.run = lambda kernel, frame, count: entered.append(count) or run(kernel, frame, count)
"""


def with_torch(code, threads=4, **environment):
    """Run code in a process that has imported PyTorch, which is set to use two threads."""
    pytest.importorskip("torch")
    return run_python(TEAM.format(threads=threads) + code, **environment)


@pytest.fixture
def openmp():
    torch = pytest.importorskip("torch")
    if not torch.backends.openmp.is_available():
        pytest.skip("this build of PyTorch has no OpenMP")


def test_pytorchs_team_computes_with_at_most_its_number_of_threads(openmp):
    code = """
fl.mse_loss(z, z + 1)
torch.set_num_threads(3)
fl.mse_loss(z, z + 1)
torch.set_num_threads(1)
fl.mse_loss(z, z + 1)
print(entered, THREADS.pool and THREADS.pool._workers)"""
    assert with_torch(code) == "[2, 3] None"
    assert with_torch("torch.set_num_threads(4); fl.mse_loss(z, z + 1); print(entered)", threads=3) == "[3]"


def test_pytorchs_team_is_found_when_pytorch_is_imported_after_a_call(openmp):
    code = """
import sys, numpy as np, fastloss as fl
from fastloss.cpu.threads import THREADS
z = np.zeros(500_000)
fl.mse_loss(z, z)
before = THREADS.team, "torch" in sys.modules
import torch
fl.mse_loss(z, z)
print(before, THREADS.team is not None)"""
    assert run_python(code) == "(None, False) True"


def test_the_environment_chooses_pool_or_team(openmp):
    code = "fl.mse_loss(z, z + 1); print(THREADS.team is not None, THREADS.pool and THREADS.pool._workers)"
    assert with_torch(code, FASTLOSS_THREADS="pool") == "False 3"
    assert with_torch(code, FASTLOSS_THREADS="openmp") == with_torch(code, FASTLOSS_THREADS="") == "True None"
    with pytest.raises(subprocess.CalledProcessError) as error:
        with_torch(code, FASTLOSS_THREADS="many")
    assert "FASTLOSS_THREADS is 'many'; accepted: pool, openmp" in error.value.stderr


def test_bit_identical_on_pool_and_team(openmp):
    code = """
for n in (1, 2, 4):
    fl.set_num_threads(n)
    v, g = fl.log_cosh_loss.value_and_grad(z, z * 0.3)
    print(v.hex(), hash(g.tobytes()))"""
    found = [x for kind in ("pool", "openmp") for x in with_torch(code, FASTLOSS_THREADS=kind, PYTHONHASHSEED="0").splitlines()]
    assert (len(found), len(set(found))) == (6, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_after_fork_leaves_pytorchs_team_alone(openmp):
    code = """
want = fl.mse_loss(z, z + 1)
child = os.fork()
if child == 0:
    os._exit(0 if fl.mse_loss(z, z + 1) == want and THREADS.team is None else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), fl.mse_loss(z, z + 1) == want, entered)"""
    assert with_torch(code) == "0 True [2, 2]"


def test_pytorchs_team_from_several_python_threads(openmp):
    code = """
from concurrent.futures import ThreadPoolExecutor
want = fl.mse_loss(z, z + 1)
with ThreadPoolExecutor(6) as callers:
    got = list(callers.map(lambda _: fl.mse_loss(z, z + 1), range(60)))
print(set(got) == {want})"""
    assert with_torch(code) == "True"


def test_the_team_is_that_of_the_library_which_pytorch_was_linked_to(openmp):
    code = """
import ctypes
class Info(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("name", ctypes.c_char_p), ("address", ctypes.c_void_p)]
def file_of(function):
    info = Info()
    ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    return info.file
print(file_of(THREADS.team._parallel) == file_of(ctypes.CDLL(torch._C.__file__).GOMP_parallel))"""
    assert with_torch(code) == "True"


POOL = """
import os, time, numpy as np, fastloss as fl
from fastloss.cpu import pool
z = np.linspace(-3, 3, 1_000_001)
fl.set_num_threads(1)
want = fl.log_cosh_loss(z, z * 0.3)
fl.set_num_threads(4)
"""


@pytest.mark.parametrize("semaphores", ["", "pool.has_semaphores = lambda library: False"])
def test_workers_sleep_and_wake(semaphores):
    code = """
for pause in (0, 0, 0.0001, 0.01, 0.2, 0.01):
    time.sleep(pause)
    assert all(fl.log_cosh_loss(z, z * 0.3) == want for _ in range(5))
from fastloss.cpu.threads import THREADS
print(THREADS.pool._workers)"""
    assert run_python(f"{POOL}{semaphores}{code}") == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_workers_that_call_python_end_before_python_does():
    """A worker that goes to sleep by a function of Python while Python ends has crashed the process."""
    code = """
import atexit
def count():
    time.sleep(0.1)
    print(len(os.listdir("/proc/self/task")) - before)
atexit.register(count)  # runs last
time.sleep(0.1)  # the thread that compiled ends
before = len(os.listdir("/proc/self/task"))
pool.has_semaphores = lambda library: False
assert fl.log_cosh_loss(z, z * 0.3) == want
print(len(os.listdir("/proc/self/task")) - before >= 3)"""
    assert run_python(POOL + code).split() == ["True", "0"]


def test_workers_where_the_system_tells_no_cpus():
    code = """
del os.sched_setaffinity, os.sched_getaffinity
os.name = "nt"
left = []
pool.leave = lambda cpu, least: left.append(cpu)
for _ in range(20):
    assert fl.log_cosh_loss(z, z * 0.3) == want
    time.sleep(0.002)
print(left)"""
    assert run_python(POOL + code) == "[]"


def test_a_call_does_not_wait_for_a_worker_that_sleeps():
    code = """
import ctypes, threading
awake = threading.Event()
kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
wait = kind(lambda address: awake.wait() and 0 or 0)
post = kind(lambda address: 0)
pool.has_semaphores = lambda library: False
pool.python_semaphores = lambda: (wait, post)
before = fl.log_cosh_loss(z, z * 0.3)  # the workers start, help or not, and go to sleep
time.sleep(0.2)
during = [fl.log_cosh_loss(z, z * 0.3) for _ in range(3)]
awake.set()
time.sleep(0.2)
print({before, *during, fl.log_cosh_loss(z, z * 0.3)} == {want})
os._exit(0)"""
    assert run_python(POOL + code.replace("os._exit(0)", "import sys; sys.stdout.flush(); os._exit(0)")) == "True"


def test_a_call_waits_for_a_worker_that_has_begun():
    begun, finished, caller = threading.Event(), [], threading.get_ident()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def kernel(frame):
        if threading.get_ident() == caller:
            begun.wait(20)
        else:
            begun.set()
            time.sleep(0.05)
            finished.append(frame)

    workers = pool.Pool()
    workers.run(kernel, 7, 2)
    assert finished == [7]
    pool.end(workers._idle)


def test_workers_are_shared_by_several_python_threads():
    code = """
from concurrent.futures import ThreadPoolExecutor
from fastloss.cpu.threads import THREADS
with ThreadPoolExecutor(8) as callers:
    got = list(callers.map(lambda _: fl.log_cosh_loss(z, z * 0.3), range(80)))
print(set(got) == {want}, THREADS.pool._workers, len(THREADS.pool._idle))"""
    assert run_python(POOL + code) == "True 3 3"
