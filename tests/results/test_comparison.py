"""Methods × data sets: which is best, which is not significantly worse, and what is never compared."""

import pytest

import report
from tests.results.test_report_tables import rows_of, run_values, sections_of, unfinished, write
from utils.results.comparison import make_comparisons

SEEDS = range(1, 6)
SPREAD = [0.0, 0.4, -0.3, 0.2, -0.1]


def three_methods(folder, *, dataset="my_set"):
    """Under ``sample`` simplecil is best, ranpac not significantly worse, tosca clearly worse; five seeds."""
    for seed, noise in zip(SEEDS, SPREAD, strict=True):
        for model, last in (("simplecil", 80 + noise), ("ranpac", 79.8 - noise), ("tosca", 60 + noise * 2)):
            write(folder, run_values(seed, model=model, last=last, dataset=dataset))


def comparison_of(folder, selections=("sample",)):
    ((table, differences),) = make_comparisons(sections_of(folder)[0], selections)
    return table, differences


def marks(table) -> dict[str, list[str]]:
    return {row[0].text: [cell.mark for cell in row[table.labels :]] for row in table.rows}


def of_last(differences) -> list[list[str]]:
    """The numbers of the comparisons of A_T."""
    rows = rows_of(differences)
    first = next(place for place, row in enumerate(rows) if row[1] == "A_T")
    return [row[3:] for row in rows[first:]]


def test_the_best_and_what_is_not_significantly_worse(tmp_path):
    three_methods(tmp_path)
    table, differences = comparison_of(tmp_path)
    assert marks(table) == {"tosca": ["", ""], "simplecil": ["best", "best"], "ranpac": ["close", "close"]}
    assert {row[4] for row in rows_of(differences)} == {"5"}
    notes = " ".join(table.notes)
    assert "With 5 shared seeds Wilcoxon's p cannot be below 0.0625" in notes
    assert "Too few" not in notes and "†" not in notes


def test_holm_counts_all_comparisons_of_a_measure(tmp_path):
    three_methods(tmp_path)
    three_methods(tmp_path, dataset="other")
    table, differences = comparison_of(tmp_path)
    assert table.header[-4:] == ("my_set 2-2 Ā", "my_set 2-2 A_T", "other 2-2 Ā", "other 2-2 A_T")
    row = next(row for row in of_last(differences) if row[0] == "ranpac")
    assert float(row[6]) == pytest.approx(min(1, 2 * float(row[4])), abs=2e-4)  # the smaller ones of tosca before it


def test_too_few_seeds_are_named_and_nothing_is_marked_as_close(tmp_path):
    for seed in (1, 2):
        write(tmp_path, run_values(seed, model="simplecil", last=80.0), run_values(seed, model="ranpac", last=79.9))
    table, _ = comparison_of(tmp_path)
    assert marks(table) == {"simplecil": ["best", "best"], "ranpac": ["", ""]}
    assert any(note.startswith("Too few seeds: 2 of 2") for note in table.notes)


def test_differences_that_are_the_same_under_every_seed_are_not_testable(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, run_values(seed, model="simplecil", last=80.0), run_values(seed, model="ranpac", last=79.0))
    table, differences = comparison_of(tmp_path)
    assert marks(table)["ranpac"] == ["", ""]
    assert [row[-3:] for row in rows_of(differences)] == [["not testable", "–", "–"]] * 2
    assert any(note.startswith("Not testable: 2 of 2") for note in table.notes)


def test_of_equal_means_all_are_the_best(tmp_path):
    for seed, last in enumerate([60.0, 61.0, 62.0]):
        write(
            tmp_path, run_values(seed, model="simplecil", last=last), run_values(seed, model="ranpac", last=122 - last)
        )
        write(tmp_path, run_values(seed, last=last - 30))
    table, _ = comparison_of(tmp_path)
    assert marks(table) == {"tosca": ["", ""], "simplecil": ["best", "best"], "ranpac": ["best", "best"]}


