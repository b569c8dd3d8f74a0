"""The feature bank: the backbone never changes, so each (image, view) is worth one forward pass, ever.

A bank is a folder below ``cache_dir`` for one split of one data set under one backbone, image size, normalisation
and precision. It holds a ``manifest.json`` that says so in words, and for each view the rows of its images
(``utils.features.rows``). This file knows what is missing; ``utils.features.extraction`` computes it, and is imported
only then.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import BankError, UserError
from utils.features.rows import FolderRows, MemoryRows, View, ViewRow
from utils.files import expanded, human_size
from utils.hardware import default_batch_size, default_workers, forward_threads
from utils.logs import progress
from utils.ranks import ONE_RANK, Ranks
from utils.words import counted

if TYPE_CHECKING:
    from utils.data.splits import Dataset
    from utils.features.extraction import FeatureExtractor, Keep
    from utils.features.views import MissingViews

log = logging.getLogger(__name__)

FORMAT = 2  # to be raised when the transforms or the meaning of a row change: older banks are then left alone


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
        data: "Dataset",
        extractor: "FeatureExtractor",
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
        self.batch_size = batch_size or default_batch_size(extractor.device, image_size)
        self.num_workers = default_workers(ranks.local_count) if num_workers is None else num_workers
        self.image_size, self.augment_seed, self.cache_dir = image_size, augment_seed, cache_dir
        self.fingerprints, self.forwards = fingerprints, 0
        self._rows = {split: self._rows_of(split) for split in ("train", "test")}

    def _rows_of(self, split: str) -> FolderRows | MemoryRows:
        images, backbone = len(self.data.split(split)), self.extractor
        shape = images, backbone.feature_dim
        if self.cache_dir is None:
            return MemoryRows(shape)
        identity = {  # all that a row depends on, but for its view
            "format": FORMAT,
            "dataset": self.data.name,
            "split": split,
            "images": images,
            "images_sha256": self.fingerprints[split],
            "backbone": backbone.name,
            "weights_sha256": backbone.weights_sha256,
            "feature_dim": backbone.feature_dim,
            "image_size": self.image_size,
            "normalize": backbone.normalize,
            "precision": backbone.precision,
            **backbone.variant,
        }
        manifest = {
            "what": f"final features of the {split} images of {self.data.name}, float32, one row an image",
            "feature": backbone.pooling,
            "views": "test.npy: the test transform; augmented-<seed>-<view>.npy: that augmented view",
            **identity,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        short = backbone.name.split(".")[0][-60:]
        name = f"{self.data.name}-{split}-{short}-{self.image_size}px-{backbone.precision}-{digest}"
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)  # hf-hub:timm/… holds characters that no file system takes
        return FolderRows(self.cache_dir / name, shape, manifest, self.augment_seed)

    def read(self, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        """Features of the images ``rows`` of ``split`` under ``view``: ``(len(rows), dim)`` float32."""
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
        """Compute every row of ``wanted`` that is not there yet. All ranks call it; each computes its share."""
        first, splits = self.ranks.first, sorted({split for split, _ in wanted})
        views = [(self._rows[split], [view for s, view in wanted if s == split]) for split in splits]
        # nothing is written, or locked, for a complete bank: it may lie on a disk that cannot be written
        if self.ranks.share(first and all(rows.complete(view) for rows, of_split in views for view in of_split)):
            return
        with ExitStack() as locks:
            if first:
                for rows, _ in views:  # the same order everywhere: no deadlock
                    locks.enter_context(rows.lock())
                self._check_space(wanted)
                for rows, of_split in views:
                    rows.prepare(of_split)
                self.forwards += self.missing(wanted)
            self.ranks.barrier()
            self._compute(self._missing_views(wanted))
            self.ranks.barrier()
            if first:
                for rows, of_split in views:
                    rows.finish(of_split)

    def _check_space(self, wanted: Sequence[View]) -> None:
        need = self.bytes_needed(wanted)
        if self.cache_dir is None or not need:
            return
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

    def _compute(self, views: "MissingViews") -> None:
        """Compute this rank's share of the rows that are missing."""
        if not views.count:
            return
        started = time.monotonic()
        title = "Features" if self.ranks.count == 1 else f"Features (1 of {self.ranks.count} ranks)"
        bar = progress(total=views.count, unit="img", desc=title, disable=not self.ranks.first)
        with bar, closing(self._extract(views, self._keep)) as batches:
            for count in batches:
                bar.update(count)
        seconds = time.monotonic() - started
        passes = counted(views.count, "forward pass")
        log.info("Features: %s in %.1f s, %.1f a second", passes, seconds, views.count / seconds)

    def _keep(self, places: list[ViewRow], features: np.ndarray) -> None:
        for want in {place[:2] for place in places}:
            chosen = [index for index, place in enumerate(places) if place[:2] == want]
            self._rows[want[0]].write(want[1], [places[index][2] for index in chosen], features[chosen])

    def probe(self, wanted: Sequence[View], seconds: float = 3.0) -> float:
        """Images a second that ``fill(wanted)`` would compute, tried on its first batches; nothing is kept.

        All of them count where there are too few to see the loaders' start apart from the rest.
        """
        views, warm_up = self._missing_views(wanted), 2 * forward_threads(self.extractor.device)
        started, done = time.monotonic(), 0
        with closing(self._extract(views, lambda *_: None)) as batches:
            for number, count in enumerate(batches, start=1):
                done += count
                if number == warm_up and views.count > 4 * warm_up * self.batch_size:
                    started, done = time.monotonic(), 0
                if number > 3 * warm_up and time.monotonic() - started > seconds:
                    break
            return done / (time.monotonic() - started)

    def _missing_views(self, wanted: Sequence[View]) -> "MissingViews":
        from utils.data.transforms import Transforms
        from utils.features.views import MissingViews

        transforms, stats = Transforms(self.image_size, self.augment_seed), getattr(self.fingerprints, "stats", None)
        return MissingViews(self.data, transforms, self._missing_rows(wanted), stats, self.ranks)

    def _extract(self, views: "MissingViews", keep: "Keep") -> Generator[int, None, None]:
        from utils.features.extraction import extract

        return extract(views, self.extractor, self.batch_size, self.num_workers, keep)


def resolve_cache_dir(value: str | None) -> Path | None:
    """The key ``cache_dir``: a folder, by default the platform's for caches, or None for ``none`` (in memory)."""
    if value == "none":
        return None
    places = {"win32": ("LOCALAPPDATA", "~/AppData/Local"), "darwin": ("", "~/Library/Caches")}
    variable, otherwise = places.get(sys.platform, ("XDG_CACHE_HOME", "~/.cache"))
    try:
        return expanded(value or Path(os.environ.get(variable) or otherwise) / "tosca")
    except UserError as error:
        raise BankError(f"cache_dir: {error}, or cache_dir=none to keep features in memory") from None
