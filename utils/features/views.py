"""Images to the pixels of their views. Loader processes run this: it needs no PyTorch, so they start at once."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from utils.data.splits import Dataset, ImageFiles, Split
from utils.data.transforms import Draws, Transforms, test_pixels, train_pixels
from utils.errors import DataError
from utils.features.rows import TEST_VIEW, View, ViewRow

LOADED_TOGETHER = 16  # views in what a loader hands over at a time, if one image has not more


@dataclass(frozen=True)
class ViewsJob:
    """Some images and the views of them that are missing, in a form that can be sent to a process.

    Attributes:
        split: its name.
        images: these images alone.
        rows: which they are in their split.
        views: for each image, its missing views, each with its random numbers (None: the test view).
        stats: ``(images, 2)`` size and time of change of each file when the run began; None if unknown.
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
    """The pixels of a job's views: ``(views, 3, size, size)`` uint8. Each image is decoded once for all of them."""
    pixels = np.empty((sum(map(len, job.views)), 3, job.size, job.size), dtype=np.uint8)
    place = iter(pixels)
    for index, views in enumerate(job.views):
        image = job.images.load(index)
        if job.stats is not None and isinstance(job.images, ImageFiles):
            _check_unchanged(job.images, index, job.stats[index])
        for _, draws in views:
            next(place)[:] = test_pixels(image, job.size) if draws is None else train_pixels(image, job.size, draws)
    return pixels


def _check_unchanged(images: ImageFiles, index: int, stats: np.ndarray) -> None:
    """Look at a file again after it was decoded: the content that was hashed names its rows."""
    path = images.path(index)
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


def view_jobs(
    data: Dataset, transforms: Transforms, missing: Mapping[View, np.ndarray], stats: Mapping[str, np.ndarray]
) -> Iterator[ViewsJob]:
    """Jobs for every missing view, once.

    Args:
        data: the images.
        transforms: what the views are.
        missing: ``(images,)`` bool for each view.
        stats: for each split of files, ``(images, 2)`` size and time of change when the run began.
    """
    for name in sorted({split for split, _ in missing}):
        split, of_split = data.split(name), {view: rows for (s, view), rows in missing.items() if s == name}
        count = np.sum(list(of_split.values()), axis=0)  # views that each image lacks
        lacking = np.flatnonzero(count)
        together = max(1, LOADED_TOGETHER * len(lacking) // max(1, int(count.sum())))
        for start in range(0, len(lacking), together):
            rows = lacking[start : start + together]
            views = [
                [
                    (view, None if view == TEST_VIEW else transforms.draws(split.keys[row], view))
                    for view, of_view in of_split.items()
                    if of_view[row]
                ]
                for row in rows.tolist()
            ]
            known = stats[name][rows] if name in stats else None
            yield ViewsJob(name, split.subset(rows), rows.tolist(), views, known, transforms.size)
