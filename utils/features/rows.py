"""Where the rows of one split live: in a folder, or in memory. A row of NaN is not computed yet.

In a folder each view has an ``.npy`` of float32, which plain calls read and write: a disk that refuses shared memory
maps serves as well, and what is read is never resident beyond its use. An array that is being filled ends in
``.filling.npy``; it is renamed once every row is there.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BufferedReader
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
_HINT = "see to its space and state, or set cache_dir to another disk, which all machines of a torchrun share"
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
        self._arrays: dict[int, np.ndarray] = {}
        self._nothing = np.broadcast_to(np.float32(np.nan), shape)

    def exists(self, view: int) -> bool:
        """Whether there is room laid out for the view, filled or not."""
        return view in self._arrays

    def missing(self, view: int) -> np.ndarray:
        """``(images,)`` bool: the rows that are not computed."""
        missing: np.ndarray = np.isnan(self._arrays.get(view, self._nothing)).any(axis=1)
        return missing

    def complete(self, view: int) -> bool:
        return not self.missing(view).any()

    def read(self, view: int, rows: np.ndarray) -> np.ndarray:
        """``(rows,)`` -> ``(rows, dim)`` float32, all of them computed."""
        found: np.ndarray = self._arrays.get(view, self._nothing)[rows]
        if np.isnan(found).any():
            raise BankError(f"the features of view {view} are not filled yet")
        return found

    def lock(self) -> AbstractContextManager[object]:
        """Held by whoever adds rows."""
        return nullcontext()

    def prepare(self, view: int) -> None:
        """Lay out room for the view, if there is none; all its rows are missing."""
        if view not in self._arrays:
            self._arrays[view] = self._nothing.copy()

    def write(self, view: int, rows: list[int], features: np.ndarray) -> None:
        """Threads and processes may write different rows at a time."""
        self._arrays[view][rows] = features

    def finish(self, view: int) -> None:
        """Declare the view complete."""


class FolderRows:
    """The same in a folder.

    Args:
        folder: of this bank.
        shape: ``(images, dim)`` of each view's array.
        manifest: what the bank holds, for its ``manifest.json``.
        augment_seed: whose views are meant; those of other seeds lie in the same folder.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], manifest: dict[str, Any], augment_seed: int) -> None:
        self.folder, self._manifest, self._augment_seed = folder, manifest, augment_seed
        self._images, self._dim = shape
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(_HEADER - 11) + "\n"
        self._header = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + header.encode()

    def path(self, view: int) -> Path:
        """The complete array of a view."""
        name = "test.npy" if view == TEST_VIEW else f"augmented-{self._augment_seed}-{view:04d}.npy"
        return self.folder / name

    def _filling(self, view: int) -> Path:
        return self.path(view).with_suffix(".filling.npy")

    def exists(self, view: int) -> bool:
        return self.complete(view) or _exists(self._filling(view))

    def complete(self, view: int) -> bool:
        return _exists(self.path(view))

    def missing(self, view: int) -> np.ndarray:
        if not _exists(self._filling(view)):
            return np.full(self._images, not self.complete(view))
        missing = np.empty(self._images, dtype=bool)
        with self._opened(self._filling(view)) as file:
            for start in range(0, self._images, _BLOCK):
                block = np.frombuffer(file.read(_BLOCK * self._dim * 4), dtype="<f4").reshape(-1, self._dim)
                missing[start : start + _BLOCK] = np.isnan(block).any(axis=1)
        return missing

    def read(self, view: int, rows: np.ndarray) -> np.ndarray:
        path, found = self.path(view), np.full((len(rows), self._dim), np.nan, dtype="<f4")
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # rows that follow each other are read together
        with self._opened(path) as file:
            for run, start in zip(np.split(found, starts[1:]), rows[starts].tolist(), strict=len(rows) > 0):
                file.seek(self._place(start))
                file.readinto(run.data.cast("B"))
        wrong = ~np.isfinite(found).all(axis=1)
        if wrong.any():
            raise BankError(
                f"{path} holds rows that are not finite numbers, the first is row {int(rows[wrong.argmax()])}; see to "
                f"the disk, and remove the damaged bank: python -m utils.features remove {self.folder.name}"
            )
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        waiting = "Waiting for %s to fill the same feature bank"
        what = f"feature bank {self.folder.name} (key cache_dir)"
        with FolderLock(self.folder / LOCK, what, wait=True, on_wait=lambda holder: log.info(waiting, holder)):
            write_json(self.folder / MANIFEST, self._manifest)
            remove_partials(self.folder, ".*")  # of a process that was killed: the lock is ours
            yield

    def prepare(self, view: int) -> None:
        path, row = self._filling(view), np.full(self._dim, np.nan, dtype="<f4").tobytes()
        if not self.exists(view):
            with _refusals(path, "written"), replacing(path, partial_path(path)) as file:
                file.write(self._header)
                for _ in range(self._images):
                    file.write(row)

    def write(self, view: int, rows: list[int], features: np.ndarray) -> None:
        path = self._filling(view)
        with _refusals(path, "written"), open(path, "r+b") as file:
            for row, feature in zip(rows, features, strict=True):
                file.seek(self._place(row))
                file.write(feature.astype("<f4").tobytes())

    def finish(self, view: int) -> None:
        path = self._filling(view)
        if not self.complete(view):
            with _refusals(path, "written"):
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())
                os.replace(path, self.path(view))
                sync_folder(self.folder)

    def _place(self, row: int) -> int:
        return _HEADER + row * self._dim * 4

    @contextmanager
    def _opened(self, path: Path) -> Iterator[BufferedReader]:
        with _refusals(path, "read"), open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(_HEADER) != self._header or size != self._place(self._images):
                raise BankError(
                    f"{path} is damaged ({size} bytes, not those of {self._images} rows of {self._dim} float32); "
                    "remove it, its features are computed again"
                )
            yield file


def _exists(path: Path) -> bool:
    with _refusals(path, "read"):  # a folder above may be another user's
        return path.exists()


@contextmanager
def _refusals(path: Path, verb: str) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except OSError as error:
        hint = " or ".join(filter(None, [hint_of_limits(error), _HINT]))
        raise BankError(
            f"{path} cannot be {verb} ({error.strerror}); {hint}; start again afterwards: what is done stays"
        ) from error
