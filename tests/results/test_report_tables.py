"""Tables over runs: worked by hand, comparable or apart, and in every format."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import report
from utils.results import escape, page, render
from utils.results.cells import MeanStd, interval_text
from utils.results.cost import COLUMNS, PUBLISHED_COLUMNS
from utils.results.metrics import GLOSSARY
from utils.results.read import newest_of_each, read_runs
from utils.results.tables import glossary_markdown, make_cost_tables, make_sections


def run_values(
    seed: int = 1, *, model: str = "tosca", last: float = 60.0, weights: str = "a" * 64, images: int = 40, **keys: Any
) -> dict[str, Any]:
    """A run's JSON of two tasks; ``last`` is the accuracy after the second under ``sample``."""
    identity = {
        "dataset": "my_set", "scenario": "class", "init_cls": 2, "increment": 2, "model_name": model, "flow": "tosca_r",
        "l1": 0.0005, "augment_seed": seed, "seed": seed, "weights_sha256": weights,
        "images_sha256": {"train": f"{images}", "test": "0"},
    } | keys  # fmt: skip

    def result(final: float) -> dict[str, Any]:
        return {
            "top1_curve": [80.0, final], "top5_curve": [100.0, 99.0], "matrix": [[80.0, None], [70.0, final]],
            "average": (80 + final) / 2, "last": final, "forgetting": 10.0,
        }  # fmt: skip

    tosca, baseline = model == "tosca", {"sample": result(last)}
    return {
        "format": 1, "status": "finished", "seed": seed, "identity": identity, "continual": model != "linear_joint",
        "config": {"selection": "sample", "augment_seed": None, "model_name": model, "scenario": "class"},
        "backbone": {"name": "vit_x"}, "task_sizes": [2, 2],
        "data": {"classes": 4, "train_images": images, "test_images": 8, "images_sha256": identity["images_sha256"]},
        "results": {"batch": result(90.0), "sample": result(last), "oracle": result(95.0)} if tosca else baseline,
        "selection_accuracy": {"batch": [100.0, 75.0], "sample": [100.0, 50.0]} if tosca else {},
        "sparsity": [0.1, 0.2] if tosca else [], "confusion": {}, "entropy": {},
    }  # fmt: skip


def write(folder: Path, *runs: dict[str, Any], newer_by: float = 0) -> list[Path]:
    paths = []
    for values in runs:
        path = folder / f"run{len(list(folder.glob('*')))}.json"
        path.write_text(json.dumps(values))
        now = path.stat().st_mtime + newer_by
        os.utime(path, (now, now))
        paths.append(path)
    return paths


def sections_of(folder: Path):
    runs, _ = read_runs([folder])
    counted, notes = newest_of_each(runs)
    sections, empty = make_sections(counted)
    return sections, [*notes, *empty]


def number(section, selection: str, measure: str, group: int = 0):
    return section.groups[group].number(selection, measure)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_mean_and_sample_deviation_worked_by_hand(tmp_path):
    write(tmp_path, *(run_values(seed, last=last) for seed, last in ((1, 60.0), (2, 62.0), (3, 67.0))))
    (section,), _ = sections_of(tmp_path)
    (group,) = section.groups
    last, average = group.number("sample", "last"), group.number("sample", "average")
    assert (last.mean, last.count) == (63.0, 3)
    assert last.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))  # n − 1
    assert (average.mean, average.std) == (pytest.approx(71.5), pytest.approx(last.std / 2))
    assert group.number("sample", "selecting").mean == 50.0  # after the last task
    assert group.number("oracle", "selecting") is None
    assert "63.00 ± 3.61" in render.as_text([section])


def test_one_seed_has_no_deviation(tmp_path):
    write(tmp_path, run_values(last=60.0))
    (section,), _ = sections_of(tmp_path)
    line = next(line for line in render.as_text([section]).splitlines() if " sample " in line)
    assert line.split()[-5:] == ["70.00", "60.00", "10.00", "50.00", "1"]


