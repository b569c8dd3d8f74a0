"""Where the rows of one split live: in a folder or in memory, behind one interface."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.errors import BankError, UserError
from utils.features.arrays import (
    TEST_VIEW,
    ArrayReader,
    ArrayWriter,
    RowChecksums,
    checksums_path,
    complete_array,
    create_array,
    create_checksums,
    incomplete_path,
    read_checksums,
)
from utils.files import FolderLock, write_json
from utils.words import counted

log = logging.getLogger(__name__)

MANIFEST, LOCK = "manifest.json", "lock"  # the files of a bank beside its arrays


class Writer(Protocol):
    """Takes computed rows of one view."""

    def write(self, row: int, feature: np.ndarray) -> None: ...

    def sync(self) -> None:
        """Make what was written survive a power failure."""

    def close(self) -> None: ...


class Rows(Protocol):
    """The feature rows of one split, by view; a row is either computed or missing."""

    def exists(self, view: int) -> bool:
        """Whether there is room laid out for the view, filled or not."""

    def complete(self, view: int) -> bool:
        """Whether the view was declared complete."""

    def missing(self, view: int) -> np.ndarray:
        """``(images,)`` bool: the rows that are not computed."""

    def read(self, view: int, rows: np.ndarray) -> np.ndarray:
        """``(rows,)`` -> ``(rows, dim)`` float32, all of them computed and as they were written."""

    def lock(self) -> AbstractContextManager[object]:
        """Held by whoever adds rows."""

    def prepare(self, views: Sequence[int]) -> None:
        """Lay out room for the views; all rows of a new one are missing."""

    def writer(self, view: int) -> Writer: ...

    def finish(self, views: Sequence[int]) -> None:
        """Declare the views complete."""

    def add_checksums(self, views: Sequence[int]) -> None:
        """Add the checksums that rows of an earlier version lack."""


class MemoryRows:
    """Rows that are gone with this object."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._arrays: dict[int, np.ndarray] = {}

    def exists(self, view: int) -> bool:
        return view in self._arrays

    def complete(self, view: int) -> bool:
        return self.exists(view) and not self.missing(view).any()

    def missing(self, view: int) -> np.ndarray:
        if not self.exists(view):
            return np.ones(self._shape[0], dtype=bool)
        missing: np.ndarray = np.isnan(self._arrays[view]).any(axis=1)
        return missing

    def read(self, view: int, rows: np.ndarray) -> np.ndarray:
        if not self.exists(view) or self.missing(view)[rows].any():
            raise BankError(f"the features of view {view} are not filled yet")
        found: np.ndarray = self._arrays[view][rows]
        return found

    def lock(self) -> AbstractContextManager[object]:
        return nullcontext()

    def prepare(self, views: Sequence[int]) -> None:
        for view in views:
            if not self.exists(view):
                try:
                    self._arrays[view] = np.full(self._shape, np.nan, dtype=np.float32)
                except MemoryError:
                    raise BankError(
                        "there is not enough memory for the features; set cache_dir to a folder, or lower train_views"
                    ) from None

    def writer(self, view: int) -> Writer:
        return _MemoryWriter(self._arrays[view])

    def finish(self, views: Sequence[int]) -> None: ...

    def add_checksums(self, views: Sequence[int]) -> None: ...


class _MemoryWriter:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def write(self, row: int, feature: np.ndarray) -> None:
        self._array[row] = feature

    def sync(self) -> None: ...

    def close(self) -> None: ...


