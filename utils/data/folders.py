"""Images in folders: ``train/<class>/`` and ``test/<class>/``, or with a level of domains above the classes.

One walk finds them for a run, for the data check and for predictions.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from textwrap import shorten

import numpy as np

from utils.config.config import Config
from utils.data.images import ImageFiles, image_suffixes, kinds_of_file
from utils.data.splits import LAYOUT, MAX_PIXELS, Dataset, normal_name
from utils.errors import DataError

log = logging.getLogger(__name__)

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


class Unused(Counter[str]):
    """What a walk found and does not use, counted: by suffix, in words."""

    def add(self, name: str, note: str = "") -> None:
        """Count the file ``name``; ``note`` says what is special about it."""
        self[f"{_suffix(name) or 'without suffix'}{note and ' '}{note}"] += 1

    def sentence(self) -> str:
        """Such as ``3 .txt, 1 without suffix``; empty if all was used."""
        return ", ".join(f"{count} {what}" for what, count in sorted(self.items()))


# -- walking ----------------------------------------------------------------------------------------------------------


class Walk:
    """One look at folders that enters none twice, wherever links lead.

    Attributes:
        unused: what was found and is no image of it.
    """

    def __init__(self, unused: Unused) -> None:
        self.unused = unused
        self._entered: set[tuple[int, int]] = set()

    def enter(self, folder: Path) -> bool:
        """Whether ``folder`` was not entered before; from now on it was."""
        with _named(folder):
            found = os.stat(folder)
        new = (found.st_dev, found.st_ino) not in self._entered
        self._entered.add((found.st_dev, found.st_ino))
        if not new:
            self.unused["folder(s) that a link leads to again"] += 1
        return new

    def entries(self, folder: Path) -> dict[str, bool]:
        """What lies directly in ``folder``, sorted: name -> whether it is a folder.

        What belongs to the machine is left out; its folders are counted if there are images in them.
        """
        entries: dict[str, bool] = {}
        with _named(folder), os.scandir(folder) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
                if not _is_of_system(entry.name):
                    entries[entry.name] = entry.is_dir()
                elif entry.is_dir() and _holds_image(entry.path):
                    self.unused[f"folder(s) named {entry.name!r}, which hold images"] += 1
        return entries

    def subfolders(self, root: Path) -> list[str]:
        """Names of the folders directly below; files there belong to no class and are counted."""
        entries = self.entries(root)
        for name, is_folder in entries.items():
            if not is_folder:
                self.unused.add(name, "beside the folders")
        return [name for name, is_folder in entries.items() if is_folder]

    def images(self, root: Path, below: str = "") -> Iterator[str]:
        """All images below ``<root>/<below>``, relative to ``root``, sorted within each folder.

        An image has a suffix that Pillow decodes, in any letter case; a file without suffix is looked into. What is
        named like an image but is no file is among them; reading refuses it.
        """
        for entry, is_folder in self.entries(root / below).items():
            name, suffix = f"{below}/{entry}" if below else entry, _suffix(entry)
            if is_folder:
                if self.enter(root / name):
                    yield from self.images(root, name)
            elif suffix in image_suffixes() or (not suffix and kinds_of_file(root / name) is not None):
                yield name
            else:
                self.unused.add(entry)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Within, the file system is asked about ``folder``; its refusal names what it refuses."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read ({error.strerror}); correct or remove it") from None


def _is_of_system(name: str) -> bool:
    """Whether a file or folder belongs to the machine, not to the data."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _holds_image(folder: str) -> bool:
    """Stop at the first image: a network disk's ``.snapshot`` holds all data many times over."""
    return any(_suffix(name) in image_suffixes() for _, _, names in os.walk(folder) for name in names)


def _suffix(name: str) -> str:
    return PurePath(name.strip()).suffix.lower()


def find_images(paths: Iterable[Path], unused: Unused | None = None) -> Iterator[Path]:
    """Files as they are given, and all images below folders; a folder's names are in memory while it is walked."""
    for path in paths:
        if os.path.isdir(path):  # Path.is_dir raises where a folder above may not be searched
            walk = Walk(Unused() if unused is None else unused)
            walk.enter(path)
            yield from (path / name for name in walk.images(path))
        else:
            yield path


# -- what a data folder holds -----------------------------------------------------------------------------------------


@dataclass
class Listing:
    """What a data folder holds, whether or not a run can use it.

    Attributes:
        roots: the folder of each split.
        files: split -> (domain, class) -> image files, relative to the split's folder, sorted; the domain may be "".
        problems: why no run can use it, one sentence each; what to do, where that is not the layout, behind ``; ``.
        notes: what else a user should know.
    """

    roots: dict[str, Path]
    files: dict[str, dict[tuple[str, str], list[str]]] = field(default_factory=lambda: {"train": {}, "test": {}})
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unused: dict[str, Unused] = field(default_factory=lambda: {"train": Unused(), "test": Unused()})


