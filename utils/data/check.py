"""Is the data what it should be? Every image decoded once; nothing is written and nothing heavy is imported."""

import hashlib
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config.config import Config
from utils.data.class_folders import class_folders
from utils.data.datasets import DATASETS, list_class_folders, load_dataset
from utils.data.folders import (
    Unused,
    both_test_folders,
    count_stray_files,
    data_folder,
    list_images,
    split_folders,
)
from utils.data.images import MAX_PIXELS, decode, kinds_of_file
from utils.data.modes import UnreadableImage, kind_sentences
from utils.data.splits import Dataset, ImageFiles
from utils.errors import DataError
from utils.files import json_lines
from utils.hardware import available_cpus
from utils.logs import progress
from utils.words import counted

POOL_FROM = 1000  # images; below, starting processes takes longer than the scan
SHOWN = 10  # findings of one kind in the summary; the JSON has all


BLOCK = 1024  # images that are handed out at a time, so that Ctrl-C has little to wait for


@dataclass(frozen=True)
class Item:
    """One image file to be decoded."""

    split: str
    label: str
    path: Path
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Scanned:
    """One image: ``place`` is its file or number, ``content`` the SHA-256 of its pixels, None if unreadable."""

    split: str
    label: str
    place: str
    content: str | None
    size: tuple[int, int]
    error: str = ""
    kinds: tuple[str, ...] = ()


@dataclass
class Findings:
    """What the scan found. ``problems`` make the exit code 1; ``warnings`` do not.

    Attributes:
        images: for each split the number of images by class (in domain data by ``<domain>/<class>``).
        problems: kind -> one sentence each.
        sizes: ``(width, height)`` -> images.
        kinds: of pictures that 8-bit RGB does not hold in full -> images.
        unused: split -> what is in its folders and is no image of a class.
    """

    dataset: str
    images: dict[str, dict[str, int]] = field(default_factory=lambda: {"train": {}, "test": {}})
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    unused: dict[str, Unused] = field(default_factory=lambda: {"train": Unused(), "test": Unused()})

    @property
    def good(self) -> bool:
        return not any(self.problems.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "dataset": self.dataset,
            "good": self.good,
            "classes": {split: len(counts) for split, counts in self.images.items()},
            "images": {split: sum(counts.values()) for split, counts in self.images.items()},
            "images_by_class": self.images,
            "smallest_class": {split: _extreme(counts, min) for split, counts in self.images.items()},
            "largest_class": {split: _extreme(counts, max) for split, counts in self.images.items()},
            "sizes": [{"width": w, "height": h, "images": n} for (w, h), n in sorted(self.sizes.items())],
            "kinds": dict(self.kinds),
            "unused": {split: dict(sorted(unused.counts.items())) for split, unused in self.unused.items()},
            "problems": {kind: found for kind, found in self.problems.items() if found},
            "warnings": self.warnings,
        }


def check_data(config: Config, workers: int | None = None) -> Findings:
    """Scan the data that ``config`` names.

    Args:
        workers: processes; by default every CPU this process may use, and one for little data.

    Raises:
        DataError: there is no data where the config says.
    """
    findings = Findings(config.dataset)
    if DATASETS[config.dataset].list_images is list_class_folders:
        scanned = _scan_folders(config, findings, workers)
    else:
        scanned = _scan_listed(load_dataset(config))
    by_content: dict[str, list[Scanned]] = defaultdict(list)
    for image in scanned:
        counts = findings.images[image.split]
        counts[image.label] = counts.get(image.label, 0) + 1
        findings.kinds.update(image.kinds)
        if image.content is None:
            findings.problems["unreadable"].append(f"{image.place}: {image.error}")
        else:
            findings.sizes[image.size] += 1
            by_content[image.content].append(image)
    for same in by_content.values():
        _judge_copies(same, findings)
    _compare_counts(findings, config)
    _compare_sizes(findings, config)
    findings.warnings += kind_sentences(findings.kinds.elements())
    for split, unused in findings.unused.items():
        if sentence := unused.sentence():
            findings.warnings.append(f"not used of the {split} split: {sentence}")
    return findings


def _judge_copies(same: Sequence[Scanned], findings: Findings) -> None:
    """Images of equal pixels: in both splits they spoil the test; in one they are counted twice."""
    splits = {image.split for image in same}
    if len(splits) == 2:
        findings.problems["in both train and test"].append(" = ".join(image.place for image in same))
    elif len(same) > 1:
        labels = sorted({image.label for image in same})
        kind = "duplicates" if len(labels) == 1 else "duplicates under different classes"
        findings.problems[kind].append(" = ".join(image.place for image in same))


def _compare_counts(findings: Findings, config: Config) -> None:
    expected = DATASETS[config.dataset].expected
    train, test = (findings.images[split] for split in ("train", "test"))
    found = (len(train), sum(train.values()), sum(test.values()))
    if expected and found != expected and config.continue_from is None:
        findings.warnings.append(
            f"{found[0]} classes, {found[1]} train and {found[2]} test images; the split that LAMDA-PILOT publishes "
            f"has {expected[0]}, {expected[1]} and {expected[2]}: numbers will not be comparable with published ones"
        )


def _compare_sizes(findings: Findings, config: Config) -> None:
    small = sum(n for size, n in findings.sizes.items() if min(size) < config.image_size)
    if small:
        findings.warnings.append(f"smaller than image_size {config.image_size}, so enlarged: {counted(small, 'image')}")


