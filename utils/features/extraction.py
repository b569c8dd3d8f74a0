"""From images to features: loaders ahead of the backbone, one forward pass for each CPU thread."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from utils.data.loader import load_ahead
from utils.features.rows import ViewRow
from utils.features.views import LOADED_TOGETHER, ViewsJob, load_views
from utils.hardware import forward_threads

Keep = Callable[[list[ViewRow], np.ndarray], object]


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
    variant: dict[str, str]  # what else a row's bits depend on

    def __call__(self, images: Tensor) -> Tensor:
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

    def forward(places: list[ViewRow], pixels: Tensor) -> int:
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
) -> Generator[tuple[list[ViewRow], Tensor], None, None]:
    """Exactly ``batch_size`` views at a time, but for the last: what they are, and ``(views, 3, S, S)`` uint8."""
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
