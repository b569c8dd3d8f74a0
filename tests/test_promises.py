"""docs/promises.md: each promise names the tests that hold it, and these exist and are part of the default run."""

import ast
import re
from functools import cache

import pytest

from tests.conftest import ROOT

TABLE = [line for line in (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
PROMISES = {cells[1].strip(): cells[-2] for cells in (re.split(r"(?<!\\)\|", line) for line in TABLE[2:])}


@cache
def functions_of(file: str) -> set[str]:
    """The test functions of a file that the default run does not leave out."""
    functions = [
        node for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    slow = {f.name for f in functions if "pytest.mark.slow" in map(ast.unparse, f.decorator_list)}
    return {f.name for f in functions if f.name.startswith("test_")} - slow


def test_no_two_promises_answer_the_same_fault():
    assert len(PROMISES) == len(TABLE) - 2 > 30


@pytest.mark.parametrize("fault", PROMISES)
def test_the_tests_that_hold_a_promise_exist(fault):
    names = re.findall(r"`([^`]*)`", PROMISES[fault])
    assert names and all(re.fullmatch(r"tests/[\w/]+\.py::test_\w+", name) for name in names), PROMISES[fault]
    for file, function in (name.split("::") for name in names):
        assert (ROOT / file).is_file(), f"docs/promises.md names {file}, which does not exist"
        assert function in functions_of(file), f"docs/promises.md names {function}, which {file} does not have"
