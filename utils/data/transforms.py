"""The release's two transforms, and a view's random numbers. Importing this loads no PyTorch: loaders need none."""

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

SCALE, RATIO = (0.05, 1.0), (3 / 4, 4 / 3)  # of a crop: its part of the image's area, its width by its height
ATTEMPTS = 10  # to find a crop that lies within the image
THIN = 16  # an enlarged picture that is so much longer than wide is never made as a whole
WORDS = 2 * ATTEMPTS + 3  # numbers of the generator that the last attempt, its place and the flip need


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view, drawn before the image's size is known.

    The generator gives one 32-bit number after another: two for each attempt at a crop, and when one fits, two for
    its place and one for the flip.

    Attributes:
        areas: for each attempt, the crop's part of the image's area.
        ratios: for each attempt, the crop's width by its height.
        words: the generator's numbers themselves, of which the place and the flip are made.
    """

    areas: tuple[float, ...]
    ratios: tuple[float, ...]
    words: tuple[int, ...]


def crop_and_flip(draws: Draws, width: int, height: int) -> tuple[tuple[int, int, int, int], bool]:
    """The crop (left, top, right, bottom) of an image and whether to flip it: RandomResizedCrop, then a coin."""
    for attempt in range(ATTEMPTS):
        target = width * height * draws.areas[attempt]
        w = round(math.sqrt(target * draws.ratios[attempt]))
        h = round(math.sqrt(target / draws.ratios[attempt]))
        if 0 < w <= width and 0 < h <= height:
            down, right, coin = draws.words[2 * attempt + 2 : 2 * attempt + 5]
            top, left = down % (height - h + 1), right % (width - w + 1)
            return (left, top, left + w, top + h), _heads(coin)
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    top, left = (height - h) // 2, (width - w) // 2
    return (left, top, left + w, top + h), _heads(draws.words[2 * ATTEMPTS])


def _heads(word: int) -> bool:
    return word & 0xFFFFFF < 1 << 23  # torch.rand(1) < 0.5: a float32 is made of the lower 24 bits


def train_pixels(image: Image.Image, size: int, draws: Draws) -> np.ndarray:
    """The augmented view of an RGB image: ``(3, size, size)`` uint8."""
    box, flip = crop_and_flip(draws, *image.size)
    view = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return _channels_first(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


def test_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The test view of an RGB image, resized and cropped in its middle: ``(3, size, size)`` uint8."""
    width, height = image.size
    short = int(256 / 224 * size)
    to = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = round((to[0] - size) / 2), round((to[1] - size) / 2)
    if max(to) > max(THIN * short, width, height):
        return _middle_of_thin(image, size, to, left, top)
    resized = image.resize(to, Image.Resampling.BICUBIC)
    return _channels_first(resized.crop((left, top, left + size, top + size)))


def _middle_of_thin(image: Image.Image, size: int, to: tuple[int, int], left: int, top: int) -> np.ndarray:
    """The same pixels without the whole enlarged picture, which takes gigabytes where one side is very short.

    Pillow enlarges along the width, then along the height, and cannot do so for a part alone without other rounding:
    the long side is done here in its fixed point (``Resample.c``). Four pixels, never at an end, give one.
    """
    wide = to[0] > to[1]
    if wide:
        image, to, left, top = image.transpose(Image.Transpose.TRANSPOSE), to[::-1], top, left

    def widened(strip: Image.Image) -> Image.Image:
        resized = strip.resize((to[0], strip.height), Image.Resampling.BICUBIC)
        return resized.crop((left, 0, left + size, strip.height))

    centers = (np.arange(top, top + size)[:, None] + 0.5) * (image.height / to[1])
    taps = (centers - 1.5).astype(int) + np.arange(4)
    x = np.abs(taps - centers + 0.5)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
    weights = weights / weights.cumsum(axis=1)[:, 3:] * (1 << 22)  # summed in Pillow's order
    fixed = np.trunc(weights + np.copysign(0.5, weights)).astype(int)
    first = int(taps[0, 0])
    strip = image.crop((0, first, image.width, int(taps[-1, 3]) + 1))
    lines = np.asarray(strip if wide else widened(strip))[taps - first]  # (size, 4, pixels across, 3)
    levels = ((fixed[:, :, None, None] * lines).sum(axis=1) + (1 << 21) >> 22).clip(0, 255).astype(np.uint8)
    view = Image.fromarray(levels)
    return _channels_first(widened(view).transpose(Image.Transpose.TRANSPOSE) if wide else view)


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class Transforms:
    """The release's two transforms, PIL image -> uint8 ``(3, size, size)``; no mean/std normalisation.

    Args:
        size: side of the square that the backbone sees.
        augment_seed: where the views' random numbers come from.
    """

    def __init__(self, size: int, augment_seed: int) -> None:
        import torch

        self.size, self.augment_seed = size, augment_seed
        self._log_ratio = torch.log(torch.tensor(RATIO)).tolist()  # in float32, as torchvision has it
        self._lock = threading.Lock()
        self._generator = torch.Generator()
        self._words = np.random.MT19937()  # the same generator as PyTorch's, which does not show its 32-bit numbers
        self._seed_words = np.random.RandomState(self._words).seed

    def draws(self, key: str, view: int) -> Draws:
        """The random numbers of view ``view`` of the image named ``key``: they depend on these and the seed alone.

        They are what torchvision draws from PyTorch's global generator after ``torch.manual_seed(seed)``.
        """
        import torch

        seed = derive_seed("view", self.augment_seed, view, key)
        uniform = torch.empty(2, 2 * ATTEMPTS)
        with self._lock:
            uniform[0].uniform_(*SCALE, generator=self._generator.manual_seed(seed))
            uniform[1].uniform_(*self._log_ratio, generator=self._generator.manual_seed(seed))
            self._seed_words(seed & 0xFFFFFFFF)
            words = self._words.random_raw(WORDS).tolist()
        return Draws(tuple(uniform[0, ::2].tolist()), tuple(uniform[1, 1::2].exp().tolist()), tuple(words))

    def test(self, image: Image.Image) -> "Tensor":
        import torch

        return torch.from_numpy(test_pixels(image, self.size))

    def view(self, image: Image.Image, key: str, view: int) -> "Tensor":
        """View ``view`` of the image named ``key``."""
        import torch

        return torch.from_numpy(train_pixels(image, self.size, self.draws(key, view)))
