"""Images to the pixels of their views. Loader processes run this: it needs no PyTorch, so they start at once."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.fingerprints import Fingerprints
from utils.data.splits import Dataset, ImageFiles, Split
from utils.data.transforms import Draws, Transforms, test_pixels, train_pixels
from utils.errors import DataError
from utils.features.arrays import TEST_VIEW, View, ViewRow
from utils.ranks import ONE_RANK, Ranks

LOADED_TOGETHER = 16  # views in what a loader hands over at a time, if one image has not more


@dataclass(frozen=True)
class ViewsJob:
    """Some images and the views of them that are missing, in a form that can be sent to a process.

    Attributes:
        split: its name.
        images: these images alone.
        rows: which they are in their split.
        views: for each image, its missing views, each with its random numbers (None: the test view).
        stats: for each image, size and modification time of the file when the run began; None if unknown.
        size: side of the square that the backbone sees.
    """

    split: str
    images: Split
    rows: list[int]
    views: list[list[tuple[int, Draws | None]]]
    stats: np.ndarray | None
    size: int

    @property
    def places(self) -> list[ViewRow]:
        """What each row of pixels is."""
        return [(self.split, view, row) for row, views in zip(self.rows, self.views, strict=True) for view, _ in views]

    def __str__(self) -> str:
        return f"{self.split} image {self.images.keys[0]!r}"


def load_views(job: ViewsJob) -> np.ndarray:
    """The pixels of a job's views: ``(views, 3, size, size)`` uint8. Each image is decoded once for all of them.

    Raises:
        DataError: an image cannot be read, or is not the one that was looked at when the run began.
    """
    pixels = np.empty((len(job.places), 3, job.size, job.size), dtype=np.uint8)
    filled = 0
    for index, views in enumerate(job.views):
        image = job.images.load(index)
        if job.stats is not None and isinstance(job.images, ImageFiles):
            _check_unchanged(job.images.path(index), job.stats[index])
        for _, draws in views:
            pixels[filled] = test_pixels(image, job.size) if draws is None else train_pixels(image, job.size, draws)
            filled += 1
    return pixels


def _check_unchanged(path: Path, stats: np.ndarray) -> None:
    """Look at a file again after it was decoded: its content names its rows, so it must be the one that was hashed."""
    try:
        found = os.stat(path)
        unchanged = [found.st_size, found.st_mtime_ns] == stats.tolist()
    except OSError:
        unchanged = False
    if not unchanged:
        raise DataError(
            f"{path} was changed while the run was at work (its size or time is not what it was at the start); start "
            "again when the images stay as they are: what is done stays"
        )


class MissingViews:
    """The images of which some view is missing, and jobs for all of them. Each rank has images of its own.

    Args:
        data: the images.
        transforms: what the views are.
        missing: ``(images,)`` bool for each view.
        fingerprints: what is known of the images' contents.
        ranks: the processes that share the work.

    Attributes:
        work: (split, row) of each image.
        count: how many views all of them lack.
    """

    def __init__(
        self,
        data: Dataset,
        transforms: Transforms,
        missing: dict[View, np.ndarray],
        fingerprints: Fingerprints | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self._data, self._transforms, self._missing, self.count = data, transforms, missing, 0
        self._stats = fingerprints.stats if fingerprints is not None else {}
        self.work: list[tuple[str, np.ndarray]] = []
        for split in sorted({split for split, _ in missing}):
            lacking = np.sum([rows for (s, _), rows in missing.items() if s == split], axis=0)  # views of each image
            mine = np.flatnonzero(lacking)
            mine = mine[mine % ranks.count == ranks.rank]  # not by place: other ranks may have begun to write
            self.work.append((split, mine))
            self.count += int(lacking[mine].sum())

    @property
    def images(self) -> int:
        return sum(len(rows) for _, rows in self.work)

    def jobs(self) -> Iterator[ViewsJob]:
        """Every missing view, once."""
        together = max(1, LOADED_TOGETHER * self.images // max(1, self.count))
        for split, rows in self.work:
            for start in range(0, len(rows), together):
                yield self._job(split, rows[start : start + together])

    def _job(self, name: str, rows: np.ndarray) -> ViewsJob:
        split = self._data.split(name)
        views = []
        for row in rows.tolist():
            lacking = [view for (s, view), missing in self._missing.items() if s == name and missing[row]]
            key = split.keys[row]
            views.append([(v, None if v == TEST_VIEW else self._transforms.draws(key, v)) for v in lacking])
        stats = self._stats.get(name)
        known = None if stats is None else stats[rows]
        return ViewsJob(name, split.subset(rows), rows.tolist(), views, known, self._transforms.size)
