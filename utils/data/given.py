"""Images given in memory or by path: paths, PIL images and tensors, all brought to one form."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.images import open_image, rgb_of
from utils.data.loader import load_ahead
from utils.data.splits import Split
from utils.errors import DataError
from utils.hardware import available_cpus

ImageSource = str | Path | Image.Image | Tensor  # a tensor is one image, (3, H, W)
Images = Sequence[ImageSource] | Tensor  # a tensor is a batch, (images, 3, H, W): uint8, or float in [0, 1]


def sources_of(images: Images) -> Sequence[ImageSource]:
    """One source for each image.

    Raises:
        DataError: a tensor that is no batch.
    """
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise DataError(f"a batch of images is (images, 3, H, W), got a tensor of shape {tuple(images.shape)}")
        return list(images)
    return list(images)


def as_image(source: ImageSource) -> Image.Image:
    """A path, a PIL image or a ``(3, H, W)`` tensor as a PIL image in RGB: one path for all.

    Raises:
        DataError: it cannot be read, or has another shape, type or range.
    """
    if isinstance(source, (str, Path)):
        return open_image(Path(source))
    if isinstance(source, Image.Image):
        return rgb_of(source)
    if not isinstance(source, Tensor):
        raise DataError(f"an image is a path, a PIL image or a tensor, got {type(source).__name__}")
    if source.ndim != 3 or source.shape[0] != 3:
        raise DataError(f"an image tensor is (3, H, W), got {tuple(source.shape)}")
    pixels = source.detach().cpu()
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise DataError(
                f"a floating-point image lies in [0, 1], got {float(pixels.min()):.3g} to {float(pixels.max()):.3g}; "
                "do not normalize it: the backbone's own normalisation follows the run's config"
            )
        pixels = (pixels * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise DataError(f"an image tensor is uint8 or floating point, got {source.dtype}")
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class GivenImages(Split):
    """Images given by a caller as a split. A file's key is ``<class>/<name>``, as below ``train/`` of a folder."""

    def __init__(self, sources: Sequence[ImageSource], labels: Sequence[str]) -> None:
        self.sources, self.labels = sources, np.zeros(len(sources), dtype=np.int64)
        named = zip(sources, labels, strict=True)
        self.keys = [
            f"{label}/{Path(source).name if isinstance(source, (str, Path)) else f'{index:06d}'}"
            for index, (source, label) in enumerate(named)
        ]

    def load(self, index: int) -> Image.Image:
        return as_image(self.sources[index])

    def subset(self, rows: np.ndarray) -> Split:
        images = rows.tolist()
        part = GivenImages([self.sources[i] for i in images], [""] * len(images))
        part.keys = [self.keys[i] for i in images]
        return part


Loaded = TypeVar("Loaded")


def loaded_ahead(
    paths: Iterable[Path], load: Callable[[Path], Loaded], ahead: int
) -> Iterator[tuple[Path, Loaded | DataError]]:
    """``(path, load(path))`` in order, at most ``ahead`` of them loaded before their turn, by a few threads.

    A ``DataError`` of ``load`` comes in place of its result.
    """

    def attempt(path: Path) -> Loaded | DataError:
        try:
            return load(path)
        except DataError as error:
            return error

    return load_ahead(attempt, paths, workers=available_cpus(), ahead=ahead)
