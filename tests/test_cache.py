"""The cache of machine code on disk: what is loaded from it, what is refused, and how large it becomes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from fastloss.kernel import cache
from fastloss.kernel.cache import Cache
from tests.test_process import FIRST_CALL
from tests.test_threads import run_python

NAME, OTHER = "0" * 64, "1" * 64
only_posix = pytest.mark.skipif(os.name != "posix", reason="the system has no owners and modes of files")


@pytest.fixture
def store(tmp_path):
    store = Cache(tmp_path / "cache")
    store.write(NAME, b"code")
    return store


def test_what_is_stored_is_read_and_only_by_the_user(store):
    assert store.read(NAME) == b"code"
    assert store.read(OTHER) is None
    if os.name == "posix":
        assert [path.stat().st_mode & 0o777 for path in (store.folder, store.folder / NAME)] == [0o700, 0o600]
    assert [path.name for path in store.folder.iterdir()] == [NAME]


@pytest.mark.parametrize("content", [b"", b"cut off", None, b"x" * 100])
def test_a_damaged_file_is_replaced(store, content):
    path = store.folder / NAME
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    assert store.read(NAME) is None
    assert store.find_or_make(NAME, lambda: b"new") == b"new"
    assert store.read(NAME) == b"new"
    assert not store.faults


def test_a_file_under_another_name_is_refused(store):
    shutil.copy(store.folder / NAME, store.folder / OTHER)
    assert store.read(OTHER) is None


@only_posix
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(store, mode):
    (store.folder / NAME).chmod(mode)
    assert store.read(NAME) is None
    (fault,) = store.faults
    assert f"{NAME} may be written by other users (mode {mode:o})" in fault
    assert store.read(NAME) is None
    assert len(store.faults) == 1
    assert store.find_or_make(NAME, lambda: b"new") == b"new"  # and is replaced by one that they may not write
    assert store.read(NAME) == b"new"


@only_posix
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_neither_read_nor_written(store, mode):
    store.folder.chmod(mode)
    assert store.read(NAME) is None
    assert store.find_or_make(OTHER, lambda: b"new") == b"new"
    assert not (store.folder / OTHER).exists()
    (fault,) = store.faults
    assert f"{store.folder} may be written by other users (mode {mode:o})" in fault


@only_posix
@pytest.mark.parametrize("of", ["file", "folder"])
def test_what_belongs_to_another_user_is_refused(store, monkeypatch, of):
    other = (store.folder / NAME if of == "file" else store.folder).stat().st_ino
    real = os.fstat

    def fstat(descriptor):
        status = real(descriptor)
        return os.stat_result([*status[:4], 12345, *status[5:]]) if status.st_ino == other else status

    monkeypatch.setattr(os, "fstat", fstat)
    assert store.read(NAME) is None
    assert "belongs to another user (uid 12345)" in store.faults[0]


@only_posix
def test_a_symbolic_link_is_refused(store, tmp_path):
    (store.folder / NAME).rename(tmp_path / "elsewhere")
    (store.folder / NAME).symlink_to(tmp_path / "elsewhere")
    assert store.read(NAME) is None


@only_posix
def test_the_caller_is_warned_once_and_gets_the_result(tmp_path):
    tmp_path.chmod(0o777)
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {FIRST_CALL.strip().replace(chr(10), chr(10) + "    ")}
    fl.mse_loss(z, z)
print(len(caught), caught[0].category.__name__, caught[0].filename, caught[0].message)"""
    compiled, warned = run_python(code, FASTLOSS_CACHE_DIR=str(tmp_path)).splitlines()
    assert compiled.startswith("1 0 ")
    assert warned.startswith(f"1 RuntimeWarning <string> {tmp_path} may be written by other users (mode 777)")
    assert not list(tmp_path.iterdir())


def test_the_kernels_used_longest_ago_are_deleted_first(store, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 2200)
    names = [f"{k}" * 64 for k in range(4)]
    for k, name in enumerate(names):
        store.write(name, b"x" * 500)
        os.utime(store.folder / name, (k, k))
    assert store.read(names[0])  # counts as a use
    store.write("a" * 64, b"x" * 500)
    assert {entry.name for entry in store.entries()} == {names[0], names[2], names[3], "a" * 64}


def test_an_interrupted_write_leaves_nothing_that_stays(store):
    old, new = store.folder / f"old{cache.UNFINISHED}", store.folder / f"new{cache.UNFINISHED}"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    store.write(OTHER, b"code")
    assert not old.exists()
    assert new.exists()  # another process may be writing it


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert run_python(FIRST_CALL, FASTLOSS_CACHE_DIR=str(tmp_path / "file" / "cache")).startswith("1 0 ")


def test_a_full_disk(store, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert store.find_or_make(OTHER, lambda: b"new") == b"new"
    assert [path.name for path in store.folder.iterdir()] == [NAME]


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_a_lock_that_another_process_holds(store, monkeypatch, patience):
    """It is waited for, but not for ever, and not after the other process has stored the code."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(cache, "PATIENCE", patience)
    with open(store.folder / (OTHER + cache.LOCK), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if patience:
            monkeypatch.setattr(time, "sleep", lambda _: store.write(OTHER, b"theirs"))
        assert store.find_or_make(OTHER, lambda: b"ours") == (b"theirs" if patience else b"ours")


@pytest.mark.slow
def test_many_cold_processes_compile_a_kernel_once(tmp_path):
    pytest.importorskip("fcntl")
    environment = os.environ | {"FASTLOSS_CACHE_DIR": str(tmp_path), "FASTLOSS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FIRST_CALL]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(64)]
    said = [process.communicate()[0].split()[:2] for process in processes]
    assert sorted(said) == [["0", "1"]] * 63 + [["1", "0"]]


@pytest.fixture
def no_variables(monkeypatch):
    for name in ("FASTLOSS_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="their folders of caches are elsewhere")
def test_the_default_folder(no_variables, tmp_path):
    no_variables.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "fastloss"
    no_variables.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == tmp_path / ".cache" / "fastloss"
    no_variables.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "fastloss"
    no_variables.setenv("FASTLOSS_CACHE_DIR", "~/mine")
    assert cache.cache_folder() == tmp_path / "mine"


def test_without_a_home_folder_nothing_is_cached(no_variables):
    def unknown(*_):
        raise RuntimeError("Could not determine home directory.")

    no_variables.setattr(Path, "home", unknown)
    assert cache.cache_folder() is None
    no_variables.setenv("FASTLOSS_CACHE_DIR", "~nobody-has-this-name/x")
    assert cache.cache_folder() is None
    store = Cache(None)
    assert store.find_or_make(NAME, lambda: b"code") == b"code"
    assert store.read(NAME) is None
    assert (store.entries(), store.clear(), store.faults) == ([], 0, [])


def test_the_command_shows_and_clears(store):
    def run(*arguments):
        environment = os.environ | {"FASTLOSS_CACHE_DIR": str(store.folder)}
        return subprocess.run(
            [sys.executable, "-m", "fastloss", "cache", *arguments], env=environment, capture_output=True, text=True, check=True
        ).stdout

    (store.folder / "notes.txt").write_text("not a kernel")
    assert str(store.folder) in run()
    assert "1 file," in run()
    assert run("--clear") == f"deleted 1 file from {store.folder}\n"
    assert "0 files," in run()
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]
    if os.name == "posix":
        store.folder.chmod(0o777)
        assert "may be written by other users (mode 777)" in run()


def test_no_warning_without_a_fault(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(NAME)
        assert not store.faults
