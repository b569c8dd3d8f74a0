"""Where ``report.py`` writes, and that it needs neither torch nor a terminal that knows every character."""

import os
import subprocess
import sys

import pytest

import report
from tests.conftest import ROOT
from tests.results.test_report_tables import run_values, write

posix = pytest.mark.skipif(os.name != "posix", reason="devices and links as on POSIX")


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs", run_values())
    return tmp_path / "logs"


def start(logs, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "report.py"), str(logs), "--no-pictures", *arguments]
    return subprocess.run(command, capture_output=True, cwd=logs.parent, env={**os.environ, **environment}, check=False)


def test_no_torch_is_needed(logs, tmp_path):
    (tmp_path / "blocked").mkdir()
    for name in ("torch", "torchvision", "timm"):
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ImportError('{name} is not there')")
    found = start(logs, PYTHONPATH=str(tmp_path / "blocked"))
    assert (found.returncode, found.stderr) == (0, b"")


@posix
@pytest.mark.parametrize("option", ["--html", "--out"])
def test_a_link_is_followed_and_stays_a_link(logs, tmp_path, option):
    target = tmp_path / ("real.html" if option == "--html" else "real_folder")
    link = tmp_path / "link.html"
    link.symlink_to(target)
    if option == "--out":
        target.mkdir()
    assert report.main([str(logs), "--no-pictures", "--out", str(tmp_path / "out"), option, str(link)]) == 0
    assert link.is_symlink() and target.exists()


@posix
def test_devices_pipes_and_folders_are_refused_in_one_line(logs, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.html")
    (folder := tmp_path / "folder.html").mkdir()
    for option, place in (
        ("--html", str(tmp_path / "pipe.html")), ("--html", str(folder)), ("--out", "/dev/null"),
    ):  # fmt: skip
        assert report.main([str(logs), "--no-pictures", "--out", str(tmp_path / "out"), option, place]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert option in line and place in line
    assert not (tmp_path / "out").exists()  # known before anything is written


def test_a_page_replaces_nothing_but_a_page(logs, tmp_path, capsys):
    (run, *_) = logs.rglob("*.json")
    before = run.read_bytes()
    assert report.main([str(logs), "--no-pictures", "--out", str(tmp_path / "out"), "--html", str(run)]) == 2
    assert "give a name that ends in .html or .htm" in capsys.readouterr().err
    assert run.read_bytes() == before


def test_a_page_of_surrogates_is_written(tmp_path):
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs", run_values(dataset="\udcff\udcfe"))
    assert report.main([str(tmp_path / "logs"), "--no-pictures", "--out", str(tmp_path / "out")]) == 0
    assert "udcff" in (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")


def test_what_a_killed_report_left_is_removed_by_the_next(logs, tmp_path):
    page = tmp_path / "page.html"
    dead, at_work = (tmp_path / f".page.html.{process}.partial" for process in (2**30, os.getppid()))
    for partial in (dead, at_work):
        partial.write_bytes(b"half")
    assert report.main([str(logs), "--no-pictures", "--html", str(page)]) == 0
    assert "<html" in page.read_text() and not dead.exists() and at_work.exists()
