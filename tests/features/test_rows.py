"""Rows on disk: what notices that one is not as it was written, what survives a power failure, disks of all kinds."""

import errno
import logging
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.errors import BankError, UserError
from utils.features import arrays, extraction
from utils.features.rows import TEST_VIEW, ArrayReader, RowChecksums, checksums_path, incomplete_path, read_checksums
from utils.features.bank import resolve_cache_dir
from utils.features.extraction import Store
from utils.features.rows import LOCK, FolderRows, MemoryRows

SHAPE = IMAGES, DIM = 9, 5
FEATURES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
EVERY = np.arange(IMAGES)


def make_rows(folder: Path, augment_seed: int = 3) -> FolderRows:
    return FolderRows(folder, SHAPE, {"what": "test"}, augment_seed)


def fill(rows: FolderRows, views: list[int], count: int = IMAGES, *, finish: bool = True) -> FolderRows:
    """Row i of view v holds ``FEATURES[i] + v``."""
    rows.folder.mkdir(exist_ok=True)
    rows.prepare(views)
    for view in views:
        writer = rows.writer(view)
        for row in range(count):
            writer.write(row, FEATURES[row] + np.float32(view))
        writer.close()
    if finish:
        rows.finish(views)
    return rows


@pytest.fixture
def rows(tmp_path: Path) -> FolderRows:
    """A bank of the test view and two augmented views, complete."""
    return fill(make_rows(tmp_path / "bank"), [TEST_VIEW, 0, 1])


def as_an_earlier_version(rows: FolderRows) -> FolderRows:
    """The same bank without checksums."""
    for path in rows.folder.glob("*.crc32"):
        path.unlink()
    return rows


# -- what was written is what is read ---------------------------------------------------------------------------------


def test_an_array_begins_as_rows_of_nan_in_the_size_it_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "_BLOCK", 2)  # so that rows are written in several pieces, the last one smaller
    arrays.create_array(tmp_path / "new.npy", (5, 3))
    found = np.load(tmp_path / "new.npy")
    assert found.shape == (5, 3) and found.dtype == np.float32 and np.isnan(found).all()
    with ArrayReader(tmp_path / "new.npy", (5, 3)) as reader:
        assert [(numbers.tolist(), len(rows)) for numbers, rows in reader.blocks()] == [
            ([0, 1], 2),
            ([2, 3], 2),
            ([4], 1),
        ]


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_both_headers_that_numpy_writes_for_such_arrays_are_read(tmp_path: Path, version: tuple[int, int]) -> None:
    with open(tmp_path / "array.npy", "wb") as file:
        np.lib.format.write_array(file, FEATURES, version=version)
    with ArrayReader(tmp_path / "array.npy", SHAPE) as reader:
        np.testing.assert_array_equal(reader.rows(EVERY), FEATURES)


