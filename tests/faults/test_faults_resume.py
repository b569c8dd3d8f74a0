"""A run that is stopped anywhere ends as if it had not been; no run overwrites another."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

import trainer
from models.tosca import TOSCA
from utils import files
from utils.features import rows
from utils.results import record, run_log
from utils.runs import checkpoint, setup
from utils.runs.checkpoint import CheckpointFolder

# where a stop comes: the object and the name of what is called then, and which call it is
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "in extraction": (rows.FolderRows, "write", 2),
    "in the first task": (TOSCA, "grown_classifier", 1),
    "in the last task": (trainer.BankTask, "epoch", 6),
    "in evaluation": (trainer, "evaluate", 2),
    "before a module is written": (CheckpointFolder, "_save", 3),
    "before the classifier is written": (CheckpointFolder, "_save", 4),
    "before the run begins": (setup.Start, "begin", 1),
    "before results are added": (CheckpointFolder, "_with_lines", 2),
    "before the manifest is written": (CheckpointFolder, "write_manifest", 3),
    "half-way through a write": (files.os, "fsync", 9),
    "between a write and its name": (files.os, "replace", 5),
    "before the old files are removed": (CheckpointFolder, "remove_old_files", 2),
    "before the results are written": (record, "write_run_json", 4),
    "before the summary": (run_log, "log_summary", 1),
}


def interrupt(patch: pytest.MonkeyPatch, moment: str, act: Callable[[], object]) -> None:
    """Let ``act`` happen at a moment of ``MOMENTS``, once."""
    owner, name, call = MOMENTS[moment]
    calls, real = [0], getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            act()
        return real(*args, **kwargs)

    patch.setattr(owner, name, counting)


def signal_myself(number: int) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_and_sigterm_end_in_one_line_and_the_next_start_ends_alike(run, undisturbed, moment, tmp_path):
    number = signal.SIGINT if len(moment) % 2 else signal.SIGTERM
    run.keys["cache_dir"] = str(tmp_path / "bank") if moment == "in extraction" else run.keys["cache_dir"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, moment, signal_myself(number))
        stopped = run()
    assert stopped.code == 128 + number
    assert "stopped; start the same command again to go on" in stopped.err
    assert "Traceback" not in stopped.err
    assert not list(run.folder.rglob("*.partial"))
    assert run().code == 0
    assert run.end() == undisturbed
    if moment == "in extraction":  # of 18 training images two views, of 12 test images one: each computed once
        assert json.loads(next(run.logs.rglob("*.json")).read_bytes())["backbone_forwards"] == 48


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_the_next_start_ends_alike(run, undisturbed, moment, tmp_path, wait_for_end):
    run.keys["cache_dir"] = str(tmp_path / "bank") if moment == "in extraction" else run.keys["cache_dir"]

    def prepare() -> None:
        interrupt(pytest.MonkeyPatch(), moment, signal_myself(signal.SIGKILL))

    assert wait_for_end(run.in_a_process(prepare)) == -signal.SIGKILL
    assert run().code == 0
    assert run.end() == undisturbed
    assert not list(run.folder.rglob("*.partial"))


def test_a_resumed_run_says_what_it_resumes(half):
    said = half().out
    assert f"Resuming from {half.checkpoints} after task 2 of 3" in said
    assert "Task 3 of 3" in said
    assert "Task 2 of 3" not in said


def test_other_versions_since_the_run_began_are_named(half, monkeypatch):
    monkeypatch.setattr(setup, "versions", lambda real=setup.versions: {**real(), "timm": "9.9"})
    assert "-> 9.9" in half().out


def test_a_finished_run_says_so_shows_its_summary_and_changes_nothing(finished, undisturbed, tree):
    before = tree(finished.checkpoints)
    said = finished().out
    assert "This run is finished" in said
    assert "--fresh" in said
    assert "forgetting" in said
    assert "top1 curve" not in said  # that stands in the log file
    (log,) = finished.logs.rglob("*.log")
    assert log.read_text().count("[selection: sample] CNN top1 curve") == 4  # after each task, and now
    assert tree(finished.checkpoints) == before
    assert finished.end() == undisturbed


def test_fresh_starts_over_and_keeps_the_old_run_whole(finished, undisturbed, tree):
    before, results = tree(finished.checkpoints), tree(finished.logs)
    ending = finished("--fresh")
    assert ending.code == 0
    (aside,) = finished.folder.glob("tosca.*")
    assert str(aside) in ending.out
    assert tree(aside) == before
    moved = {content for name, content in tree(finished.logs).items()}
    assert set(results.values()) <= moved  # log, JSON and CSV of the old run are there under new names
    assert {k: v for k, v in finished.end().items() if "20" not in k.partition("glyphs_vit")[2]} == undisturbed


def test_damaged_manifest_then_fresh_keeps_the_damaged_run(half, tree):
    manifest = half.checkpoints / checkpoint.MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:50])
    before = tree(half.checkpoints)
    assert half("--fresh").code == 0
    (aside,) = half.folder.glob("tosca.*")
    assert tree(aside) == before


@pytest.mark.parametrize(
    "key", ["flow=adapter", "mlp_ratio=8", "lr=0.1", "seed=7", "increment=4", "model_name=simplecil"]
)
def test_another_run_moves_the_first_aside_and_says_where(half, tree, key):
    before = tree(half.checkpoints)
    ending = half(key)
    assert ending.code == 0
    (aside,) = half.folder.glob("tosca.*")
    assert f"to {aside}" in ending.out
    assert tree(aside) == before


def test_a_run_that_stops_at_a_broken_image_leaves_the_run_in_its_folder(finished, tree, make_folder, tmp_path):
    before = tree(finished.checkpoints)
    other = make_folder(tmp_path / "other", classes=8, train=2, test=2)
    image = sorted((other / "train").rglob("*.png"))[0]
    image.write_bytes(image.read_bytes()[:-100])
    new = {"data_path": str(other), "cache_dir": "none"}
    assert str(image) in finished(**new).error
    assert tree(finished.checkpoints) == before
    assert not list(finished.folder.glob("tosca.*"))
    assert "This run is finished" in finished().out  # the old command still finds it


def test_another_run_that_is_stopped_in_its_extraction_counts_what_it_computed(finished, make_folder, tmp_path):
    other = make_folder(tmp_path / "other", classes=6, train=2, test=2)
    new = {"data_path": str(other), "cache_dir": str(tmp_path / "bank")}
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "in extraction", signal_myself(signal.SIGINT))
        assert finished(**new).code == 130
    assert not list(finished.folder.glob("tosca.*"))
    assert finished(**new).code == 0
    assert len(list(finished.folder.glob("tosca.*"))) == 1
    newest = max(finished.logs.rglob("*.json"), key=lambda path: path.stat().st_mtime)
    assert json.loads(newest.read_bytes())["backbone_forwards"] == 12 * (1 + 1) + 12  # each once: train twice, test


def test_files_of_the_release_are_moved_aside_and_those_that_only_look_like_ours_stay(run, tree):
    run.checkpoints.mkdir()
    (run.checkpoints / "task0.pth").write_bytes(b"another run's")
    others = ("task_notes.pth", "classifier_best.pth", "results.jsonl.txt")
    for name in others:
        (run.checkpoints / name).write_bytes(b"mine")
    assert run().code == 0
    (aside,) = run.folder.glob("tosca.*")
    assert tree(aside) == {"task0.pth": b"another run's"}
    assert [(run.checkpoints / name).read_bytes() for name in others] == [b"mine"] * 3


@pytest.mark.parametrize("call", [1, 2, 4])
def test_killed_while_moving_aside_the_old_run_is_not_split(half, tree, call, wait_for_end):
    before = tree(half.checkpoints)

    def prepare() -> None:
        real, calls = os.replace, [0]

        def replace(*args: Any) -> None:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        checkpoint.os.replace = replace  # this is a process of its own

    assert wait_for_end(half.in_a_process(prepare, lr=0.1)) == -signal.SIGKILL
    assert half(lr=0.1).code == 0
    (aside,) = half.folder.glob("tosca.*")
    assert tree(aside) == before


def test_two_moves_aside_in_a_second_get_two_names(half, monkeypatch):
    monkeypatch.setattr(checkpoint.time, "strftime", lambda *_: "20260101-000000")
    assert half("lr=0.1").code == 0
    assert half("lr=0.2").code == 0
    assert {p.name for p in half.folder.glob("tosca.*")} == {"tosca.20260101-000000", "tosca.20260101-000000-2"}


def test_several_seeds_side_by_side_resume_each(run):
    seeds = [3, 4]
    with pytest.MonkeyPatch.context() as patch:
        real, calls = TOSCA.fit, [0]

        def fit(self: Any, task: Any, on_epoch: Any) -> None:
            calls[0] += 1
            if calls[0] == 5:  # the second task of the second seed
                raise KeyboardInterrupt
            real(self, task, on_epoch)

        patch.setattr(TOSCA, "fit", fit)
        assert run(seed=seeds).code == 130
    first = (run.checkpoints / "seed3" / checkpoint.MANIFEST).read_bytes()
    ending = run(seed=seeds)
    assert ending.code == 0
    assert re.search(r" sample +\S+ ± .* 2\b", ending.out)
    assert (run.checkpoints / "seed3" / checkpoint.MANIFEST).read_bytes() == first
    manifest = json.loads((run.checkpoints / "seed4" / checkpoint.MANIFEST).read_bytes())
    assert (manifest["seed"], manifest["status"]) == (4, "finished")
    assert len((run.checkpoints / "seed4" / checkpoint.RESULTS).read_text().splitlines()) == 3
    assert len(list(run.logs.rglob("*.json"))) == 2


@pytest.mark.parametrize("shared", ["checkpoint_dir", "log_dir"])
def test_a_second_process_stops_at_once_and_names_the_first(run, tmp_path, shared, wait_for_end):
    """The first is held in its first task until the second has answered."""
    reader, writer = os.pipe()

    def prepare() -> None:
        def wait(*_: Any) -> None:
            os.write(writer, b"x")
            time.sleep(60)

        TOSCA.fit = wait

    first = run.in_a_process(prepare)
    os.read(reader, 1)
    before = {p: p.read_bytes() for p in run.folder.rglob("*.manifest")}
    other = {"log_dir": "other logs", "checkpoint_dir": "other tosca"}
    del other[shared]
    try:
        error = run(**{key: str(tmp_path / name) for key, name in other.items()}).error
    finally:
        os.kill(first, signal.SIGKILL)
        wait_for_end(first)
    assert f"process {first} on " in error
    assert run.keys[shared] in error
    assert {p: p.read_bytes() for p in before} == before
    assert run().code == 0  # the lock went with its holder
