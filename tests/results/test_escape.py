"""What names from JSON files may not do to a terminal, a page, a spreadsheet, LaTeX or a folder."""

import re

import pytest

import report
from tests.results.test_report_tables import run_values, sections_of, write
from utils.files import atomic_write
from utils.results import escape, page, render

EVIL = '=cmd|x!A1 \x1b[2J\x9b]0;t\x07 \u202e <script>alert("1")</script> \\input{/etc/passwd} `b` ../../up'


@pytest.fixture
def evil_runs(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    write(folder, run_values(1, dataset=EVIL, flow=EVIL, precision=EVIL), run_values(1, dataset=EVIL, precision="b"))
    return folder


def test_the_terminal_gets_no_character_that_steers_it(evil_runs, capsys):
    assert report.main([str(evil_runs), "--out", str(evil_runs / "out"), "--no-pictures"]) == 0
    shown = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "\\x1b[2J" in shown


def test_a_file_name_cannot_steer_the_terminal_either(tmp_path, capsys):
    write(tmp_path, run_values())
    (tmp_path / "bad\x1b[2J\n.json").write_text("{")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--no-pictures"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_html_shows_tags_as_text(evil_runs):
    html = page.as_html(sections_of(evil_runs)[0], None, {}, [EVIL])
    assert html.count("<script") == 1, "the page's own script, which no run can write"
    assert "alert" not in html.partition("<script")[2] and "&lt;script&gt;" in html


def test_latex_has_no_command_of_theirs_and_plain_labels(evil_runs):
    text = render.as_latex(sections_of(evil_runs)[0])
    assert "\\input{" not in text.replace("\\input this", "") and r"\textbackslash{}input\{" in text
    (label,) = re.findall(r"\\label\{tab:(.*)\}", text)
    assert re.fullmatch(r"[A-Za-z0-9._=-]+", label)


def test_markdown_shows_tags_and_code_as_text(evil_runs):
    text = render.as_markdown(sections_of(evil_runs)[0])
    assert not re.search(r"(?<!\\)(<script|`b`)", text)


def test_files_have_plain_names_and_stay_in_their_folder(evil_runs, tmp_path, monkeypatch):
    drawing = pytest.importorskip("utils.results.drawing")
    monkeypatch.setattr(drawing, "save", lambda _, *paths: [atomic_write(path, b"picture") for path in paths])
    out = tmp_path / "a" / "out"
    assert report.main([str(evil_runs), "--out", str(out)]) == 0
    names = [path.relative_to(out).as_posix() for path in out.rglob("*")]
    assert names and all(re.fullmatch(r"[A-Za-z0-9._=-]+", name) for name in names)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["..", "/", ".hidden", "a/b", "con trol\x00", "é", ""])
def test_a_plain_name_is_plain_and_differs_from_others(text):
    name = escape.plain_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*", name)
    assert name != escape.plain_name(text + "?")


def test_a_name_that_is_plain_stays_as_it_is():
    assert escape.plain_name("my_set-2-2") == "my_set-2-2"
