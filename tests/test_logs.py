"""The run's log file: it holds every line, also those said before it, and a log that cannot be written ends the run."""

import io
import logging
import sys
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.logs import logging_to, logging_to_terminal, progress

log = logging.getLogger("test")


def test_lines_within_go_to_the_file_and_later_ones_do_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with logging_to(tmp_path / "deeper" / "run.log"):
        log.info("within")
    log.info("after")
    (line,) = (tmp_path / "deeper" / "run.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith("[test_logs.py] => within")


def test_what_is_said_before_a_log_opens_stands_first_in_it_and_only_there(tmp_path, capsys):
    handlers = list(logging.getLogger().handlers)
    with logging_to_terminal():
        log.info("before")
        for name in ("one", "two"):
            with logging_to(tmp_path / name):
                log.info("in %s", name)
            log.info("after %s", name)
    said = {
        name: [line.split("=> ")[1] for line in (tmp_path / name).read_text().splitlines()] for name in ("one", "two")
    }
    assert said == {"one": ["before", "in one"], "two": ["after one", "in two"]}
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        *("before", "in one", "after one", "in two", "after two")
    ]
    assert logging.getLogger().handlers == handlers  # a notebook that ran the command logs as before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_on_a_full_disk_ends_the_run_in_one_line_that_says_why():
    with logging_to(Path("/dev/full")), pytest.raises(UserError) as caught:
        logging.getLogger().error("anything")
    assert "the log cannot be written (No space left on device)" in str(caught.value)
    assert "log_dir" in str(caught.value)


def test_a_log_that_cannot_be_opened_is_one_line_that_names_file_and_key(tmp_path):
    (tmp_path / "run.log").mkdir()
    with pytest.raises(UserError) as caught, logging_to(tmp_path / "run.log"):
        raise AssertionError("the log was opened")
    expected = f"{tmp_path / 'run.log'} cannot be written (Is a directory); set log_dir to another folder"
    assert str(caught.value) == expected


def test_a_bar_that_no_terminal_shows_is_made_of_whole_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in progress(range(3), desc="bar"):
        sys.stderr.write("a line\n")
    lines = sys.stderr.getvalue().split("\n")
    assert lines[-1] == "" and lines.count("a line") == 3 and "\r" not in sys.stderr.getvalue()
    assert [line for line in lines if line != "a line" and not line.startswith("bar: ")] == [""]


class OnlyWrites:
    """What programs put in the place of standard error to have it in their log: it can do nothing but write."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("stderr", [None, OnlyWrites()], ids=["none", "only writes"])
def test_a_bar_needs_no_whole_standard_error(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(progress(range(3), desc="bar")) == [0, 1, 2]
    assert stderr is None or "bar: " in stderr.text
