"""Loader processes that die, fail or are too many; stops while they are at work. Nothing is left running."""

import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.loader_faults import die_at_the_ninth, fail
from utils.features import extraction
from utils.features.bank import FeatureBank


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
    """Preparation for a process: forward passes take their time, while its loaders are there."""

    def prepare() -> None:
        keep = FeatureBank._keep

        def slow(self: FeatureBank, *rows: object) -> None:
            time.sleep(seconds)
            keep(self, *rows)

        FeatureBank._keep = slow

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
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "load_views", die_at_the_ninth)
        error = run(num_workers=2).error
    assert "a process that loads images ended (signal 9) before it had handed over test image '" in error
    assert "lower num_workers" in error
    assert run(num_workers=2).code == 0
    assert run.end() == undisturbed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_of_our_own_in_a_loader_shows_where_it_was(run, tmp_path, monkeypatch, workers):
    run.keys["cache_dir"] = str(tmp_path / "bank")
    monkeypatch.setattr(extraction, "load_views", fail)
    with pytest.raises(ZeroDivisionError, match="no such view") as caught:
        run(num_workers=workers)
    shown = "".join(traceback.format_exception(caught.value))
    assert 'raise ZeroDivisionError("no such view")' in shown


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_in_a_loader_names_file_and_class(run, data, tmp_path, workers):
    folder = shutil.copytree(data, tmp_path / "images")
    broken = next((folder / "train" / "3").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    error = run(num_workers=workers, data_path=str(folder), cache_dir=str(tmp_path / "bank")).error
    assert str(broken) in error
    assert "class '3'" in error


def test_more_loaders_than_cpus_are_a_warning(run, monkeypatch):
    monkeypatch.setattr("models.preparation.available_cpus", lambda: 2)
    ending = run(num_workers=3)
    assert ending.code == 0
    assert "num_workers 3 is above the 2 CPUs" in ending.out
    assert "is above" not in run(num_workers=2).out


def test_a_run_with_loader_processes_never_forks(run, monkeypatch, tmp_path):
    """A fork beside threads may hang; Python 3.12 and later warn of it, and the suite treats that as an error."""
    forks: list[int] = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(threading.active_count()) or fork())
    assert run(num_workers=2, cache_dir=str(tmp_path / "bank")).code == 0
    assert forks == []