def test_each_accuracy_stands_beside_the_name_of_its_selection(tmp_path):
    write(tmp_path, run_values(), run_values(model="simplecil"))
    (section,), _ = sections_of(tmp_path)
    rows = [(group.labels["method"], selection) for group, selection, _ in section.rows()]
    assert rows == [("tosca", "batch"), ("tosca", "sample"), ("tosca", "oracle"), ("simplecil", "sample")]
    assert [selection for _, selection, _ in section.rows(["sample"])] == ["sample", "sample"]


# -- what is averaged together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "column"), [({"weights": "b" * 64}, "weights"), ({"images": 41}, "images")], ids=["weights", "images"]
)
def test_incomparable_runs_are_never_averaged_and_it_says_so(tmp_path, other, column):
    write(tmp_path, run_values(1, last=60.0), run_values(2, last=70.0, **other))
    (section,), _ = sections_of(tmp_path)
    assert [len(group.runs) for group in section.groups] == [1, 1]
    assert column in section.columns
    assert section.groups[0].labels[column] != section.groups[1].labels[column]
    assert any(note.startswith("Not comparable, never averaged together") for note in section.notes)


def test_same_counts_but_other_images_are_apart_as_well(tmp_path):
    other = run_values(2)
    other["identity"]["images_sha256"] = other["data"]["images_sha256"] = {"train": "changed", "test": "0"}
    write(tmp_path, run_values(1), other)
    (section,), _ = sections_of(tmp_path)
    assert len(section.groups) == 2


def test_a_setting_is_a_column_only_where_it_differs(tmp_path):
    write(tmp_path, run_values(1), run_values(2), run_values(1, l1=0.0), run_values(2, l1=0.0))
    (section,), _ = sections_of(tmp_path)
    assert section.columns == ("method", "flow", "l1")
    assert [(group.labels["l1"], group.seeds) for group in section.groups] == [("0", [1, 2]), ("0.0005", [1, 2])]


def test_settings_that_a_baseline_does_not_read_do_not_part_its_runs(tmp_path):
    write(tmp_path, run_values(1, model="simplecil", l1=0.0), run_values(2, model="simplecil", l1=1.0), run_values(1))
    (section,), _ = sections_of(tmp_path)
    assert section.columns == ("method", "flow")
    assert [(group.name, group.seeds) for group in section.groups] == [("tosca (tosca_r)", [1]), ("simplecil", [1, 2])]


def test_splits_and_data_sets_have_tables_of_their_own(tmp_path):
    write(tmp_path, run_values(), run_values(increment=1), run_values(dataset="other"))
    sections, _ = sections_of(tmp_path)
    assert [section.key for section in sections] == ["my_set-2-1", "my_set-2-2", "other-2-2"]


def test_of_the_same_run_the_newest_counts_and_it_says_so(tmp_path):
    (old,) = write(tmp_path, run_values(last=10.0), newer_by=-100)
    (new,) = write(tmp_path, run_values(last=60.0))
    (section,), notes = sections_of(tmp_path)
    assert number(section, "sample", "last").mean == 60.0
    assert notes == [f"{old} is not counted: {new} is a newer run with the same settings and seed"]


def test_an_upper_bound_is_labelled(tmp_path):
    write(tmp_path, run_values(model="linear_joint"))
    (section,), _ = sections_of(tmp_path)
    assert section.groups[0].labels["method"] == "linear_joint (not continual)"
    assert any("upper bound" in note for note in section.notes)


def test_a_method_that_keeps_images_is_labelled(tmp_path):
    write(tmp_path, run_values(model="knn"))
    (section,), _ = sections_of(tmp_path)
    assert section.groups[0].labels["method"] == "knn (keeps all images)"


def unfinished(seed: int, tasks: int) -> dict[str, Any]:
    values = run_values(seed)
    for result in values["results"].values():
        result["top1_curve"], result["top5_curve"] = result["top1_curve"][:tasks], result["top5_curve"][:tasks]
        result["matrix"] = [row[:tasks] for row in result["matrix"][:tasks]]
    if not tasks:
        values["results"] = {}
    return values | {"status": "running"}


def test_unfinished_runs_are_marked_and_never_averaged_with_finished_ones(tmp_path):
    write(tmp_path, run_values(1), unfinished(2, 1), unfinished(3, 0))
    (section,), notes = sections_of(tmp_path)
    assert [group.labels["status"] for group in section.groups] == ["finished", "unfinished, 1 of 2 tasks"]
    assert [group.seeds for group in section.groups] == [[1], [2]]
    assert len(notes) == 1 and notes[0].endswith("is unfinished, no task is done yet")


