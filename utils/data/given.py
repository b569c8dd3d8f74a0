"""Images given in memory or by path: paths, files, PIL images, tensors and arrays, all brought to one form."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from utils import module
from utils.data.loader import load_ahead
from utils.data.splits import MAX_PIXELS, Split
from utils.errors import DataError
from utils.hardware import available_cpus
from utils.words import counted

Array = npt.NDArray[Any]
# a tensor is one image, (3, H, W), an array (H, W, 3) or (H, W), as each library has them: uint8, or float in [0, 1]
ImageSource = str | Path | Image.Image | BinaryIO | Tensor | Array
Images = Iterable[ImageSource] | Tensor | Array  # a tensor or array is a batch: images first
Loaded = TypeVar("Loaded")


def sources_of(images: Images | ImageSource) -> Sequence[ImageSource]:
    """One source for each image. What is not surely a batch or one image is refused with its shape."""
    if isinstance(images, (Tensor, np.ndarray)):
        return _sources_of_array(images)
    if isinstance(images, (str, Path, Image.Image)) or _is_file(images):
        return [images]
    if not isinstance(images, Iterable):
        raise DataError(f"images are paths, open files, PIL images, tensors or arrays, got {type(images).__name__}")
    return list(images)


def _sources_of_array(images: Tensor | Array) -> Sequence[ImageSource]:
    shape = tuple(images.shape)
    if isinstance(images, Tensor):
        if len(shape) == 4 and shape[1] == 3 != shape[3]:
            return list(images)
        raise DataError(f"a batch of images is (images, 3, H, W), got a tensor of shape {shape}")
    if images.dtype.kind not in "biufc":
        raise DataError(f"an array of type {images.dtype} holds no pixels; give paths and images as a list")
    if len(shape) == 4 and shape[3] == 3 != shape[1]:
        return list(images)
    if len(shape) == 3 and 3 not in shape[:2] and (shape[2] == 3 or shape[2] > 4):  # else it may be four channels
        return [images] if shape[2] == 3 else list(images)
    raise DataError(
        f"a batch is (images, H, W, 3) or (images, H, W), one image (H, W, 3), got an array of shape {shape}, which is "
        "not surely one of them; give a list of images"
    )


def checked_labels(labels: Iterable[str], count: int) -> list[str]:
    """The class name of each of ``count`` images."""
    if isinstance(labels, (str, Mapping, Set)) or not isinstance(labels, Iterable):
        raise DataError(f"labels are a sequence with the class name of each image, got {labels!r:.60}")
    names = list(labels)
    if len(names) != count:
        raise DataError(f"{counted(count, 'image')} but {counted(len(names), 'label')}")
    if bad := [name for name in names if not isinstance(name, str) or not name]:
        raise DataError(f"labels are class names, got {bad[0]!r:.60}")
    return names


def checked_top_k(top_k: int) -> int:
    """How many classes to name for each image."""
    if not isinstance(top_k, (int, np.integer)) or isinstance(top_k, bool) or top_k < 1:
        raise DataError(f"top_k is how many classes to name for each image, at least 1, got {top_k!r:.60}")
    return int(top_k)


def numbered(sources: Sequence[ImageSource], load: Callable[[ImageSource], Loaded], first: int = 0) -> list[Loaded]:
    """``load`` of each source; a fault names which image it is, counted from ``first``."""
    return [_named(number, source, load) for number, source in enumerate(sources, start=first)]


def _named(number: int, source: ImageSource, load: Callable[[ImageSource], Loaded]) -> Loaded:
    try:
        return load(source)
    except DataError as error:
        raise error if isinstance(source, (str, Path)) else DataError(f"images[{number}]: {error}") from error


def as_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A path, an open file, a PIL image, a tensor or an array as a PIL image in RGB: one way for all."""
    images = module("utils.data.images")
    image: Image.Image
    if isinstance(source, (str, Path)):
        image = images.open_image(Path(source), max_pixels)
        return image
    if isinstance(source, Image.Image) or _is_file(source):
        image = images.decode(source, max_pixels)
        return image
    if isinstance(source, Tensor):
        if source.ndim != 3 or source.shape[0] != 3 or source.shape[2] == 3:
            raise DataError(f"an image tensor is (3, H, W), got {tuple(source.shape)}")
        values = source.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        return _image_of(values.permute(1, 2, 0).numpy(), f"tensor is uint8 or floating point, got {source.dtype}")
    if isinstance(source, np.ndarray):
        if not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3 != source.shape[0])):
            raise DataError(f"an image array is (H, W, 3) or (H, W), got {source.shape}")
        return _image_of(source, f"array is uint8 or floating point, got {source.dtype}")
    raise DataError(f"an image is a path, an open file, a PIL image, a tensor or an array, got {type(source).__name__}")


def _is_file(source: object) -> TypeGuard[BinaryIO]:
    return callable(getattr(source, "read", None))


def _image_of(pixels: Array, kinds: str) -> Image.Image:
    """``(H, W[, 3])`` values as an image; ``kinds`` says which types it may have."""
    if not pixels.size:
        raise DataError(f"an image has pixels, got the shape {pixels.shape}")
    if np.issubdtype(pixels.dtype, np.floating):
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise DataError(
                f"a floating-point image lies in [0, 1], got {float(pixels.min()):.3g} to {float(pixels.max()):.3g}; "
                "do not normalize it: the backbone's own normalisation follows the run's config"
            )
        pixels = np.rint(pixels * pixels.dtype.type(255)).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"an image {kinds}")
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


class GivenImages(Split):
    """Images given by a caller as a split. A file's key is ``<class>/<name>``, as below ``train/`` of a folder."""

    def __init__(self, sources: Sequence[ImageSource], labels: Sequence[str], max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        self.numbers = list(range(len(sources)))
        self.sources = [io.BytesIO(source.read()) if _is_file(source) else source for source in sources]  # read often
        self.labels = np.zeros(len(sources), dtype=np.int64)
        names = [Path(s).name if isinstance(s, (str, Path)) else f"{i:06d}" for i, s in enumerate(sources)]
        self.keys = [f"{label}/{name}" for label, name in zip(labels, names, strict=True)]

    def load(self, index: int) -> Image.Image:
        return _named(self.numbers[index], self.sources[index], lambda source: as_image(source, self.max_pixels))

    def subset(self, rows: np.ndarray) -> Split:
        images = rows.tolist()
        part = GivenImages([self.sources[i] for i in images], [""] * len(images), self.max_pixels)
        part.keys, part.numbers = [self.keys[i] for i in images], [self.numbers[i] for i in images]
        return part


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
