"""Is the data what it should be? Every image decoded once; nothing is written and nothing heavy is imported."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config.config import Config
from utils.data.datasets import DATASETS, data_folder, list_class_folders, load_dataset
from utils.data.folders import Listing, list_folders
from utils.data.images import MAX_PIXELS, UnreadableImage, decode, kind_sentences, kinds_of_file
from utils.data.loader import load_ahead
from utils.hardware import available_cpus
from utils.logs import progress
from utils.words import counted

PROCESSES_FROM = 1000  # images; below, starting processes takes longer than the scan
BLOCK = 16  # images that a process is given at a time
SHOWN = 10  # findings of one kind in the summary; the JSON has all


@dataclass(frozen=True)
class Scanned:
    """One image, not decoded yet while there is neither ``content`` nor ``error``.

    Attributes:
        place: its file, or where there is none, its name.
        content: the SHA-256 of its pixels.
        kinds: which kinds of picture it is of that 8-bit RGB does not hold in full.
    """

    split: str
    label: str
    place: str
    max_pixels: int = MAX_PIXELS
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
        unused = {split: dict(sorted(found.counts.items())) for split, found in listing.unused.items()}
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
        "smallest_class": {split: _extreme(min, of_class) for split, of_class in counts.items()},
        "largest_class": {split: _extreme(max, of_class) for split, of_class in counts.items()},
        "sizes": [{"width": w, "height": h, "images": number} for (w, h), number in sorted(sizes.items())],
        "kinds": dict(kinds),
        "unused": unused,
        "problems": {kind: found for kind, found in problems.items() if found},
        "warnings": warnings + kind_sentences(kinds.elements()),
    }


def _in_folders(listing: Listing, max_pixels: int) -> Iterator[Scanned]:
    images = [
        Scanned(split, _label(group), str(listing.roots[split] / file), max_pixels)
        for split, found in listing.files.items()
        for group, files in found.items()
        for file in files
    ]
    blocks = [images[start : start + BLOCK] for start in range(0, len(images), BLOCK)]
    workers = available_cpus() if len(images) >= PROCESSES_FROM else 1
    scanned = load_ahead(
        scan_block,
        blocks,
        workers=workers,
        ahead=4 * workers,
        processes=workers > 1,
        name=lambda block: block[0].place,
    )
    each = (image for _, block in scanned for image in block)
    yield from progress(each, total=len(images), desc="Images", unit="img")


def _label(group: tuple[str, str]) -> str:
    return "/".join(filter(None, group))


def scan_block(images: list[Scanned]) -> list[Scanned]:
    return [scan(image) for image in images]


def scan(image: Scanned) -> Scanned:
    """Decode one file."""
    path = Path(image.place)
    try:
        return _with_pixels(replace(image, kinds=tuple(kinds_of_file(path) or ())), decode(path, image.max_pixels))
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


def _extreme(choose: Any, of_class: dict[str, int]) -> dict[str, Any] | None:
    return {"class": (name := choose(of_class, key=of_class.get)), "images": of_class[name]} if of_class else None


def summary(facts: dict[str, Any]) -> list[str]:
    """What ``check_data`` found, for people."""
    lines = [facts["dataset"]]
    for split in ("train", "test"):
        images, classes = counted(facts["images"][split], "image"), counted(facts["classes"][split], "class")
        lines.append(f"  {split:5}  {images} of {classes}")
        if small := facts["smallest_class"][split]:
            large = facts["largest_class"][split]
            lines[-1] += (
                f"; smallest {small['class']} ({small['images']}), largest {large['class']} ({large['images']})"
            )
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
