"""The feature bank as a run meets it: on disks that cannot be written, damaged, from an earlier version."""

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


@pytest.mark.parametrize("checksums", [True, False], ids=["", "of an earlier version"])
def test_a_complete_bank_on_a_read_only_disk_is_used(run, filled, undisturbed, monkeypatch, checksums):
    if not checksums:
        for path in filled.rglob("*.crc32"):
            path.unlink()
    for lock in filled.rglob("lock"):
        lock.unlink()
    read_only(monkeypatch, filled)
    ending = run()
    assert ending.code == 0, ending.err
    assert ("cannot be added" in ending.out and "they are read without" in ending.out) == (not checksums)
    assert run.end() == undisturbed


def test_an_incomplete_bank_on_a_read_only_disk_names_file_and_key(run, filled, monkeypatch):
    next(filled.rglob("augmented-*.npy")).unlink()
    read_only(monkeypatch, filled)
    error = run().error
    assert str(filled) in error
    assert "Read-only file system" in error
    assert "cache_dir" in error


def test_a_bank_of_an_earlier_version_is_used_as_it_is_and_said_so(run, filled, undisturbed):
    for path in filled.rglob("*.crc32"):
        path.unlink()
    ending = run()
    assert ending.code == 0
    assert "of an earlier version lacked" in ending.out
    assert "forward passes in" not in ending.out  # nothing was computed
    assert run.end() == undisturbed


def test_a_flipped_bit_in_the_bank_is_one_line_and_the_way_out_works(run, filled, undisturbed):
    array = next(filled.rglob("augmented-*.npy"))
    content = bytearray(array.read_bytes())
    content[-3] ^= 1
    array.write_bytes(content)
    error = run().error
    assert f"{array} holds rows that differ from what was written" in error
    from utils.features.__main__ import remove

    remove(filled, [array.parent.name])
    assert run().code == 0
    assert run.end() == undisturbed
