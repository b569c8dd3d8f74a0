"""Loader processes that die, fail or are too many; stops while they are at work. Nothing is left running."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.data.splits import ImageFiles
from utils.features import bank as features


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def group_is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def slowly(seconds: float) -> Callable[[], None]:
    """Preparation for a process: images take their time."""

    def prepare() -> None:
        load = ImageFiles.load

        def slow(self: ImageFiles, index: int) -> object:
            time.sleep(seconds)
            return load(self, index)

        ImageFiles.load = slow

    return prepare


def filling(bank: Path) -> bool:
    return any(bank.rglob("*.filling.npy"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stop_during_extraction_leaves_no_process_and_the_next_start_ends_alike(
    run, undisturbed, tmp_path, wait_for_end, number
):
    """As a cluster and a terminal send them: SIGTERM to the process, Ctrl-C to it and its loaders."""
    bank = tmp_path / "bank"
    run.keys["cache_dir"] = str(bank)
    process = run.in_a_process(slowly(0.1), num_workers=2)
    wait_until(lambda: filling(bank))
    time.sleep(0.3)
    if number == signal.SIGINT:
        os.killpg(process, number)
    else:
        os.kill(process, number)
    assert wait_for_end(process) == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: group_is_empty(process))
    assert run(num_workers=2).code == 0
    assert run.end() == undisturbed


def test_a_killed_loader_is_one_line_and_the_next_start_ends_alike(run, undisturbed, tmp_path, monkeypatch):
    run.keys["cache_dir"] = str(tmp_path / "bank")
    main_process, load = os.getpid(), ImageFiles.load

    def die(self: ImageFiles, index: int) -> object:
        if index == 9 and os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "load", die)
        error = run(num_workers=2).error
    assert "a process that loads images was killed" in error
    assert "lower num_workers" in error
    assert run(num_workers=2).code == 0
    assert run.end() == undisturbed


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_in_a_loader_names_the_image(run, tmp_path, monkeypatch, workers):
    run.keys["cache_dir"] = str(tmp_path / "bank")

    def fail(*_: object) -> None:
        raise ValueError("no such view")

    monkeypatch.setattr(features.Transforms, "view", fail)
    error = run(num_workers=workers).error
    assert "train image '" in error
    assert "no such view" in error


def test_a_broken_image_in_a_loader_names_file_and_class(run, data, tmp_path, monkeypatch):
    run.keys["cache_dir"] = str(tmp_path / "bank")

    def broken(path: Path) -> None:
        raise OSError("broken data stream")

    monkeypatch.setattr("utils.data.images.read_image", broken)
    error = run(num_workers=2).error
    assert str(data) in error
    assert "class '" in error


def test_more_loaders_than_cpus_are_a_warning(run, monkeypatch):
    monkeypatch.setattr("trainer.available_cpus", lambda: 2)
    ending = run(num_workers=3)
    assert ending.code == 0
    assert "num_workers 3 is above the 2 CPUs" in ending.out
    assert "is above" not in run(num_workers=2).out


def test_loaders_that_cannot_be_started_are_one_line(run, tmp_path, monkeypatch):
    import multiprocessing.popen_fork

    def refuse(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.popen_fork.Popen, "_launch", refuse)
    error = run(num_workers=2, cache_dir=str(tmp_path / "bank")).error
    assert "cannot be started (Resource temporarily unavailable); lower num_workers" in error
