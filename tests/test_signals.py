"""Signals while kernels are compiled and computed: handlers that call losses or fork, and Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no timer signals and no fork")

START = """
import os, signal, sys, numpy as np, fastloss as fl
z, said = np.ones(100, np.float32), []
def interrupt(*_):
    raise KeyboardInterrupt
def call(*_):
    said.append(float(fl.mse_loss(z, 0 * z)))
def fork(*_):
    child = os.fork()
    if child == 0:
        os._exit(int(fl.l1_loss(z, 0 * z)))
    said.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.signal(signal.SIGALRM, {"interrupt": interrupt, "call": call, "fork": fork}[sys.argv[1]])
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
"""
COMPILE = """
try:
    fl.binary_cross_entropy_with_logits.value_and_grad(z, 0 * z)
    while not said:  # the computer is faster than the timer
        pass
except KeyboardInterrupt:
    said.append("interrupted")
value, grad = fl.binary_cross_entropy_with_logits.value_and_grad(z, 0 * z)
print(*said, value.round(5), grad[0].round(5))
"""
COMPUTE = """
fl.set_num_threads(2)
big = np.ones(50_000_000, np.float32)
out = np.zeros_like(big)
kernel = fl.mse_loss.value_and_grad
kernel(big, big, out=out)
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[3]))
try:
    while True:
        kernel(big, big, out=out)
except KeyboardInterrupt:
    out[...] = 7
    time_to_write = sum(range(3_000_000))
    print((out == 7).all())
"""


def run(code, *arguments, cache):
    environment = os.environ | {"FASTLOSS_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.alike
@pytest.mark.parametrize("delay", ["0.02", "0.1", "0.4", "0.8"])  # while llvmlite is imported, Numba is imported, and a kernel is compiled
@pytest.mark.parametrize(("handler", "said"), [("call", "1.0"), ("fork", "1"), ("interrupt", "interrupted")])
def test_a_signal_while_a_kernel_is_compiled(tmp_path, handler, said, delay):
    assert run(START + COMPILE, handler, delay, cache=tmp_path) == f"{said} 1.31326 0.00731"


def test_after_ctrl_c_the_output_is_no_longer_written(tmp_path):
    assert run(START + COMPUTE, "interrupt", "1000", "0.5", cache=tmp_path) == "True"


def test_a_fork_while_another_thread_compiles(tmp_path):
    code = """
import os, threading, time, numpy as np, fastloss as fl
z = np.ones(100, np.float32)
thread = threading.Thread(target=lambda: fl.mse_loss(z, z))
thread.start()
for delay in (0.1, 0.4):
    time.sleep(delay)
    child = os.fork()
    if child == 0:
        os._exit(int(fl.l1_loss(z, 0 * z)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
thread.join()"""
    assert run(code, cache=tmp_path).split() == ["1", "1"]


@pytest.mark.parametrize("what", ["computing", "compiling"])
def test_the_process_ends_while_threads_are(tmp_path, what):
    code = """
import sys, threading, time, numpy as np, fastloss as fl
z = np.ones(400_000, np.float32)
def work():
    while True:
        fl.mse_loss.value_and_grad(z, z)
if sys.argv[1] == "computing":
    fl.set_num_threads(2)
    fl.mse_loss.value_and_grad(z, z)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)"""
    assert run(code, what, cache=tmp_path) == ""
