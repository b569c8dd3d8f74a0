"""Where the rows of one split live: in a folder, or in memory. A row of NaN is not computed yet.

In a folder each view has an ``.npy`` of float32, which plain calls read and write: a disk that refuses shared memory
maps serves as well, and what is read is never resident beyond its use. An array that is being filled ends in
``.filling.npy``; it is renamed once every row is there.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import BankError
from utils.files import (
    FolderLock,
    hint_of_limits,
    open_regular,
    partial_path,
    remove_partials,
    replacing,
    sync_folder,
    write_json,
)

log = logging.getLogger(__name__)

MANIFEST, LOCK = "manifest.json", "lock"  # the files of a bank beside its arrays
_HEADER = 128  # bytes before the first row
_BLOCK = 4096  # rows handled at a time where all are

View = tuple[str, int]  # (split, view)
ViewRow = tuple[str, int, int]  # (split, view, row)
TEST_VIEW = -1  # the view that the test transform gives


class MemoryRows:
    """Rows that are gone with this object.

    Args:
        shape: ``(images, dim)`` of each view's array.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._arrays: dict[int, np.ndarray] = {}

    def exists(self, view: int) -> bool:
        """Whether there is room laid out for the view, filled or not."""
        return view in self._arrays

    def complete(self, view: int) -> bool:
        return not self.missing(view).any()

    def missing(self, view: int) -> np.ndarray:
        """``(images,)`` bool: the rows that are not computed."""
        if not self.exists(view):
            return np.ones(self._shape[0], dtype=bool)
        missing: np.ndarray = np.isnan(self._arrays[view]).any(axis=1)
        return missing

    def read(self, view: int, rows: np.ndarray) -> np.ndarray:
        """``(rows,)`` -> ``(rows, dim)`` float32, all of them computed."""
        found = np.full((1, 1), np.nan) if not self.exists(view) else self._arrays[view][rows]
        if np.isnan(found).any():
            raise BankError(f"the features of view {view} are not filled yet")
        return found

    def write(self, view: int, rows: list[int], features: np.ndarray) -> None:
        """Threads and processes may write different rows at a time."""
        self._arrays[view][rows] = features

    def lock(self) -> AbstractContextManager[object]:
        """Held by whoever adds rows."""
        return nullcontext()

    def prepare(self, views: Sequence[int]) -> None:
        """Lay out room for the views; all rows of a new one are missing."""
        for view in views:
            if not self.exists(view):
                self._arrays[view] = np.full(self._shape, np.nan, dtype=np.float32)

    def finish(self, views: Sequence[int]) -> None:
        """Declare the views complete."""