# -- formats ----------------------------------------------------------------------------------------------------------


def test_latex_escapes_what_it_would_take_for_commands(tmp_path):
    assert escape.latex("my_set 50% & #1 {x} ~ ^ $ \\ – ±") == (
        r"my\_set 50\% \& \#1 \{x\} \textasciitilde{} \textasciicircum{} \$ \textbackslash{} -- $\pm$"
    )
    write(tmp_path, run_values(1), run_values(2))
    sections, _ = sections_of(tmp_path)
    text = render.as_latex(sections)
    code = "\n".join(line for line in text.splitlines() if not line.startswith(("%", r"\label")))
    assert re.findall(r"(?<!\\)_", code) == ["_"]  # the one of $A_T$
    assert "$A_T$" in code and r"tosca\_r" in code and r"60.00 $\pm$ 0.00" in code
    assert code.count(r"\toprule") == code.count(r"\bottomrule") == code.count(r"\begin{table}") == 1
    body = code[code.index(r"\midrule") : code.index(r"\bottomrule")]
    assert {line.count("&") for line in body.splitlines() if "&" in line} == {len(sections[0].table().header) - 1}
    assert code.isascii()


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [(99.5, 0.8, "[98.70, 100.00]"), (0.3, 0.5, "[0.00, 0.80]"), (50.0, 1.0, "[49.00, 51.00]")],
)
def test_an_interval_ends_where_percentages_do(mean, half, text):
    assert interval_text(MeanStd(mean, 1.0, 3, half)) == text


def test_on_a_narrow_screen_the_labels_of_a_row_share_one_cell(tmp_path):
    """So that its first numbers are seen; the browser shows either this cell or the others."""
    write(tmp_path, run_values())
    text = page.as_html(sections_of(tmp_path)[0], None, {}, [])
    head = re.search(r'<th class="short">(.*?)</th>', text)[1]
    assert head == "method, flow, selection"
    assert re.search(r'<td class="short">tosca, tosca_r, batch \(class order\)</td><td class="label">tosca</td>', text)
    narrow = text[text.index("@media (max-width: 40rem)") :]
    assert ".label { display: none; }" in narrow and ".short { display: table-cell;" in narrow


def test_markdown_rows_have_as_many_cells_as_the_head(tmp_path):
    write(tmp_path, run_values(1, precision="a|b"), run_values(1, precision="c"))
    text = render.as_markdown(sections_of(tmp_path)[0])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert glossary_markdown() in text


def test_the_glossary_is_told_word_for_word_everywhere(tmp_path):
    write(tmp_path, run_values())
    sections, _ = sections_of(tmp_path)
    html = page.as_html(sections, None, {}, [])
    for term, definition in GLOSSARY.items():
        assert f"- **{term}**: {definition}\n" in glossary_markdown()
        assert f"{term}: {definition}" in render.glossary_text()
        assert f"% {term}: {definition}\n" in render.as_latex(sections)
        assert f"<dt>{term}</dt><dd>{definition.replace(chr(39), '&#x27;')}</dd>" in html


# -- the command ------------------------------------------------------------------------------------------------------