class FolderRows:
    """Rows in a folder, one array and one file of checksums for each view (``utils.features.arrays``).

    An array that is being filled ends in ``.filling.npy``; it is renamed once every row is there.

    Args:
        folder: of this bank.
        shape: ``(images, dim)`` of each array.
        manifest: what the bank holds, for its ``manifest.json``.
        augment_seed: whose views are meant; those of other seeds lie in the same folder.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], manifest: dict[str, Any], augment_seed: int) -> None:
        self.folder, self._shape, self._manifest, self._augment_seed = folder, shape, manifest, augment_seed

    def path(self, view: int) -> Path:
        """The complete array of a view."""
        name = "test.npy" if view == TEST_VIEW else f"augmented-{self._augment_seed}-{view:04d}.npy"
        return self.folder / name

    def complete(self, view: int) -> bool:
        return self.path(view).exists()

    def exists(self, view: int) -> bool:
        return self.complete(view) or incomplete_path(self.path(view)).exists()

    def missing(self, view: int) -> np.ndarray:
        missing, path = np.zeros(self._shape[0], dtype=bool), self.path(view)
        if self.complete(view):
            return missing
        try:
            with ArrayReader(incomplete_path(path), self._shape) as array:
                expected, sums = read_checksums(checksums_path(path), self._shape[0]), RowChecksums(path)
                for numbers, found in array.blocks():
                    missing[numbers] = ~np.isfinite(found).all(axis=1)
                    if expected is not None:  # an array that an earlier version began has none
                        computed = numbers[~missing[numbers]]
                        values = sums.of_all(computed, found[computed - numbers[0]])
                        missing[computed] = values != expected[computed]  # power failed before both were on the disk
        except FileNotFoundError:  # there is none, or another process completed it in this moment
            return np.full(self._shape[0], not self.complete(view))
        return missing

    def read(self, view: int, rows: np.ndarray) -> np.ndarray:
        """Raise BankError for rows that are missing or not as they were written."""
        path = self.path(view)
        try:
            with ArrayReader(path, self._shape) as array:
                found = array.rows(rows)
        except FileNotFoundError:
            raise BankError(f"the features in {path} are not filled yet") from None
        wrong = ~np.isfinite(found).all(axis=1)
        what = "holds rows that are not finite numbers"
        expected = read_checksums(checksums_path(path), self._shape[0], rows)
        if not wrong.any() and expected is not None:
            wrong = RowChecksums(path).of_all(rows, found) != expected
            what = "holds rows that differ from what was written (their checksums do not fit)"
        if wrong.any():
            raise BankError(
                f"{path} {what}, the first is row {int(rows[wrong.argmax()])}; see to the disk, and remove the damaged "
                f"bank: python -m utils.features remove {self.folder.name}"
            )
        return found

    def lock(self) -> AbstractContextManager[object]:
        what = f"feature bank {self.folder.name} (key cache_dir)"
        return FolderLock(self.folder / LOCK, what, wait=True, on_wait=_say_waiting)

    def prepare(self, views: Sequence[int]) -> None:
        write_json(self.folder / MANIFEST, self._manifest)
        for left in self.folder.glob("*.partial"):  # of a process that was killed: the lock is ours
            left.unlink(missing_ok=True)
        self.add_checksums(views)
        for view in views:
            if not self.exists(view):
                path = self.path(view)
                create_checksums(checksums_path(path), np.zeros(self._shape[0], dtype="<u4"))
                create_array(incomplete_path(path), self._shape)

    def writer(self, view: int) -> Writer:
        return ArrayWriter(self.path(view), self._shape)

    def finish(self, views: Sequence[int]) -> None:
        for view in views:
            if not self.complete(view):
                complete_array(self.path(view))

    def add_checksums(self, views: Sequence[int]) -> None:
        """Add the checksums that arrays of an earlier version lack, from the rows as they are, and say so."""
        lacking = [view for view in views if self.exists(view) and not checksums_path(self.path(view)).exists()]
        for number, view in enumerate(lacking):
            path = self.path(view)
            array = path if self.complete(view) else incomplete_path(path)
            values, sums = np.zeros(self._shape[0], dtype="<u4"), RowChecksums(path)
            with ArrayReader(array, self._shape) as reader:
                for numbers, found in reader.blocks():
                    values[numbers] = sums.of_all(numbers, found)
            try:
                create_checksums(checksums_path(path), values)
            except UserError:
                if array != path:
                    raise
                log.warning(
                    "Feature bank %s: checksums of %s cannot be added (%s cannot be written): they are read without",
                    *(self.folder.name, counted(len(lacking) - number, "array"), self.folder),
                )
                return
        if lacking:
            log.info(
                "Feature bank %s: added the checksums that %s of an earlier version lacked, from the rows as they are; "
                "nothing is computed again",
                *(self.folder.name, counted(len(lacking), "array")),
            )


def _say_waiting(holder: str) -> None:
    log.info("Waiting for %s to fill the same feature bank", holder)
