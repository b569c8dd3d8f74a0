"""Images to the pixels of their views, and these to features: loaders ahead, one forward pass for each CPU thread.

Loader processes import this to run ``load_views``: PyTorch is imported where features are computed, so they start at
once.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from utils.data.loader import load_ahead
from utils.data.splits import Dataset, Split
from utils.data.transforms import Draws, Transforms, test_pixels, train_pixels
from utils.errors import DataError
from utils.features.rows import TEST_VIEW, View, ViewRow
from utils.hardware import forward_threads

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
        if job.stats is not None and job.images.root is not None:
            _check_unchanged(job.images.root / job.images.keys[index], job.stats[index])
        for _, draws in views:
            next(place)[:] = test_pixels(image, job.size) if draws is None else train_pixels(image, job.size, draws)
    return pixels


def _check_unchanged(path: Path, stats: np.ndarray) -> None:
    """Look at a file again after it was decoded: the content that was hashed names its rows."""
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


# -- through the backbone ---------------------------------------------------------------------------------------------

Keep = Callable[[list[ViewRow], np.ndarray], object]


class FeatureExtractor(Protocol):
    """What the bank needs of a backbone (``backbone.vit.Backbone`` is one)."""

    name: str
    weights_sha256: str
    feature_dim: int
    precision: str
    parameters: int
    normalize: bool
    device: "torch.device"
    pooling: str  # what a feature is, as timm names it
    variant: dict[str, str]  # what else a row's bits depend on

    def __call__(self, images: "Tensor") -> "Tensor":
        """``(images, 3, S, S)`` uint8 -> ``(images, feature_dim)`` float32."""


def extract(
    jobs: Iterable[ViewsJob], extractor: FeatureExtractor, batch_size: int, num_workers: int, keep: Keep
) -> Generator[int, None, None]:
    """Pass views through a backbone; yield how many they were whenever a batch is done. Close it to stop.

    Args:
        jobs: what to load.
        extractor: the backbone.
        batch_size: images in one forward pass.
        num_workers: processes that load images; 0 loads in a thread of this one.
        keep: takes what rows of features are, and the rows; from several threads.
    """

    import torch

    def forward(places: list[ViewRow], pixels: "Tensor") -> int:
        """The shape is always the same, and so is every row, whatever is beside it.

        A matrix product may pick another algorithm for another number of rows; then an image's last bits would
        depend on how an interrupted extraction was cut.
        """
        padding = pixels[-1:].expand(batch_size - len(pixels), -1, -1, -1)
        features = extractor(torch.cat([pixels, padding]) if len(padding) else pixels)[: len(places)]
        keep(places, features.cpu().numpy())
        return len(places)

    running: deque[Future[int]] = deque()
    pin = extractor.device.type not in ("cpu", "mps")  # where the copy can run beside the backbone
    threads = forward_threads(extractor.device)
    with (
        closing(_batches(jobs, batch_size, num_workers)) as batches,
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        for places, pixels in batches:
            running.append(pool.submit(forward, places, pixels.pin_memory() if pin else pixels))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _batches(
    jobs: Iterable[ViewsJob], batch_size: int, num_workers: int
) -> Generator[tuple[list[ViewRow], "Tensor"], None, None]:
    """Exactly ``batch_size`` views at a time, but for the last: what they are, and ``(views, 3, S, S)`` uint8."""
    import torch

    workers = max(1, num_workers)
    # what waits for the backbone: two batches, and something from each loader
    ahead = -(-2 * batch_size // LOADED_TOGETHER) + 2 * workers
    places: list[ViewRow] = []
    pixels = torch.empty(0, dtype=torch.uint8)
    with closing(load_ahead(load_views, jobs, workers=workers, ahead=ahead, processes=num_workers > 0)) as loaded:
        for job, part in loaded:
            places += job.places
            pixels = torch.cat([pixels, torch.from_numpy(part)])
            while len(places) >= batch_size:
                yield places[:batch_size], pixels[:batch_size]
                places, pixels = places[batch_size:], pixels[batch_size:]
        if places:
            yield places, pixels
