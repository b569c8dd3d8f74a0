"""From images to rows: loaders ahead of the backbone, one forward pass for each CPU thread, rows to their writers."""

import threading
import time
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from utils.data.splits import Dataset
from utils.errors import BankError, NumericError, is_lack_of_memory
from utils.features.arrays import HINT_FEATURES_STAY, View, ViewRow
from utils.features.batches import batches_of
from utils.features.rows import Writer
from utils.features.views import MissingViews
from utils.hardware import forward_threads

SYNC_SECONDS = 30  # at most this much work is lost when the power fails (a batch when only the process dies)


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


class Store:
    """Where features go, from any thread. Those without a writer are dropped."""

    def __init__(self, writers: Mapping[View, Writer]) -> None:
        self._writers, self._lock, self._last_sync = writers, threading.Lock(), time.monotonic()

    def write(self, places: list[ViewRow], features: np.ndarray) -> None:
        with self._lock:
            for (split, view, row), feature in zip(places, features, strict=True):
                if (split, view) in self._writers:
                    self._writers[split, view].write(row, feature)
            if time.monotonic() - self._last_sync > SYNC_SECONDS:
                for writer in self._writers.values():
                    writer.sync()
                self._last_sync = time.monotonic()


class Extraction:
    """Passes missing views through a backbone.

    Args:
        data: the images.
        extractor: the backbone.
        batch_size: images in one forward pass.
        num_workers: processes that load images; 0 loads in this one.
    """

    def __init__(self, data: Dataset, extractor: FeatureExtractor, batch_size: int, num_workers: int) -> None:
        self._data, self._extractor, self._batch_size, self._num_workers = data, extractor, batch_size, num_workers
        self.threads = forward_threads(extractor.device)

    def run(self, views: MissingViews, store: Store) -> Generator[int, None, None]:
        """Compute ``views`` into ``store``; yield how many are done whenever a batch is. Close it to stop.

        Raises:
            DataError: an image cannot be read. NumericError: a feature is not finite. BankError: no space.
        """
        running: deque[Future[int]] = deque()
        pin = self._extractor.device.type not in ("cpu", "mps")  # where the copy can run beside the backbone
        with (
            closing(batches_of(views, self._batch_size, self._num_workers, pin)) as batches,
            ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for places, pixels in batches:
                running.append(pool.submit(self._forward, places, pixels, store))
                if len(running) > self.threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def _forward(self, places: list[ViewRow], pixels: Tensor, store: Store) -> int:
        """Compute one batch and store it. The shape is always the same, and so is every row, whatever is beside it.

        A matrix product may pick another algorithm for another number of rows; then an image's last bits would
        depend on how an interrupted extraction was cut.
        """
        count = len(pixels)
        if count < self._batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(self._batch_size - count, -1, -1, -1)])
        try:
            features = self._extractor(pixels)[:count].cpu().numpy()
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            raise BankError(
                f"a forward pass of {self._batch_size} images does not fit the memory of {self._extractor.device}; "
                f"lower feature_batch_size; {HINT_FEATURES_STAY}"
            ) from None
        self._check_finite(features, places)
        store.write(places, features)
        return count

    def _check_finite(self, features: np.ndarray, places: list[ViewRow]) -> None:
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            split, view, row = places[bad[0]]
            raise NumericError(
                f"the backbone's feature of {split} image {self._data.split(split).keys[row]!r} (view {view}) is not "
                "finite; try precision=fp32, or check the weights"
            )
