"""The manifest as a type: nothing is lost on the way to disk and back, and its size grows as the tasks do."""

import json
from dataclasses import replace

import pytest
import torch

from utils.errors import CheckpointError
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.manifest import BaseFacts, EpochStats, RunManifest, TaskRecord

SELECTIONS = ("batch", "sample", "oracle")


def record(tasks: int) -> TaskRecord:
    """The record of the last of ``tasks`` tasks, with numbers of full length."""
    rows = [100 / (3 + task) for task in range(tasks)]
    return TaskRecord(
        {
            name: {"top1": 1 / 3, "top5": 2 / 3, "per_task": rows, "groups": {"total": 1 / 3, "old": 0.0}}
            for name in SELECTIONS
        },
        {name: [[task + other for other in range(tasks)] for task in range(tasks)] for name in SELECTIONS[:2]},
        {name: {"right": rows, "wrong": [None] * tasks} for name in SELECTIONS[:2]},
        0.25,
        {"backbone": 10, "luca_per_task": 5},
        (EpochStats(1.5, 50.0), EpochStats(1 / 3, 200 / 3)),
        {"sample": {"per_class": rows}},
    )


def manifest(tasks: int) -> RunManifest:
    """Of a run of ``tasks`` tasks of one class, after all of them."""
    made = RunManifest(
        **{"identity": {"a": 1}, "config": {"b": [2]}, "seed": 3, "backbone": {}, "data": {}, "versions": {"c": "d"}},
        class_order=tuple(map(str, range(tasks))),
        task_sizes=(1,) * tasks,
        row_class=tuple(range(tasks)),
        missing_at_start=7,
        base=BaseFacts("folder", 1, 2, "sha", "old and new classes", 0),
        cost={"minutes": 0.5},
    )
    for task in range(tasks):
        made = made.with_task(record(task + 1))
    return made


def save(folder: CheckpointFolder, tasks: int) -> RunManifest:
    return folder.commit(manifest(tasks), {"sigma": torch.tensor(1.0)}, None, tasks - 1)


def test_json_and_back_is_the_same():
    made = manifest(3)
    assert RunManifest.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.finished and not replace(made, status="running").finished


def test_what_is_kept_beside_the_manifest_comes_back(tmp_path):
    made = save(CheckpointFolder(tmp_path), 4)
    assert CheckpointFolder(tmp_path).read_manifest() == made
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classifier3.pth",
        "evaluation3.manifest",
        "run.manifest",
    ]


def test_only_the_last_task_keeps_what_grows_with_the_tasks():
    *earlier, last = manifest(5).tasks
    assert last == record(5)
    for task, kept in enumerate(earlier):
        assert (kept.confusion, kept.entropy, kept.details) == ({}, {}, {})
        assert [result["per_task"] for result in kept.results.values()] == [
            result["per_task"] for result in record(task + 1).results.values()
        ]


def test_the_manifest_grows_as_the_tasks_do(tmp_path):
    sizes = {}
    for tasks in (50, 100, 200):
        save(CheckpointFolder(tmp_path / str(tasks)), tasks)
        sizes[tasks] = (tmp_path / str(tasks) / "run.manifest").stat().st_size
    assert sizes[200] - sizes[100] < 2.1 * (sizes[100] - sizes[50])


def test_what_stands_beside_it_grows_with_the_square_of_the_tasks_and_no_faster(tmp_path):
    sizes = {}
    for tasks in (50, 100, 200):
        save(CheckpointFolder(tmp_path / str(tasks)), tasks)
        sizes[tasks] = (tmp_path / str(tasks) / f"evaluation{tasks - 1}.manifest").stat().st_size
    assert sizes[200] < 4.5 * sizes[100] < 4.5 * 4.5 * sizes[50]


def test_an_old_manifest_that_held_everything_goes_on_and_is_then_kept_apart(tmp_path):
    folder, made = CheckpointFolder(tmp_path), manifest(3)
    unfinished = replace(made, tasks=made.tasks[:2], status="running")
    folder.write_manifest(unfinished)  # names no file beside it
    assert folder.read_manifest() == unfinished
    folder.commit(folder.read_manifest().with_task(record(3)), {"sigma": torch.tensor(1.0)}, None, 2)
    assert folder.read_manifest().tasks[2] == record(3)
    assert folder.read_manifest().tasks[0].results["sample"]["per_task"] == [100 / 3]
    assert '"per_task":' not in (tmp_path / "run.manifest").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "3"}, "'seed' is of another kind: str"),
        ({"seed": True}, "'seed' is of another kind: bool"),
        ({"tasks": [1]}, "'tasks' holds an item of another kind"),
        ({"task_sizes": [1, 1]}, "task_sizes [1, 1] do not fit its 3 rows"),
        ({"task_sizes": [3, 0]}, "task_sizes [3, 0] do not fit"),
        ({"row_class": [0, 1, 9]}, "row_class names classes that are not among the 3"),
        ({"row_class": [0, 1, -1]}, "row_class names classes that are not among the 3"),
        ({"tasks": [manifest(1).tasks[0].to_json()] * 4}, "results of 4 tasks, but 3 tasks"),
        ({"base": {"folder": 1}}, "base's 'folder' is of another kind"),
        ({"tasks": [{"results": {"sample": 3}}]}, "a task's 'results' holds a value of another kind"),
    ],
)
def test_a_manifest_of_another_shape_names_what_is_wrong(change, words):
    with pytest.raises(CheckpointError) as caught:
        RunManifest.from_json({**manifest(3).to_json(), **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("name", list(manifest(1).to_json().keys() - {"domains", "continual", "missing_at_start"}))
def test_what_is_absent_is_named(name):
    values = manifest(1).to_json()
    del values[name]
    if name in ("base", "cost", "format"):  # only where there is one; the reader of the file looks at the format
        RunManifest.from_json(values)
        return
    with pytest.raises(CheckpointError, match=f"'{name}' is absent"):
        RunManifest.from_json(values)