def list_folders(root: Path, config: Config) -> Listing:
    """Every image below ``root``, and whatever is wrong with the folders."""
    with _named(root):
        listing = Listing(_split_folders(root))
    if (root / "test").is_dir() and (root / "val").is_dir():
        listing.notes.append(f"{root} has test/ and val/: test/ is used, val/ is not")
    for split in listing.roots:
        _list_split(listing, split, root, domains=config.scenario == "domain")
    _compare_splits(listing, continues=config.continue_from is not None)
    for split, unused in listing.unused.items():
        if sentence := unused.sentence():
            listing.notes.append(f"not used of the {split} split: {sentence}")
    return listing


def load_folders(root: Path, config: Config) -> Dataset:
    """The images below ``root`` as a data set; the first problem ends it.

    Classes and domains that the test split alone has, as a continued run may, are counted last.
    """
    listing, by_domain = list_folders(root, config), config.scenario == "domain"
    for problem in listing.problems:
        raise DataError(problem if "; " in problem else f"{problem}; {DOMAIN_LAYOUT if by_domain else LAYOUT}")
    for note in listing.notes:
        log.info("Data: %s", note)
    in_train, in_test = listing.files["train"], listing.files["test"]
    classes = _numbered([*sorted(name for _, name in in_train), *sorted(name for _, name in in_test)])
    domains = _numbered([domain for domain, _ in (*in_train, *in_test)])
    splits = []
    for split, found in listing.files.items():
        rows = sorted(
            (domains[domain], classes[name], file) for (domain, name), files in found.items() for file in files
        )
        of_domain, labels, keys = zip(*rows, strict=True)
        images = ImageFiles(listing.roots[split], keys, labels, config.max_pixels or MAX_PIXELS)
        splits.append((images, np.array(of_domain)))
    (train, train_domains), (test, test_domains) = splits
    if not by_domain:
        return Dataset(config.dataset, train, test, tuple(classes))
    return Dataset(config.dataset, train, test, tuple(classes), tuple(domains), train_domains, test_domains)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Each name once, with its number."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _split_folders(root: Path) -> dict[str, Path]:
    """``<root>/train`` and ``<root>/test`` (or ``val``); where one does not exist, the error says what there is."""
    if not root.is_dir():
        raise DataError(f"data folder {str(root)!r} does not exist; {LAYOUT}")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for folder in (root / "train", test):
        if not folder.is_dir():
            names = ", ".join(Walk(Unused()).entries(root)) or "nothing there"
            found = shorten(names, 100, placeholder=" …")
            raise DataError(f"{str(folder)!r} does not exist; found {found}; {LAYOUT}")
    return {"train": root / "train", "test": test}


def _list_split(listing: Listing, split: str, root: Path, *, domains: bool) -> None:
    split_root, unused, files = listing.roots[split], listing.unused[split], listing.files[split]
    walk = Walk(unused)
    try:
        walk.enter(root)  # a link back to what lies above the classes brings no images
        walk.enter(split_root)
        above = _folders(walk, split_root, "domain") if domains else {"": ""}
        folders: dict[tuple[str, str], str] = {}
        for domain, below in above.items():
            for name, folder in _folders(walk, split_root / below, "class").items():
                folders[domain, name] = f"{below}/{folder}" if below else folder
        # all are entered before the first is walked: a link from one class to another never takes that one's images
        entered = {group: walk.enter(split_root / folder) for group, folder in folders.items()}
    except DataError as error:
        listing.problems.append(str(error))
        return
    for group, folder in folders.items():
        before, files[group] = unused.copy(), []
        try:
            files[group] += sorted(walk.images(split_root, folder)) if entered[group] else []
        except DataError as error:
            listing.problems.append(str(error))
            continue
        if not files[group]:
            found = Unused(unused - before).sentence() if entered[group] else "links to another class"
            listing.problems.append(
                f"class {group[1]!r} in {(split_root / folder).parent} holds no image{found and f' (but {found})'}; "
                "remove the folder or add images (such as .jpg or .png)"
            )


def _folders(walk: Walk, folder: Path, what: str) -> dict[str, str]:
    """Name -> its folder directly below; no two names may look the same."""
    found: dict[str, str] = {}
    for name in walk.subfolders(folder):
        if (other := found.setdefault(normal_name(name), name)) != name:
            raise DataError(
                f"{folder} has {other!a} and {name!a}, which look the same; rename one, or put together what is in them"
            )
    if not found:
        raise DataError(f"{folder} holds no {what} folders")
    return found


def _compare_splits(listing: Listing, *, continues: bool) -> None:
    """Both splits have the same classes; on top of a saved run the test split may have those that it has learned."""
    for one, other in (("test", "train"), ("train", "test")):
        domains = {domain for domain, _ in listing.files[other]}
        lacking: dict[str, None] = {}
        for domain, name in listing.files[one].keys() - listing.files[other].keys():
            if not (continues and one == "test" and (not domain or domain not in domains)):
                of = f" of domain {domain!r}" if domain else ""
                lacking[f"class {name!r}{of}" if domain in domains else f"domain {domain!r}"] = None
        if domains:  # else that split is a problem of its own
            where = f"is in {listing.roots[one]} but not in {listing.roots[other]}"
            listing.problems += [f"{what} {where}" for what in sorted(lacking)]
