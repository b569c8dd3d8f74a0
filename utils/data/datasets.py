"""Which data sets there are, and how each lists its images."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.config.config import Config
from utils.data.class_folders import domain_folder, image_folder
from utils.data.folders import data_folder
from utils.data.images import MAX_PIXELS
from utils.data.splits import Dataset, ImageArray
from utils.errors import DataError

log = logging.getLogger(__name__)

DIGITS = Path(__file__).resolve().parents[2] / "assets" / "digits.npz"


def load_dataset(config: Config) -> Dataset:
    """The data that ``config`` names. Files are listed, not yet decoded.

    Raises:
        DataError: a folder, a class or an image that is missing where one must be; the expected layout is shown.
    """
    source = DATASETS[config.dataset]
    data = source.list_images(config)
    if source.expected and config.continue_from is None:
        _warn_about_counts(data, source.expected)
    return data


def list_class_folders(config: Config) -> Dataset:
    """``train/<class>/`` and ``test/<class>/``, or in domain-incremental runs ``train/<domain>/<class>/``."""
    root, continues = data_folder(config), config.continue_from is not None
    max_pixels = config.max_pixels or MAX_PIXELS
    if config.scenario == "domain":
        return domain_folder(root, continues=continues, max_pixels=max_pixels)
    return image_folder(config.dataset, root, continues=continues, max_pixels=max_pixels)


def _cifar100(config: Config) -> Dataset:
    from torchvision.datasets import CIFAR100

    root = data_folder(config)
    was_there = root.exists()
    try:
        splits = [CIFAR100(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:
        if not was_there:
            with suppress(OSError):  # torchvision makes the folder first; one that holds something stays
                root.rmdir()
        raise DataError(
            f"CIFAR-100 is not in {str(root)!r} and cannot be downloaded ({type(error).__name__}: {error}); put "
            "cifar-100-python.tar.gz (or the folder cifar-100-python/) there, or set data_path to where it is"
        ) from error
    train, test = (ImageArray(split.data, split.targets) for split in splits)
    return Dataset("cifar224", train, test, tuple(splits[0].classes))


def _digits(_: Config) -> Dataset:
    """The 1,797 handwritten digits that ship with the repository; of each class every third image is for testing."""
    with np.load(DIGITS) as archive:
        levels, labels = archive["images"], archive["labels"].astype(np.int64)  # 0..16, (1797, 8, 8)
    pixels = np.rint(levels.astype(np.float64) * (255 / 16)).astype(np.uint8)
    place = np.empty(len(labels), dtype=np.int64)  # of an image within its class
    for label in range(10):
        place[labels == label] = np.arange((labels == label).sum())
    is_test = place % 3 == 2
    train, test = (ImageArray(pixels[m], labels[m]) for m in (~is_test, is_test))
    return Dataset("digits", train, test, tuple(str(digit) for digit in range(10)))


def _warn_about_counts(data: Dataset, expected: tuple[int, int, int]) -> None:
    found = (len(data.class_names), len(data.train), len(data.test))
    if found != expected:
        log.warning(
            "%s has %d classes, %d train and %d test images; the split that LAMDA-PILOT publishes has %d, %d and %d: "
            "numbers will not be comparable with published ones",
            data.name,
            *found,
            *expected,
        )


@dataclass(frozen=True)
class Source:
    """How a data set lists its images.

    Attributes:
        list_images: from the config, the images of both splits with their classes; nothing is decoded yet.
        expected: classes, training and test images of the published split; where others are found, the log warns.
    """

    list_images: Callable[[Config], Dataset]
    expected: tuple[int, int, int] | None = None


# The names are read without importing this file (utils/config/methods.py): plain texts. The counts are those of the
# splits that LAMDA-PILOT publishes; other splits of the same names circulate.
DATASETS = {
    "cifar224": Source(_cifar100, (100, 50_000, 10_000)),
    "cub": Source(list_class_folders, (200, 9_430, 2_358)),
    "imageneta": Source(list_class_folders, (200, 5_981, 1_519)),
    "imagenetr": Source(list_class_folders, (200, 24_000, 6_000)),
    "omnibenchmark": Source(list_class_folders, (300, 89_697, 5_985)),
    "vtab": Source(list_class_folders, (50, 1_796, 8_619)),
    "objectnet": Source(list_class_folders, (200, 26_509, 6_628)),
    "imagefolder": Source(list_class_folders),
    "digits": Source(_digits),
}
