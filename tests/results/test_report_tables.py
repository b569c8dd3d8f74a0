"""Tables over runs: worked by hand, comparable or apart; and the command that makes them."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import report
from utils.results import render
from utils.results.metrics import BY_RELEASE, COLUMNS, EVAL_MS, TRAIN, terms
from utils.results.read import newest_of_each, read_runs
from utils.results.tables import cost_tables, make_sections, section_table


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
        "backbone": {"name": "vit_x"}, "task_sizes": [2, 2], "all_task_sizes": [2, 2], "backbone_forwards": 48,
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


def text_of(section) -> str:
    return render.as_text([section_table(section)])


def notes_of(section) -> str:
    return " ".join(section_table(section).notes)


def rows_of(table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


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
    assert "63.00 ± 3.61" in text_of(section)


def test_one_seed_has_no_deviation(tmp_path):
    write(tmp_path, run_values(last=60.0))
    (section,), _ = sections_of(tmp_path)
    line = next(line for line in text_of(section).splitlines() if " sample " in line)
    assert line.split()[-5:] == ["70.00", "60.00", "10.00", "50.00", "1"]


def test_each_accuracy_stands_beside_the_name_of_its_selection(tmp_path):
    write(tmp_path, run_values(), run_values(model="simplecil"))
    (section,), _ = sections_of(tmp_path)
    rows = rows_of(section_table(section))
    assert [(row[0], row[2]) for row in rows] == [
        ("tosca", "batch (class order)"), ("tosca", "sample"), ("tosca", "oracle (true task)"), ("simplecil", "–"),
    ]  # fmt: skip
    assert [row[2] for row in rows_of(section_table(section, ["sample"]))] == ["sample", "–"]


def test_forgetting_of_one_task_is_a_dash(tmp_path):
    values = run_values()
    for result in values["results"].values():
        result["forgetting"] = None
    write(tmp_path, values)
    (section,), _ = sections_of(tmp_path)
    assert {row[5] for row in rows_of(section_table(section))} == {"–"}


def test_what_is_not_chosen_is_not_called_the_module_of_lowest_entropy():
    """A method without modules answers ``sample``; only where there is a choice has that a definition."""
    assert set(terms([run_values(model="knn"), run_values(model="ranpac")])) == {"Ā", "A_T", "forgetting"}
    shown = terms([run_values()])
    assert "lowest entropy" in shown["sample"] and {"batch", "oracle", "selection accuracy"} <= set(shown)
    assert "lda" not in shown and "batch" not in terms([run_values()], ["sample"])


# -- what is averaged together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "column"),
    [
        ({"weights": "b" * 64}, "weights"),
        ({"images": 41}, "images"),
        ({"images_sha256": {"train": "as many, but others", "test": "0"}}, "images"),
    ],
    ids=["weights", "images", "other images"],
)
def test_incomparable_runs_are_never_averaged_and_it_says_so(tmp_path, other, column):
    write(tmp_path, run_values(1, last=60.0), run_values(2, last=70.0, **other))
    (section,), _ = sections_of(tmp_path)
    assert [len(group.runs) for group in section.groups] == [1, 1]
    assert column in section.columns
    assert section.groups[0].labels[column] != section.groups[1].labels[column]
    assert "Not comparable, never averaged together" in notes_of(section)


def test_a_setting_is_a_column_only_where_it_differs(tmp_path):
    write(tmp_path, run_values(1), run_values(2), run_values(1, l1=0.0), run_values(2, l1=0.0))
    (section,), _ = sections_of(tmp_path)
    assert section.columns == ("method", "flow", "l1")
    assert [(group.labels["l1"], group.seeds) for group in section.groups] == [("0", (1, 2)), ("0.0005", (1, 2))]


def test_settings_that_a_baseline_does_not_read_do_not_part_its_runs(tmp_path):
    write(tmp_path, run_values(1, model="simplecil", l1=0.0), run_values(2, model="simplecil", l1=1.0), run_values(1))
    (section,), _ = sections_of(tmp_path)
    assert section.columns == ("method", "flow")
    found = [(group.name, group.seeds) for group in section.groups]
    assert found == [("tosca (flow tosca_r)", (1,)), ("simplecil", (1, 2))]


def test_splits_and_data_sets_have_tables_of_their_own(tmp_path):
    other = run_values(increment=1) | {"task_sizes": [2, 1], "all_task_sizes": [2, 1]}
    write(tmp_path, run_values(), other, run_values(dataset="other"))
    sections, _ = sections_of(tmp_path)
    assert [section.key for section in sections] == ["my_set-2-1", "my_set-2-2", "other-2-2"]


def test_of_the_same_run_the_newest_counts_and_it_says_so(tmp_path):
    (old,) = write(tmp_path, run_values(last=10.0), newer_by=-100)
    (new,) = write(tmp_path, run_values(last=60.0))
    (section,), notes = sections_of(tmp_path)
    assert number(section, "sample", "last").mean == 60.0
    assert notes == [f"{old} is not counted: {new} is a newer run with the same settings and seed"]


@pytest.mark.parametrize(
    ("model", "label", "note"),
    [("linear_joint", "linear_joint (not continual)", "an upper bound"), ("knn", "knn (keeps all images)", "")],
)
def test_what_a_method_keeps_or_sees_is_in_its_label(tmp_path, model, label, note):
    write(tmp_path, run_values(model=model))
    (section,), _ = sections_of(tmp_path)
    assert section.groups[0].labels["method"] == label and note in notes_of(section)


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
    assert [group.seeds for group in section.groups] == [(1,), (2,)]
    assert len(notes) == 1 and notes[0].endswith("is unfinished, no task is done yet")


@pytest.mark.parametrize(
    ("sizes", "title", "key"),
    [
        ([4, 4, 2], "4 classes, then 4 (3 tasks)", "my_set-4-4"),
        ([4, 2, 4], "4 + 2 + 4 classes (3 tasks)", "my_set-4-2-4"),
        ([1, 1], "1 class, then 1 (2 tasks)", "my_set-1-1"),
        ([5], "5 classes (1 task)", "my_set-5-5"),
    ],
)
def test_the_title_tells_the_sizes_of_all_tasks(tmp_path, sizes, title, key):
    """Those of a continued run are not what ``init_cls`` and ``increment`` of its own config say."""
    write(tmp_path, run_values(init_cls=2, increment=4) | {"all_task_sizes": sizes})
    (section,), _ = sections_of(tmp_path)
    assert (section.title, section.key) == (f"my_set: {title}", key)


def test_a_continued_run_that_tested_new_classes_alone_is_marked(tmp_path):
    base = {"base": {"reported_from_task": 1}, "all_task_sizes": [2, 2, 2]}
    write(tmp_path, run_values(1) | base, run_values(2) | base | {"base": {"reported_from_task": 0}})
    (section,), _ = sections_of(tmp_path)
    assert {group.labels["status"] for group in section.groups} == {"finished", "new classes alone"}
    assert "did not test the classes learned before" in notes_of(section)


def test_rows_of_other_seeds_are_told_with_their_seeds(tmp_path):
    write(tmp_path, run_values(1), run_values(2), run_values(3, model="simplecil"))
    (section,), _ = sections_of(tmp_path)
    assert "tosca (flow tosca_r): 1, 2; simplecil: 3." in notes_of(section)


# -- the command ------------------------------------------------------------------------------------------------------


def test_report_writes_all_files_and_names_what_it_skipped(tmp_path, capsys):
    logs = tmp_path / "logs"
    logs.mkdir()
    write(logs, run_values())
    damaged = {
        "foreign": {"name": "something else"},
        "list": [1, 2],
        "nan": run_values(last=float("nan")),
        "cost": run_values() | {"cost": 5},
        "costs": run_values() | {"cost": {"Params (M)": "many"}},
        "shape": run_values() | {"results": 5},
        "curves": run_values() | {"task_sizes": [2, 2, 2]},
        "later": run_values() | {"format": 2},
    }
    (logs / "torn.json").write_text('{"format": 1, "sta')
    for name, values in damaged.items():
        (logs / f"{name}.json").write_text(json.dumps(values))
    out, page = tmp_path / "out", tmp_path / "page.html"
    assert report.main([str(logs), "--out", str(out), "--html", str(page), "--no-pictures"]) == 0
    told = capsys.readouterr().out
    for name in ("torn", *damaged):
        lines = [line for line in told.splitlines() if line.startswith("skipped") and f"{name}.json" in line]
        assert len(lines) == 1
    names = ["tables.md", "tables.tex"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert str(out / "tables.tex") in told
    text = page.read_text(encoding="utf-8")
    assert "<title>Results on my_set 2-2</title>" in text and "<dt>sample</dt>" in text and "<dt>lda</dt>" not in text


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
    assert values["glossary"] == terms([values])


def test_costs_stand_apart_by_account_and_by_what_the_bank_held(tmp_path):
    cost = {name: 1.0 + index for index, name in enumerate(COLUMNS)} | {EVAL_MS + BY_RELEASE: 100.0}
    cold, warm = {"cost": cost | {TRAIN: 70.0}}, {"cost": cost, "backbone_forwards": 8}
    write(tmp_path, run_values(1) | cold, run_values(2) | warm, run_values(3) | warm)
    (table,) = cost_tables(sections_of(tmp_path)[0])
    assert table.header == ("method", "flow", "account", *COLUMNS, "seeds")
    place = table.header.index(TRAIN)
    rows = rows_of(table)
    assert [(row[2], row[place], row[-1]) for row in rows] == [
        ("here, 48 images", "70.00", "1"), ("here, 8 images", "4.000 ± 0.000", "2"), ("release procedure", "–", "3"),
    ]  # fmt: skip
    assert rows[2][table.header.index(EVAL_MS)] == "100.0 ± 0.0"


def test_names_of_pictures_and_legends_hang_on_the_runs_alone(tmp_path):
    """Whatever else lies in the folder: another method, an unfinished run, another data set."""

    def of_the_first(folder: Path) -> tuple[str, str]:
        section = next(s for s in sections_of(folder)[0] if s.key.startswith("my_set-2-2"))
        group = next(g for g in section.groups if g.name == "tosca (flow tosca_r)")
        return section.key, group.key

    write(tmp_path, run_values(1))
    alone = of_the_first(tmp_path)
    write(tmp_path, run_values(2), run_values(1, model="simplecil"), unfinished(3, 1), run_values(1, dataset="other"))
    assert of_the_first(tmp_path) == alone
    (section,) = (s for s in sections_of(tmp_path)[0] if s.key == "my_set-2-2")
    names = [group.name for group in section.groups]
    assert names == ["tosca (flow tosca_r)", "tosca (flow tosca_r, unfinished, 1 of 2 tasks)", "simplecil"]
    assert len({group.key for group in section.groups}) == 3
