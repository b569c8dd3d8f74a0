"""What a data set is: images by split and class, their content hashes, and the two transforms of the release."""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.config import Config
from utils.errors import DataError
from utils.progress import progress

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# (classes, train images, test images) of the splits that LAMDA-PILOT publishes; others circulate
EXPECTED_COUNTS = {
    "cifar224": (100, 50_000, 10_000),
    "cub": (200, 9_430, 2_358),
    "imageneta": (200, 5_981, 1_519),
    "imagenetr": (200, 24_000, 6_000),
    "omnibenchmark": (300, 89_697, 5_985),
    "vtab": (50, 1_796, 8_619),
    "objectnet": (200, 26_509, 6_628),
}
LAYOUT = "expected <folder>/train/<class>/<images> and <folder>/test/<class>/<images> (val/ is accepted for test/)"
DOMAIN_LAYOUT = "expected <folder>/train/<domain>/<class>/<images> and the same domains and classes below test/"
_MEND = "replace or remove what is named, then start again: what is done stays"
DIGITS = Path(__file__).resolve().parent.parent / "assets" / "digits.npz"


class Split:
    """The images of one split in a fixed order.

    Attributes:
        keys: what names each image within the split, for messages and for the random numbers of its views.
        labels: ``(images,)`` int64, the class of each image as its place in ``Dataset.class_names``.
    """

    keys: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """The image in RGB.

        Raises:
            DataError: it cannot be read; file and class are named.
        """
        raise NotImplementedError


class ImageFiles(Split):
    """Image files below ``<root>/<class>/``, classes and files in sorted order.

    Args:
        root: the split's folder.
        files: paths relative to ``root``, beginning with the class.
        labels: the class of each file.
    """

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int]) -> None:
        self.root, self.keys, self.labels = root, tuple(files), np.asarray(labels, dtype=np.int64)

    def path(self, index: int) -> Path:
        return self.root / self.keys[index]

    def load(self, index: int) -> Image.Image:
        path = self.path(index)
        try:
            return decode(path)
        except UnreadableImage as error:
            folder = Path(self.keys[index]).parent.as_posix()
            raise DataError(f"{path} (class {folder!r}) is not a readable image ({error}); {_MEND}") from None


class ImageArray(Split):
    """Images held in memory: ``pixels`` is uint8 ``(images, height, width[, 3])``."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, np.asarray(labels, dtype=np.int64)
        self.keys = tuple(f"{index:06d}" for index in range(len(pixels)))

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def content_hashes(self) -> list[str]:
        """The SHA-256 of every image's pixels, in order."""
        return [hashlib.sha256(np.ascontiguousarray(image)).hexdigest() for image in self.pixels]


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


def read_image(path: Path) -> Image.Image:
    """A file as PIL's ``convert("RGB")`` makes it: EXIF rotation is not applied, 16-bit grey is clipped."""
    with Image.open(path) as image:
        return image.convert("RGB")


class UnreadableImage(DataError):
    """Why a file is no image, in a few words; the caller names the file."""


def decode(path: Path) -> Image.Image:
    """``read_image``; whatever a damaged file makes a decoder trip over is one kind of error.

    Raises:
        UnreadableImage: the file is missing or no image.
    """
    try:
        return read_image(path)
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def check_images(data: Dataset, *, threads: int) -> None:
    """Decode every image once, some at a time (decoders release the interpreter's lock).

    Raises:
        DataError: some cannot be read; the first ten are named with their class.
    """
    places = [(split, index) for split in (data.train, data.test) for index in range(len(split))]
    faults: list[str] = []
    bar = progress(total=len(places), desc="Checking images", unit="img")
    with bar, ThreadPoolExecutor(max_workers=threads) as pool:
        for start in range(0, len(places), 256):  # in blocks, so that Ctrl-C has little to wait for
            block = places[start : start + 256]
            faults += [fault for fault in pool.map(_fault_of, block) if fault is not None]
            bar.update(len(block))
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        count = f"{len(faults)} of {len(places)} images cannot be read: " if len(faults) > 1 else ""
        raise DataError(f"{count}{'; '.join(faults[:10])}{more}; {_MEND}")


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fault_of(place: tuple[Split, int]) -> str | None:
    split, index = place
    try:
        split.load(index)
    except DataError as error:
        return str(error).removesuffix(f"; {_MEND}")
    return None


def load_dataset(config: Config) -> Dataset:
    """The data that ``config`` names. Files are listed, not yet decoded.

    Raises:
        DataError: a folder, a class or an image that is missing where one must be; the expected layout is shown.
    """
    if config.dataset == "digits":
        data = _digits()
    elif config.dataset == "cifar224":
        data = _cifar100(data_folder(config))
    elif config.scenario == "domain":
        data = _domain_folder(data_folder(config), continues=config.continue_from is not None)
    else:
        data = _image_folder(config.dataset, data_folder(config), continues=config.continue_from is not None)
    if config.continue_from is None:
        _warn_about_counts(data)
    return data


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


def _files(root: Path, found: dict[str, list[str]], classes: Sequence[str]) -> ImageFiles:
    files = [file for name in classes for file in found.get(name, ())]
    labels = [label for label, name in enumerate(classes) for _ in found.get(name, ())]
    return ImageFiles(root, files, labels)


def _cifar100(root: Path) -> Dataset:
    from torchvision.datasets import CIFAR100

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


def _digits() -> Dataset:
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


def _warn_about_counts(data: Dataset) -> None:
    expected = EXPECTED_COUNTS.get(data.name)
    found = (len(data.class_names), len(data.train), len(data.test))
    if expected and found != expected:
        log.warning(
            "%s has %d classes, %d train and %d test images; the split that LAMDA-PILOT publishes has %d, %d and %d: "
            "numbers will not be comparable with published ones",
            data.name,
            *found,
            *expected,
        )


# -- transforms ---------------------------------------------------------------------------------------------------


class Transforms:
    """The release's two transforms, PIL image -> uint8 ``(3, size, size)``; no mean/std normalisation.

    Args:
        size: side of the square that the backbone sees.
        augment_seed: where the views' random numbers come from.
    """

    def __init__(self, size: int, augment_seed: int) -> None:
        from torchvision import transforms as T
        from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

        self.augment_seed = augment_seed
        self.test = T.Compose(
            [T.Resize(int(256 / 224 * size), InterpolationMode.BICUBIC), T.CenterCrop(size), pil_to_tensor]
        )
        self.train = T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3)),
                T.RandomHorizontalFlip(0.5),
                pil_to_tensor,
            ]
        )

    def view(self, image: Image.Image, key: str, view: int) -> Any:
        """View ``view`` of the image named ``key``: its random numbers depend on seed, view and key alone."""
        import torch

        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(derive_seed("view", self.augment_seed, view, key))
            return self.train(image)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: independent random streams for (purpose, seed, task, epoch …)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
