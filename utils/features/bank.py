"""The feature bank: the backbone never changes, so each (image, view) is worth one forward pass, ever.

A bank is a folder below ``cache_dir`` for one split of one data set under one backbone, image size, normalisation
and precision. It holds a ``manifest.json`` that says so in words, and for each view the rows of its images
(``utils.features.rows``). This file knows what is missing; ``utils.features.extraction`` computes it.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.fingerprints import Fingerprints
from utils.data.splits import Dataset
from utils.data.transforms import Transforms
from utils.errors import BankError
from utils.features.arrays import View
from utils.features.extraction import Extraction, FeatureExtractor, Store
from utils.features.rows import FolderRows, MemoryRows, Rows
from utils.features.views import MissingViews
from utils.files import human_size
from utils.hardware import default_batch_size, default_workers, total_memory
from utils.logs import progress
from utils.ranks import ONE_RANK, Ranks
from utils.words import counted

log = logging.getLogger(__name__)

FORMAT = 1  # to be raised when the transforms or the meaning of a row change: older banks are then left alone


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
        self._rows = {split: self._rows_of(split, cache_dir) for split in ("train", "test")}

    def _rows_of(self, split: str, cache_dir: Path | None) -> Rows:
        shape = len(self.data.split(split)), self.extractor.feature_dim
        if cache_dir is None:
            return MemoryRows(shape)
        folder = cache_dir / self._folder_name(split)
        return FolderRows(folder, shape, self.describe(split), self.transforms.augment_seed)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        """Features of the images ``rows`` of ``split`` under ``view``: ``(len(rows), dim)`` float32.

        Raises:
            BankError: the array is not filled, damaged, or of another size.
        """
        return self._rows[split].read(view, rows)

    # -- what is missing -------------------------------------------------------------------------------------------

    def missing(self, wanted: Sequence[View]) -> int:
        """How many forward passes ``fill(wanted)`` would make."""
        return sum(int(rows.sum()) for rows in self._missing_rows(wanted).values())

    def bytes_needed(self, wanted: Sequence[View]) -> int:
        """Bytes that ``fill(wanted)`` would add to the disk (or to memory)."""
        new = [split for split, view in wanted if not self._rows[split].exists(view)]
        return sum(len(self.data.split(split)) for split in new) * self.extractor.feature_dim * 4

    def _missing_rows(self, wanted: Sequence[View]) -> dict[View, np.ndarray]:
        """For each of ``wanted`` that is not complete, which rows are not: ``(images,)`` bool."""
        found = {(split, view): self._rows[split].missing(view) for split, view in wanted}
        return {want: rows for want, rows in found.items() if rows.any()}

    # -- filling ---------------------------------------------------------------------------------------------------

    def fill(self, wanted: Sequence[View]) -> None:
        """Compute every row of ``wanted`` that is not there yet. All ranks call it; each computes its share.

        Raises:
            DataError: an image cannot be read. BankError: no space. NumericError: a feature is not finite.
        """
        views = {split: [view for s, view in wanted if s == split] for split in sorted({split for split, _ in wanted})}
        if self.ranks.share(self._is_complete(views) if self.ranks.first else None):
            return
        with ExitStack() as locks:
            if self.ranks.first:
                for split in views:  # the same order everywhere: no deadlock
                    locks.enter_context(self._rows[split].lock())
                self._check_batch()
                self._check_space(wanted)
                for split in views:
                    self._rows[split].prepare(views[split])
                self.forwards += self.missing(wanted)
            self.ranks.barrier()
            self._fill_missing(self._missing_rows(wanted))
            self.ranks.barrier()
            if self.ranks.first:
                for split in views:
                    self._rows[split].finish(views[split])

    def _is_complete(self, views: dict[str, list[int]]) -> bool:
        """Whether nothing is to be written: a complete bank may lie on a disk that cannot be."""
        if not all(self._rows[split].complete(view) for split in views for view in views[split]):
            return False
        for split in views:
            self._rows[split].add_checksums(views[split])
        return True

    def _check_batch(self) -> None:
        """Refuse a batch whose pixels alone, as bytes and as numbers, are more than all memory."""
        need, memory = self.batch_size * 3 * self.image_size**2 * 5, total_memory()
        if memory is not None and need > memory:
            raise BankError(
                f"feature_batch_size {self.batch_size} needs {human_size(need)} of memory for images of "
                f"{self.image_size} px, this machine has {human_size(memory)}; lower feature_batch_size"
            )

    def _check_space(self, wanted: Sequence[View]) -> None:
        need = self.bytes_needed(wanted)
        if self.cache_dir is None:
            log.info("Feature bank: needs %s of memory", human_size(need))
        elif need:
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

    def _fill_missing(self, missing: dict[View, np.ndarray]) -> None:
        """Compute this rank's share of the rows that ``missing`` marks."""
        views = self._views(missing, self.ranks)
        if not views.count:
            return
        started = time.monotonic()
        bar = progress(
            total=views.count,
            unit="img",
            desc="Features" if self.ranks.count == 1 else f"Features (1 of {self.ranks.count} ranks)",
            disable=not self.ranks.first,
        )
        with ExitStack() as writers:
            opened = {}
            for split, view in missing:
                opened[split, view] = writers.enter_context(closing(self._rows[split].writer(view)))
            with bar, closing(self._extraction().run(views, Store(opened))) as batches:  # stops before writers close
                for count in batches:
                    bar.update(count)
        seconds = time.monotonic() - started
        passes = counted(views.count, "forward pass")
        log.info("Features: %s in %.1f s, %.1f a second", passes, seconds, views.count / seconds)

    def probe(self, wanted: Sequence[View], seconds: float = 3.0) -> float:
        """Images a second that ``fill(wanted)`` would compute, tried on its first batches; nothing is kept.

        All of them count where there are too few to see the loaders' start apart from the rest.
        """
        views, extraction = self._views(self._missing_rows(wanted), self.ranks), self._extraction()
        warm_up = 2 * extraction.threads
        started, done = time.monotonic(), 0
        with closing(extraction.run(views, Store({}))) as batches:
            for number, count in enumerate(batches, start=1):
                done += count
                if number == warm_up and views.count > 4 * warm_up * self.batch_size:
                    started, done = time.monotonic(), 0
                if number > 3 * warm_up and time.monotonic() - started > seconds:
                    break
            return done / (time.monotonic() - started)

    def _views(self, missing: dict[View, np.ndarray], ranks: Ranks) -> MissingViews:
        known = self.fingerprints if isinstance(self.fingerprints, Fingerprints) else None
        return MissingViews(self.data, self.transforms, missing, known, ranks)

    def _extraction(self) -> Extraction:
        return Extraction(self.data, self.extractor, self.batch_size, self.num_workers)

    # -- what it is ------------------------------------------------------------------------------------------------

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

    def _folder_name(self, split: str) -> str:
        digest = hashlib.sha256(json.dumps(self.identity(split), sort_keys=True).encode()).hexdigest()[:16]
        backbone = self.extractor.name.split(".")[0]
        return f"{self.data.name}-{split}-{backbone}-{self.image_size}px-{self.extractor.precision}-{digest}"


def default_cache_dir() -> Path:
    """The user's cache folder, as the platform defines it.

    Raises:
        BankError: the user has no home folder, as in a container with a user id of its own.
    """
    try:
        return _platform_cache() / "tosca"
    except RuntimeError:  # of Path.home
        raise BankError(
            "the home folder of this user is not known (the environment variable HOME is not set), so neither is where "
            "the feature bank is; set cache_dir=<folder>, or cache_dir=none to keep features in memory"
        ) from None


def _platform_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def resolve_cache_dir(value: str | None) -> Path | None:
    """The key ``cache_dir``: a folder, the default, or None for ``none`` (in memory)."""
    if value == "none":
        return None
    try:
        return Path(value).expanduser() if value else default_cache_dir()
    except RuntimeError as error:
        raise BankError(f"cache_dir {value!r} cannot be resolved ({error}); give the folder's full path") from None
