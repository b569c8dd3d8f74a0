"""The run's log file: it holds every line, and a log that cannot be written ends the run."""

import logging
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.logs import logging_to

log = logging.getLogger("test")


def test_lines_within_go_to_the_file_and_later_ones_do_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with logging_to(tmp_path / "deeper" / "run.log"):
        log.info("within")
    log.info("after")
    (line,) = (tmp_path / "deeper" / "run.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith("[test_logs.py] => within")


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