def test_a_reader_closes_its_file_also_when_it_refuses_it(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", FEATURES)
    with ArrayReader(tmp_path / "array.npy", SHAPE) as reader:
        pass
    with pytest.raises(ValueError, match="closed file"):
        reader.rows(EVERY)
    with pytest.raises(BankError) as refused:  # which keeps the reader alive
        ArrayReader(tmp_path / "array.npy", (IMAGES + 1, DIM))
    (opened,) = [frame.frame.f_locals["self"] for frame in refused.traceback if frame.name == "__init__"]
    assert opened._file.closed


def test_rows_are_read_as_they_were_written_in_any_order(rows: FolderRows) -> None:
    for chosen in ([0], [8], [3, 4, 5, 1], [8, 7, 6], [2, 2, 3], list(range(9)), []):
        found = rows.read(1, np.array(chosen, dtype=np.int64))
        assert found.dtype == np.float32 and found.flags.writeable
        np.testing.assert_array_equal(found, FEATURES[chosen] + np.float32(1))


@pytest.mark.parametrize("bit", [0, 7, 13, 22])  # of the mantissa: the number stays finite
@pytest.mark.parametrize("row", [0, 4, 8])
def test_a_flipped_bit_that_leaves_a_finite_number_is_noticed(rows: FolderRows, row: int, bit: int) -> None:
    path = rows.path(0)
    content = bytearray(path.read_bytes())
    content[-(IMAGES - row) * DIM * 4 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    assert np.isfinite(np.load(path)).all()
    with pytest.raises(BankError, match=rf"{path} holds rows that differ from what was written .* row {row};") as error:
        rows.read(0, EVERY)
    assert f"remove {rows.folder.name}" in str(error.value)
    rows.read(0, EVERY[row != EVERY])  # the others are good


def test_a_row_of_another_image_view_or_bank_is_noticed(rows: FolderRows, tmp_path: Path) -> None:
    path, whole = rows.path(0), rows.path(0).read_bytes()
    size = DIM * 4
    path.write_bytes(whole[: -2 * size] + whole[-size:] + whole[-2 * size : -size])  # two images exchanged
    with pytest.raises(BankError, match="row 7"):
        rows.read(0, EVERY)
    for other in (rows, fill(make_rows(tmp_path / "other"), [1])):  # with its checksums
        path.write_bytes(other.path(1).read_bytes())
        checksums_path(path).write_bytes(checksums_path(other.path(1)).read_bytes())
        with pytest.raises(BankError, match="differ from what was written"):
            rows.read(0, EVERY)


def test_a_row_that_is_not_finite_is_noticed(rows: FolderRows) -> None:
    path = rows.path(0)
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.inf).tobytes())
    with pytest.raises(BankError, match="not finite numbers, the first is row 8"):
        rows.read(0, EVERY)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(SHAPE, dtype=np.float64),
        np.zeros(SHAPE, dtype=np.int32),
        np.zeros(SHAPE, dtype=">f4"),
        np.zeros(SHAPE, dtype=np.float16),
        np.asfortranarray(np.zeros(SHAPE, dtype=np.float32)),
        np.zeros(SHAPE[::-1], dtype=np.float32),
        np.zeros((*SHAPE, 1), dtype=np.float32),
        np.zeros(0, dtype=np.float32),
        np.float32(1),
        np.array([{"code": 1}], dtype=object),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_of_another_type_or_shape_is_one_line(rows: FolderRows, array: np.ndarray) -> None:
    np.save(rows.path(0), array)
    with pytest.raises(BankError, match=rf"{rows.path(0)} is damaged \(.*\); remove it") as error:
        rows.read(0, EVERY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x09\x00",
        b"no array",
        b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118,
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b" " * 20000,
        b"\x93NUMPY\x01\x00\x36\x00{'descr':'<f4','fortran_order':False,'shape':(-9,-5)}\n".ljust(64),
    ],
)
def test_a_file_that_is_no_array_is_one_line(rows: FolderRows, content: bytes) -> None:
    rows.path(0).write_bytes(content)
    with pytest.raises(BankError, match=r"is damaged") as error:
        rows.read(0, EVERY)
    assert "\n" not in str(error.value)


def test_checksums_of_another_size_are_one_line_and_can_be_made_again(rows: FolderRows) -> None:
    path = checksums_path(rows.path(0))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(BankError, match=rf"{path} is damaged \(34 bytes, expected 36\); remove it: it is made again"):
        rows.read(0, EVERY)
    path.unlink()
    rows.add_checksums([0])
    rows.read(0, EVERY)


# -- banks of earlier versions ----------------------------------------------------------------------------------------


def test_a_bank_without_checksums_is_read_and_gets_them_without_a_forward_pass(
    rows: FolderRows, caplog: pytest.LogCaptureFixture
) -> None:
    written = {path.name: path.read_bytes() for path in rows.folder.glob("*.crc32")}
    as_an_earlier_version(rows)
    rows.read(0, EVERY)
    with caplog.at_level(logging.INFO):
        rows.add_checksums([TEST_VIEW, 0, 1])
    assert "added the checksums that 3 arrays of an earlier version lacked" in caplog.text
    assert {path.name: path.read_bytes() for path in rows.folder.glob("*.crc32")} == written
    caplog.clear()
    rows.add_checksums([TEST_VIEW, 0, 1])
    assert not caplog.text


