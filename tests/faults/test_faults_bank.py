"""The feature bank as a run meets it on disks that cannot be written."""

import shutil
from pathlib import Path

import pytest

from tests.features.test_rows import read_only


@pytest.fixture
def filled(run, tmp_path: Path) -> Path:
    """A bank of the run's own, complete; the run's files are gone."""
    folder = tmp_path / "own bank"
    run.keys["cache_dir"] = str(folder)
    assert run().code == 0
    for left in (run.checkpoints, run.logs):
        shutil.rmtree(left)
    return folder


def test_a_complete_bank_on_a_read_only_disk_is_used(run, filled, undisturbed, monkeypatch):
    for lock in filled.rglob("lock"):
        lock.unlink()
    read_only(monkeypatch, filled)
    ending = run()
    assert ending.code == 0, ending.err
    assert "forward passes in" not in ending.out  # nothing was computed
    assert run.end() == undisturbed


def test_an_incomplete_bank_on_a_read_only_disk_names_file_and_key(run, filled, monkeypatch):
    next(filled.rglob("augmented-*.npy")).unlink()
    read_only(monkeypatch, filled)
    error = run().error
    assert str(filled) in error
    assert "Read-only file system" in error
    assert "cache_dir" in error


def test_a_damaged_array_is_one_line_whose_way_out_works(run, filled, undisturbed):
    array = next(filled.rglob("augmented-*.npy"))
    array.write_bytes(array.read_bytes()[:-4] + b"\xff" * 4)
    error = run().error
    assert f"remove {array.parent.name}" in error
    from utils.features.__main__ import remove

    remove(filled, [array.parent.name])
    assert run().code == 0
    assert run.end() == undisturbed
