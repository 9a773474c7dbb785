"""The table of mutations applies to the package, and a mutation is found by its tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.mutations import cpu, cuda
from tests.mutations.__main__ import MUTATIONS, main
from tests.mutations.mutation import StaleMutationError
from tests.mutations.trial import ROOT, Outcome


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_entry_applies(mutation):
    mutation.check(ROOT / "fastloss")
    assert all((ROOT / "tests" / test.partition("::")[0]).exists() for test in mutation.tests)


def test_names_are_unique_and_there_are_enough_mutations():
    assert max(Counter(mutation.name for mutation in MUTATIONS).values()) == 1
    assert (len(cpu.MUTATIONS) >= 50, len(cuda.MUTATIONS) >= 25) == (True, True)


def test_an_entry_that_no_longer_applies_is_named():
    with pytest.raises(StaleMutationError, match=r"row-mask-inclusive: 'gone' occurs 0 times in cpu/step.py, not 1"):
        replace(MUTATIONS[0], old="gone").apply("text")
    assert replace(MUTATIONS[0], old="a", new="b", count=3, nth=2).apply("aaa") == "aba"


def test_an_explanation_is_wrong_if_the_mutation_is_killed():
    explained = replace(MUTATIONS[0], survives="reason")
    assert [Outcome(x, v, 0.0).is_expected for x in (MUTATIONS[0], explained) for v in ("killed", "survived")] == [True, False, False, True]


def test_a_mutation_is_killed(capsys):
    assert main(["--only", "bounds-exclude-least"]) == 0
    assert "1 killed" in capsys.readouterr().out
    assert main(["--only", "unknown"]) == 1
