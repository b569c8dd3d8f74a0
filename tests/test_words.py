"""Numbers in sentences: tasks count from 1, one thing is no plural, zero has no sign."""

import re

import pytest

from tests.conftest import ROOT
from utils.words import counted, fixed

PRODUCT = [
    path
    for pattern in ("*.py", "models/**/*.py", "utils/**/*.py", "backbone/*.py")
    for path in sorted(ROOT.glob(pattern))
]
NOUNS = "tasks|images|classes|files|runs|seeds|epochs|domains|modules|banks|arrays|problems|pictures|passes|labels"


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(1, "task", "1 task"), (0, "task", "0 tasks"), (2, "class", "2 classes"), (1, "pass", "1 pass")],
)
def test_one_thing_is_no_plural(number, noun, words):
    assert counted(number, noun) == words


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(-0.04, 1, "0.0"), (-0.06, 1, "-0.1"), (-0.0, 2, "0.00"), (7.25, 1, "7.2")]
)
def test_zero_has_no_sign(value, digits, text):
    assert fixed(value, digits) == text


def test_no_sentence_writes_a_count_before_a_plural_by_itself():
    """``f"{len(tasks)} tasks"`` would say ``1 tasks``; ``3 of {total} tasks`` and pairs of counts are fine."""
    direct = re.compile(rf"(?<!of )(?:\{{len\([^}}]*\)\}}|(?<![\w%(])%d) (?:{NOUNS})\b")
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in PRODUCT
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if direct.search(line) and not re.search(r"(of|and|has|over) (\{len\([^}]*\)\}|%d)", line)
    ]
    assert found == []


def test_no_error_counts_tasks_from_zero():
    from_zero = re.compile(r"""f["'][^"']*task \{[\w.]*(index|task|t)\}""")
    found = [str(path) for path in PRODUCT if from_zero.search(path.read_text(encoding="utf-8"))]
    assert found == []
