"""Methods × data sets: which is best, which is not significantly worse, and what is never compared."""

import pytest

import report
from tests.results.test_report_tables import run_values, sections_of, unfinished, write
from utils.results import page, render
from utils.results.comparison import Differences, make_comparisons

SEEDS = range(1, 6)
SPREAD = [0.0, 0.4, -0.3, 0.2, -0.1]


def three_methods(folder, *, dataset="my_set"):
    """Under ``sample`` simplecil is best, ranpac not significantly worse, tosca clearly worse; five seeds."""
    for seed, noise in zip(SEEDS, SPREAD, strict=True):
        for model, last in (("simplecil", 80 + noise), ("ranpac", 79.8 - noise), ("tosca", 60 + noise * 2)):
            write(folder, run_values(seed, model=model, last=last, dataset=dataset))


def comparison_of(folder, selections=("sample",)):
    (comparison,) = make_comparisons(sections_of(folder)[0], selections)
    return comparison


def marks(comparison) -> dict[str, list[str]]:
    table = comparison.table()
    return {row.cells[0].text: [cell.mark for cell in row.cells[table.labels :]] for row in table.rows}


def test_the_best_and_what_is_not_significantly_worse(tmp_path):
    three_methods(tmp_path)
    comparison = comparison_of(tmp_path)
    assert marks(comparison) == {"tosca": ["", ""], "simplecil": ["best", "best"], "ranpac": ["close", "close"]}
    assert {pair.difference.count for pair in comparison.pairs} == {5}
    notes = " ".join(comparison.table().notes)
    assert "With 5 shared seeds Wilcoxon's p cannot be below 0.0625" in notes
    assert "Too few" not in notes


def test_holm_counts_all_comparisons_of_a_measure(tmp_path):
    three_methods(tmp_path)
    three_methods(tmp_path, dataset="other")
    comparison = comparison_of(tmp_path)
    assert comparison.columns == ("my_set 2-2", "other 2-2")
    last = [pair for pair in comparison.pairs if pair.measure == "last"]
    smallest = min(last, key=lambda pair: pair.difference.p_t)
    assert smallest.p_holm == pytest.approx(4 * smallest.difference.p_t)  # two methods beside the best, two data sets


def test_too_few_seeds_are_named_and_nothing_is_marked_as_close(tmp_path):
    for seed in (1, 2):
        write(tmp_path, run_values(seed, model="simplecil", last=80.0), run_values(seed, model="ranpac", last=79.9))
    comparison = comparison_of(tmp_path)
    assert marks(comparison) == {"simplecil": ["best", "best"], "ranpac": ["", ""]}
    assert any(note.startswith("Too few seeds: 2 of 2") for note in comparison.table().notes)


def test_only_shared_seeds_are_paired(tmp_path):
    for seed in (1, 2, 3, 4):
        write(tmp_path, run_values(seed, model="simplecil", last=80.5 + seed))
    for seed in (2, 3, 4, 5):
        write(tmp_path, run_values(seed, model="ranpac", last=79.0 + seed))
    pair = next(pair for pair in comparison_of(tmp_path).pairs if pair.measure == "last")
    # over all seeds 83.0 and 82.5; over the three that both have 83.5 and 82.0
    assert (pair.difference.count, pair.difference.mean) == (3, 1.5)


def test_an_upper_bound_and_what_the_order_tells_are_never_the_best(tmp_path):
    for seed in SEEDS:
        write(tmp_path, run_values(seed, last=60.0), run_values(seed, model="simplecil", last=70.0))
        write(tmp_path, run_values(seed, model="linear_joint", last=99.0))
    comparison = comparison_of(tmp_path, None)
    rows = {" ".join(row.cells[0].text.split()): row for row in comparison.table().rows}
    assert set(rows) == {"tosca", "simplecil", "linear_joint (not continual)"}  # no batch, no oracle
    assert rows["simplecil"].cells[-1].mark == "best"
    assert rows["linear_joint (not continual)"].cells[-1].mark == ""


