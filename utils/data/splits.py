"""What a data set is: images by split and class, and their content hashes."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

LAYOUT = "expected <folder>/train/<class>/<images> and <folder>/test/<class>/<images> (val/ is accepted for test/)"
MAX_PIXELS = 178_956_970  # Pillow refuses more as a possible decompression bomb


def normal_name(name: str) -> str:
    """The one form of a class's or domain's name: composed Unicode (NFC), without spaces at its ends."""
    return unicodedata.normalize("NFC", name).strip() or name


class Split:
    """The images of one split in a fixed order.

    Attributes:
        keys: what names each image within the split, for messages and for the random numbers of its views.
        labels: ``(images,)`` int64, the class of each image as its place in ``Dataset.class_names``.
        root: the folder that keys are paths below; None where the images lie in memory.
    """

    keys: Sequence[str]
    labels: np.ndarray
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """The image in RGB; an error names file and class."""
        raise NotImplementedError

    def subset(self, rows: np.ndarray) -> "Split":
        """These images alone, in a form that can be sent to another process."""
        raise NotImplementedError

    def content_hashes(self) -> list[str]:
        """The SHA-256 of every image's content, in order."""
        raise NotImplementedError


class ImageArray(Split):
    """Images held in memory: ``pixels`` is uint8 ``(images, height, width[, 3])``."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int] | np.ndarray) -> None:
        self.pixels, self.labels = pixels, np.asarray(labels, dtype=np.int64)
        self.keys = tuple(f"{index:06d}" for index in range(len(pixels)))

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def subset(self, rows: np.ndarray) -> "ImageArray":
        part = ImageArray(self.pixels[rows], self.labels[rows])
        part.keys = tuple(self.keys[row] for row in rows.tolist())
        return part

    def content_hashes(self) -> list[str]:
        """The SHA-256 of every image's pixels, in order."""
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in self.pixels]


@dataclass(frozen=True)
class Dataset:
    """A train and a test split over the same classes.

    Attributes:
        class_names: in the order that labels count them (sorted).
        domain_names: empty, or in domain-incremental data the domains in sorted order.
        train_domains, test_domains: ``(images,)`` the domain of each image, or None.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...] = ()
    train_domains: np.ndarray | None = None
    test_domains: np.ndarray | None = None

    def split(self, name: str) -> Split:
        return {"train": self.train, "test": self.test}[name]
