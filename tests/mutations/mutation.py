"""`Mutation`: one way to break the package, with the tests that notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SIDES = {"cpu": "not stand-in", "cuda": "stand-in or cuda"}  # the tests of each side, as an expression for pytest's -k


class StaleMutationError(Exception):
    """Raised if the text that a mutation replaces is not found as often as its entry says."""


@dataclass(frozen=True)
class Mutation:
    """A change of one place in a file of the package."""

    name: str
    file: str  # relative to the package
    old: str
    new: str
    breaks: str  # one sentence: what is wrong then
    tests: tuple[str, ...]  # test files or node ids, relative to the folder of the tests
    count: int = 1  # how often `old` occurs in the file
    nth: int = 1  # the occurrence that is replaced, counted from 1
    select: str = ""  # expression for pytest's -k, for tests whose node ids are long
    survives: str = ""  # for a mutation that changes no result: the reason
    side: str = "cpu"

    def apply(self, text: str) -> str:
        """Return the text of the file with the change; raise StaleMutationError if `old` does not occur `count` times."""
        parts = text.split(self.old)
        if len(parts) - 1 != self.count:
            found = f"{self.old!r} occurs {len(parts) - 1} times in {self.file}, not {self.count}"
            raise StaleMutationError(f"{self.name}: {found}; correct its entry in tests/mutations/{self.side}.py")
        return self.old.join(parts[: self.nth]) + self.new + self.old.join(parts[self.nth :])

    def check(self, package: Path) -> None:
        """Raise StaleMutationError if the mutation does not apply to the package in a folder."""
        if self.apply(text := (package / self.file).read_text(encoding="utf-8")) == text:
            raise StaleMutationError(f"{self.name}: it changes nothing; correct its entry in tests/mutations/{self.side}.py")

    @property
    def expression(self) -> str:
        """The expression for pytest's -k that selects the tests."""
        return f"({SIDES[self.side]}) and ({self.select})" if self.select else SIDES[self.side]