def test_batch_is_compared_apart_and_only_when_asked_for(tmp_path):
    three_methods(tmp_path)
    sections, _ = sections_of(tmp_path)
    assert [c.key for c in make_comparisons(sections)] == ["comparison"]
    single, batch = make_comparisons(sections, ["sample", "batch"])
    assert "order tells the task" in batch.title and batch.key == "comparison-batch"
    assert {entry.selection for entry in single.entries} == {"sample"}
    assert {(e.group.labels["method"], e.selection) for e in batch.entries} == {
        ("tosca", "batch"),
        ("simplecil", "sample"),
        ("ranpac", "sample"),
    }


def test_other_images_stand_in_a_column_of_their_own(tmp_path):
    for seed in SEEDS:
        write(tmp_path, run_values(seed, model="simplecil"), run_values(seed, model="ranpac", images=41))
    comparison = comparison_of(tmp_path)
    assert len(comparison.columns) == 2 and comparison.pairs == ()


def test_unfinished_runs_are_left_out_and_it_says_so(tmp_path):
    three_methods(tmp_path)
    write(tmp_path, unfinished(9, 1))
    comparison = comparison_of(tmp_path)
    assert all(entry.group.finished for entry in comparison.entries)
    assert comparison.table().notes[-1] == "Unfinished runs are left out (1)."


def test_one_method_alone_has_nothing_to_compare(tmp_path):
    write(tmp_path, run_values(1, model="simplecil"), run_values(2, model="simplecil"))
    assert make_comparisons(sections_of(tmp_path)[0]) == []


# -- formats ----------------------------------------------------------------------------------------------------------


def test_every_format_shows_the_marks(tmp_path):
    three_methods(tmp_path)
    comparison = comparison_of(tmp_path)
    best, close = "80.04 ± 0.27", "79.76 ± 0.27"
    plain = render.as_text([comparison])
    assert f"*{best}*" in plain and f"_{close}_" in plain and "*x*: the best" in plain
    styled = render.as_text([comparison], styled=True)
    assert f"\x1b[1m{best}\x1b[22m" in styled and f"\x1b[4m{close}\x1b[24m" in styled
    assert f"**{best}**" in render.as_markdown([comparison]) and f"<ins>{close}</ins>" in render.as_markdown(
        [comparison]
    )
    latex = render.as_latex([comparison])
    assert rf"\textbf{{{best}}}".replace("±", r"$\pm$") in latex
    assert rf"\underline{{{close}}}".replace("±", r"$\pm$") in latex
    html = page.as_html([], None, {}, [], [comparison])
    assert f"<strong>{best}</strong>" in html and f"<ins>{close}</ins>" in html


def test_marks_do_not_shift_the_columns_of_text(tmp_path):
    three_methods(tmp_path)
    lines = render.as_text([comparison_of(tmp_path)]).splitlines()
    ends = {len(line) for line in lines if line.startswith(("tosca", "simplecil", "ranpac"))}
    assert len(ends) == 1


def test_the_comparisons_stand_in_all_files(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    three_methods(tmp_path / "logs")
    out, html = tmp_path / "out", tmp_path / "page.html"
    assert report.main([str(tmp_path / "logs"), "--out", str(out), "--html", str(html), "--no-pictures"]) == 0
    assert "Methods and data sets" in capsys.readouterr().out
    for text in ((out / "tables.md").read_text(), (out / "tables.tex").read_text(), html.read_text()):
        assert "Differences to the best" in text and "Wilcoxon" in text


def test_a_line_of_differences_worked_by_hand(tmp_path):
    for seed, (a, b) in enumerate([(61.0, 60.0), (64.0, 62.0), (70.0, 67.0)]):
        write(tmp_path, run_values(seed, model="simplecil", last=a), run_values(seed, model="ranpac", last=b))
    rows = Differences(comparison_of(tmp_path)).table().rows
    last = next(row for row in rows if row.cells[1].text == "A_T")
    assert [cell.text for cell in last.cells[-6:]] == ["3", "2.00", "[-0.48, 4.48]", "0.0742", "0.2500", "0.0742"]
