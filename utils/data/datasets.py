"""Which data sets there are, and how each lists its images."""

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import module
from utils.config.config import Config
from utils.data.splits import LAYOUT, Dataset, ImageArray
from utils.errors import DataError
from utils.files import expanded

log = logging.getLogger(__name__)

DIGITS = Path(__file__).resolve().parents[2] / "assets" / "digits.npz"


CIFAR_MD5 = {  # of the files in cifar-100-python/
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


def load_dataset(config: Config) -> Dataset:
    """The data that ``config`` names. Files are listed, not yet decoded."""
    source = DATASETS[config.dataset]
    data = source.list_images(config)
    if warning := source.other_counts(config, len(data.class_names), len(data.train), len(data.test)):
        log.warning("%s has %s", data.name, warning)
    return data


def data_folder(config: Config) -> Path:
    """``data_path``, else ``$TOSCA_DATA/<dataset>``; for CIFAR-100, which is downloaded, else ``data/``."""
    if config.data_path is not None:
        return expanded(config.data_path)
    if root := os.environ.get("TOSCA_DATA"):
        return expanded(root) / config.dataset
    if config.dataset == "cifar224":
        return Path("data")
    raise DataError(
        f"dataset {config.dataset!r} needs its folder: set data_path=<folder>, or the environment variable TOSCA_DATA "
        f"to the folder that holds {config.dataset}/; {LAYOUT}"
    )


def list_class_folders(config: Config) -> Dataset:
    """``train/<class>/`` and ``test/<class>/``, or in domain-incremental runs ``train/<domain>/<class>/``."""
    data: Dataset = module("utils.data.folders").load_folders(data_folder(config), config)
    return data


def _cifar100(config: Config) -> Dataset:
    folder = data_folder(config) / "cifar-100-python"
    if not _is_published_cifar(folder):
        _download_cifar(folder.parent)
    train, test, meta = (pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in CIFAR_MD5)
    splits = [  # rows of 3072 values, channel after channel
        ImageArray(split["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), split["fine_labels"])
        for split in (train, test)
    ]
    return Dataset("cifar224", splits[0], splits[1], tuple(meta["fine_label_names"]))


def _is_published_cifar(folder: Path) -> bool:
    """Whether every file holds what was published: pickles of any other content are not opened."""
    try:
        found = [hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest() for name in CIFAR_MD5]
    except OSError:
        return False
    return found == list(CIFAR_MD5.values())


def _download_cifar(root: Path) -> None:
    from torchvision.datasets import CIFAR100

    was_there = root.exists()
    try:
        CIFAR100(str(root), download=True)
    except Exception as error:
        if not was_there:
            with suppress(OSError):  # torchvision makes the folder first; one that holds something stays
                root.rmdir()
        raise DataError(
            f"CIFAR-100 is not in {str(root)!r} and cannot be downloaded ({type(error).__name__}: {error}); put "
            "cifar-100-python.tar.gz (or the folder cifar-100-python/) there, or set data_path to where it is"
        ) from error


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


@dataclass(frozen=True)
class Source:
    """How a data set lists its images.

    Attributes:
        list_images: from the config, the images of both splits with their classes; nothing is decoded yet.
        expected: classes, training and test images of the published split; where others are found, the log warns.
    """

    list_images: Callable[[Config], Dataset]
    expected: tuple[int, int, int] | None = None

    def other_counts(self, config: Config, *found: int) -> str:
        """What to warn of where ``found`` are other counts than expected; empty where there is nothing to say."""
        if self.expected in (None, found) or config.continue_from is not None:
            return ""
        counts = "{} classes, {} train and {} test images".format
        return (
            f"{counts(*found)}; the split that LAMDA-PILOT publishes has {counts(*self.expected)}: numbers will not be "
            "comparable with published ones"
        )


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
