"""A pool of threads. The threads of a call run the same kernel, which takes ranges from an atomic counter until none is left.

The caller's thread computes too, so a pool of n threads has n - 1 workers. Workers wait for jobs in machine code: a worker that
waited in Python would need the interpreter's lock to wake. After a job a worker stays awake for about a millisecond, and then
sleeps. A caller that has finished cancels the jobs that no worker has begun, so a call never waits for a worker to wake.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import ctypes
import functools
import os
import threading
from time import monotonic, sleep
from typing import Any, NamedTuple

from fastloss.cpu.compile import load_assembly
from fastloss.cpu.cpus import affinity
from fastloss.cpu.features import processor

# Looks at the state, some 20 ns each, before a worker sleeps: about a millisecond, as long as OpenMP's threads stay awake. Between them
# it lets other threads have its CPU.
SPINS = 40_000
ENDING = 1.0  # seconds that the end of the process waits for workers whose machine code calls functions of Python
CHECKED_AFTER = 0.1  # seconds after which a call looks whether the process may use other CPUs
LINE = 16  # fields of a worker, of 8 bytes: two cache lines, so that workers do not share one
UNKNOWN = -1  # for a CPU
CPU = 3  # position of the caller's CPU; before it are the state, the kernel and the frame, and a semaphore begins at 8

# A worker's state is IDLE, POSTED (there is a job), RUNNING or ASLEEP. `work` returns if it finds itself on the caller's CPU.
ASSEMBLY = """
DECLARE

define i64 @work(ptr %worker, ptr %wait, ptr %yield, ptr %get_cpu, i64 %spins) {
entry:
  %semaphore = getelementptr i64, ptr %worker, i64 8
  br label %awake
awake:
  br label %look
look:
  %spin = phi i64 [0, %awake], [%next, %again], [%next, %letting]
  %state = load atomic i64, ptr %worker acquire, align 8
  %posted = icmp eq i64 %state, 1
  br i1 %posted, label %take, label %idle
idle:
  %next = add i64 %spin, 1
  %tired = icmp ugt i64 %next, %spins
  br i1 %tired, label %sleep, label %again
again:
  PAUSE
  %count = and i64 %next, 127
  %often = icmp eq i64 %count, 0
  br i1 %often, label %letting, label %look
letting:
  call i32 %yield()
  br label %look
sleep:
  %slept = cmpxchg ptr %worker, i64 0, i64 3 seq_cst seq_cst
  %before = extractvalue {i64, i1} %slept, 0
  %missed = icmp eq i64 %before, 1
  br i1 %missed, label %awake, label %waiting
waiting:
  call i32 %wait(ptr %semaphore)
  br label %awake
take:
  %cpu_at = getelementptr i64, ptr %worker, i64 3
  %callers = load i64, ptr %cpu_at
  %here = call i32 %get_cpu()
  %cpu = sext i32 %here to i64
  %equal = icmp eq i64 %cpu, %callers
  %known = icmp sge i64 %callers, 0
  %same = and i1 %equal, %known
  br i1 %same, label %leave, label %begin
leave:
  ret i64 0
begin:
  %taken = cmpxchg ptr %worker, i64 1, i64 2 seq_cst seq_cst
  %mine = extractvalue {i64, i1} %taken, 1
  br i1 %mine, label %run, label %awake
run:
  %kernel_at = getelementptr ptr, ptr %worker, i64 1
  %frame_at = getelementptr ptr, ptr %worker, i64 2
  %kernel = load ptr, ptr %kernel_at
  %frame = load ptr, ptr %frame_at
  %last = icmp eq ptr %kernel, null
  br i1 %last, label %end, label %compute
end:
  ret i64 1
compute:
  call void %kernel(ptr %frame)
  store atomic i64 0, ptr %worker release, align 8
  br label %awake
}