def test_a_row_of_other_seeds_is_never_the_best_by_its_own_mean(tmp_path):
    """Its seeds may have been easier; over those that it shares it is compared all the same."""
    for seed in SEEDS:
        write(tmp_path, run_values(seed, last=60.0 + seed), run_values(seed, model="simplecil", last=61.5 + 1.1 * seed))
    for seed in (3, 4, 5, 6):
        write(tmp_path, run_values(seed, model="ranpac", last=62.0 + seed + seed % 2))
    table, differences = comparison_of(tmp_path)
    assert marks(table) == {"tosca": ["", ""], "simplecil": ["best", "best"], "ranpac": ["close", "close"]}
    cells = {row[0]: row[-1] for row in rows_of(table)}
    assert cells["ranpac"].endswith(" †") and not cells["simplecil"].endswith("†")
    assert any(note.startswith("† Other seeds") for note in table.notes)
    # over the three that both have: (64.8 + 65.9 + 67) / 3 against (66 + 66 + 68) / 3
    assert next(row[1:3] for row in of_last(differences) if row[0] == "ranpac") == ["3", "−0.77"]


def test_an_upper_bound_and_what_the_order_tells_are_never_the_best(tmp_path):
    for seed in SEEDS:
        write(tmp_path, run_values(seed, last=60.0), run_values(seed, model="simplecil", last=70.0))
        write(tmp_path, run_values(seed, model="linear_joint", last=99.0))
    table, _ = comparison_of(tmp_path, None)
    found = marks(table)
    assert set(found) == {"tosca", "simplecil", "linear_joint (not continual)"}  # no batch, no oracle
    assert (found["simplecil"][-1], found["linear_joint (not continual)"][-1]) == ("best", "")


def test_batch_is_compared_apart_and_only_when_asked_for(tmp_path):
    three_methods(tmp_path)
    sections, _ = sections_of(tmp_path)
    assert [table.key for table, _ in make_comparisons(sections)] == ["comparison"]
    (single, _), (batch, _) = make_comparisons(sections, ["sample", "batch"])
    assert "order tells the task" in batch.title and batch.key == "comparison-batch"
    assert [row[0] for row in rows_of(single)] == ["tosca", "ranpac", "simplecil"]
    assert [row[:2] for row in rows_of(batch)] == [["tosca", "tosca_r"], ["ranpac", "–"], ["simplecil", "–"]]
    assert [row[2] for row in rows_of(batch)] == ["batch (class order)", "–", "–"]


def test_other_images_stand_in_a_column_of_their_own(tmp_path):
    for seed in SEEDS:
        write(tmp_path, run_values(seed, model="simplecil"), run_values(seed, model="ranpac", images=41))
    table, differences = comparison_of(tmp_path)
    assert len(table.header) == 1 + 4 and differences.rows == ()


def test_unfinished_runs_and_those_of_new_classes_alone_are_left_out_and_it_says_so(tmp_path):
    three_methods(tmp_path)
    write(tmp_path, unfinished(9, 1), run_values(8) | {"base": {"reported_from_task": 1}})
    table, _ = comparison_of(tmp_path)
    assert {row[-1].split()[0] for row in rows_of(table)} == {"60.08", "80.04", "79.76"}
    assert table.notes[-1] == "Left out: unfinished runs, and runs that tested new classes alone (2 rows)."


def test_one_method_alone_has_nothing_to_compare(tmp_path):
    write(tmp_path, run_values(1, model="simplecil"), run_values(2, model="simplecil"))
    assert make_comparisons(sections_of(tmp_path)[0]) == []


def test_the_comparison_stands_first_in_all_files(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    three_methods(tmp_path / "logs")
    out, html = tmp_path / "out", tmp_path / "page.html"
    assert report.main([str(tmp_path / "logs"), "--out", str(out), "--html", str(html), "--no-pictures"]) == 0
    said = capsys.readouterr().out
    for text in (said, (out / "tables.md").read_text(), (out / "tables.tex").read_text(), html.read_text()):
        assert text.index("Methods and data sets") < text.index("2 classes, then 2")
        assert text is said or ("Differences to the best" in text and "Wilcoxon" in text)


def test_a_line_of_differences_worked_by_hand(tmp_path):
    for seed, (a, b) in enumerate([(61.0, 60.0), (64.0, 62.0), (70.0, 67.0)]):
        write(tmp_path, run_values(seed, model="simplecil", last=a), run_values(seed, model="ranpac", last=b))
    (row,) = of_last(comparison_of(tmp_path)[1])
    assert row == ["ranpac", "3", "2.00", "[−0.48, 4.48]", "0.0742", "0.2500", "0.0742"]
