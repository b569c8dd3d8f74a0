"""Folders of images: walked in one way, whatever they are for."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from utils.config.config import Config
from utils.data.images import image_suffixes, is_image
from utils.errors import DataError
from utils.files import expanded

LAYOUT = "expected <folder>/train/<class>/<images> and <folder>/test/<class>/<images> (val/ is accepted for test/)"


DOMAIN_LAYOUT = "expected <folder>/train/<domain>/<class>/<images> and the same domains and classes below test/"

# What operating systems, archives and network disks leave in folders, in lower case; hidden names are passed over too
SYSTEM_NAMES = frozenset(
    [
        *["__macosx", "icon\r"],  # macOS
        *["thumbs.db", "ehthumbs.db", "desktop.ini"],  # Windows
        *["system volume information", "$recycle.bin", "recycler"],
        *["lost+found", "$trash"],  # Linux
        *["@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"],  # NAS boxes
    ]
)


@dataclass
class Unused:
    """What a walk found and does not use, counted: by suffix, in words."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, note: str = "") -> None:
        """Count the file ``name``; ``note`` says what is special about it."""
        self.counts[f"{_suffix(name) or 'without suffix'}{note and ' '}{note}"] += 1

    def sentence(self) -> str:
        """Such as ``3 .txt, 1 without suffix``; empty if all was used."""
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


# -- walking ----------------------------------------------------------------------------------------------------------


def is_system_name(name: str) -> bool:
    """Whether a file or folder belongs to the machine, not to the data."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def walk(folder: Path, unused: Unused) -> Iterator[tuple[str, bool]]:
    """All images below ``folder``, relative to it, sorted within each folder; each with whether it is a regular file.

    An image has a suffix that Pillow decodes, in any letter case; a file without suffix is looked into. A folder that
    links lead to twice is walked once.

    Raises:
        DataError: a folder cannot be read.
    """
    yield from _walk(folder, "", unused, set())


def _walk(root: Path, below: str, unused: Unused, visited: set[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    folder = root / below
    try:
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in visited:
            return
        visited.add((identity.st_dev, identity.st_ino))
        with os.scandir(folder) as found:
            entries = sorted((e.name, e.is_dir(), e) for e in found if not is_system_name(e.name))
        regular = {name: entry.is_file() for name, is_folder, entry in entries if not is_folder}
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read ({error.strerror}); correct or remove it") from None
    for name, is_folder, _ in entries:
        if is_folder:
            yield from _walk(root, f"{below}{name}/", unused, visited)
        elif _suffix(name) in image_suffixes() or (not _suffix(name) and regular[name] and is_image(folder / name)):
            yield f"{below}{name}", regular[name]
        else:
            unused.add(name)


def _suffix(name: str) -> str:
    return PurePath(name.strip()).suffix.lower()


def find_images(paths: Iterable[Path], unused: Unused | None = None) -> Iterator[Path]:
    """Files as they are given, and all images below folders, sorted within each folder.

    Nothing is collected: a folder's names are in memory while it is walked, no more. What is named like an image but
    is no file is among them; decoding refuses it.
    """
    for path in paths:
        if path.is_dir():
            yield from (path / name for name, _ in walk(path, unused or Unused()))
        else:
            yield path


def list_images(root: Path, name: str, unused: Unused) -> list[str]:
    """Image files below ``<root>/<name>``, relative to ``root``, sorted.

    Raises:
        DataError: something is named like an image but is no file.
    """
    files = []
    for file, regular in walk(root / name, unused):
        if not regular:  # reading a pipe would never end
            raise DataError(f"{root / name / file} is not a file (a broken link, a pipe or a device); remove it")
        files.append(f"{name}/{file}")
    return sorted(files)


# -- what a data folder holds -----------------------------------------------------------------------------------------


def data_folder(config: Config) -> Path:
    """``data_path``, else ``$TOSCA_DATA/<dataset>``; for CIFAR-100, which is downloaded, else ``data/``."""
    if config.data_path is not None:
        return Path(config.data_path).expanduser()
    if root := os.environ.get("TOSCA_DATA"):
        return expanded(root) / config.dataset
    if config.dataset == "cifar224":
        return Path("data")
    raise DataError(
        f"dataset {config.dataset!r} needs its folder: set data_path=<folder>, or the environment variable TOSCA_DATA "
        f"to the folder that holds {config.dataset}/; {LAYOUT}"
    )


def split_folders(root: Path) -> tuple[Path, Path]:
    """``<root>/train`` and ``<root>/test`` (or ``val``).

    Raises:
        DataError: one of them does not exist; what there is in its place is named.
    """
    if not root.is_dir():
        raise DataError(f"data folder {str(root)!r} does not exist; {LAYOUT}")
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(f"{str(folder)!r} does not exist; found {_entries(root)}; {LAYOUT}")
    return train, test


def both_test_folders(root: Path) -> str:
    """A sentence where ``test/`` stands beside ``val/``, else empty."""
    both = (root / "test").is_dir() and (root / "val").is_dir()
    return f"{root} has test/ and val/: test/ is used, val/ is not" if both else ""


def subfolders(root: Path) -> list[str]:
    """Names of the folders directly below, sorted, without hidden ones and those of the machine."""
    try:
        with os.scandir(root) as found:
            return sorted(e.name for e in found if e.is_dir() and not is_system_name(e.name))
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror}); {LAYOUT}") from None


def count_stray_files(root: Path, unused: Unused) -> None:
    """Count the files directly in ``root``, which belong to no class."""
    with os.scandir(root) as found:
        for entry in found:
            if not entry.is_dir() and not is_system_name(entry.name):
                unused.add(entry.name, "beside the folders")


def _entries(root: Path, shown: int = 8) -> str:
    """What a folder holds, in a few words."""
    names = sorted(name for name in os.listdir(root) if not is_system_name(name))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "nothing there"
