"""Folders of images: walked in one way, whatever they are for."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.config import Config
from utils.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


LAYOUT = "expected <folder>/train/<class>/<images> and <folder>/test/<class>/<images> (val/ is accepted for test/)"


DOMAIN_LAYOUT = "expected <folder>/train/<domain>/<class>/<images> and the same domains and classes below test/"


def data_folder(config: Config) -> Path:
    """``data_path``, else ``$TOSCA_DATA/<dataset>``; for CIFAR-100, which is downloaded, else ``data/``."""
    if config.data_path is not None:
        return Path(config.data_path).expanduser()
    if root := os.environ.get("TOSCA_DATA"):
        return Path(root).expanduser() / config.dataset
    if config.dataset == "cifar224":
        return Path("data")
    raise DataError(
        f"dataset {config.dataset!r} needs its folder: set data_path=<folder>, or the environment variable TOSCA_DATA "
        f"to the folder that holds {config.dataset}/; {LAYOUT}"
    )


def split_folders(root: Path) -> tuple[Path, Path]:
    """``<root>/train`` and ``<root>/test`` (or ``val``).

    Raises:
        DataError: one of them does not exist.
    """
    if not root.is_dir():
        raise DataError(f"data folder {str(root)!r} does not exist; {LAYOUT}")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(f"{str(folder)!r} does not exist; {LAYOUT}")
    return train, test


def subfolders(root: Path) -> list[str]:
    """Names of the folders directly below, sorted, without hidden ones."""
    try:
        return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror}); {LAYOUT}") from None


def _list_classes(root: Path) -> dict[str, list[str]]:
    """Class -> its image files, sorted, relative to ``root``; hidden files are skipped, subfolders are searched."""
    classes = {name: list_images(root, name) for name in subfolders(root)}
    if not classes:
        raise DataError(f"{root} holds no class folders; {LAYOUT}")
    if empty := [name for name, files in classes.items() if not files]:
        raise DataError(
            f"class {empty[0]!r} in {root} holds no image; remove the folder or add images ({', '.join(SUFFIXES)})"
        )
    return classes


def list_images(root: Path, name: str) -> list[str]:
    """Image files below ``<root>/<name>``, relative to ``root``, sorted; hidden files are skipped."""
    files, pending, visited = [], [name], set()
    while pending:
        folder = pending.pop()
        try:
            identity = os.stat(root / folder)
            if (identity.st_dev, identity.st_ino) in visited:  # a symbolic link that leads back here
                continue
            visited.add((identity.st_dev, identity.st_ino))
            for entry in os.scandir(root / folder):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(f"{folder}/{entry.name}")
                elif entry.name.lower().endswith(SUFFIXES):
                    if not entry.is_file():  # reading a pipe would never end
                        raise DataError(f"{entry.path} is not a file (a broken link, or a device); remove it")
                    files.append(f"{folder}/{entry.name}")
        except OSError as error:
            raise DataError(
                f"{error.filename or root / folder} cannot be read ({error.strerror}); mend or remove it"
            ) from None
    return sorted(files)


def _check_same_classes(
    train: dict[str, Any], test: dict[str, Any], train_root: Path, test_root: Path, *, continues: bool = False
) -> None:
    extra = sorted(set(test) - set(train))
    if extra and not continues:
        raise DataError(f"class {extra[0]!r} is in {test_root} but not in {train_root}; {LAYOUT}")
    if lacking := sorted(set(train) - set(test)):
        raise DataError(f"class {lacking[0]!r} is in {train_root} but not in {test_root}; {LAYOUT}")


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as they are given, and all images below folders, sorted within each folder; hidden ones are skipped.

    Nothing is collected: a folder's names are in memory while it is walked, no more.
    """
    for path in paths:
        if path.is_dir():
            yield from _below(path, set())
        else:
            yield path


def _below(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        identity = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror})") from None
    here = (identity.st_dev, identity.st_ino)
    if here in above:  # a symbolic link that leads back
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(folder / entry.name, above | {here})
        elif entry.name.lower().endswith(SUFFIXES):
            yield folder / entry.name
