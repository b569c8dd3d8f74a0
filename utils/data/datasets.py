"""Which data sets there are, and how each lists its images."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.config import Config
from utils.data.folders import DOMAIN_LAYOUT, _check_same_classes, _list_classes, data_folder, split_folders, subfolders
from utils.data.splits import Dataset, ImageArray, ImageFiles
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


def _class_folders(config: Config) -> Dataset:
    """``train/<class>/`` and ``test/<class>/``, or in domain-incremental runs ``train/<domain>/<class>/``."""
    root, continues = data_folder(config), config.continue_from is not None
    if config.scenario == "domain":
        return _domain_folder(root, continues=continues)
    return _image_folder(config.dataset, root, continues=continues)


def _image_folder(name: str, root: Path, *, continues: bool = False) -> Dataset:
    """``continues``: the test split may hold classes that a saved run has learned; they are counted last."""
    train_root, test_root = split_folders(root)
    train, test = _list_classes(train_root), _list_classes(test_root)
    _check_same_classes(train, test, train_root, test_root, continues=continues)
    classes = (*sorted(train), *sorted(test.keys() - train.keys()))
    return Dataset(name, _files(train_root, train, classes), _files(test_root, test, classes), classes)


def _domain_folder(root: Path, *, continues: bool = False) -> Dataset:
    """``train/<domain>/<class>/``: the same label space seen in several domains (a domain may lack classes).

    ``continues``: the test split may hold domains that a saved run has learned; they are counted last.
    """
    train_root, test_root = split_folders(root)
    domains = tuple(subfolders(train_root))
    if not domains:
        raise DataError(f"{train_root} holds no domain folders; {DOMAIN_LAYOUT}")
    for domain in domains:
        if not (test_root / domain).is_dir():
            raise DataError(f"{test_root} lacks the domain {domain!r} that {train_root} has; {DOMAIN_LAYOUT}")
    extra = sorted(set(subfolders(test_root)) - set(domains))
    if extra and not continues:
        raise DataError(f"{test_root} has the domain {extra[0]!r} that {train_root} lacks; {DOMAIN_LAYOUT}")
    listed: dict[str, list[dict[str, list[str]]]] = {"train": [], "test": []}
    for domain in domains:
        train, test = _list_classes(train_root / domain), _list_classes(test_root / domain)
        _check_same_classes(train, test, train_root / domain, test_root / domain)
        listed["train"].append(train)
        listed["test"].append(test)
    for domain in extra:
        listed["train"].append({})
        listed["test"].append(_list_classes(test_root / domain))
    domains += tuple(extra)
    classes = tuple(sorted({name for split in listed.values() for found in split for name in found}))
    splits, of_image = {}, {}
    for split, base in (("train", train_root), ("test", test_root)):
        files, labels, domain_of = [], [], []
        for number, (domain, found) in enumerate(zip(domains, listed[split], strict=True)):
            for label, name in enumerate(classes):
                paths = found.get(name, [])
                files += [f"{domain}/{path}" for path in paths]
                labels += [label] * len(paths)
                domain_of += [number] * len(paths)
        splits[split] = ImageFiles(base, files, labels)
        of_image[split] = np.asarray(domain_of, dtype=np.int64)
    return Dataset(
        "imagefolder", splits["train"], splits["test"], classes, domains, of_image["train"], of_image["test"]
    )


def _files(root: Path, found: dict[str, list[str]], classes: Sequence[str]) -> ImageFiles:
    files = [file for name in classes for file in found.get(name, ())]
    labels = [label for label, name in enumerate(classes) for _ in found.get(name, ())]
    return ImageFiles(root, files, labels)


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


# The names are read without importing this file (utils/methods.py): they are plain texts. The counts are those of the
# splits that LAMDA-PILOT publishes; other splits of the same names circulate.
DATASETS = {
    "cifar224": Source(_cifar100, (100, 50_000, 10_000)),
    "cub": Source(_class_folders, (200, 9_430, 2_358)),
    "imageneta": Source(_class_folders, (200, 5_981, 1_519)),
    "imagenetr": Source(_class_folders, (200, 24_000, 6_000)),
    "omnibenchmark": Source(_class_folders, (300, 89_697, 5_985)),
    "vtab": Source(_class_folders, (50, 1_796, 8_619)),
    "objectnet": Source(_class_folders, (200, 26_509, 6_628)),
    "imagefolder": Source(_class_folders),
    "digits": Source(_digits),
}
