"""Is the data what it should be? Every image decoded once; nothing is written and nothing heavy is imported."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config.config import Config
from utils.data.datasets import DATASETS, data_folder, list_class_folders, load_dataset
from utils.data.folders import Listing, list_folders
from utils.data.images import UnreadableImage, decode, kind_sentences, kinds_of_file
from utils.data.loader import load_ahead
from utils.data.splits import MAX_PIXELS
from utils.hardware import available_cpus
from utils.logs import progress
from utils.words import counted

SHOWN = 10  # findings of one kind in the summary; the JSON has all


@dataclass(frozen=True)
class Scanned:
    """One image.

    Attributes:
        place: its file, or where there is none, its name.
        content: the SHA-256 of its pixels.
        kinds: which kinds of picture it is of that 8-bit RGB does not hold in full.
    """

    split: str
    label: str
    place: str
    content: str = ""
    size: tuple[int, int] = (0, 0)
    kinds: tuple[str, ...] = ()
    error: str = ""


def check_data(config: Config) -> dict[str, Any]:
    """Scan the data that ``config`` names; ``problems`` make it not ``good``, ``warnings`` do not. JSON-ready.

    In domain data a class is ``<domain>/<class>``. ``unused`` is what lies in the folders and is no image of a class.
    """
    source, problems, warnings = DATASETS[config.dataset], defaultdict[str, list[str]](list), list[str]()
    counts: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    unused: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    if source.list_images is list_class_folders:
        listing = list_folders(data_folder(config), config)
        problems["folders"] += listing.problems
        warnings += listing.notes
        counts = {split: dict.fromkeys(map(_label, found), 0) for split, found in listing.files.items()}
        unused = {split: dict(sorted(found.items())) for split, found in listing.unused.items()}
        images = _in_folders(listing, config.max_pixels or MAX_PIXELS)
    else:
        images = _in_memory(config)
    sizes, kinds, same = Counter[tuple[int, int]](), Counter[str](), defaultdict[str, list[Scanned]](list)
    for image in images:
        counts[image.split][image.label] = counts[image.split].get(image.label, 0) + 1
        kinds.update(image.kinds)
        if image.error:
            problems["unreadable"].append(f"{image.place}: {image.error}")
        else:
            sizes[image.size] += 1
            same[image.content].append(image)
    for copies in same.values():
        if len(copies) > 1:
            problems[_kind_of_copies(copies)].append(" = ".join(image.place for image in copies))
    totals = {split: sum(of_class.values()) for split, of_class in counts.items()}
    if warning := source.other_counts(config, len(counts["train"]), totals["train"], totals["test"]):
        warnings.append(warning)
    if small := sum(number for size, number in sizes.items() if min(size) < config.image_size):
        warnings.append(f"smaller than image_size {config.image_size}, so enlarged: {counted(small, 'image')}")
    return {
        "dataset": config.dataset,
        "good": not any(problems.values()),
        "classes": {split: len(of_class) for split, of_class in counts.items()},
        "images": totals,
        "images_by_class": counts,
        "sizes": [{"width": w, "height": h, "images": number} for (w, h), number in sorted(sizes.items())],
        "kinds": dict(kinds),
        "unused": unused,
        "problems": {kind: found for kind, found in problems.items() if found},
        "warnings": warnings + kind_sentences(kinds.elements()),
    }


def _in_folders(listing: Listing, max_pixels: int) -> Iterator[Scanned]:
    images = [
        Scanned(split, _label(group), str(listing.roots[split] / file))
        for split, found in listing.files.items()
        for group, files in found.items()
        for file in files
    ]
    workers = available_cpus()  # decoding and hashing hold no lock: threads serve
    scanned = load_ahead(partial(scan, max_pixels=max_pixels), images, workers=workers, ahead=4 * workers)
    for _, image in progress(scanned, total=len(images), desc="Images", unit="img"):
        yield image


def _label(group: tuple[str, str]) -> str:
    return "/".join(filter(None, group))


def scan(image: Scanned, max_pixels: int = MAX_PIXELS) -> Scanned:
    """Decode one file."""
    path = Path(image.place)
    try:
        return _with_pixels(replace(image, kinds=tuple(kinds_of_file(path) or ())), decode(path, max_pixels))
    except UnreadableImage as error:
        return replace(image, error=str(error))


def _in_memory(config: Config) -> Iterator[Scanned]:
    """Every image of a data set that is no folder of images."""
    data = load_dataset(config)
    for name in ("train", "test"):
        split = data.split(name)
        for index, label in enumerate(split.labels.tolist()):
            image = Scanned(name, data.class_names[label], f"{name} image {split.keys[index]}")
            yield _with_pixels(image, split.load(index))


def _with_pixels(image: Scanned, pixels: Image.Image) -> Scanned:
    content = hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()
    return replace(image, content=content, size=pixels.size)


def _kind_of_copies(copies: Iterable[Scanned]) -> str:
    """Images of equal pixels: in both splits they spoil the test; in one they are counted twice."""
    if len({image.split for image in copies}) == 2:
        return "in both train and test"
    return "duplicates" if len({image.label for image in copies}) == 1 else "duplicates under different classes"


def summary(facts: dict[str, Any]) -> list[str]:
    """What ``check_data`` found, for people."""
    lines = [facts["dataset"]]
    for split in ("train", "test"):
        images, classes = counted(facts["images"][split], "image"), counted(facts["classes"][split], "class")
        lines.append(f"  {split:5}  {images} of {classes}")
        if of_class := facts["images_by_class"][split]:
            small, large = (
                f"{(name := choose(of_class, key=of_class.get))} ({of_class[name]})" for choose in (min, max)
            )
            lines[-1] += f"; smallest {small}, largest {large}"
    if sizes := sorted(facts["sizes"], key=lambda size: size["width"] * size["height"]):
        words = [f"{size['width']}×{size['height']}" for size in sizes]
        most, often = max((size["images"], word) for size, word in zip(sizes, words, strict=True))
        several = f"{words[0]} to {words[-1]}; most often {often} ({most})"
        lines.append(f"  sizes  {several if len(words) > 1 else f'all {often}'}")
    for kind, found in facts["problems"].items():
        lines.append(f"problem: {kind} ({len(found)})")
        lines += [f"  {sentence}" for sentence in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"  … and {len(found) - SHOWN} more (--json has all)")
    lines += [f"warning: {sentence}" for sentence in facts["warnings"]]
    number = sum(map(len, facts["problems"].values()))
    return [*lines, counted(number, "problem") if number else "no problem found"]