define void @share(ptr %frame, ptr %kernel, ptr %workers, i64 %count, ptr %post, ptr %yield, i64 %cpu) {
entry:
  br label %posting
posting:
  %k = phi i64 [0, %entry], [%k1, %posted]
  %more = icmp ult i64 %k, %count
  br i1 %more, label %one, label %posted_all
one:
  %worker_at = getelementptr ptr, ptr %workers, i64 %k
  %worker = load ptr, ptr %worker_at
  %kernel_at = getelementptr ptr, ptr %worker, i64 1
  %frame_at = getelementptr ptr, ptr %worker, i64 2
  %cpu_at = getelementptr i64, ptr %worker, i64 3
  store ptr %kernel, ptr %kernel_at
  store ptr %frame, ptr %frame_at
  store i64 %cpu, ptr %cpu_at
  %before = atomicrmw xchg ptr %worker, i64 1 seq_cst
  %asleep = icmp eq i64 %before, 3
  br i1 %asleep, label %wake, label %posted
wake:
  %semaphore = getelementptr i64, ptr %worker, i64 8
  call i32 %post(ptr %semaphore)
  br label %posted
posted:
  %k1 = add i64 %k, 1
  br label %posting
posted_all:
  %ends = icmp eq ptr %kernel, null
  br i1 %ends, label %done, label %compute
compute:
  call void %kernel(ptr %frame)
  br label %ending
ending:
  %j = phi i64 [0, %compute], [%j1, %ended]
  %left = icmp ult i64 %j, %count
  br i1 %left, label %last, label %done
last:
  %ender_at = getelementptr ptr, ptr %workers, i64 %j
  %ender = load ptr, ptr %ender_at
  %cancelled = cmpxchg ptr %ender, i64 1, i64 0 seq_cst seq_cst
  br label %check
check:
  %tries = phi i64 [0, %last], [%tries1, %pausing], [0, %yielding]
  %now = load atomic i64, ptr %ender acquire, align 8
  %running = icmp eq i64 %now, 2
  br i1 %running, label %wait, label %ended
wait:
  %tries1 = add i64 %tries, 1
  %long = icmp ugt i64 %tries1, 100
  br i1 %long, label %yielding, label %pausing
pausing:
  PAUSE
  br label %check
yielding:
  call i32 %yield()
  br label %check
ended:
  %j1 = add i64 %j, 1
  br label %ending
done:
  ret void
}
"""
LEAVES = 0  # returned by `work` of a worker that finds itself on the caller's CPU
PAUSES = {  # by LLVM's name of the processor: the declaration and the call of an instruction that waits for some cycles
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}


class System(NamedTuple):
    """The functions of the system that the machine code calls."""

    wait: Any  # wait until a semaphore is more than 0, and decrement it
    post: Any  # increment a semaphore
    yield_cpu: Any
    get_cpu: Any  # returns the CPU of the calling thread, or UNKNOWN
    calls_python: bool  # whether one of them is written in Python


class Code(NamedTuple):
    """The functions of `ASSEMBLY`."""

    work: Any
    share: Any


@functools.cache
def code() -> Code:
    """Compile the machine code of the pool."""
    declaration, call = PAUSES.get(processor(), ("", ""))
    work, share = load_assembly(ASSEMBLY.replace("DECLARE", declaration).replace("PAUSE", call), "work", "share")
    return Code(ctypes.CFUNCTYPE(ctypes.c_int64)(work), ctypes.CFUNCTYPE(None)(share))


@functools.cache
def system() -> System:
    """Return the functions of the C library, or others in their place where it lacks them."""
    integer = ctypes.CFUNCTYPE(ctypes.c_int)
    library = ctypes.CDLL(None) if os.name == "posix" else None
    yield_cpu = getattr(library, "sched_yield", None)
    # In a virtual machine, Linux often wakes a worker on the caller's CPU although another CPU is idle (a halted virtual CPU looks as
    # if the host had preempted it), and the two threads then take turns. So a worker that wakes on the caller's CPU moves to another
    # for good: 1,000,000 elements of BCE every 5 ms took 1.57 ms instead of 1.88 (12 processes each), every 20 ms 1.75 instead of 2.37.
    get_cpu = getattr(library, "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
    semaphores = (library.sem_wait, library.sem_post) if library is not None and has_semaphores(library) else None
    wait, post = semaphores or python_semaphores()
    calls_python = None in (semaphores, yield_cpu, get_cpu)
    return System(wait, post, yield_cpu or integer(lambda: 0), get_cpu or integer(lambda: UNKNOWN), calls_python)


def has_semaphores(library: Any) -> bool:
    """Whether the C library has semaphores in memory. That of macOS has functions with their names, which fail."""
    memory = (ctypes.c_int64 * 8)()
    return hasattr(library, "sem_init") and library.sem_init(memory, 0, 0) == 0


def python_semaphores() -> tuple[Any, Any]:
    """Return functions that wait and post like those of the C library, with Python's semaphores."""
    made: dict[int, threading.Semaphore] = {}
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)

    def wait(address: int) -> int:
        made.setdefault(address, threading.Semaphore(0)).acquire()
        return 0

    def post(address: int) -> int:
        made.setdefault(address, threading.Semaphore(0)).release()
        return 0

    return kind(wait), kind(post)


