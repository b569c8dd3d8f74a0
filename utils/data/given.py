"""Images given in memory or by path: paths, files, PIL images, tensors and arrays, all brought to one form."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from utils.data.images import MAX_PIXELS, decode_file, open_image, rgb_of
from utils.data.loader import load_ahead
from utils.data.splits import Split
from utils.errors import DataError
from utils.hardware import available_cpus
from utils.words import counted

Array = npt.NDArray[Any]
# a tensor is one image, (3, H, W), an array (H, W, 3) or (H, W), as each library has them: uint8, or float in [0, 1]
ImageSource = str | Path | Image.Image | BinaryIO | Tensor | Array
Images = Sequence[ImageSource] | Tensor | Array  # a tensor or array is a batch: images first


def sources_of(images: Images | ImageSource) -> Sequence[ImageSource]:
    """One source for each image.

    Raises:
        DataError: a tensor or array that is no batch.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise DataError(f"a batch of images is (images, 3, H, W), got a tensor of shape {tuple(images.shape)}")
        return list(images)
    if isinstance(images, np.ndarray):
        if images.ndim not in (3, 4):
            raise DataError(f"a batch of images is (images, H, W[, 3]), got an array of shape {images.shape}")
        return [images] if images.ndim == 3 and images.shape[2] == 3 else list(images)
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    return [images] if _is_file(images) else list(cast("Sequence[ImageSource]", images))


def as_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A path, an open file, a PIL image, a tensor or an array as a PIL image in RGB: one way for all.

    Raises:
        DataError: it cannot be read, or has another shape, type or range.
    """
    if isinstance(source, (str, Path)):
        return open_image(Path(source), max_pixels)
    if isinstance(source, Image.Image):
        return rgb_of(source)
    if _is_file(source):
        return decode_file(source, max_pixels)
    if isinstance(source, Tensor):
        if source.ndim != 3 or source.shape[0] != 3:
            raise DataError(f"an image tensor is (3, H, W), got {tuple(source.shape)}")
        values = source.detach().cpu()
        return _image_of(
            (values.float() if values.dtype == torch.bfloat16 else values).permute(1, 2, 0).numpy(), source
        )
    if isinstance(source, np.ndarray):
        if not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)):
            raise DataError(f"an image array is (H, W, 3) or (H, W), got {source.shape}")
        return _image_of(source, source)
    raise DataError(f"an image is a path, an open file, a PIL image, a tensor or an array, got {type(source).__name__}")


def _is_file(source: object) -> TypeGuard[BinaryIO]:
    return callable(getattr(source, "read", None))


def _image_of(pixels: Array, source: Tensor | Array) -> Image.Image:
    """``(H, W[, 3])`` values as an image."""
    if np.issubdtype(pixels.dtype, np.floating):
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise DataError(
                f"a floating-point image lies in [0, 1], got {float(pixels.min()):.3g} to {float(pixels.max()):.3g}; "
                "do not normalize it: the backbone's own normalisation follows the run's config"
            )
        pixels = np.rint(pixels * pixels.dtype.type(255)).astype(np.uint8)
    if pixels.dtype != np.uint8:
        kind = "tensor" if isinstance(source, Tensor) else "array"
        raise DataError(f"an image {kind} is uint8 or floating point, got {source.dtype}")
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


class GivenImages(Split):
    """Images given by a caller as a split. A file's key is ``<class>/<name>``, as below ``train/`` of a folder."""

    def __init__(self, sources: Sequence[ImageSource], labels: Sequence[str], max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        sources = [
            io.BytesIO(source.read()) if _is_file(source) else source for source in sources
        ]  # read more than once
        self.sources, self.labels = sources, np.zeros(len(sources), dtype=np.int64)
        named = zip(sources, labels, strict=True)
        self.keys = [
            f"{label}/{Path(source).name if isinstance(source, (str, Path)) else f'{index:06d}'}"
            for index, (source, label) in enumerate(named)
        ]

    def load(self, index: int) -> Image.Image:
        return as_image(self.sources[index], self.max_pixels)

    def subset(self, rows: np.ndarray) -> Split:
        images = rows.tolist()
        part = GivenImages([self.sources[i] for i in images], [""] * len(images), self.max_pixels)
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


def checked_labels(labels: Iterable[str], count: int) -> list[str]:
    """The class name of each of ``count`` images.

    Raises:
        DataError: no sequence of names, or not one for each image.
    """
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise DataError(f"labels are a list with the class name of each image, got {labels!r}")
    names = list(labels)
    if len(names) != count:
        raise DataError(f"{counted(count, 'image')} but {counted(len(names), 'label')}")
    if bad := [label for label in names if not isinstance(label, str) or not label]:
        raise DataError(f"labels are class names, got {bad[0]!r}")
    return names