def test_report_writes_all_files_and_names_what_it_skipped(tmp_path, capsys):
    logs = tmp_path / "logs"
    logs.mkdir()
    write(logs, run_values())
    (logs / "torn.json").write_text('{"format": 1, "sta')
    (logs / "foreign.json").write_text('{"name": "something else"}')
    (logs / "list.json").write_text("[1, 2]")
    (logs / "nan.json").write_text(json.dumps(run_values(last=float("nan"))))
    (logs / "cost.json").write_text(json.dumps(run_values() | {"cost": 5}))
    (logs / "costs.json").write_text(json.dumps(run_values() | {"cost": {"Params (M)": "many"}}))
    (logs / "shape.json").write_text(json.dumps(run_values() | {"results": 5}))
    out, page = tmp_path / "out", tmp_path / "page.html"
    assert report.main([str(logs), "--out", str(out), "--html", str(page), "--no-pictures"]) == 0
    told = capsys.readouterr().out
    for name in ("torn", "foreign", "list", "nan", "cost", "costs", "shape"):
        lines = [line for line in told.splitlines() if line.startswith("skipped") and f"{name}.json" in line]
        assert len(lines) == 1
    names = ["tables.md", "tables.tex"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert str(out / "tables.tex") in told
    assert "torn.json" in page.read_text(encoding="utf-8")


def test_nothing_readable_is_exit_code_2_and_one_line(tmp_path, capsys):
    for place in (tmp_path / "absent", tmp_path):
        assert report.main([str(place), "--out", str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_found_twice_counts_once(tmp_path):
    (path,) = write(tmp_path, run_values())
    runs, _ = read_runs([tmp_path, path])
    assert len(runs) == 1


def test_the_json_of_a_real_run_is_read_back(finished_run):
    runs, skipped = read_runs([Path(finished_run.config["log_dir"])])
    assert skipped == [] and len(runs) == 1
    (section,), _ = make_sections(runs)
    values = finished_run.json()
    assert number(section, "sample", "last").mean == values["results"]["sample"]["last"]
    assert values["glossary"] == GLOSSARY


def test_costs_stand_twice_each_with_its_account(tmp_path, capsys):
    cost = {name: 1.0 + index for index, name in enumerate(COLUMNS)} | dict.fromkeys(PUBLISHED_COLUMNS, 100.0)
    more = {name: value + 2 for name, value in cost.items()}
    write(tmp_path, run_values(1) | {"cost": cost}, run_values(2) | {"cost": more})
    (found,) = make_cost_tables(sections_of(tmp_path)[0])
    table = found.table()
    assert table.header == ("method", "flow", "account", *COLUMNS, "seeds")
    spent, published = ([cell.text for cell in row.cells] for row in table.rows)
    assert spent[:5] == ["tosca", "tosca_r", "as spent here", "2.000 ± 1.414", "3.000 ± 1.414"]
    assert published[:7] == ["", "", "as published", "–", "101.0 ± 1.4", "101.0 ± 1.4", "101.0 ± 1.4"]
    assert [published[-4:-1], spent[-1], published[-1]] == [["–"] * 3, "2", "2"]
    tex = render.as_latex([found])
    assert r"as spent here & 2.000 $\pm$ 1.414" in tex and r"as published & -- & 101.0 $\pm$ 1.4" in tex


def test_names_of_pictures_and_legends_hang_on_the_runs_alone(tmp_path):
    """Whatever else lies in the folder: another method, an unfinished run, another data set."""

    def of_the_first(folder: Path) -> tuple[str, str]:
        section = next(s for s in sections_of(folder)[0] if s.key.startswith("my_set-2-2"))
        group = next(g for g in section.groups if g.runs[0].identity["model_name"] == "tosca" and g.finished)
        return section.key, group.key

    write(tmp_path, run_values(1))
    alone = of_the_first(tmp_path)
    write(tmp_path, run_values(2), run_values(1, model="simplecil"), unfinished(3, 1), run_values(1, dataset="other"))
    assert of_the_first(tmp_path) == alone
    (section,) = (s for s in sections_of(tmp_path)[0] if s.key == "my_set-2-2")
    names = [group.name for group in section.groups]
    assert names == ["tosca (tosca_r)", "tosca (tosca_r, unfinished, 1 of 2 tasks)", "simplecil"]
    assert len({group.key for group in section.groups}) == 3


def test_a_picture_of_many_small_letters_has_the_width_of_the_page(tmp_path):
    """Such as the confusion of 200 classes with the names of the mistakes beside it."""
    write(tmp_path, run_values())
    (section,), _ = sections_of(tmp_path)
    files = [tmp_path / f"{width}.png" for width in (900, 1700)]
    for path in files:
        Image.new("L", (int(path.stem), 10)).save(path)
    text = page.as_html([section], None, {section.key: {"a run": [(path.stem, path) for path in files]}}, [])
    assert re.findall(r'<figure( class="whole")?>.*?<img alt="(\d+)"', text) == [
        ("", "900"),
        (' class="whole"', "1700"),
    ]
    assert ".whole { grid-column: 1 / -1; } .whole img { min-width: 60rem; }" in text
