"""Images are known by their contents: what a start reads, what it trusts, and what it notices."""

import logging
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, FolderMaker, tiny_config
from utils.data import fingerprints
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.splits import Dataset


@pytest.fixture
def data(tmp_path: Path, make_folder: FolderMaker) -> Dataset:
    """Three classes of 4 training and 3 test images, a year old."""
    data = load_dataset(tiny_config(data_path=str(make_folder(tmp_path / "images", classes=3, train=4, test=3))))
    for split in (data.train, data.test):
        for row in range(len(split)):
            os.utime(split.path(row), (1e9, 1e9))
    return data


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every start is long after the files were written, so that their hashes are remembered."""
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: os.stat(tmp_path).st_ctime_ns + 10**13)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose contents are read."""
    paths: list[Path] = []
    content = fingerprints.content_of_file

    def read(path: Path) -> str:
        paths.append(path)
        return content(path)

    monkeypatch.setattr(fingerprints, "content_of_file", read)
    return paths


def exchange(path: Path) -> None:
    """Other pixels under the same name, size and modification time."""
    before, pixels = path.stat(), np.array(Image.open(path))
    pixels[0, 0] ^= 255
    content = path.read_bytes()
    Image.fromarray(pixels).save(path)
    new = path.read_bytes()
    path.write_bytes((new + bytes(len(content)))[: max(len(content), len(new))])
    if len(new) > len(content):  # as large as before: what is behind a PNG's end is not read
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "CHECKED_FILES", 0)


