"""The arrays of a feature bank: rows on disk (or in memory) that are NaN until they are computed."""

import os
import threading
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.errors import BankError

SYNC_SECONDS = 30  # at most this much work is lost when the power fails (a batch when only the process dies)
HINT_FEATURES_STAY = "start again afterwards: the features that are done stay"

View = tuple[str, int]  # (split, view)
ViewRow = tuple[str, int, int]  # (split, view, row)


def incomplete_path(path: Path) -> Path:
    return path.with_suffix(".filling.npy")


def create_array(path: Path, shape: tuple[int, int]) -> None:
    """An ``.npy`` of NaN rows, complete on disk before it has its name."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, shape[1]), dtype=np.float32)) | {"shape": shape}
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            block = np.full((min(shape[0], 4096), shape[1]), np.nan, dtype=np.float32)
            for start in range(0, shape[0], len(block)):
                file.write(block[: shape[0] - start].tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise BankError(
            f"{path} cannot be written ({error.strerror}); free space or set cache_dir to another disk; "
            f"{HINT_FEATURES_STAY}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def open_array(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array as a read-only memory map, or None if it is not there."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise BankError(f"{path} is damaged ({error}); remove it, its features are computed again") from error
    if array.shape != shape or array.dtype != np.float32:
        raise BankError(
            f"{path} is damaged ({array.dtype} of shape {array.shape}, expected float32 of {shape}); remove it, its "
            "features are computed again"
        )
    return array


class Writer(Protocol):
    def write(self, row: int, feature: np.ndarray) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class FileWriter:
    """Rows straight into the file: nothing of it becomes resident in memory."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path, self.row_bytes = path, shape[1] * 4
        try:
            self.offset = path.stat().st_size - shape[0] * self.row_bytes  # the header's length
            self.file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise BankError(
                f"{path} cannot be opened ({error.strerror}); under torchrun on several machines cache_dir must be on "
                "a disk that all of them share"
            ) from error

    def write(self, row: int, feature: np.ndarray) -> None:
        try:
            self.file.seek(self.offset + row * self.row_bytes)
            self.file.write(feature.tobytes())
        except OSError as error:
            raise BankError(f"{self.path} cannot be written ({error.strerror}); {HINT_FEATURES_STAY}") from error

    def sync(self) -> None:
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise BankError(f"{self.path} cannot be written ({error.strerror}); {HINT_FEATURES_STAY}") from error

    def close(self) -> None:
        self.file.close()


class MemoryWriter:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def write(self, row: int, feature: np.ndarray) -> None:
        self.array[row] = feature

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Store:
    """Where features go, from any thread; closed as a context manager. Those without a writer are dropped."""

    def __init__(self, writers: dict[View, Writer]) -> None:
        self.writers, self.lock, self.last_sync = writers, threading.Lock(), time.monotonic()

    def write(self, places: list[ViewRow], features: np.ndarray) -> None:
        with self.lock:
            for (split, view, row), feature in zip(places, features, strict=True):
                if (split, view) in self.writers:
                    self.writers[split, view].write(row, feature)
            if time.monotonic() - self.last_sync > SYNC_SECONDS:
                for writer in self.writers.values():
                    writer.sync()
                self.last_sync = time.monotonic()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.writers.values():
            writer.close()


def sync_file(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
