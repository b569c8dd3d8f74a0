"""Tables in every markup: what is marked and how wide; and what names from JSON files may not do to any of them."""

import re
import shutil
import subprocess
import warnings

import pytest

import report
from tests.results.test_report_tables import run_values, sections_of, write
from utils.files import atomic_write
from utils.results import escape, render
from utils.results.metrics import GLOSSARY
from utils.results.render import HTML, LATEX, MARKDOWN, TEXT, Cell, Picture, Table
from utils.results.tables import cost_tables, section_table

EVIL = '=cmd|x!A1 \x1b[2J\x9b]0;t\x07 \u202e <script>alert("1")</script> \\input{/etc/passwd} `b` ../../up 2²⁰ Ωλ'
TABLE = Table(
    "a-key",
    "a title",
    ("method", "Ā", "last A_T"),
    1,
    (
        (Cell("a"), Cell("80.04 ± 0.27", "best"), Cell("−1.00")),
        (Cell("a"), Cell("79.76 ± 0.27", "close"), Cell("–")),
        (Cell("b"), Cell("1.00 †"), Cell("2.00")),
    ),
    ("p ≥ 0.05",),
)


# -- one table, every markup ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markup", "lines"),
    [
        (TEXT, ["method Ā last A_T", "a *80.04 ± 0.27* −1.00", "_79.76 ± 0.27_ –", "- p ≥ 0.05"]),
        (
            MARKDOWN,
            ["## a title", "| a | **80.04 ± 0.27** | −1.00 |", "| | <ins>79.76 ± 0.27</ins> | – |", "- p ≥ 0.05"],
        ),
        (LATEX, [r"method & $\bar{A}$ & last $A_T$ \\", r"a & \textbf{80.04 $\pm$ 0.27} & $-$1.00 \\"]),
        (LATEX, [r"\addlinespace", r"b & 1.00 $\dagger$ & 2.00 \\", r"\label{tab:a-key}", r"p $\geq$ 0.05"]),
        (HTML, ['<tr><td>a</td><td class="n"><strong>80.04 ± 0.27</strong></td><td class="n">−1.00</td></tr>']),
        (HTML, ["<h2>a title</h2>", "<h1>Results</h1>", "<li>p ≥ 0.05</li>", "<dt>Ā</dt><dd>a mean</dd>"]),
    ],
    ids=["text", "markdown", "latex", "more latex", "row", "page"],
)
def test_a_table_in_every_markup(markup, lines):
    text = render.write([TABLE], markup, {"Ā": "a mean"}, "Results")
    written = [re.sub(r" +(?=</td>)|(?<=\">) +", "", " ".join(line.split())) for line in text.splitlines()]
    assert [line for line in lines if line not in written] == []


def test_marks_do_not_shift_the_columns_of_text():
    rows = [line for line in render.as_text([TABLE]).splitlines() if "±" in line]
    assert [line.index(".76" if "79" in line else ".04") for line in rows] == [rows[0].index(".04")] * 2


def test_pictures_stand_in_the_page_alone(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG")
    picture = Picture("what <it> shows", path)
    assert 'alt="what &lt;it&gt; shows" src="data:image/png;base64,iVBORw=="' in render.write([picture], HTML)
    assert render.write([picture, TABLE], LATEX) == render.write([TABLE], LATEX)


def test_no_line_for_a_terminal_is_longer_than_120_columns_and_no_number_is_lost(tmp_path):
    cost = {"cost": dict.fromkeys(("Eval (ms/smp)", "Train (GFLOPs)", "Peak Train Mem. (MB)"), 1234.5)}
    for model in ("tosca", "tosca_white", "knn"):
        write(
            tmp_path, *(run_values(s, model=model, precision="p" * 30, views=v) | cost for s in (1, 2) for v in (1, 2))
        )
    sections, _ = sections_of(tmp_path)
    tables = [section_table(sections[0]), *cost_tables(sections)]
    text = render.as_text(tables, GLOSSARY)
    assert max(map(len, text.splitlines())) <= 120
    for table in tables:
        for cell in (cell for row in table.rows for cell in row[table.labels :]):
            assert cell.text in text
        assert text.count("(further columns)") > 0


def test_names_that_are_cut_for_a_terminal_keep_both_ends():
    keys = ("first_session", "first_session_lr", "first_session_weight_decay")
    names = (*keys, *(f"another key of a long name, {number}" for number in range(4)), "measure")
    table = render.Table("key", "title", names, len(names) - 1, ((render.Cell("none"),) * len(names),))
    head = render.as_text([table], {}).splitlines()[2].split("  ")[: len(keys)]
    assert len({name.strip() for name in head}) == len(keys)
    for name, key in zip(map(str.strip, head), keys, strict=True):
        first, _, last = name.partition("…")
        assert key.startswith(first) and key.endswith(last)
    assert "…" in "".join(head)


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [(99.5, 0.8, "[98.70, 100.00]"), (0.3, 0.5, "[0.00, 0.80]"), (50.0, 1.0, "[49.00, 51.00]"), (50.0, None, "–")],
)
def test_an_interval_ends_where_percentages_do(mean, half, text):
    assert render.interval_text(mean, half, (0, 100)) == text


