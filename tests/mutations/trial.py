"""Run the tests on a mutated copy of the package. The working tree is never changed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tests.mutations.mutation import Mutation

ROOT = Path(__file__).parents[2]
COPIED = ("fastloss", "bench", "tests", "pyproject.toml")
NONE_SELECTED = 5  # pytest's exit status if no test was selected
PYTEST = ("-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider")


class TrialError(Exception):
    """Raised if the tests cannot judge a mutation: they fail without it, or none is selected."""


@dataclass(frozen=True)
class Outcome:
    """What the tests said about one mutation."""

    mutation: Mutation
    verdict: str  # "killed", "timeout" or "survived"
    seconds: float
    detail: str = ""  # the first test that failed

    @property
    def is_expected(self) -> bool:
        """Whether the mutation is killed, or survives with an explanation."""
        return (self.verdict == "survived") == bool(self.mutation.survives)


class Copy:
    """A copy of the package and its tests in a folder, in which one mutation at a time is applied.

    Kernels are compiled into the user's cache of kernels. The key of a kernel contains the sources, or its own text, so a mutant
    never finds a kernel of the unchanged code that it would compile differently.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder)

    def check_unchanged(self, mutations: Iterable[Mutation], timeout: float) -> None:
        """Run the tests of all mutations on the unchanged code; raise TrialError if one of them fails."""
        selected = defaultdict(set)
        for mutation in mutations:
            selected[mutation.expression].update(mutation.tests)
        for expression, tests in selected.items():
            status, output = self.run_tests(sorted(tests), expression, timeout)
            if status:
                raise TrialError(f"the tests fail without a mutation:\n{output}")

    def try_mutation(self, mutation: Mutation, timeout: float) -> Outcome:
        """Apply a mutation, run its tests, and undo it."""
        path = self.folder / "fastloss" / mutation.file
        text, start = path.read_text(encoding="utf-8"), perf_counter()
        path.write_text(mutation.apply(text), encoding="utf-8")
        try:
            status, output = self.run_tests(mutation.tests, mutation.expression, timeout)
        finally:
            path.write_text(text, encoding="utf-8")
        if status == NONE_SELECTED:
            raise TrialError(f"{mutation.name}: its tests select nothing:\n{output}")
        verdict = "timeout" if status is None else "killed" if status else "survived"
        return Outcome(mutation, verdict, perf_counter() - start, reason(status, output))

    def run_tests(self, tests: Iterable[str], expression: str, timeout: float) -> tuple[int | None, str]:
        """Run tests in the copy; return pytest's exit status, or None after the timeout, and its output."""
        command = [sys.executable, *PYTEST, "-k", expression, *(f"tests/{test}" for test in tests)]
        # Python compares the time of a source with that of its bytecode only to the second, so bytecode is not stored.
        environment = os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests have started
                if isinstance(error, subprocess.TimeoutExpired):
                    return None, f"not finished after {timeout:g} s"
                raise
        return process.returncode, output


def reason(status: int | None, output: str) -> str:
    """Return why a mutation counts as killed: the first failed test, or what ended the process."""
    if failed := re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE):
        return failed[1]
    if status is not None and status < 0:
        return f"the process ended by {signal.Signals(-status).name}"
    lines = output.strip().splitlines()
    return lines[-1] if status != 0 and lines else ""
