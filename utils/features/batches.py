"""Images to batches: each is decoded once for all its views, by processes that never let the backbone wait."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from utils.data.splits import Dataset
from utils.data.transforms import Transforms
from utils.errors import BankError, DataError
from utils.features.arrays import HINT_FEATURES_STAY, View, ViewRow
from utils.hardware import ONE_RANK, Ranks

TEST_VIEW = -1  # the view that the test transform gives
LOADED_TOGETHER = 16  # views in what a loader process hands over at a time


class ViewsOfImages(torch.utils.data.Dataset):
    """Item -> the places and the uint8 pixels ``(views, 3, S, S)`` of one image under its missing views.

    So an image is decoded once for all its views. Each rank has images of its own.
    """

    def __init__(
        self, data: Dataset, transforms: Transforms, missing: dict[View, np.ndarray], ranks: Ranks = ONE_RANK
    ) -> None:
        self.data, self.transforms, self.missing, self.views = data, transforms, missing, 0
        self.work: list[tuple[str, int]] = []
        for split in sorted({split for split, _ in missing}):
            count = np.sum([rows for (s, _), rows in missing.items() if s == split], axis=0)  # missing views of each
            mine = np.flatnonzero(count)
            mine = mine[mine % ranks.count == ranks.rank]  # not by place: other ranks may have begun to write
            self.work += [(split, row) for row in mine.tolist()]
            self.views += int(count[mine].sum())

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, item: int) -> tuple[list[ViewRow], Tensor] | DataError:
        name, row = self.work[item]
        split = self.data.split(name)
        key = split.keys[row]
        views = [view for (s, view), rows in self.missing.items() if s == name and rows[row]]
        try:
            image = split.load(row)
            pixels = [
                self.transforms.test(image) if view == TEST_VIEW else self.transforms.view(image, key, view)
                for view in views
            ]
        except DataError as error:
            return error  # raised in the main process, as it is: a worker would wrap it into a traceback
        except Exception as error:
            return DataError(f"{name} image {key!r} cannot be transformed ({type(error).__name__}: {error}); remove it")
        return [(name, view, row) for view in views], torch.stack(pixels)


def _together(items: list[tuple[list[ViewRow], Tensor] | DataError]) -> tuple[list[ViewRow], Tensor] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    return [place for places, _ in items for place in places], torch.cat([pixels for _, pixels in items])


def batches_of(
    images: ViewsOfImages, batch_size: int, num_workers: int, pin: bool
) -> Iterator[tuple[list[ViewRow], Tensor]]:
    """Batches of exactly ``batch_size`` (image, view) pairs, but for the last."""
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=max(1, LOADED_TOGETHER * len(images) // images.views),
        num_workers=min(num_workers, len(images)),
        collate_fn=_together,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else the loader takes a number from the global one
        # a fork starts at once and shares the images in memory; loaders never touch the accelerator
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        prefetch_factor=max(2, 2 * batch_size // LOADED_TOGETHER // num_workers) if num_workers else None,
    )
    places: list[ViewRow] = []
    parts: list[Tensor] = []

    def batch(count: int) -> tuple[list[ViewRow], Tensor]:
        nonlocal places, parts
        pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
        first, places, parts = places[:count], places[count:], [pixels[count:]]
        return first, pixels[:count].pin_memory() if pin else pixels[:count]

    try:
        loaded_batches = iter(loader)
    except OSError as error:
        raise BankError(
            f"{num_workers} processes that load images cannot be started ({error.strerror}); lower num_workers"
        ) from error
    try:
        for loaded in loaded_batches:
            if isinstance(loaded, DataError):
                raise loaded
            places += loaded[0]
            parts.append(loaded[1])
            while len(places) >= batch_size:
                yield batch(batch_size)
        if places:
            yield batch(len(places))
    finally:
        del loaded_batches  # ends the loader's processes, which an error's traceback would keep


@contextmanager
def killed_loaders_named() -> Iterator[None]:
    """PyTorch tells of a killed loader process from a signal handler: the error may come up anywhere within."""
    killed = None
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        killed = str(error).splitlines()[0]
    if killed:  # out here, for the error's traceback would keep the other loaders
        raise BankError(
            f"a process that loads images was killed ({killed}); often memory (in containers /dev/shm) is short: lower "
            f"num_workers, 0 needs none; {HINT_FEATURES_STAY}"
        )


def _start_worker(_: int) -> None:
    """One thread a worker, and Ctrl-C is the main process's to answer. SIGTERM ends it, as PyTorch expects."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