def test_a_change_that_keeps_size_and_time_is_noticed_by_the_file_system_alone(
    data: Dataset, tmp_path: Path, later: None, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint_splits(data, tmp_path / "cache")
    nothing_is_checked(monkeypatch)
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == first and hashed == []
    exchange(data.train.path(2))
    second = fingerprint_splits(data, tmp_path / "cache")
    assert hashed == [data.train.path(2)]
    assert second["train"] != first["train"] and second["test"] == first["test"]


def test_files_exchanged_under_equal_size_times_and_inode_are_noticed(
    data: Dataset,
    tmp_path: Path,
    later: None,
    hashed: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when another image of a disk is mounted in the place of the first."""
    remembered: dict[str, tuple[int, int, int, int]] = {}
    stat = fingerprints._stat
    monkeypatch.setattr(fingerprints, "_stat", lambda path: remembered.setdefault(path, stat(path)))
    first = fingerprint_splits(data, tmp_path / "cache")
    exchange(data.test.path(4))
    hashed.clear()
    second = fingerprint_splits(data, tmp_path / "cache")
    assert second["test"] != first["test"] and second["train"] == first["train"]
    assert f"{data.test.path(4)} has other content than before, though" in caplog.text
    assert len(hashed) == 2 * 21  # all were looked at, and then, for nothing remembered is to be trusted, read again
    caplog.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == second and caplog.text == ""  # which is remembered


def test_each_start_reads_other_files_again_and_never_more_than_its_budget(
    data: Dataset, tmp_path: Path, later: None, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint_splits(data, tmp_path / "cache")
    monkeypatch.setattr(fingerprints, "CHECKED_FILES", 3)
    seen = set()
    for _ in range(40):
        hashed.clear()
        assert fingerprint_splits(data, tmp_path / "cache") == first
        assert len(hashed) == 6
        seen |= set(hashed)
    assert len(seen) == 12 + 9  # in the end all of them
    monkeypatch.setattr(fingerprints, "CHECKED_FILES", 4096)
    size = max(data.train.path(i).stat().st_size for i in range(12))
    monkeypatch.setattr(fingerprints, "CHECKED_BYTES", 2 * size)
    hashed.clear()
    fingerprint_splits(data, tmp_path / "cache")
    assert 2 <= len(hashed) < 12 and sum(path.stat().st_size for path in hashed) <= 2 * 2 * size
    monkeypatch.setattr(fingerprints, "CHECKED_BYTES", 0)
    hashed.clear()
    fingerprint_splits(data, tmp_path / "cache")
    assert len(hashed) == 2  # of each split one at least


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"PK\x03\x04 half a zip",
        pickle.dumps({"names": 1}),
        {"names": np.zeros(3), "stats": np.zeros((3, 4)), "contents": np.zeros(3)},
        {"names": np.zeros(3, "S16"), "stats": np.zeros((2, 4), np.int64), "contents": np.zeros(3, "S64")},
        {"names": np.zeros((), "S16"), "stats": np.zeros((0, 4), np.int64), "contents": np.zeros((), "S64")},
        {"names": np.array([{"code": 1}], dtype=object)},
    ],
    ids=range(8),
)
def test_a_damaged_memory_of_hashes_is_made_again(
    data: Dataset, tmp_path: Path, later: None, hashed: list[Path], content: object
) -> None:
    first = fingerprint_splits(data, tmp_path / "cache")
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    whole = memory.read_bytes()
    if isinstance(content, dict):
        np.savez(memory, **content)
    else:
        memory.write_bytes(content)
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == first
    assert len(hashed) == 21
    with np.load(memory) as made, np.load(tmp_path / "cache" / "hashes" / memory.name) as again:
        assert made["contents"].tolist() == again["contents"].tolist()
    assert len(memory.read_bytes()) == len(whole)


def test_the_budget_is_the_one_that_the_page_names() -> None:
    page = (ROOT / "docs" / "bank.md").read_text(encoding="utf-8")
    (files, megabytes), *_ = re.findall(r"all of them up to ([\d,]+) files and (\d+) MB", page)
    assert int(files.replace(",", "")) == fingerprints.CHECKED_FILES
    assert int(megabytes) * 10**6 == fingerprints.CHECKED_BYTES


def test_what_is_remembered_of_a_file_fits_into_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"123")
    found = os.stat(tmp_path / "file")
    assert fingerprints._stat(str(tmp_path / "file")) == (3, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    largest = SimpleNamespace(st_size=3, st_mtime_ns=1, st_ctime_ns=2, st_ino=2**64 - 1)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints.os, "stat", lambda path: largest)
        row = fingerprints._stat("any")
    assert np.array(row, dtype=np.int64).tolist() == [3, 1, 2, 2**63 - 1]


def test_every_file_is_hashed_once_and_in_order_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "content_of_file", lambda path: f"content of {path.name}")
    names = [f"{number}.png" for number in range(700)]
    assert fingerprints._hashes(names) == [f"content of {name}" for name in names]


def test_a_memory_whose_hashes_are_no_text_is_made_again(
    data: Dataset, tmp_path: Path, later: None, hashed: list[Path]
) -> None:
    first = fingerprint_splits(data, tmp_path / "cache")
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    with np.load(memory) as archive:
        names, stats = archive["names"], archive["stats"]
    np.savez(memory, names=names, stats=stats, contents=np.zeros(len(names)))
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == first and len(hashed) == 21


@pytest.mark.parametrize("newest", ["modified", "changed"])
@pytest.mark.parametrize(("age_ns", "remembered"), [(2_000_000_000, False), (2_000_000_001, True)])
def test_a_file_that_is_younger_than_two_seconds_is_read_again(
    data: Dataset, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, newest, age_ns, remembered
) -> None:
    """Within the clock's tick it may change again and look the same."""
    start, inode = 10**18, 2**62  # an inode's number is no time, however large
    times = (start - age_ns, 0) if newest == "modified" else (0, start - age_ns)
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: start)
    monkeypatch.setattr(fingerprints, "_stat", lambda path: (os.stat(path).st_size, *times, inode))
    fingerprint_splits(data, tmp_path / "cache")
    nothing_is_checked(monkeypatch)
    hashed.clear()
    fingerprint_splits(data, tmp_path / "cache")
    assert len(hashed) == (0 if remembered else 21)


def test_hashes_are_written_only_when_there_are_new_ones_and_never_without_a_folder(
    data: Dataset, tmp_path: Path, later: None, hashed: list[Path]
) -> None:
    first = fingerprint_splits(data, tmp_path / "cache")
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    assert re.fullmatch(r"[0-9a-f]{16}\.npz", memory.name)
    os.utime(memory, (1e9, 1e9))
    assert fingerprint_splits(data, tmp_path / "cache") == first and memory.stat().st_mtime == 1e9
    hashed.clear()
    assert fingerprint_splits(data, None) == first and len(hashed) == 21


def test_a_new_file_is_found_wherever_it_stands_among_the_remembered_ones(
    tmp_path: Path, make_folder: FolderMaker, later: None, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_hash_of_path", lambda path: path[-16:].encode())  # in the order of names
    folder = make_folder(tmp_path / "images", classes=2, train=2, test=1)
    config = tiny_config(data_path=str(folder), init_cls=1, increment=1)
    fingerprint_splits(load_dataset(config), tmp_path / "cache")
    nothing_is_checked(monkeypatch)
    for name in ("000a.png", "zzzz.png"):
        new = folder / "train" / "1" / name
        new.write_bytes((folder / "train" / "1" / "000.png").read_bytes())
        hashed.clear()
        fingerprint_splits(load_dataset(config), tmp_path / "cache")
        assert hashed == [new]


def test_where_hashes_cannot_be_remembered_the_images_are_read_each_time(
    data: Dataset, tmp_path: Path, later: None, hashed: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO):
        first = fingerprint_splits(data, tmp_path / "cache")
    assert "hashes of the images are not remembered" in caplog.text
    hashed.clear()
    assert fingerprint_splits(data, tmp_path / "cache") == first and len(hashed) == 21


def test_the_contents_are_those_of_the_files(data: Dataset, tmp_path: Path) -> None:
    import hashlib

    found = fingerprint_splits(data, tmp_path / "cache")
    for name in ("train", "test"):
        split = data.split(name)
        expected = [hashlib.sha256(split.path(i).read_bytes()).digest() for i in range(len(split))]
        assert [row.tobytes() for row in found.contents[name]] == expected
    assert pickle.loads(pickle.dumps(found)).contents["train"].shape == (12, 32)  # as ranks share it


def test_what_a_killed_write_of_hashes_left_is_removed_by_the_next(data: Dataset, tmp_path: Path, later: None) -> None:
    fingerprint_splits(data, tmp_path / "bank")
    (hashes,) = (tmp_path / "bank" / "hashes").iterdir()
    hashes.unlink()
    dead, at_work = (hashes.with_name(f".{hashes.name}.{process}.partial") for process in (2**30, os.getppid()))
    for partial in (dead, at_work):
        partial.write_bytes(b"half")
    fingerprint_splits(data, tmp_path / "bank")
    assert sorted(path.name for path in hashes.parent.iterdir()) == sorted([hashes.name, at_work.name])
