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

from utils import module
from utils.errors import BankError, NumericError, UserError
from utils.features.rows import FolderRows, MemoryRows, View, ViewRow
from utils.files import expanded, human_size
from utils.hardware import default_batch_size, default_workers, total_memory
from utils.logs import progress
from utils.ranks import ONE_RANK, Ranks
from utils.words import counted

if TYPE_CHECKING:
    from utils.data.splits import Dataset
    from utils.features.extraction import FeatureExtractor, Keep

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
        what = (
            f"final features of the {split} images of {self.data.name}; {images} images of {self.image_size} px, "
            f"{'normalised' if backbone.normalize else 'not normalised'}, through {backbone.name} (weights "
            f"{backbone.weights_sha256[:12]}…), {backbone.feature_dim} features, computed in {backbone.precision}"
        )
        manifest = {"what": what, "feature": backbone.pooling, **identity}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        short = backbone.name.split(".")[0][-60:]
        name = f"{self.data.name}-{split}-{short}-{self.image_size}px-{backbone.precision}-{digest}"
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)  # hf-hub:timm/… holds characters that no file system takes
        return FolderRows(self.cache_dir / name, shape, manifest, self.augment_seed)

    def read(self, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        """Features of the images ``rows`` of ``split`` under ``view``: ``(len(rows), dim)`` float32."""
        return self._rows[split].read(view, rows)

    def path(self, view: View) -> Path | None:
        """The file of a (split, view); None in memory."""
        rows = self._rows[view[0]]
        return rows.path(view[1]) if isinstance(rows, FolderRows) else None

    # -- what is missing -------------------------------------------------------------------------------------------

    def missing(self, wanted: Sequence[View]) -> int:
        """How many forward passes ``fill(wanted)`` would make."""
        return sum(int(rows.sum()) for rows in self._missing_rows(wanted).values())

    def bytes_needed(self, wanted: Sequence[View]) -> int:
        """Bytes that ``fill(wanted)`` would add to the disk (or to memory)."""
        new = (len(self.data.split(split)) for split, view in wanted if not self._rows[split].exists(view))
        return sum(new) * self.extractor.feature_dim * 4

    def _missing_rows(self, wanted: Sequence[View]) -> dict[View, np.ndarray]:
        """For each of ``wanted``, which rows are not there: ``(images,)`` bool."""
        return {(split, view): self._rows[split].missing(view) for split, view in wanted}

    # -- filling ---------------------------------------------------------------------------------------------------

    def fill(self, wanted: Sequence[View]) -> None:
        """Compute every row of ``wanted`` that is not there yet. All ranks call it; each computes its share."""
        first = self.ranks.first
        # nothing is written, or locked, for a complete bank: it may lie on a disk that cannot be written
        if self.ranks.share(first and all(self._rows[split].complete(view) for split, view in wanted)):
            return
        with ExitStack() as locks:
            if first:
                for split in sorted({split for split, _ in wanted}):  # the same order everywhere: no deadlock
                    locks.enter_context(self._rows[split].lock())
                self._check_space(self.bytes_needed(wanted))
                for split, view in wanted:
                    self._rows[split].prepare(view)
                self.forwards += self.missing(wanted)
            self.ranks.barrier()
            self._compute(wanted)
            self.ranks.barrier()
            if first:
                for split, view in wanted:
                    self._rows[split].finish(view)

    def _check_space(self, need: int) -> None:
        batch, memory = self.batch_size * 3 * self.image_size**2 * 5, total_memory()  # pixels as bytes and as numbers
        if memory is not None and batch > memory:
            raise BankError(
                f"feature_batch_size {self.batch_size} needs {human_size(batch)} of memory for images of "
                f"{self.image_size} px, this machine has {human_size(memory)}; lower feature_batch_size"
            )
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

    def _compute(self, wanted: Sequence[View]) -> None:
        """Compute this rank's share of the rows that are missing."""
        count, batches = self._extract(wanted, self._keep)
        if not count:
            return
        started = time.monotonic()
        bar = progress(total=count, unit="img", desc="Features", disable=not self.ranks.first)  # of this rank
        with bar, closing(batches):
            for done in batches:
                bar.update(done)
        seconds = time.monotonic() - started
        log.info("Features: %s in %.1f s, %.1f a second", counted(count, "forward pass"), seconds, count / seconds)

    def _keep(self, places: list[ViewRow], features: np.ndarray) -> None:
        """Write rows, those of a view together."""
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            split, view, row = places[bad[0]]
            raise NumericError(
                f"the backbone's feature of {split} image {self.data.split(split).keys[row]!r} (view {view}) is not "
                "finite; try precision=fp32, or check the weights"
            )
        for split, view in {place[:2] for place in places}:
            chosen = [index for index, place in enumerate(places) if place[:2] == (split, view)]
            self._rows[split].write(view, [places[index][2] for index in chosen], features[chosen])

    def probe(self, wanted: Sequence[View], seconds: float = 3.0) -> float:
        """Images a second that ``fill(wanted)`` would compute, tried on its first batches; nothing is kept."""
        times, passed = [time.monotonic()], [0]
        with closing(self._extract(wanted, lambda *_: None)[1]) as batches:
            for done in batches:
                times.append(time.monotonic())
                passed.append(passed[-1] + done)
                if times[-1] - times[0] > seconds:
                    break
        begin = (len(times) - 1) // 3  # the first third shows how the loaders start, if there are several batches
        return (passed[-1] - passed[begin]) / (times[-1] - times[begin])

    def _extract(self, wanted: Sequence[View], keep: "Keep") -> tuple[int, Generator[int, None, None]]:
        """How many views this rank has to compute, and what computes them (``extract``)."""
        transforms, extraction = module("utils.data.transforms"), module("utils.features.extraction")
        ranks, missing = self.ranks, self._missing_rows(wanted)
        for rows in missing.values():  # a share by row, not by place: other ranks may have begun to write
            rows &= np.arange(len(rows)) % ranks.count == ranks.rank
        stats = getattr(self.fingerprints, "stats", {})
        jobs = extraction.view_jobs(
            self.data, transforms.Transforms(self.image_size, self.augment_seed), missing, stats
        )
        count = sum(int(rows.sum()) for rows in missing.values())
        return count, extraction.extract(jobs, self.extractor, self.batch_size, min(self.num_workers, count), keep)


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
