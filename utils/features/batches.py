"""Views of images to batches for the backbone, by loaders that never let it wait."""

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from utils.data.loader import load_ahead
from utils.features.arrays import ViewRow
from utils.features.views import LOADED_TOGETHER, MissingViews, ViewsJob, load_views


def batches_of(
    views: MissingViews, batch_size: int, num_workers: int, pin: bool
) -> Generator[tuple[list[ViewRow], Tensor], None, None]:
    """Batches of exactly ``batch_size`` views, but for the last: what each is, and ``(views, 3, S, S)`` uint8.

    Args:
        views: what to load.
        batch_size: views in each.
        num_workers: processes that load; 0 loads in a thread of this one.
        pin: put batches where an accelerator's copy engine can fetch them.
    """
    workers = max(1, min(num_workers, views.images))
    # what waits for the backbone: two batches, and something from each loader
    ahead = -(-2 * batch_size // LOADED_TOGETHER) + 2 * workers
    loaded = load_ahead(
        load_views, views.jobs(), workers=workers, ahead=ahead, processes=num_workers > 0, name=ViewsJob.__str__
    )
    places: list[ViewRow] = []
    parts: list[np.ndarray] = []

    def batch(count: int) -> tuple[list[ViewRow], Tensor]:
        nonlocal places, parts
        pixels = np.concatenate(parts) if len(parts) > 1 else parts[0]
        first, places, parts = places[:count], places[count:], [pixels[count:]]
        tensor = torch.from_numpy(pixels[:count])
        return first, tensor.pin_memory() if pin else tensor

    with closing(loaded):
        for job, pixels in loaded:
            places += job.places
            parts.append(pixels)
            while len(places) >= batch_size:
                yield batch(batch_size)
        if places:
            yield batch(len(places))
