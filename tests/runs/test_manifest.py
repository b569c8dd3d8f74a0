"""The manifest as a type: nothing is lost on the way to disk and back, and its size grows as the tasks do."""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.errors import CheckpointError
from utils.files import json_lines
from utils.results.record import write_run_json
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.manifest import FEW_TASKS, BaseFacts, EpochStats, RunManifest, TaskRecord
from utils.runs.paths import RunPaths

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
        **{
            "identity": {"a": 1},
            "config": {"scenario": "class"},
            "seed": 3,
            "backbone": {},
            "data": {},
            "versions": {"c": "d"},
        },
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
    evaluations = [f"evaluation{task}.manifest" for task in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier3.pth", *evaluations, "run.manifest"]


def test_only_the_last_task_keeps_what_grows_with_the_tasks():
    *earlier, last = manifest(5).tasks
    assert last == record(5)
    for task, kept in enumerate(earlier):
        assert (kept.confusion, kept.entropy, kept.details) == ({}, {}, {})
        assert [result["per_task"] for result in kept.results.values()] == [
            result["per_task"] for result in record(task + 1).results.values()
        ]


def unfinished(tasks: int) -> RunManifest:
    """Of a run of 300 tasks of one class, after the first ``tasks``."""
    whole = tuple(range(300))
    made = replace(manifest(0), class_order=tuple(map(str, whole)), task_sizes=(1,) * 300, row_class=whole)
    for task in range(tasks):
        made = made.with_task(record(task + 1))
    return made


def bytes_of_one_task(folder: Path, tasks: int) -> dict[str, int]:
    """Bytes of each file that the task after ``tasks`` tasks writes, checkpoint and report; tensors are left out."""
    before = CheckpointFolder(folder).commit(unfinished(tasks), {"sigma": torch.tensor(1.0)}, None, tasks - 1)
    paths = RunPaths(folder / "logs", "run")
    write_run_json(paths, before)
    old = {path: path.stat().st_ino for path in folder.rglob("*")}
    after = CheckpointFolder(folder).commit(before.with_task(record(tasks + 1)), {}, None, tasks)
    write_run_json(paths, after)
    new = [path for path in folder.rglob("*") if path.is_file() and old.get(path) != path.stat().st_ino]
    return {re.sub(r"\d+", "", path.name): path.stat().st_size for path in new if path.suffix != ".pth"}


def test_what_a_task_writes_grows_as_the_tasks_before_it_do(tmp_path):
    at = {tasks: bytes_of_one_task(tmp_path / str(tasks), tasks) for tasks in (50, 100, 200)}
    assert set(at[50]) == {"run.manifest", "evaluation.manifest", "run.json", "run.csv", "run.epochs.csv"}
    for name in at[50]:
        small, middle, large = (at[tasks][name] for tasks in (50, 100, 200))
        assert small < middle < large, name
        assert large - middle < 2.2 * (middle - small), name  # 2: a line; 4: a square


def test_a_long_run_shows_what_grows_with_the_square_once_it_is_finished(tmp_path):
    paths = RunPaths(tmp_path, "run")
    for tasks, shown in ((FEW_TASKS, True), (FEW_TASKS + 1, False)):
        values = write_run_json(paths, unfinished(tasks))
        assert (len(values["results"]["sample"]["matrix"]), len(values["confusion"].get("sample", []))) == (
            (tasks, tasks) if shown else (0, 0)
        )
        assert isinstance(values["results"]["sample"]["forgetting"], float)
        assert len(values["epochs"]) == (tasks if shown else 0)
    values = write_run_json(paths, manifest(FEW_TASKS + 5))
    assert np.array(values["confusion"]["sample"]).shape == (FEW_TASKS + 5,) * 2
    matrix = np.array(values["results"]["sample"]["matrix"], dtype=float)
    assert np.isnan(matrix).sum() == (FEW_TASKS + 5) * (FEW_TASKS + 4) / 2  # the tasks that were not learned yet


@pytest.mark.skipif(os.name != "posix", reason="folders are flushed on POSIX alone")
def test_csvs_are_flushed_to_disk_at_the_end_alone(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    write_run_json(RunPaths(tmp_path / "running", "run"), unfinished(2))
    assert len(flushed) == 2  # the JSON and its folder
    write_run_json(RunPaths(tmp_path / "finished", "run"), manifest(2))
    assert len(flushed) == 2 + 3 * 2


def test_a_file_of_results_is_never_written_again(tmp_path):
    folder = CheckpointFolder(tmp_path)
    before = folder.commit(unfinished(3), {}, None, 2)
    first = {path.name: path.stat().st_ino for path in tmp_path.glob("evaluation*")}
    folder.commit(before.with_task(record(4)), {}, None, 3)
    later = {path.name: path.stat().st_ino for path in tmp_path.glob("evaluation*")}
    assert later.items() > first.items() and set(later) - set(first) == {"evaluation3.manifest"}


def test_a_row_that_no_file_holds_is_missed(tmp_path):
    folder = CheckpointFolder(tmp_path)
    made = folder.commit(unfinished(3), {}, None, 2)
    folder.write_manifest(replace(made, files={n: sha for n, sha in made.files.items() if n != "evaluation1.manifest"}))
    with pytest.raises(CheckpointError, match=r"names no evaluation1\.manifest"):
        folder.read_manifest()


def test_rows_of_all_tasks_in_one_file_are_read_and_go_on(tmp_path):
    """As format 2 wrote them."""
    folder, made = CheckpointFolder(tmp_path), unfinished(3)
    made = replace(made, tasks=tuple(replace(task, epochs=()) for task in made.tasks))  # they stood in the manifest
    rows = [{n: {k: r[k] for k in ("per_task", "groups") if k in r} for n, r in t.results.items()} for t in made.tasks]
    last = made.tasks[-1]
    old = {"rows": rows, "confusion": last.confusion, "entropy": last.entropy, "details": last.details}
    content = json_lines(old).encode()
    (tmp_path / "evaluation2.manifest").write_bytes(content)
    made = replace(made, files={"evaluation2.manifest": hashlib.sha256(content).hexdigest()})
    folder.write_manifest(made)
    assert folder.read_manifest() == made
    grown = folder.commit(folder.read_manifest().with_task(record(4)), {}, None, 3)
    assert set(grown.files) == {"evaluation2.manifest", "evaluation3.manifest", "classifier3.pth"}
    assert folder.read_manifest() == grown


def test_an_old_manifest_that_held_everything_goes_on_and_is_then_kept_apart(tmp_path):
    folder, made = CheckpointFolder(tmp_path), manifest(3)
    early = replace(made, tasks=made.tasks[:2], status="running")
    folder.write_manifest(early)  # names no file beside it
    assert folder.read_manifest() == early
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
        ({"tasks": [manifest(1).tasks[0].to_json()] * 4}, "results of 4 of 3 tasks"),
        ({"base": {"folder": 1}}, "base's 'folder' is of another kind"),
        ({"tasks": [{"results": {"sample": 3}}]}, "a task's 'results' holds a value of another kind"),
    ],
)
def test_a_manifest_of_another_shape_names_what_is_wrong(change, words):
    with pytest.raises(CheckpointError) as caught:
        RunManifest.from_json({**manifest(3).to_json(), **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("name", sorted(manifest(1).to_json().keys() - {"domains", "continual", "missing_at_start"}))
def test_what_is_absent_is_named(name):
    values = manifest(1).to_json()
    del values[name]
    if name in ("base", "cost", "format"):  # only where there is one; the reader of the file looks at the format
        RunManifest.from_json(values)
        return
    with pytest.raises(CheckpointError, match=f"'{name}' is absent"):
        RunManifest.from_json(values)