def test_an_array_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    rows = as_an_earlier_version(fill(make_rows(tmp_path / "bank"), [0], count=4, finish=False))
    assert rows.missing(0).tolist() == [False] * 4 + [True] * 5
    rows.prepare([0])
    assert rows.missing(0).tolist() == [False] * 4 + [True] * 5


def test_where_checksums_cannot_be_added_rows_are_read_without(
    rows: FolderRows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    as_an_earlier_version(rows)
    read_only(monkeypatch, rows.folder)
    rows.add_checksums([TEST_VIEW, 0, 1])
    assert "checksums of 3 arrays cannot be added" in caplog.text and rows.folder.name in caplog.text
    np.testing.assert_array_equal(rows.read(0, EVERY), FEATURES)


# -- what survives ----------------------------------------------------------------------------------------------------


def test_a_row_whose_checksum_was_not_written_is_missing(tmp_path: Path) -> None:
    """Power may fail when one of two files has reached the disk, or half of a row."""
    rows = fill(make_rows(tmp_path / "bank"), [0], count=6, finish=False)
    sums, array = checksums_path(rows.path(0)), incomplete_path(rows.path(0))
    sums.write_bytes(sums.read_bytes()[: 4 * 5] + bytes(4 * 4))
    content = bytearray(array.read_bytes())
    content[-(IMAGES - 2) * DIM * 4 : -(IMAGES - 2) * DIM * 4 + 8] = bytes(8)
    array.write_bytes(content)
    assert np.flatnonzero(rows.missing(0)).tolist() == [2, 5, 6, 7, 8]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed from now on, in order: ("flush", file) and ("name", file)."""
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
    return events


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which file a handle is")


@needs_proc
def test_files_are_on_the_disk_before_they_have_their_names_and_names_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fill(make_rows(tmp_path / "bank"), [], finish=False)
    events = recorded(monkeypatch)
    rows.prepare([0])
    made = [event for event in events if "manifest" not in event[1]]
    partial = f"augmented-3-0000.{os.getpid()}.partial"
    assert made[-6:] == [
        ("flush", partial),
        ("name", "augmented-3-0000.crc32"),
        ("flush", "bank"),
        ("flush", f"augmented-3-0000.filling.{os.getpid()}.partial"),
        ("name", "augmented-3-0000.filling.npy"),
        ("flush", "bank"),
    ]
    events.clear()
    rows.finish([0])
    assert events == [
        ("flush", "augmented-3-0000.filling.npy"),
        ("flush", "augmented-3-0000.crc32"),
        ("name", "augmented-3-0000.npy"),
        ("flush", "bank"),
    ]


def test_a_row_is_in_its_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """A process that is killed loses nothing that it had computed."""
    rows = fill(make_rows(tmp_path / "bank"), [0], count=0, finish=False)
    writer, complete = rows.writer(0), rows.path(0)
    writer.write(4, FEATURES[4])
    with ArrayReader(incomplete_path(complete), SHAPE) as reader:
        np.testing.assert_array_equal(reader.rows(EVERY[4:5])[0], FEATURES[4])
    found = read_checksums(checksums_path(complete), IMAGES)
    assert found is not None and np.flatnonzero(found).tolist() == [4]
    writer.close()
    assert writer._rows.closed and writer._checksums.closed


@needs_proc
def test_rows_and_checksums_are_flushed_every_half_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = fill(make_rows(tmp_path / "bank"), [0], count=0, finish=False)
    events, now = recorded(monkeypatch), [0.0]
    monkeypatch.setattr(extraction.time, "monotonic", lambda: now[0])
    store = Store({("train", 0): rows.writer(0)})
    for now[0], flushed in ((10.0, False), (29.0, False), (31.0, True), (50.0, False), (62.0, True)):
        events.clear()
        store.write([("train", 0, 1)], FEATURES[:1])
        expected = [("flush", "augmented-3-0000.filling.npy"), ("flush", "augmented-3-0000.crc32")]
        assert events == (expected if flushed else [])


def test_a_disk_that_takes_only_a_part_of_a_row_gets_the_rest(tmp_path: Path) -> None:
    rows = fill(make_rows(tmp_path / "bank"), [0], count=0, finish=False)
    writer: Any = rows.writer(0)

    class Stingy:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, content: bytes) -> int:
            return self.file.write(content[:3])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    writer._rows = Stingy(writer._rows)
    writer.write(4, FEATURES[4])
    writer.close()
    assert np.flatnonzero(~rows.missing(0)).tolist() == [4]


# -- disks of all kinds -----------------------------------------------------------------------------------------------


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


def test_a_disk_that_refuses_memory_maps_serves(rows: FolderRows, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("mmap.mmap", refuse)
    np.testing.assert_array_equal(rows.read(0, EVERY), FEATURES)


def test_a_disk_that_refuses_locks_names_file_and_key(rows: FolderRows, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(UserError, match=rf"{rows.folder / LOCK} cannot be locked .*\(key cache_dir\)"):
        rows.lock().__enter__()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_an_intact_array_that_cannot_be_read_is_not_called_damaged(
    rows: FolderRows, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real_open = open

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(".npy"):
            raise OSError(number, os.strerror(number), str(file))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BankError, match=rf"{rows.path(0)} cannot be read \({os.strerror(number)}\)") as error:
        rows.read(0, EVERY)
    assert "damaged" not in str(error.value)
    assert ("ulimit -n" in str(error.value)) == (number == errno.EMFILE)


def test_too_few_open_files_are_one_line_that_names_the_limit(tmp_path: Path) -> None:
    rows = fill(make_rows(tmp_path / "bank"), list(range(20)), count=0, finish=False)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[Any] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, before[1]))
        with pytest.raises(BankError, match=r"cannot be opened \(Too many open files\); raise .*ulimit -n"):
            opened.extend(rows.writer(view) for view in range(20))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for writer in opened:
            writer.close()


@pytest.mark.parametrize("value", [None, "~/bank", "~nobody-here/bank"])
def test_a_user_without_a_home_is_told_the_key(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(BankError, match="cache_dir"):
        resolve_cache_dir(value)


# -- in memory --------------------------------------------------------------------------------------------------------


def test_rows_in_memory_have_the_same_interface() -> None:
    rows = MemoryRows(SHAPE)
    assert rows.missing(0).all() and not rows.exists(0)
    with pytest.raises(BankError, match="not filled yet"):
        rows.read(0, EVERY)
    rows.prepare([0])
    writer = rows.writer(0)
    for row in (1, 2):
        writer.write(row, FEATURES[row])
    assert not rows.complete(0) and np.flatnonzero(~rows.missing(0)).tolist() == [1, 2]
    np.testing.assert_array_equal(rows.read(0, np.array([2, 1])), FEATURES[[2, 1]])
    with pytest.raises(BankError, match="not filled yet"):
        rows.read(0, np.array([1, 3]))


def test_checksums_depend_on_every_bit_of_a_row() -> None:
    sums = RowChecksums(Path("bank/test.npy"))
    expected, content = sums.of(3, FEATURES[3]), FEATURES[3].tobytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        assert sums.of(3, np.frombuffer(changed, dtype=np.float32)) != expected
    assert sums.of(4, FEATURES[3]) != expected


def test_checksums_of_banks_on_disk_stay_valid() -> None:
    """Another formula would call every bank damaged that was filled before."""
    sums, feature = RowChecksums(Path("bank/test.npy")), np.arange(5, dtype=np.float32)
    assert (sums.of(0, feature), sums.of(3, feature)) == (3269163841, 1624023921)


def test_a_task_reads_its_own_checksums_alone(rows: FolderRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them for each task would make a stream's cost the square of its size."""
    asked: list[int] = []
    from_buffer = np.frombuffer

    def counting(content: bytes, **kinds: Any) -> np.ndarray:
        asked.append(len(content))
        return from_buffer(content, **kinds)

    monkeypatch.setattr(np, "frombuffer", counting)
    rows.read(0, np.array([2, 3, 7]))
    assert sum(asked) == 3 * 4
