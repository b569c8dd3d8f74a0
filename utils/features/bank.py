"""The feature bank: the backbone never changes, so each (image, view) is worth one forward pass, ever.

A bank is a folder below ``cache_dir`` for one split of one data set under one backbone, image size, normalisation
and precision. It holds a ``manifest.json`` that says so in words, and one ``.npy`` array ``(images, dim)`` float32
for each view. A row that is not computed yet is NaN. An array still being filled ends in ``.filling.npy`` and is
renamed once every row is there (``utils.arrays``). Only this file calls the backbone.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.data.splits import Dataset
from utils.data.transforms import Transforms
from utils.errors import BankError, NumericError
from utils.features.arrays import (
    HINT_FEATURES_STAY,
    FileWriter,
    MemoryWriter,
    Store,
    View,
    ViewRow,
    Writer,
    create_array,
    incomplete_path,
    open_array,
    sync_file,
)
from utils.features.batches import TEST_VIEW, ViewsOfImages, batches_of, killed_loaders_named
from utils.files import FolderLock, human_size, write_json
from utils.hardware import ONE_RANK, Ranks, default_batch_size, default_workers, forward_threads
from utils.progress import progress

log = logging.getLogger(__name__)

MANIFEST, LOCK = "manifest.json", "lock"  # the files of a bank beside its arrays
FORMAT = 1  # to be raised when the transforms or the meaning of a row change: older banks are then left alone


class FeatureExtractor(Protocol):
    """What the bank needs of a backbone (``backbone.vit.Backbone`` is one)."""

    name: str
    weights_sha256: str
    feature_dim: int
    precision: str
    parameters: int
    normalize: bool
    device: torch.device
    pooling: str  # what a feature is, as timm names it
    variant: dict[str, str]  # what else a row's bits depend on; empty where earlier banks stay valid

    def __call__(self, images: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8 -> ``(images, feature_dim)`` float32."""


