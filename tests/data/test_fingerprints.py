"""Images are known by their contents, and files by name, size and time: what a start reads, trusts and notices."""

import hashlib
import logging
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import FolderMaker, tiny_config
from utils.data import fingerprints, images
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.splits import Dataset
from utils.errors import DataError


@pytest.fixture
def data(tmp_path: Path, make_folder: FolderMaker) -> Dataset:
    """Three classes of 4 training and 3 test images, a year old."""
    data = load_dataset(tiny_config(data_path=str(make_folder(tmp_path / "images", classes=3, train=4, test=3))))
    for split in (data.train, data.test):
        for row in range(len(split)):
            os.utime(split.path(row), (1e9, 1e9))
    return data


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose contents are read."""
    paths: list[Path] = []
    content = images.content_of_file
    monkeypatch.setattr(images, "content_of_file", lambda path: paths.append(path) or content(path))
    return paths


def test_each_split_has_one_hash_over_names_and_contents_and_what_the_file_system_says(
    data: Dataset, tmp_path: Path
) -> None:
    found = pickle.loads(pickle.dumps(fingerprint_splits(data, tmp_path / "cache")))  # as ranks share it
    for name in ("train", "test"):
        split, digest = data.split(name), hashlib.sha256()
        for row, key in enumerate(split.keys):
            digest.update(f"{key}\0{hashlib.sha256(split.path(row).read_bytes()).hexdigest()}\n".encode())
        assert found[name] == digest.hexdigest()
        stats = [os.stat(split.path(row)) for row in range(len(split))]
        assert found.stats[name].dtype == np.int64
        assert found.stats[name].tolist() == [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def test_only_what_has_another_name_size_or_time_is_read_again(
    data: Dataset, tmp_path: Path, hashed: list[Path]
) -> None:
    first = fingerprint_splits(data, tmp_path / "cache")
    assert sorted(hashed) == sorted(split.path(row) for split in (data.train, data.test) for row in range(len(split)))
    memories = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "hashes").iterdir()}
    assert all(re.fullmatch(r"[0-9a-f]{16}\.txt", path.name) for path in memories)
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == first and hashed == []
    assert {path: path.stat().st_mtime_ns for path in memories} == memories  # nothing new: nothing is written
    touched, exchanged, grown = (data.train.path(row) for row in (2, 5, 7))
    os.utime(touched, (2e9 - 1e9 + 1, 1e9 + 1))
    exchanged.write_bytes(data.train.path(6).read_bytes())
    os.utime(exchanged, (1e9 + 2, 1e9 + 2))
    grown.write_bytes(grown.read_bytes() + b"0")
    os.utime(grown, (1e9, 1e9))
    second = fingerprint_splits(data, tmp_path / "cache")
    assert set(hashed) == {touched, exchanged, grown} and len(hashed) == 3
    assert second["train"] != first["train"] and second["test"] == first["test"]
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == second and hashed == []
    assert fingerprint_splits(data, None) == second and len(hashed) == 21


@pytest.mark.parametrize(("age_ns", "remembered"), [(2_000_000_000, False), (2_000_000_001, True)])
def test_a_file_that_is_younger_than_two_seconds_is_read_again(
    data: Dataset, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, age_ns: int, remembered: bool
) -> None:
    """Within the clock's tick it may change again and look the same."""
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: 10**18 + age_ns)
    fingerprint_splits(data, tmp_path / "cache")
    hashed.clear()
    fingerprint_splits(data, tmp_path / "cache")
    assert len(hashed) == (0 if remembered else 21)


@pytest.mark.parametrize("damage", [b"", b"\xff\0 no lines\n", b"half"])
def test_what_is_damaged_of_the_memory_is_read_again(
    data: Dataset, tmp_path: Path, hashed: list[Path], damage: bytes
) -> None:
    first = fingerprint_splits(data, tmp_path / "cache")
    for memory in (tmp_path / "cache" / "hashes").iterdir():
        whole = memory.read_bytes()
        memory.write_bytes(whole[:-10] if damage == b"half" else damage)
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == first
    assert len(hashed) == (2 if damage == b"half" else 21)
    assert len(memory.read_bytes()) == len(whole)


def test_where_hashes_cannot_be_remembered_the_images_are_read_each_time(
    data: Dataset, tmp_path: Path, hashed: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        first = fingerprint_splits(data, tmp_path / "cache")
    assert "hashes of the images are not remembered" in caplog.text
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == first and len(hashed) == 21


def test_what_is_hashed_when_a_start_is_stopped_is_remembered(
    data: Dataset, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, bad = images.content_of_file, data.train.path(9)

    def stops(path: Path) -> str:
        if path == bad:
            raise PermissionError(13, "Permission denied")
        return content(path)

    with monkeypatch.context() as patch:
        patch.setattr(images, "content_of_file", stops)
        with pytest.raises(DataError, match=f"{bad} cannot be read"):
            fingerprint_splits(data, tmp_path / "cache")
    hashed.clear()
    fingerprint_splits(data, tmp_path / "cache")
    assert {data.train.path(row) for row in (9, 10, 11)} < set(hashed) and len(hashed) == 3 + 9


def test_what_pictures_lose_is_said_at_each_start_though_they_are_read_once(
    data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGBA", (4, 4)).save(data.train.path(0))
    os.utime(data.train.path(0), (1e9, 1e9))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            fingerprint_splits(data, tmp_path / "cache")
    assert caplog.text.count("Images: 1 image with transparency: laid on white") == 2


def test_what_a_killed_write_of_hashes_left_is_removed_by_the_next(data: Dataset, tmp_path: Path) -> None:
    fingerprint_splits(data, tmp_path / "bank")
    hashes, other = (tmp_path / "bank" / "hashes").iterdir()
    hashes.unlink()
    dead, at_work = (hashes.with_name(f".{hashes.name}.{process}.partial") for process in (2**30, os.getppid()))
    for partial in (dead, at_work):
        partial.write_bytes(b"half")
    fingerprint_splits(data, tmp_path / "bank")
    assert {path.name for path in hashes.parent.iterdir()} == {hashes.name, other.name, at_work.name}
