"""The page of growth has the form that its commands write: phases, columns and words; the numbers are measured."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import many_tasks, scale
from benchmarks.pages import exponent, marks, publish
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "scale.md"


def form(lines: Sequence[str]) -> set[str]:
    """Words without numbers; of the rows of a table, whose length depends on the sizes, the first cell."""
    words = [re.sub(r"-?\d[\d,]*(\.\d+)?|nan", "#", line) for line in lines]
    return {word.split(" | ")[0] if word.startswith("| ") else word for word in words if not word.startswith("|---")}


def part_of_page(command: str) -> list[str]:
    begin, end = marks(command)
    return PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip().split("\n")


def test_every_phase_of_a_run_is_simulated_and_stands_on_the_page(tmp_path: Path) -> None:
    copy = tmp_path / "scale.md"
    copy.write_bytes(PAGE.read_bytes())
    lines = scale.section([20, 40], [2, 3], dim=16)
    publish(copy, scale.COMMAND, lines)
    assert "\n".join(lines) in copy.read_text(encoding="utf-8")
    assert form(lines) == form(part_of_page(scale.COMMAND))
    phases = " ".join(form(lines))
    for phase in ("list", "hash", "bank|row", "stream", "statistics", "learning", "checkpoint", "evaluation", "predic"):
        assert re.search(phase, phases), phase


def test_many_tasks_of_one_class_stand_on_the_page_as_their_command_writes_them() -> None:
    times = {"learning": 2.0, "evaluation": 3.0, "bookkeeping": 1.0, "middle": 1024.0, "last": 2048.0}
    lines = many_tasks.section([2, 4], [times, {name: 2 * value for name, value in times.items()}], 100, "# CPUs")
    (row,) = (line for line in lines if line.startswith("| 4 "))
    assert row == "| 4 | 4.0 s | 6.0 s | 2.0 s | 500 ms | 2 KB | 4 KB |"
    (powers,) = (line for line in lines if line.startswith("| exponent"))
    assert powers == "| exponent | 1.00 | 1.00 | 1.00 | 0.00 | 1.00 | 1.00 |"
    assert lines[-1] == "Bookkeeping took 0.50 of the time of learning at 4 tasks."
    here, there = form(lines), form(part_of_page(many_tasks.COMMAND))
    assert {line for line in here if "CPUs" not in line} == {line for line in there if "CPUs" not in line}


def test_an_exponent_worked_by_hand() -> None:
    assert exponent([5, 10, 20], [7.0, 3.0, 12.0]) == 2.0


def test_a_page_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("words\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        publish(page, "benchmarks.scale", ["x"])
    assert page.read_text() == "words\n"
