"""Builds: results that are computed once, each on a thread of its own, such as a compiled kernel.

Python runs signal handlers in the main thread, at any moment. If the main thread compiled, a handler that calls a loss or forks would
find the compiler half-way, or wait for a lock that its own thread holds; and Ctrl-C could leave Numba imported in part. A thread of a
build never runs a handler, so nothing interrupts it.
"""

from __future__ import annotations

import _thread
import atexit
import functools
import importlib
import os
import threading
from collections.abc import Callable
from typing import Any

PATIENCE = 20.0  # seconds that a fork, or the end of the process, waits for the builds of other threads

_results: dict[Any, Any] = {}  # by key
_running: dict[int, Build] = {}  # by identity
_one_at_a_time = threading.RLock()  # held only by threads of builds


class Build:
    """A result that a thread of its own computes."""

    def __init__(self, key: Any, make: Callable[[], Any]) -> None:
        self.key, self.make = key, make
        self.error: BaseException | None = None
        self.is_done = False
        self.lock = _thread.allocate_lock()  # released when the build is done
        self.thread = 0

    def start(self) -> None:
        """Compute the result on a new thread; on the caller's if it is one of a build, or if the system allows no more threads.

        `threading.Thread` is not used: its `start` holds a lock in which a signal handler that starts a thread would wait for ever.
        """
        self.lock.acquire()
        if any(build.thread == _thread.get_ident() for build in list(_running.values())):
            self.run()
            return
        try:
            _running[id(self)] = self
            _thread.start_new_thread(self.run, ())
        except RuntimeError:
            self.run()
        except BaseException:  # Ctrl-C
            _running.pop(id(self), None)
            raise

    def run(self) -> None:
        """Compute the result, unless another build of the same key has done so."""
        self.thread = _thread.get_ident()
        try:
            with _one_at_a_time:
                if self.key not in _results:
                    _results[self.key] = self.make()
        except BaseException as error:
            self.error = error
        finally:
            _running.pop(id(self), None)
            self.is_done = True
            self.lock.release()

    def wait(self, seconds: float = float("inf")) -> None:
        """Wait until the build is done.

        A signal handler may interrupt this, wait for the same build, or raise an exception, so the lock is not held on return and not
        waited for without end.
        """
        while not self.is_done and seconds > 0:
            if self.lock.acquire(timeout=0.05):
                self.lock.release()
            seconds -= 0.05


def built(key: Any, make: Callable[[], Any]) -> Any:
    """Return the result of `make()`, which is called once for each key."""
    if key not in _results:
        handle_forks()
        build = Build(key, make)
        build.start()
        build.wait()
        if build.error is not None:
            raise build.error
    return _results[key]


def wait_for_others() -> None:
    """Wait for the builds of other threads, before the process forks or ends.

    Their thread does not survive in a child, where the compiler's locks would stay locked.
    """
    for build in list(_running.values()):
        if build.thread != _thread.get_ident():
            build.wait(PATIENCE)


def after_fork_in_child() -> None:
    """Forget builds whose threads are gone."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()
    _running.clear()


@functools.cache
def handle_forks() -> None:
    """Let forks and the end of the process wait for builds. Called before the first build.

    `before` hooks run in the reverse order. Those of modules that a build imports take locks that the build may need, so these modules
    are imported first, and their hooks run after ours.
    """
    importlib.import_module("logging")
    importlib.import_module("concurrent.futures.thread")
    atexit.register(wait_for_others)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=wait_for_others, after_in_child=after_fork_in_child)