# -- scanning ---------------------------------------------------------------------------------------------------------


def scan_all(items: Sequence[Item], pool: Executor | None) -> Iterator[Scanned]:
    """Decode every one of ``items``, in order, in the threads or processes of ``pool``; None: in this one."""
    if pool is None:
        yield from map(scan, items)
        return
    for start in range(0, len(items), BLOCK):
        yield from pool.map(scan, items[start : start + BLOCK], chunksize=32)


def scan(item: Item) -> Scanned:
    """Decode one file."""
    place = str(item.path)
    try:
        image = decode(item.path, item.max_pixels)
    except UnreadableImage as error:
        return Scanned(item.split, item.label, place, None, (0, 0), str(error))
    kinds = tuple(kinds_of_file(item.path))
    return Scanned(item.split, item.label, place, _content(image), image.size, kinds=kinds)


def _scan_folders(config: Config, findings: Findings, workers: int | None) -> list[Scanned]:
    """Every image below train/ and test/; what is wrong with the folders goes to ``findings``."""
    items: list[Item] = []
    known: dict[str, str] = {}
    root = data_folder(config)
    if both := both_test_folders(root):
        findings.warnings.append(both)
    for split, split_root in zip(("train", "test"), split_folders(root), strict=True):
        try:
            labels = (
                _domain_labels(split_root, known) if config.scenario == "domain" else class_folders(split_root, known)
            )
        except DataError as error:
            findings.problems["folders"].append(str(error))
            continue
        known = labels
        if not labels:
            findings.problems["folders"].append(f"{split_root} holds no class folders")
        count_stray_files(split_root, findings.unused[split])
        for label, folder in labels.items():
            files = list_images(split_root, folder, findings.unused[split])
            findings.images[split][label] = 0
            if not files:
                findings.problems["folders"].append(f"{split_root / folder} holds no image")
            items += [Item(split, label, split_root / file, config.max_pixels or MAX_PIXELS) for file in files]
    train, test = (findings.images[split].keys() for split in ("train", "test"))
    findings.problems["folders"] += [f"{label} is in train but not in test" for label in sorted(train - test)]
    if config.continue_from is None:  # else these are what the saved run has learned
        findings.problems["folders"] += [f"{label} is in test but not in train" for label in sorted(test - train)]
    workers = workers or (available_cpus() if len(items) >= POOL_FROM else 1)
    # spawned, not forked: a caller may have threads
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawned) if workers > 1 else nullcontext() as pool:
        return list(progress(scan_all(items, pool), total=len(items), desc="Images", unit="img"))


def _domain_labels(root: Path, known: Collection[str]) -> dict[str, str]:
    """``<domain>/<class>`` -> its folder below ``root``."""
    labels: dict[str, str] = {}
    for domain, folder in class_folders(root, {label.partition("/")[0] for label in known}).items():
        classes = [label.partition("/")[2] for label in known if label.startswith(f"{domain}/")]
        for name, below in class_folders(root / folder, classes).items():
            labels[f"{domain}/{name}"] = f"{folder}/{below}"
    return labels


def _scan_listed(data: Dataset) -> list[Scanned]:
    """Every image of a data set that lists its images in a way of its own."""
    scanned = []
    for name in ("train", "test"):
        split = data.split(name)
        for index, number in enumerate(split.labels.tolist()):
            label = data.class_names[number]
            if isinstance(split, ImageFiles):
                scanned.append(scan(Item(name, label, split.path(index), split.max_pixels)))
            else:
                image = split.load(index)
                place = f"{name} image {split.keys[index]}"
                scanned.append(Scanned(name, label, place, _content(image), image.size))
    return scanned


def _content(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


# -- telling ----------------------------------------------------------------------------------------------------------


def _extreme(counts: dict[str, int], choose: Any) -> dict[str, Any] | None:
    if not counts:
        return None
    name = choose(counts, key=lambda label: counts[label])
    return {"class": name, "images": counts[name]}


def summary(findings: Findings) -> list[str]:
    """For people."""
    facts = findings.as_dict()
    lines = [f"{findings.dataset}"]
    for split in ("train", "test"):
        images, classes = counted(facts["images"][split], "image"), counted(facts["classes"][split], "class")
        line = f"  {split:5}  {images} of {classes}"
        small, large = facts["smallest_class"][split], facts["largest_class"][split]
        if small:
            line += f"; smallest {small['class']} ({small['images']}), largest {large['class']} ({large['images']})"
        lines.append(line)
    if findings.sizes:
        lines.append(f"  sizes  {_size_line(findings.sizes)}")
    for kind, found in facts["problems"].items():
        lines.append(f"problem: {kind} ({len(found)})")
        lines += [f"  {sentence}" for sentence in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"  … and {len(found) - SHOWN} more (--json has all)")
    lines += [f"warning: {sentence}" for sentence in findings.warnings]
    lines.append("no problem found" if findings.good else counted(sum(map(len, facts["problems"].values())), "problem"))
    return lines


def _size_line(sizes: Counter[tuple[int, int]]) -> str:
    (w, h), most = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return f"all {w}×{h}"
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    ends = " to ".join(f"{a}×{b}" for a, b in (by_area[0], by_area[-1]))
    return f"{ends}; most often {w}×{h} ({most})"


def as_json(findings: Findings) -> str:
    """All that was found, as JSON."""
    return json_lines(findings.as_dict())
