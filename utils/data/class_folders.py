"""A data set in folders: ``train/<class>/`` and ``test/<class>/``, or with a level of domains above the classes."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from utils.data.folders import (
    DOMAIN_LAYOUT,
    LAYOUT,
    Unused,
    both_test_folders,
    count_stray_files,
    list_images,
    split_folders,
    subfolders,
)
from utils.data.names import by_normal_name, spelled_as
from utils.data.splits import Dataset, ImageFiles
from utils.errors import DataError

log = logging.getLogger(__name__)

Listed = dict[str, list[str]]  # class -> its image files, relative to the split's folder, sorted


def image_folder(name: str, root: Path, *, continues: bool, max_pixels: int) -> Dataset:
    """``continues``: the test split may hold classes that a saved run has learned; they are counted last.

    Raises:
        DataError: a folder, a class or an image that is missing where one must be; the expected layout is shown.
    """
    unused = {"train": Unused(), "test": Unused()}
    train_root, test_root = split_folders(root)
    train = _list_classes(train_root, "", unused["train"])
    test = _list_classes(test_root, "", unused["test"], train)
    _check_same_classes(train, test, train_root, test_root, continues=continues)
    classes = (*sorted(train), *sorted(test.keys() - train.keys()))
    _say_what_is_unused(root, unused)
    files = [_files(base, [found], classes, max_pixels) for base, found in ((train_root, train), (test_root, test))]
    return Dataset(name, files[0], files[1], classes)


def domain_folder(root: Path, *, continues: bool, max_pixels: int) -> Dataset:
    """``train/<domain>/<class>/``: the same label space seen in several domains (a domain may lack classes).

    ``continues``: the test split may hold domains that a saved run has learned; they are counted last.
    """
    unused = {"train": Unused(), "test": Unused()}
    train_root, test_root = split_folders(root)
    of_train, of_test = _domains(train_root, test_root, continues=continues)
    listed: dict[str, list[Listed]] = {"train": [], "test": []}
    known: Listed = {}  # the classes so far: in all domains they are spelled as in the first
    for domain in of_test:
        train = _list_classes(train_root, of_train[domain], unused["train"], known) if domain in of_train else {}
        known |= train
        test = _list_classes(test_root, of_test[domain], unused["test"], known)
        if domain in of_train:
            folders = (train_root / of_train[domain], test_root / of_test[domain])
            _check_same_classes(train, test, *folders)
        listed["train"].append(train)
        listed["test"].append(test)
    classes = tuple(sorted({name for split in listed.values() for found in split for name in found}))
    _say_what_is_unused(root, unused)
    splits = [_files(base, listed[s], classes, max_pixels) for s, base in (("train", train_root), ("test", test_root))]
    counts = [[sum(map(len, found.values())) for found in listed[split]] for split in ("train", "test")]
    domains = [np.repeat(np.arange(len(count)), count) for count in counts]
    return Dataset("imagefolder", splits[0], splits[1], classes, tuple(of_test), domains[0], domains[1])


def _domains(train_root: Path, test_root: Path, *, continues: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Domain -> its folder, below train and below test; what only test has comes last."""
    train = by_normal_name(subfolders(train_root), str(train_root))
    if not train:
        raise DataError(f"{train_root} holds no domain folders; {DOMAIN_LAYOUT}")
    found = by_normal_name(subfolders(test_root), str(test_root))
    spelled = spelled_as(found, train, "domain", str(test_root))
    test = {spelled[name]: folder for name, folder in found.items()}
    if lacking := [name for name in train if name not in test]:
        raise DataError(f"{test_root} lacks the domain {lacking[0]!r} that {train_root} has; {DOMAIN_LAYOUT}")
    extra = sorted(test.keys() - train.keys())
    if extra and not continues:
        raise DataError(f"{test_root} has the domain {extra[0]!r} that {train_root} lacks; {DOMAIN_LAYOUT}")
    return train, {name: test[name] for name in [*train, *extra]}


def class_folders(root: Path, known: Collection[str] = ()) -> dict[str, str]:
    """Class -> its folder below ``root``. Names that look the same are one, spelled as in ``known``."""
    found = by_normal_name(subfolders(root), str(root))
    spelled = spelled_as(found, known, "class", str(root))
    return {spelled[name]: folder for name, folder in found.items()}


def _list_classes(split_root: Path, domain: str, unused: Unused, known: Listed | None = None) -> Listed:
    """The images of every class below ``<split_root>/<domain>``."""
    root = split_root / domain
    folders = class_folders(root, known or {})
    if not folders:
        raise DataError(f"{root} holds no class folders; {LAYOUT}")
    count_stray_files(root, unused)
    classes = {}
    for name, folder in folders.items():
        before = unused.counts.copy()
        classes[name] = list_images(split_root, f"{domain}/{folder}" if domain else folder, unused)
        if not classes[name]:
            found = Unused(unused.counts - before).sentence()
            raise DataError(
                f"class {name!r} in {root} holds no image{found and f' (but {found})'}; remove the folder or add "
                "images (such as .jpg or .png)"
            )
    return classes


def _check_same_classes(
    train: Listed, test: Listed, train_root: Path, test_root: Path, *, continues: bool = False
) -> None:
    extra = sorted(set(test) - set(train))
    if extra and not continues:
        raise DataError(f"class {extra[0]!r} is in {test_root} but not in {train_root}; {LAYOUT}")
    if lacking := sorted(set(train) - set(test)):
        raise DataError(f"class {lacking[0]!r} is in {train_root} but not in {test_root}; {LAYOUT}")


def _files(root: Path, domains: Sequence[Listed], classes: Sequence[str], max_pixels: int) -> ImageFiles:
    """The images by domain, then by class, then in sorted order."""
    files = [file for found in domains for name in classes for file in found.get(name, ())]
    labels = [label for found in domains for label, name in enumerate(classes) for _ in found.get(name, ())]
    return ImageFiles(root, files, labels, max_pixels)


def _say_what_is_unused(root: Path, unused: dict[str, Unused]) -> None:
    if both := both_test_folders(root):
        log.info("Data: %s", both)
    for split, found in unused.items():
        if sentence := found.sentence():
            log.info("Data: not used of the %s split: %s", split, sentence)
