"""Each promise of docs/promises.md has tests that hold it, which exist and are part of the default run."""

import ast
import re
from functools import cache

import pytest

from tests.conftest import ROOT

PROMISES = re.findall(r"^- \*\*(.+?)\*\*:", (ROOT / "docs" / "promises.md").read_text(encoding="utf-8"), re.MULTILINE)


def index() -> dict[str, list[str]]:
    """tests/promises.txt: the tests by promise."""
    held, tests = dict[str, list[str]](), list[str]()
    for line in (ROOT / "tests" / "promises.txt").read_text(encoding="utf-8").splitlines():
        if line[:1] == " ":
            tests.append(line.strip())
        elif line and line[0] != "#":
            assert line not in held, f"{line} stands twice"
            tests = held[line] = []
    return held


@cache
def functions_of(file: str) -> set[str]:
    """The test functions of a file that the default run does not leave out."""
    functions = [
        node for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    slow = {f.name for f in functions if "pytest.mark.slow" in map(ast.unparse, f.decorator_list)}
    return {f.name for f in functions if f.name.startswith("test_")} - slow


def test_the_index_is_that_of_the_page_in_its_order():
    assert len(PROMISES) > 20
    assert list(index()) == PROMISES


@pytest.mark.parametrize("promise", PROMISES)
def test_the_tests_that_hold_a_promise_exist(promise):
    tests = index()[promise]
    assert tests
    for name in tests:
        file, _, function = name.partition("::")
        assert (ROOT / file).is_file(), f"tests/promises.txt names {file}, which does not exist"
        assert function in functions_of(file), f"tests/promises.txt names {function}, which {file} does not have"
