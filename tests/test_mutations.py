"""The list of mutations that no test can see speaks of mutations that exist, each with its reason above it."""

from functools import cache

import pytest

from tests.mutate import TARGETS
from tests.mutations import ROOT, mutations

LINES = (ROOT / "tests" / "equivalent_mutations.txt").read_text(encoding="utf-8").splitlines()


@cache
def keys_of(file: str) -> set[str]:
    return {mutation.key for mutation in mutations(file)}


@pytest.mark.parametrize("key", [line for line in LINES if line and not line.startswith("#")])
def test_an_equivalent_mutation_exists(key):
    file = key.partition(": ")[0]
    assert file in TARGETS and key in keys_of(file)


def test_every_group_of_equivalent_mutations_has_its_reason():
    for group in "\n".join(LINES).split("\n\n"):
        assert group.startswith("# ") and group.rstrip().splitlines()[0].endswith((".", "prints"))


def test_a_target_s_tests_exist():
    for file, tests in TARGETS.items():
        assert all((ROOT / path).exists() for path in (file, *tests))
