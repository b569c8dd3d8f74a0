"""Files of a feature bank: an ``.npy`` of float32 rows, NaN until they are computed, and a checksum for each row.

Rows are read and written by plain calls: a disk that refuses shared memory maps serves as well, and what is read is
never resident beyond its use. Beside ``test.npy`` lies ``test.crc32``: a little-endian uint32 for each row.
"""

import errno
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import BankError
from utils.files import hint_of_limits, open_regular, replacing, sync_folder

HINT_FEATURES_STAY = "start again afterwards: the features that are done stay"
_BLOCK = 4096  # rows handled at a time where all are

View = tuple[str, int]  # (split, view)
ViewRow = tuple[str, int, int]  # (split, view, row)
TEST_VIEW = -1  # the view that the test transform gives


def incomplete_path(path: Path) -> Path:
    return path.with_suffix(".filling.npy")


def checksums_path(path: Path) -> Path:
    return path.with_suffix(".crc32")


class RowChecksums:
    """CRC-32 of rows, each begun with its bank, its array and its number: a row from elsewhere does not fit.

    Args:
        path: the complete array; only its name and its folder's name count.
    """

    def __init__(self, path: Path) -> None:
        self._start = zlib.crc32(f"{path.parent.name}/{path.name}".encode())

    def of(self, row: int, feature: np.ndarray) -> int:
        return zlib.crc32(
            np.ascontiguousarray(feature, dtype="<f4").data, (self._start + row * 0x9E3779B1) & 0xFFFFFFFF
        )

    def of_all(self, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
        """``(rows,)``, ``(rows, dim)`` -> ``(rows,)`` uint32."""
        return np.fromiter(map(self.of, rows.tolist(), features), dtype="<u4", count=len(rows))


def create_array(path: Path, shape: tuple[int, int]) -> None:
    """Write an ``.npy`` of NaN rows at ``path``, complete on disk before it has its name.

    Raises:
        BankError: it cannot be written.
    """
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    block = np.full((min(shape[0], _BLOCK), shape[1]), np.nan, dtype="<f4")

    def write(file: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, shape[0], _BLOCK):
            file.write(block[: shape[0] - start].data)

    _create(path, write)


def create_checksums(path: Path, values: np.ndarray) -> None:
    """Write the checksums ``values``, ``(images,)`` uint32, at ``path``.

    Raises:
        BankError: they cannot be written.
    """
    _create(path, lambda file: file.write(values.astype("<u4").data))


def _create(path: Path, write: Callable[[BinaryIO], object]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with replacing(path, partial) as file:
            write(file)
    except OSError as error:
        raise cannot_be_written(path, error) from error


class ArrayReader:
    """An array's file, open for reading.

    Args:
        path: the file.
        shape: the ``(images, dim)`` that it must have.

    Raises:
        FileNotFoundError: it is not there.
        BankError: it cannot be read, or is no array of this shape.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path, self.shape = path, shape
        try:
            self._file = open_regular(path).detach()  # unbuffered; closed by the context manager
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _cannot_be_read(path, error) from error
        try:
            self._offset = self._checked_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ArrayReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _checked_header(self) -> int:
        """Where the rows begin."""
        try:
            version = np.lib.format.read_magic(self._file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran_order, dtype = read_header(self._file)
        except OSError as error:
            raise _cannot_be_read(self.path, error) from error
        except Exception as error:  # a damaged header makes NumPy, and the parser that it asks, raise nearly anything
            raise _damaged(self.path, f"its header is none of an .npy file: {type(error).__name__}") from error
        if shape != self.shape or dtype != np.dtype("<f4") or fortran_order:
            raise _damaged(self.path, f"{dtype} of shape {shape}, expected float32 of {self.shape}")
        offset, size = self._file.tell(), os.fstat(self._file.fileno()).st_size
        if size != (expected := offset + self.shape[0] * self.shape[1] * 4):
            raise _damaged(self.path, f"{size} bytes, expected {expected}")
        return offset

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """``(rows,)`` -> ``(rows, dim)`` float32. Rows that follow each other are read together.

        Raises:
            BankError: the disk does not give them.
        """
        found = np.empty((len(rows), self.shape[1]), dtype="<f4")
        for start, end in _runs(rows):
            self._read_into(found[start:end], self._offset + int(rows[start]) * self.shape[1] * 4)
        return found

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every row, some thousands at a time: their numbers and what they hold."""
        for start in range(0, self.shape[0], _BLOCK):
            numbers = np.arange(start, min(start + _BLOCK, self.shape[0]))
            yield numbers, self.rows(numbers)

    def _read_into(self, target: np.ndarray, position: int) -> None:
        view = target.data.cast("B")
        try:
            self._file.seek(position)
            while len(view):
                count = self._file.readinto(view)
                if not count:
                    raise _damaged(self.path, "it ended while it was read")
                view = view[count:]
        except OSError as error:
            raise _cannot_be_read(self.path, error) from error


def read_checksums(path: Path, images: int, rows: np.ndarray | None = None) -> np.ndarray | None:
    """Checksums of ``rows`` (of all ``images`` by default), uint32, or None if the file is not there.

    Raises:
        BankError: it cannot be read, or has another size.
    """
    rows = np.arange(images) if rows is None else rows
    found = np.empty(len(rows), dtype="<u4")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            for start, end in _runs(rows) if size == 4 * images else ():  # only what is asked for: tasks are many
                file.seek(4 * int(rows[start]))
                found[start:end] = np.frombuffer(file.read(4 * (end - start)), dtype="<u4")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _cannot_be_read(path, error) from error
    if size != 4 * images:
        raise BankError(
            f"{path} is damaged ({size} bytes, expected {4 * images}); remove it: it is made again from the rows as "
            "they are"
        )
    return found


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where rows that follow each other begin and end among ``rows``."""
    ends = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
    return zip([0, *ends], [*ends, len(rows)], strict=True) if len(rows) else iter(())


class ArrayWriter:
    """Rows straight into the file of an array that is being filled, each with its checksum.

    Args:
        path: the complete array that it becomes.
        shape: its ``(images, dim)``.

    Raises:
        BankError: a file cannot be opened.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path, self._row_bytes, self._sums = incomplete_path(path), shape[1] * 4, RowChecksums(path)
        opened = self.path
        try:
            self._offset = self.path.stat().st_size - shape[0] * self._row_bytes  # the header's length
            self._rows = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
            opened = checksums_path(path)
            self._checksums = open(opened, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise _cannot_be_opened(opened, error) from error

    def write(self, row: int, feature: np.ndarray) -> None:
        content = np.ascontiguousarray(feature, dtype="<f4")
        try:
            _write_at(self._rows, self._offset + row * self._row_bytes, content.tobytes())
            _write_at(self._checksums, 4 * row, self._sums.of(row, content).to_bytes(4, "little"))
        except OSError as error:
            raise cannot_be_written(self.path, error) from error

    def sync(self) -> None:
        """Flush what was written to the disk."""
        try:
            for file in (self._rows, self._checksums):
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_be_written(self.path, error) from error

    def close(self) -> None:
        self._rows.close()
        self._checksums.close()


def _write_at(file: io.FileIO, position: int, content: bytes) -> None:
    file.seek(position)
    while content:  # a disk that is nearly full takes a part
        content = content[file.write(content) :]


def complete_array(path: Path) -> None:
    """Give a filled array its final name, when it is safely on the disk.

    Raises:
        BankError: it cannot be written.
    """
    try:
        for part in (incomplete_path(path), checksums_path(path)):
            with open(part, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(incomplete_path(path), path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_be_written(path, error) from error


def cannot_be_written(path: Path, error: OSError) -> BankError:
    return BankError(
        f"{path} cannot be written ({error.strerror}); {_hint(error, 'free space or set cache_dir to another disk')}; "
        f"{HINT_FEATURES_STAY}"
    )


def _cannot_be_read(path: Path, error: OSError) -> BankError:
    return BankError(f"{path} cannot be read ({error.strerror}); {_hint(error, 'see to its disk, or set cache_dir')}")


def _cannot_be_opened(path: Path, error: OSError) -> BankError:
    shared = "under torchrun on several machines cache_dir must be on a disk that all of them share"
    return BankError(f"{path} cannot be opened ({error.strerror}); {_hint(error, shared)}")


def _hint(error: OSError, otherwise: str) -> str:
    if error.errno == errno.EMFILE:
        return f"{hint_of_limits(error)} or lower train_views or num_workers"
    return " or ".join(filter(None, [hint_of_limits(error), otherwise]))


def _damaged(path: Path, found: str) -> BankError:
    return BankError(f"{path} is damaged ({found}); remove it, its features are computed again")