class FeatureBank:
    """Features by (split, view, rows), computed at most once.

    Args:
        data: the images.
        extractor: the backbone.
        image_size: side of the square that it sees.
        augment_seed: where the views' random numbers come from.
        fingerprints: of each split's images (``fingerprint_splits``).
        cache_dir: the folder of all banks, or None to keep this one in memory.
        batch_size: images in one forward pass.
        num_workers: processes that load images; 0 loads in this one.
        ranks: the processes that share the work.

    Attributes:
        forwards: images passed through the backbone for ``fill``, by all ranks together.
    """

    def __init__(
        self,
        data: Dataset,
        extractor: FeatureExtractor,
        *,
        image_size: int,
        augment_seed: int,
        fingerprints: dict[str, str],
        cache_dir: Path | None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        if cache_dir is None and ranks.count > 1:
            raise BankError("cache_dir=none keeps features in one process; under torchrun give a shared folder")
        self.data, self.extractor, self.ranks = data, extractor, ranks
        self.transforms = Transforms(image_size, augment_seed)
        self.batch_size = batch_size or default_batch_size(extractor.device, image_size)
        self.num_workers = default_workers(ranks.local_count) if num_workers is None else num_workers
        self.forwards = 0
        self.image_size, self.cache_dir = image_size, cache_dir
        self.fingerprints = fingerprints
        self._memory: dict[View, np.ndarray] = {}

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        """Features of the images ``rows`` of ``split`` under ``view``: ``(len(rows), dim)`` float32.

        Raises:
            BankError: the array is not filled, damaged, or of another size.
        """
        if self.cache_dir is None:
            array = self._memory.get((split, view))
        else:
            array = open_array(self._path(split, view), (len(self.data.split(split)), self.extractor.feature_dim))
        if array is None:
            raise BankError(f"the features of {split}, view {view} are not filled yet")
        values = np.array(array[rows])  # a copy: the map is closed on return and its pages do not stay resident
        if not np.isfinite(values).all():
            raise BankError(
                f"{self._path(split, view) if self.cache_dir else 'the feature bank'} holds rows that are not finite "
                f"numbers; remove the damaged bank: python -m utils.features remove {self._folder(split).name}"
            )
        return values

    def missing(self, wanted: Sequence[View]) -> int:
        """How many forward passes ``fill(wanted)`` would make."""
        return sum(int(rows.sum()) for rows in self._missing_rows(wanted).values())

    def bytes_needed(self, wanted: Sequence[View]) -> int:
        """Bytes that ``fill(wanted)`` would add to the disk (or to memory)."""
        return sum(self._nbytes(*w) for w in wanted if not self._exists(*w))

    # -- filling ---------------------------------------------------------------------------------------------------

    def fill(self, wanted: Sequence[View]) -> None:
        """Compute every row of ``wanted`` that is not there yet. All ranks call it; each computes its share.

        Raises:
            DataError: an image cannot be read. BankError: no space. NumericError: a feature is not finite.
        """
        if self.ranks.share(self._complete(wanted) if self.ranks.first else None):
            return
        with ExitStack() as locks:
            if self.ranks.first:
                for split in sorted({split for split, _ in wanted}):  # the same order everywhere: no deadlock
                    locks.enter_context(self._lock(split))
                self._prepare(wanted)
                self.forwards += self.missing(wanted)
            self.ranks.barrier()
            self._fill_missing(self._missing_rows(wanted))
            self.ranks.barrier()
            if self.ranks.first:
                self._finish(wanted)

    def _lock(self, split: str) -> AbstractContextManager:
        if self.cache_dir is None:
            return nullcontext()
        folder = self._folder(split)
        return FolderLock(folder / LOCK, f"feature bank {folder.name}", wait=True, on_wait=_say_waiting)

    def _prepare(self, wanted: Sequence[View]) -> None:
        """Check the space for all of it, then lay out the arrays, every row NaN."""
        need = self.bytes_needed(wanted)
        if self.cache_dir is None:
            log.info("Feature bank: needs %s of memory", human_size(need))
            return
        if need:
            free = shutil.disk_usage(self.cache_dir).free
            log.info(
                "Feature bank in %s: needs %s of disk, %s are free", self.cache_dir, human_size(need), human_size(free)
            )
            if need > free:
                raise BankError(
                    f"the feature bank needs {human_size(need)} in {self.cache_dir}, {human_size(free)} are free; free "
                    "some, set cache_dir to a larger disk, lower train_views, or list banks to remove: "
                    "python -m utils.features list"
                )
        for split in sorted({split for split, _ in wanted}):
            write_json(self._folder(split) / MANIFEST, self.describe(split))
            for left in self._folder(split).glob("*.partial"):  # of a process that was killed: the lock is ours
                left.unlink(missing_ok=True)
        for want in wanted:
            if not self._exists(*want):
                create_array(
                    incomplete_path(self._path(*want)), (len(self.data.split(want[0])), self.extractor.feature_dim)
                )

    def _finish(self, wanted: Sequence[View]) -> None:
        for want in wanted if self.cache_dir is not None else ():
            path = self._path(*want)
            if not path.exists():
                try:
                    sync_file(incomplete_path(path))
                    os.replace(incomplete_path(path), path)
                except OSError as error:
                    raise BankError(f"{path} cannot be written ({error.strerror}); {HINT_FEATURES_STAY}") from error

    def _fill_missing(self, missing: dict[View, np.ndarray]) -> None:
        """Compute this rank's share of the rows that ``missing`` marks."""
        images = ViewsOfImages(self.data, self.transforms, missing, self.ranks)
        if not len(images):
            return
        started = time.monotonic()
        bar = progress(
            total=images.views,
            unit="img",
            desc="Features" if self.ranks.count == 1 else f"Features (1 of {self.ranks.count} ranks)",
            disable=not self.ranks.first,
        )
        with (
            bar,
            killed_loaders_named(),
            Store({want: self._writer(want) for want in missing}) as store,
            closing(self._computed(images, store)) as batches,  # first of all the threads and loaders end
        ):
            for count in batches:
                bar.update(count)
        seconds = time.monotonic() - started
        log.info("Features: %d forward passes in %.1f s, %.1f a second", images.views, seconds, images.views / seconds)

    def _computed(self, images: ViewsOfImages, store: Store) -> Iterator[int]:
        """Pass ``images`` through the backbone into ``store``; yields how many are done whenever a batch is."""
        threads = forward_threads(self.extractor.device)
        running: deque[Future[int]] = deque()
        with (
            closing(batches_of(images, self.batch_size, self.num_workers, self._pin)) as batches,
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for places, pixels in batches:
                running.append(pool.submit(self._forward, places, pixels, store))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def probe(self, wanted: Sequence[View], seconds: float = 3.0) -> float:
        """Images a second that ``fill(wanted)`` would compute, tried on its first batches; nothing is kept.

        All of them count where there are too few to see the loaders' start apart from the rest.
        """
        images = ViewsOfImages(self.data, self.transforms, self._missing_rows(wanted), self.ranks)
        warm_up = 2 * forward_threads(self.extractor.device)
        started, done = time.monotonic(), 0
        with killed_loaders_named(), closing(self._computed(images, Store({}))) as batches:
            for number, count in enumerate(batches, start=1):
                done += count
                if number == warm_up and images.views > 4 * warm_up * self.batch_size:
                    started, done = time.monotonic(), 0
                if number > 3 * warm_up and time.monotonic() - started > seconds:
                    break
            return done / (time.monotonic() - started)

    @property
    def _pin(self) -> bool:
        return self.extractor.device.type not in ("cpu", "mps")  # where the copy can run beside the backbone

    def _forward(self, places: list[ViewRow], pixels: Tensor, store: Store) -> int:
        """Compute one batch and store it. The shape is always the same, and so is every row, whatever is beside it.

        A matrix product may pick another algorithm for another number of rows; then an image's last bits would
        depend on how an interrupted extraction was cut.
        """
        count = len(pixels)
        if count < self.batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch_size - count, -1, -1, -1)])
        features = self.extractor(pixels)[:count].cpu().numpy()
        _check_finite(features, places, self.data)
        store.write(places, features)
        return count

    # -- what is where ---------------------------------------------------------------------------------------------

    def identity(self, split: str) -> dict[str, Any]:
        """All that a row of ``split`` depends on, but for its view."""
        return {
            "format": FORMAT,
            "dataset": self.data.name,
            "split": split,
            "images": len(self.data.split(split)),
            "images_sha256": self.fingerprints[split],
            "backbone": self.extractor.name,
            "weights_sha256": self.extractor.weights_sha256,
            "feature_dim": self.extractor.feature_dim,
            "image_size": self.image_size,
            "normalize": self.extractor.normalize,
            "precision": self.extractor.precision,
            **self.extractor.variant,
        }

    def describe(self, split: str) -> dict[str, Any]:
        """The manifest of the bank of ``split``: what it holds in words, and its identity."""
        return {
            "what": f"final features of the {split} images of {self.data.name}, float32, one row an image",
            "feature": self.extractor.pooling,
            "views": "test.npy: the test transform; augmented-<seed>-<view>.npy: that augmented view",
            **self.identity(split),
        }

    def _folder(self, split: str) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity(split), sort_keys=True).encode()).hexdigest()[:16]
        backbone = self.extractor.name.split(".")[0]
        name = f"{self.data.name}-{split}-{backbone}-{self.image_size}px-{self.extractor.precision}-{digest}"
        return self.cache_dir / name

    def _path(self, split: str, view: int) -> Path:
        name = "test.npy" if view == TEST_VIEW else f"augmented-{self.transforms.augment_seed}-{view:04d}.npy"
        return self._folder(split) / name

    def _exists(self, split: str, view: int) -> bool:
        if self.cache_dir is None:
            return (split, view) in self._memory
        path = self._path(split, view)
        return path.exists() or incomplete_path(path).exists()

    def _nbytes(self, split: str, view: int) -> int:
        return len(self.data.split(split)) * self.extractor.feature_dim * 4

    def _complete(self, wanted: Sequence[View]) -> bool:
        return self.cache_dir is not None and all(self._path(*want).exists() for want in wanted)

    def _missing_rows(self, wanted: Sequence[View]) -> dict[View, np.ndarray]:
        """For each of ``wanted`` that is not complete, which rows are not: ``(images,)`` bool."""
        found = {want: self._missing_of(*want) for want in wanted}
        return {want: rows for want, rows in found.items() if rows.any()}

    def _missing_of(self, split: str, view: int) -> np.ndarray:
        images = len(self.data.split(split))
        if self.cache_dir is None:
            return np.full(images, (split, view) not in self._memory)
        path = self._path(split, view)
        if path.exists():
            return np.zeros(images, dtype=bool)
        if not incomplete_path(path).exists():
            return np.ones(images, dtype=bool)
        array = open_array(incomplete_path(path), (images, self.extractor.feature_dim))
        if array is None:  # completed by another process in this moment
            return np.zeros(images, dtype=bool)
        blocks = np.array_split(array, max(1, images // 4096))
        return np.concatenate([np.isnan(block).any(axis=1) for block in blocks])

    def _writer(self, want: View) -> Writer:
        shape = (len(self.data.split(want[0])), self.extractor.feature_dim)
        if self.cache_dir is None:
            self._memory[want] = np.full(shape, np.nan, dtype=np.float32)
            return MemoryWriter(self._memory[want])
        return FileWriter(incomplete_path(self._path(*want)), shape)


def default_cache_dir() -> Path:
    """The user's cache folder, as the platform defines it."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tosca"


def resolve_cache_dir(value: str | None) -> Path | None:
    """The key ``cache_dir``: a folder, the default, or None for ``none`` (in memory)."""
    if value == "none":
        return None
    return Path(value).expanduser() if value else default_cache_dir()


def _check_finite(features: np.ndarray, places: list[ViewRow], data: Dataset) -> None:
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        split, view, row = places[bad[0]]
        raise NumericError(
            f"the backbone's feature of {split} image {data.split(split).keys[row]!r} (view {view}) is not finite; "
            "try precision=fp32, or check the weights"
        )


def _say_waiting(holder: str) -> None:
    log.info("Waiting for %s to fill the same feature bank", holder)