# -- LaTeX ------------------------------------------------------------------------------------------------------------


def test_latex_escapes_what_it_would_take_for_commands():
    assert escape.latex("my_set 50% & #1 {x} ~ ^ $ \\ – ± − 2²⁰") == (
        r"my\_set 50\% \& \#1 \{x\} \textasciitilde{} \textasciicircum{} \$ \textbackslash{} -- $\pm$ $-$ 2U+00B2U+2070"
    )
    assert escape.latex("[1] *") == "{[}1] {*}", "after the end of a row they would be its options"
    assert escape.latex("Ā and A_T, not DATA_T or A_T_x") == r"$\bar{A}$ and $A_T$, not DATA\_T or A\_T\_x"


@pytest.fixture
def tex(tmp_path):
    """The file of tables that has everything: comparison, sections, differences, costs, and names from anywhere."""
    logs = tmp_path / "logs"
    logs.mkdir()
    cost = {"cost": {"Eval (ms/smp)": 1.5, "Train (GFLOPs)": 2.0}}
    for seed, noise in enumerate([0.0, 0.4, -0.3]):
        for model, last in (("simplecil", 80 + noise), ("ranpac", 79.8 - noise), ("linear_joint", 90.0)):
            write(logs, run_values(seed, model=model, last=last) | cost)
        write(logs, run_values(seed, dataset=EVIL, precision=EVIL, flow="$é_ß"))
    with warnings.catch_warnings():
        assert report.main([str(logs), "--out", str(tmp_path / "out"), "--no-pictures"]) == 0
    return tmp_path / "out" / "tables.tex"


def test_latex_has_no_letter_that_the_encoding_t1_lacks(tex):
    code = "\n".join(line for line in tex.read_text().splitlines() if not line.startswith("%"))
    assert {c for c in code if not c.isascii()} <= set("éß")
    assert not re.search(r"(?<!\\)_", re.sub(r"\$A_T\$|\\label\{.*\}", "", code))
    assert "\\input{" not in code and r"\textbackslash{}input\{" in code
    labels = re.findall(r"\\label\{tab:(.*)\}", code)
    assert len(labels) == len(set(labels)) > 4
    for body in re.findall(r"\\begin\{tabular\}\{(.*?)\}(.*?)\\end\{tabular\}", code, re.S):
        assert {line.count(" &") for line in body[1].splitlines() if "&" in line} == {len(body[0]) - 1}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_compiles(tex):
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}\begin{document}"
    (tex.parent / "paper.tex").write_text(head + r"\input{tables}\end{document}")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    made = subprocess.run(command, cwd=tex.parent, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-2000:]


# -- names from anywhere ----------------------------------------------------------------------------------------------


@pytest.fixture
def evil_runs(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    write(folder, run_values(1, dataset=EVIL, flow=EVIL, precision=EVIL), run_values(1, dataset=EVIL, precision="b"))
    return folder


def test_the_terminal_gets_no_character_that_steers_it(evil_runs, capsys):
    (evil_runs / "bad\x1b[2J\n.json").write_text("{")
    assert report.main([str(evil_runs), "--out", str(evil_runs / "out"), "--no-pictures"]) == 0
    shown = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "\\x1b[2J" in shown


def test_pages_and_markdown_show_tags_as_text_with_as_many_cells_as_the_head(evil_runs):
    (section,), _ = sections_of(evil_runs)
    table = section_table(section)
    html, text = render.write([table], HTML, {}, EVIL), render.write([table], MARKDOWN)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r"(?<!\\)(<script|`b`)", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(table.header) + 1}


def test_files_have_plain_names_and_stay_in_their_folder(evil_runs, tmp_path, monkeypatch):
    figures = pytest.importorskip("utils.results.figures")
    monkeypatch.setattr(figures, "save", lambda _, *paths: [atomic_write(path, b"picture") for path in paths])
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
