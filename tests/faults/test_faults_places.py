"""Checkpoint folders that vanish or are disks of their own; names and tensors that nobody should trust."""

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest

import main
import predict
from models.tosca import TOSCA
from utils.features import __main__ as bank_command
from utils.runs import checkpoint
from utils.runs.checkpoint import MANIFEST

# -- a folder that changes during a run -------------------------------------------------------------------------------


def at_task(patch, task, act) -> None:
    """Let ``act`` happen when task number ``task`` begins."""
    fit = TOSCA.fit

    def acting(self, data, *args):
        if data.index == task:
            act()
        return fit(self, data, *args)

    patch.setattr(TOSCA, "fit", acting)


def exchange(folder) -> None:
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    shutil.rmtree(folder)
    other.rename(folder)


CHANGES = {
    "removed": shutil.rmtree,
    "exchanged": exchange,
    "renamed": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "a module removed": lambda folder: (folder / "task0.pth").unlink(),
    "a module changed": lambda folder: (folder / "task0.pth").write_bytes(b"other"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("task", [1, 2])
def test_a_checkpoint_folder_that_changes_during_a_run_is_no_success(run, undisturbed, monkeypatch, change, task):
    with monkeypatch.context() as patch:
        at_task(patch, task, lambda: CHANGES[change](run.checkpoints))
        error = run().error
    assert str(run.checkpoints) in error
    assert "while" in error or "damaged" in error or "is missing" in error
    again = run() if change != "a module changed" and change != "a module removed" else run("--fresh")
    if again.code == 2:  # files are missing: it says so again instead of going on without them
        assert "--fresh" in again.error
        again = run("--fresh")
    assert again.code == 0
    assert {"task0.pth", "task1.pth", "task2.pth", MANIFEST} <= {path.name for path in run.checkpoints.iterdir()}


def test_a_log_folder_that_is_removed_during_a_run_is_no_success(run, monkeypatch):
    with monkeypatch.context() as patch:
        at_task(patch, 1, lambda: shutil.rmtree(run.logs))
        assert "was removed or exchanged" in run().error
    assert run().code == 0


# -- a folder that is a disk of its own -------------------------------------------------------------------------------


@pytest.fixture
def own_disk(half, monkeypatch):
    """The checkpoint folder as a mount point: nothing can be renamed out of it."""
    replace, folder = os.replace, half.checkpoints.resolve()

    def refuse(source, target):
        if str(source).startswith(str(folder)) != str(target).startswith(str(folder)):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", refuse)
    monkeypatch.setattr(checkpoint.os.path, "ismount", lambda path: str(path) == str(folder))
    return half


def test_what_a_mount_point_holds_is_moved_aside_within_it(own_disk, tree):
    before = tree(own_disk.checkpoints)
    ending = own_disk(lr=0.1)
    assert ending.code == 0
    (aside,) = own_disk.checkpoints.glob("tosca.*")
    assert f"to {aside}" in ending.out
    assert tree(aside) == before


# -- an interrupted --fresh -------------------------------------------------------------------------------------------


def fill_the_disk_of_the_log() -> None:
    (handler,) = [one for one in logging.getLogger().handlers if isinstance(one, logging.FileHandler)]
    handler.setStream(open("/dev/full", "w"))  # noqa: SIM115 - the handler closes it


def refuse_memory() -> None:
    raise MemoryError("Unable to allocate 8 TiB")


STOPS = {  # at task 1: what ends the run, with which exit code, and what it says
    "Ctrl-C": (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "start the same command again to go on (without"),
    "the log's disk": (fill_the_disk_of_the_log, 2, "the log cannot be written (No space left on device)"),
    "memory": (refuse_memory, 2, "memory does not suffice (Unable to allocate 8 TiB)"),
}


@pytest.mark.parametrize("kind", STOPS)
def test_a_fresh_start_that_is_stopped_goes_on_without_fresh(finished, undisturbed, monkeypatch, kind):
    act, code, words = STOPS[kind]
    with monkeypatch.context() as patch:
        at_task(patch, 1, act)
        stopped = finished("--fresh")
    assert stopped.code == code and words in stopped.err
    assert "leave out --fresh to go on" in stopped.out
    ending = finished()
    assert ending.code == 0
    assert "after task 1 of 3" in ending.out
    assert len(list(finished.folder.glob("tosca.*"))) == 1
    found = finished.end()  # and what was set aside
    assert [name for name in undisturbed if found[name] != undisturbed[name]] == []


def test_fresh_with_several_seeds_moves_all_aside_before_the_first_begins(run, monkeypatch):
    assert run(seed=[3, 4]).code == 0
    with monkeypatch.context() as patch:
        at_task(patch, 0, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run("--fresh", seed=[3, 4]).code == 130
    assert len(list((run.checkpoints).glob("seed4.*"))) == 1  # going on without --fresh cannot meet the old run
    assert "This run is finished" not in run(seed=[3, 4]).out


# -- hostile checkpoints ----------------------------------------------------------------------------------------------


def reseal(folder, change) -> None:
    """Change the manifest as somebody would who knows how its SHA-256 is made."""
    path = folder / MANIFEST
    values = json.loads(path.read_bytes())
    values.pop("sha256")
    change(values)
    text = json.dumps(values, sort_keys=True)
    path.write_text(json.dumps({**values, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.mark.parametrize(
    "name",
    ["../outside.pth", "/etc/passwd", "sub/task0.pth", "run.manifest", "", "task0.pth\n"],
)
def test_a_name_that_is_no_plain_file_of_a_run_is_refused(finished, tree, name):
    secret = finished.folder / "outside.pth"
    secret.write_bytes(b"secret")
    sha256 = hashlib.sha256(b"secret").hexdigest()
    reseal(finished.checkpoints, lambda values: values["files"].update({name: sha256}))
    assert f"names {name!r}, which is no file of a run" in finished().error
    target = finished.folder / "new"
    error = finished(continue_from=str(finished.checkpoints), checkpoint_dir=str(target)).error
    assert "which is no file of a run" in error
    assert not list(target.glob("*.pth"))


def test_a_pipe_in_place_of_a_module_is_refused_at_once(finished):
    module = finished.checkpoints / "task0.pth"
    module.unlink()
    os.mkfifo(module)
    assert "no regular file" in finished().error


@pytest.mark.parametrize("change", [lambda v: v.update(tasks="many"), lambda v: v.pop("data"), lambda v: v.update(x=1)])
def test_a_resealed_manifest_of_another_shape_is_one_line(finished, change):
    reseal(finished.checkpoints, change)
    assert f"{MANIFEST} is damaged (" in finished().error


# -- no home folder ---------------------------------------------------------------------------------------------------


def test_a_tilde_without_a_home_folder_is_one_line_for_every_command(monkeypatch, capsys, finished):
    """HOME is not set and the user id has no entry: simulated, since the tests may not run as such a user."""

    def unknown(_: int) -> None:
        raise KeyError("no such user id")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    image = next(Path(finished.keys["data_path"]).rglob("*.png"))
    for command, arguments in (
        (predict.main, ["--checkpoint=~/run", str(image)]),
        (bank_command.main, ["--cache-dir=~/bank", "list"]),
        (main.main, [f"--config={finished.write_config(cache_dir='~/bank')}"]),
        (main.main, [f"--config={finished.write_config(checkpoint_dir='~/run')}"]),
    ):
        assert command(arguments) == 2, arguments
        (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
        assert "the home folder at" in line and "is not known" in line
