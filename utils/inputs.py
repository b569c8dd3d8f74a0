"""Image files named by a user: found one after another, loaded a little ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from utils.data import SUFFIXES, UnreadableImage, available_cpus, decode
from utils.errors import DataError

Loaded = TypeVar("Loaded")


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


def open_image(path: Path) -> Image.Image:
    """The file as an RGB image.

    Raises:
        DataError: it is missing, or not an image that can be read.
    """
    try:
        return decode(path)
    except UnreadableImage as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"{path} does not exist") from None
        raise DataError(f"{path} is not a readable image ({error})") from None


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

    waiting: deque = deque()
    with ThreadPoolExecutor(max_workers=available_cpus()) as pool:
        for path in paths:
            waiting.append((path, pool.submit(attempt, path)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
