"""The manifest as a type: nothing is lost on the way to disk and back, and its size grows as the tasks do."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.errors import CheckpointError, UserError
from utils.results.record import write_run_json
from utils.runs.checkpoint import RESULTS, CheckpointFolder
from utils.runs.manifest import FEW_TASKS, BaseFacts, EpochStats, RunManifest, TaskRecord, versions
from utils.runs.setup import RunPaths

SELECTIONS = ("batch", "sample", "oracle")
ABOUT = {"identity": {"a": 1}, "config": {"scenario": "class"}, "backbone": {}, "data": {}, "versions": {"c": "d"}}


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


def manifest(done: int, tasks: int, **facts: object) -> RunManifest:
    """Of a run of ``tasks`` tasks of one class, after ``done`` of them."""
    names, rows = tuple(map(str, range(tasks))), tuple(range(tasks))
    made = RunManifest(**ABOUT, seed=3, class_order=names, task_sizes=(1,) * tasks, row_class=rows, **facts)
    for task in range(done):
        made = made.with_task(record(task + 1))
    return made


def commit(folder: CheckpointFolder, made: RunManifest) -> RunManifest:
    """Save the newest task of ``made``."""
    return folder.commit(made, {"sigma": torch.tensor(1.0)}, {len(made.tasks) - 1: None})


def commit_tasks(folder: CheckpointFolder, done: int, tasks: int) -> RunManifest:
    """Save task after task."""
    made = manifest(0, tasks)
    for task in range(done):
        made = commit(folder, made.with_task(record(task + 1)))
    return made


def test_json_and_back_is_the_same():
    base = BaseFacts("folder", 1, 2, "sha", "old and new classes", 0)
    made = manifest(3, 3, base=base, backbone_forwards=7, cost={"minutes": 0.5})
    assert RunManifest.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.finished and not manifest(2, 3).finished


def test_each_task_adds_a_line_and_changes_none(tmp_path):
    folder = CheckpointFolder(tmp_path)
    made, lines = manifest(0, 4), b""
    for task in range(4):
        made = commit(folder, made.with_task(record(task + 1)))
        assert folder.read_manifest() == made
        content = (tmp_path / RESULTS).read_bytes()
        assert content.startswith(lines) and content.count(b"\n") == task + 1
        lines = content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier3.pth", RESULTS, "run.manifest"]
    assert json.loads((tmp_path / "run.manifest").read_bytes())["tasks"] == []


def test_what_a_dead_process_added_is_not_read_and_the_next_commit_cuts_it_off(tmp_path):
    folder, whole = CheckpointFolder(tmp_path / "killed"), CheckpointFolder(tmp_path / "whole")
    made = commit_tasks(folder, 2, 4)
    with open(folder.folder / RESULTS, "ab") as file:
        file.write(b'{"results": {"sample": half a line')
    assert folder.read_manifest() == made
    commit(folder, folder.read_manifest().with_task(record(3)))
    commit_tasks(whole, 3, 4)
    assert (folder.folder / RESULTS).read_bytes() == (whole.folder / RESULTS).read_bytes()


@pytest.mark.parametrize("damage", ["shorter", "changed", "gone", "lines exchanged"])
def test_results_that_are_not_those_that_were_saved_are_named(tmp_path, damage):
    folder = CheckpointFolder(tmp_path)
    commit_tasks(folder, 3, 4)
    path = tmp_path / RESULTS
    content = path.read_bytes()
    first, second, third = content.splitlines(keepends=True)
    path.write_bytes(
        {"shorter": content[:-1], "changed": content.replace(b"0.25", b"0.75"), "gone": b""}.get(
            damage, second + first + third
        )
    )
    if damage == "gone":
        path.unlink()
    with pytest.raises(CheckpointError, match=rf"{RESULTS} is (damaged|missing).*start over with --fresh"):
        folder.read_manifest()


def test_a_disk_that_is_full_while_a_line_is_added_leaves_what_was_saved(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    made = commit_tasks(folder, 2, 4)

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("utils.runs.checkpoint.atomic_write", lambda *_: None)
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=rf"{RESULTS} cannot be written \(No space left .*was there is unchanged"):
            commit(folder, made.with_task(record(3)))
    assert folder.read_manifest() == made


def bytes_of_one_task(folder: Path, tasks: int) -> dict[str, int]:
    """Bytes that the task after ``tasks`` tasks writes to each file, checkpoint and report; tensors are left out."""
    checkpoint, paths = CheckpointFolder(folder), RunPaths(folder / "logs", "run")
    before = checkpoint.commit(manifest(tasks, 300), {}, dict.fromkeys(range(tasks)))
    write_run_json(paths, before)
    lines = (folder / RESULTS).stat().st_size
    after = commit(checkpoint, before.with_task(record(tasks + 1)))
    write_run_json(paths, after)
    sizes = {path.name: path.stat().st_size for path in (folder / "run.manifest", paths.file(".json"))}
    return {**sizes, RESULTS: (folder / RESULTS).stat().st_size - lines}


def test_what_a_task_writes_grows_as_the_tasks_before_it_do(tmp_path):
    at = {tasks: bytes_of_one_task(tmp_path / str(tasks), tasks) for tasks in (50, 100, 200)}
    for name in ("run.json", RESULTS):
        small, middle, large = (at[tasks][name] for tasks in (50, 100, 200))
        assert small < middle < large, name
        assert large - middle < 2.2 * (middle - small), name  # 2: a line; 4: a square
    assert at[200]["run.manifest"] < at[50]["run.manifest"] + 10  # it names modules, and these are none


def test_a_commit_hashes_its_own_line_alone(tmp_path, monkeypatch):
    import hashlib

    folder = CheckpointFolder(tmp_path)
    made = commit_tasks(folder, 20, 30)
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr("hashlib.sha256", lambda content: (hashed.append(len(content)), sha256(content))[1])
    commit(folder, made.with_task(record(21)))
    assert sum(hashed) < (tmp_path / RESULTS).stat().st_size / 3


def test_a_long_run_shows_what_grows_with_the_square_once_it_is_finished(tmp_path):
    paths = RunPaths(tmp_path, "run")
    for tasks, shown in ((FEW_TASKS, True), (FEW_TASKS + 1, False)):
        values = write_run_json(paths, manifest(tasks, 300))
        assert (len(values["results"]["sample"]["matrix"]), len(values["confusion"].get("sample", []))) == (
            (tasks, tasks) if shown else (0, 0)
        )
        assert isinstance(values["results"]["sample"]["forgetting"], float)
        assert len(values["epochs"]) == (tasks if shown else 0)
    values = write_run_json(paths, manifest(FEW_TASKS + 5, FEW_TASKS + 5))
    assert np.array(values["confusion"]["sample"]).shape == (FEW_TASKS + 5,) * 2
    matrix = np.array(values["results"]["sample"]["matrix"], dtype=float)
    assert np.isnan(matrix).sum() == (FEW_TASKS + 5) * (FEW_TASKS + 4) / 2  # the tasks that were not learned yet


@pytest.mark.parametrize("change", [{"format": 99}, {"files": {"../task0.pth": "0"}}, {"seed": 4}, {"tasks": 1}])
def test_a_manifest_of_another_format_or_one_that_was_edited_is_one_line(tmp_path, change):
    folder = CheckpointFolder(tmp_path)
    folder.write_manifest(manifest(0, 3))
    values = json.loads(folder.manifest_path.read_bytes())
    folder.manifest_path.write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=r"run\.manifest is damaged \(its SHA-256"):
        folder.read_manifest()


def test_versions_load_no_package_that_a_run_may_not_need():
    found = versions()
    assert (found["torch"], found["timm"]) == (torch.__version__, version("timm"))
    code = "import sys; from utils.runs.manifest import versions; versions(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torchvision", "timm"} & set(loaded)


def test_the_sizes_of_all_tasks_are_in_the_json(tmp_path):
    """A continued run that tests new classes alone reports its own tasks; its title needs those before, too."""
    made = replace(manifest(3, 3), base=BaseFacts("folder", 2, 2, "sha", "new classes alone", 2))
    values = write_run_json(RunPaths(tmp_path, "run"), made)
    assert (values["task_sizes"], values["all_task_sizes"]) == ([1], [1, 1, 1])
