"""Rows on disk: what is read is what was written, what survives a kill, disks of all kinds."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.errors import BankError, UserError
from utils.features import rows as module
from utils.features.bank import resolve_cache_dir
from utils.features.rows import LOCK, TEST_VIEW, FolderRows, MemoryRows

SHAPE = IMAGES, DIM = 9, 5
FEATURES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
EVERY = np.arange(IMAGES)


def fill(rows: FolderRows, views: list[int], count: int = IMAGES, *, finish: bool = True) -> FolderRows:
    """Row i of view v holds ``FEATURES[i] + v``."""
    for view in views:
        rows.prepare(view)
        rows.write(view, list(range(count)), FEATURES[:count] + np.float32(view))
        if finish:
            rows.finish(view)
    return rows


@pytest.fixture
def empty(tmp_path: Path) -> FolderRows:
    (tmp_path / "bank").mkdir()
    return FolderRows(tmp_path / "bank", SHAPE, {"what": "test"}, 3)


@pytest.fixture
def rows(empty: FolderRows) -> FolderRows:
    """A bank of the test view and two augmented views, complete."""
    return fill(empty, [TEST_VIEW, 0, 1])


@pytest.mark.parametrize("chosen", [[0], [8], [3, 4, 5, 1], [8, 7, 6], [2, 2, 3], [0, 2, 4], list(range(9)), []])
def test_rows_are_read_as_they_were_written_in_any_order(rows: FolderRows, chosen: list[int]) -> None:
    found = rows.read(1, np.array(chosen, dtype=np.int64))
    assert found.dtype == np.float32 and found.flags.writeable
    np.testing.assert_array_equal(found, FEATURES[chosen] + np.float32(1))


@pytest.mark.parametrize("shape", [SHAPE, (1, 1), (12_345_678, 1_280)])
def test_the_header_is_the_one_that_numpy_writes(tmp_path: Path, shape: tuple[int, int]) -> None:
    """So any program reads the arrays."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with open(tmp_path / "header", "w+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0)
        assert FolderRows(tmp_path, shape, {}, 0)._header == file.read()


@pytest.mark.parametrize("memory", [False, True])
def test_rows_are_missing_until_they_are_written(
    empty: FolderRows, memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 2)  # so that rows are looked at in several pieces, the last one smaller
    rows = MemoryRows(SHAPE) if memory else empty
    assert rows.missing(0).all() and not rows.exists(0) and not rows.complete(0)
    unread = "not filled yet" if memory else r"augmented-3-0000.npy cannot be read \(No such file or directory\)"
    with pytest.raises(BankError, match=unread):
        rows.read(0, EVERY)
    rows.prepare(0)
    rows.write(0, [1, 8], FEATURES[[1, 8]])
    rows.prepare(0)  # what is there stays
    assert rows.exists(0) and not rows.complete(0)
    assert np.flatnonzero(~rows.missing(0)).tolist() == [1, 8]
    with pytest.raises(BankError, match=unread):
        rows.read(0, np.array([1, 3]))
    rows.write(0, [0, *range(2, 8)], FEATURES[[0, *range(2, 8)]])
    rows.finish(0)
    assert rows.complete(0) and not rows.missing(0).any()
    np.testing.assert_array_equal(rows.read(0, EVERY[::-1]), FEATURES[::-1])


def test_half_a_row_is_a_missing_row(empty: FolderRows) -> None:
    """Power may fail when only a part of it has reached the disk."""
    fill(empty, [0], count=6, finish=False)
    array = empty._filling(0)
    content = bytearray(array.read_bytes())
    content[-(IMAGES - 2) * DIM * 4 + 8 : -(IMAGES - 3) * DIM * 4] = np.full(3, np.nan, dtype="<f4").tobytes()
    array.write_bytes(content)
    assert np.flatnonzero(empty.missing(0)).tolist() == [2, 6, 7, 8]


# -- damage -----------------------------------------------------------------------------------------------------------


def test_a_row_that_is_not_finite_is_noticed(rows: FolderRows) -> None:
    path = rows.path(0)
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.inf).tobytes())
    with pytest.raises(BankError, match=rf"not finite numbers, the first is row 8;.* remove {rows.folder.name}"):
        rows.read(0, EVERY)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(SHAPE, dtype=np.float64),
        np.asfortranarray(np.zeros(SHAPE, dtype=np.float32)),
        np.zeros(SHAPE[::-1], dtype=np.float32),
        np.array([{"code": 1}], dtype=object),
        b"",
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 20000,
    ],
    ids=lambda array: f"{len(array)} bytes" if isinstance(array, bytes) else f"{array.dtype}{array.shape}",
)
@pytest.mark.parametrize("complete", [True, False])
def test_what_is_no_array_of_this_type_and_shape_is_one_line(
    rows: FolderRows, array: np.ndarray | bytes, complete: bool
) -> None:
    path = rows.path(0) if complete else rows._filling(0)
    rows.path(0).unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)
    with pytest.raises(BankError, match=rf"{path} is damaged \(.*\); remove it") as error:
        rows.read(0, EVERY) if complete else rows.missing(0)
    assert "\n" not in str(error.value)


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file a handle is")
def test_files_are_on_the_disk_before_they_have_their_names_and_names_too(
    empty: FolderRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flush(handle: int) -> None:
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def name(source: Path, target: Path) -> None:
        events.append(("name", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", name)
    fill(empty, [0])
    filling, complete = "augmented-3-0000.filling.npy", "augmented-3-0000.npy"
    assert events == [
        *[("flush", f".{filling}.{os.getpid()}.partial"), ("name", filling), ("flush", "bank")],
        *[("flush", filling), ("name", complete), ("flush", "bank")],
    ]


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Below ``folder`` nothing can be written from now on, as root too."""
    real_open, real_os_open = open, os.open

    def refuse(path: object) -> None:
        if str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(file)
        return real_open(file, mode, *args, **kwargs)

    def os_opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_os_open(path, flags, *args, **kwargs)

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr(os, "open", os_opened)
    unlink, replace = os.unlink, os.replace
    monkeypatch.setattr(os, "unlink", lambda path: (refuse(path), unlink(path)))
    monkeypatch.setattr(os, "replace", lambda source, target: (refuse(target), replace(source, target)))


def test_a_disk_that_refuses_locks_names_file_and_key(rows: FolderRows, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(UserError, match=rf"{rows.folder / LOCK} cannot be locked .*\(key cache_dir\)"), rows.lock():
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("act", ["read", "written"])
def test_what_the_disk_refuses_is_not_called_damage(
    rows: FolderRows, monkeypatch: pytest.MonkeyPatch, number: int, act: str
) -> None:
    real_open = open

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(".npy"):
            raise OSError(number, os.strerror(number), str(file))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BankError, match=rf"{rows.folder}/.*npy cannot be {act} \({os.strerror(number)}\)") as error:
        rows.read(0, EVERY) if act == "read" else rows.write(0, [0], FEATURES[:1])
    assert "damaged" not in str(error.value)
    assert ("ulimit -n" in str(error.value)) == (number == errno.EMFILE)


@pytest.mark.parametrize("value", [None, "~/bank", "~nobody-here/bank"])
def test_a_user_without_a_home_is_told_the_key(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(BankError, match="cache_dir"):
        resolve_cache_dir(value)