class Worker:
    """A thread that waits for jobs until it is ended, or the process ends."""

    def __init__(self, cpus: set[int] | None) -> None:
        self.fields = (ctypes.c_int64 * (2 * LINE))()
        address = -(-ctypes.addressof(self.fields) // 128) * 128  # of the first whole pair of cache lines
        self.state = ctypes.c_void_p(address)
        self.cpu = ctypes.c_int64.from_address(address + 8 * CPU)
        self.has_ended = False
        # The `start` of threading.Thread holds a lock in which a signal handler that calls a loss would wait for ever.
        _thread.start_new_thread(self.work, (cpus, affinity(0)))

    def work(self, cpus: set[int] | None, inherited: set[int] | None) -> None:
        """Work on `cpus`, rather than on those inherited from the thread that started the worker. Leave the caller's CPU if found there."""
        if cpus is not None and inherited != cpus and inherited == affinity(0):
            set_affinity(cpus)
        least, functions = len(affinity(0) or ()) // 2, system()
        while code().work(self.state, functions.wait, functions.yield_cpu, functions.get_cpu, ctypes.c_int64(SPINS)) == LEAVES:
            leave(self.cpu.value, least)
            self.cpu.value = UNKNOWN  # it has been tried, and the job is taken now wherever the thread runs
        self.has_ended = True


class Pool:
    """Workers, which start when first needed, and end with the process, or when the process may use other CPUs than before."""

    def __init__(self) -> None:
        self._cpus = affinity(os.getpid())
        self._checked = monotonic()
        self._idle: list[Worker] = []
        self._workers = 0
        self._started: list[Worker] = []  # those that have to end before Python does
        self._is_closed = False
        self._changing = threading.Lock()  # is never waited for: a signal handler may have interrupted the thread that holds it

    def run(self, kernel: Any, frame: Any, threads: int) -> None:
        """Call `kernel(frame)` on the caller's thread and on `threads - 1` workers; return when all that have begun are finished.

        There are fewer workers if other callers have them, or if the system allows no more threads.
        """
        if monotonic() - self._checked > CHECKED_AFTER:
            self._follow_cpus()
        if self._workers < threads - 1:
            self._start(threads - 1)
        idle = self._idle
        workers = take(idle, threads - 1)
        try:
            share(kernel, frame, workers, system().get_cpu())
        finally:
            idle.extend(workers)
            if idle is not self._idle:
                end(idle)

    def _start(self, count: int) -> None:
        """Start workers until there are `count`. If another call is doing so, fewer workers help this one."""
        if self._changing.acquire(blocking=False):
            try:
                while self._workers < count and not self._is_closed:
                    self._idle.append(worker := Worker(self._cpus))
                    self._workers += 1
                    if system().calls_python:
                        self._end_before_python(worker)
            except RuntimeError:  # the system allows no more threads
                pass
            finally:
                self._changing.release()

    def _end_before_python(self, worker: Worker) -> None:
        """Let a worker end when the process does, because its machine code calls functions of Python, which then no longer run."""
        if not self._started:
            atexit.register(self._close, os.getpid())
        self._started.append(worker)

    def _close(self, process: int) -> None:
        """End the workers, and start no others. Workers that compute for other threads are not waited for beyond `ENDING`."""
        if process != os.getpid():  # the workers are the parent's
            return
        self._is_closed, until = True, monotonic() + ENDING
        end(self._idle)
        while not all(worker.has_ended for worker in self._started) and monotonic() < until:
            sleep(0.001)

    def _follow_cpus(self) -> None:
        """Replace the workers if the process may use other CPUs than when they started. Those at work end when they have finished."""
        self._checked = monotonic()
        if (cpus := affinity(os.getpid())) != self._cpus and self._changing.acquire(blocking=False):
            try:
                old, self._idle, self._workers, self._cpus = self._idle, [], 0, cpus
            finally:
                self._changing.release()
            end(old)


def take(idle: list[Worker], count: int) -> list[Worker]:
    """Take up to `count` workers from a list. Other callers may have the others."""
    taken: list[Worker] = []
    with contextlib.suppress(IndexError):
        while len(taken) < count:
            taken.append(idle.pop())
    return taken


def share(kernel: Any, frame: Any, workers: list[Worker], cpu: int) -> None:
    """Call `kernel(frame)` on the caller's thread, which runs on `cpu`, and on workers; return when all that have begun are finished."""
    pointers = (ctypes.c_void_p * len(workers))(*(worker.state.value for worker in workers))
    functions = system()
    code().share(frame, kernel, pointers, ctypes.c_int64(len(workers)), functions.post, functions.yield_cpu, ctypes.c_int64(cpu))


def end(workers: list[Worker]) -> None:
    """Remove workers from a list, and let their threads end. A worker without a kernel in its job returns."""
    with contextlib.suppress(IndexError):  # empty
        while True:
            share(None, None, [workers.pop()], UNKNOWN)


def leave(cpu: int, least: int) -> None:
    """Move the calling thread away from a CPU, for good, unless it may then use fewer CPUs than `least`, or none.

    A thread never gains a CPU: those that it may use may have been set by other code.
    """
    others = os.sched_getaffinity(0) - {cpu}
    if others and len(others) >= least:
        set_affinity(others)


def set_affinity(cpus: set[int]) -> None:
    """Let the calling thread run on these CPUs. If the system does not permit it, the thread stays as it is."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cpus)