class FolderRows:
    """The same in a folder.

    Args:
        folder: of this bank.
        shape: ``(images, dim)`` of each view's array.
        manifest: what the bank holds, for its ``manifest.json``.
        augment_seed: whose views are meant; those of other seeds lie in the same folder.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], manifest: dict[str, Any], augment_seed: int) -> None:
        self.folder, self._shape, self._manifest, self._augment_seed = folder, shape, manifest, augment_seed
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(_HEADER - 11) + "\n"
        self._header = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + header.encode()

    def path(self, view: int) -> Path:
        """The complete array of a view."""
        name = "test.npy" if view == TEST_VIEW else f"augmented-{self._augment_seed}-{view:04d}.npy"
        return self.folder / name

    def complete(self, view: int) -> bool:
        return self.path(view).exists()

    def exists(self, view: int) -> bool:
        return self.complete(view) or self._filling(view).exists()

    def missing(self, view: int) -> np.ndarray:
        missing = np.zeros(self._shape[0], dtype=bool)
        if self.complete(view):
            return missing
        try:
            for start in range(0, len(missing), _BLOCK):
                block = np.arange(start, min(start + _BLOCK, len(missing)))
                missing[block] = np.isnan(self._rows_of(self._filling(view), block)).any(axis=1)
        except FileNotFoundError:  # there is none, or another process completed it in this moment
            return np.full(self._shape[0], not self.complete(view))
        return missing

    def read(self, view: int, rows: np.ndarray) -> np.ndarray:
        path = self.path(view)
        try:
            found = self._rows_of(path, rows)
        except FileNotFoundError:
            raise BankError(f"the features in {path} are not filled yet") from None
        wrong = ~np.isfinite(found).all(axis=1)
        if wrong.any():
            raise BankError(
                f"{path} holds rows that are not finite numbers, the first is row {int(rows[wrong.argmax()])}; see to "
                f"the disk, and remove the damaged bank: python -m utils.features remove {self.folder.name}"
            )
        return found

    def write(self, view: int, rows: list[int], features: np.ndarray) -> None:
        path = self._filling(view)
        with _refusals(path, "written"), open(path, "r+b") as file:
            for row, feature in zip(rows, features, strict=True):
                file.seek(self._place(row))
                file.write(np.ascontiguousarray(feature, dtype="<f4").data)

    def lock(self) -> AbstractContextManager[object]:
        what = f"feature bank {self.folder.name} (key cache_dir)"
        return FolderLock(self.folder / LOCK, what, wait=True, on_wait=_say_waiting)

    def prepare(self, views: Sequence[int]) -> None:
        write_json(self.folder / MANIFEST, self._manifest)
        remove_partials(self.folder, ".*")  # of a process that was killed: the lock is ours
        block = np.full((min(self._shape[0], _BLOCK), self._shape[1]), np.nan, dtype="<f4")
        for view in views:
            if self.exists(view):
                continue
            path = self._filling(view)
            with _refusals(path, "written"), replacing(path, partial_path(path)) as file:
                file.write(self._header)
                for start in range(0, self._shape[0], _BLOCK):
                    file.write(block[: self._shape[0] - start].data)

    def finish(self, views: Sequence[int]) -> None:
        for view in views:
            if not self.complete(view):
                path = self._filling(view)
                with _refusals(path, "written"):
                    with open(path, "r+b") as file:
                        os.fsync(file.fileno())
                    os.replace(path, self.path(view))
                    sync_folder(self.folder)

    def _filling(self, view: int) -> Path:
        return self.path(view).with_suffix(".filling.npy")

    def _place(self, row: int) -> int:
        return _HEADER + row * self._shape[1] * 4

    def _rows_of(self, path: Path, rows: np.ndarray) -> np.ndarray:
        """``(rows,)`` -> ``(rows, dim)`` float32. Rows that follow each other are read together."""
        found = np.full((len(rows), self._shape[1]), np.nan, dtype="<f4")
        ends = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        with _refusals(path, "read"), open_regular(path) as file:
            header, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
            if header != self._header or size != self._place(self._shape[0]):
                raise BankError(
                    f"{path} is damaged (it is no array of {self._shape} float32, {size} bytes); remove it, its "
                    "features are computed again"
                )
            for start, end in zip([0, *ends], [*ends, len(rows)], strict=True) if len(rows) else ():
                file.seek(self._place(int(rows[start])))
                file.readinto(found[start:end].data.cast("B"))
        return found


Rows = MemoryRows | FolderRows


@contextmanager
def _refusals(path: Path, verb: str) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except FileNotFoundError as error:
        if verb == "read":
            raise
        raise BankError(
            f"{path} cannot be {verb} ({error.strerror}); under torchrun on several machines cache_dir must be on a "
            "disk that all of them share"
        ) from error
    except OSError as error:
        hint = hint_of_limits(error) or "see to its space and state, or set cache_dir to another disk"
        raise BankError(
            f"{path} cannot be {verb} ({error.strerror}); {hint}; start again afterwards: the features that are done "
            "stay"
        ) from error


def _say_waiting(holder: str) -> None:
    log.info("Waiting for %s to fill the same feature bank", holder)
