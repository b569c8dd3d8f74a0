"""Is the data what it should be? Every image decoded once; nothing is written and nothing heavy is imported."""

import hashlib
import json
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config import Config
from utils.data.datasets import DATASETS, load_dataset
from utils.data.folders import data_folder, list_images, split_folders, subfolders
from utils.data.images import HINT_REPLACE, decode
from utils.data.modes import UnreadableImage
from utils.data.splits import Dataset, Split
from utils.errors import DataError
from utils.hardware import available_cpus
from utils.progress import progress

POOL_FROM = 1000  # images; below, starting processes takes longer than the scan
SHOWN = 10  # findings of one kind in the summary; the JSON has all


@dataclass(frozen=True)
class Scanned:
    """One image: ``place`` is its file or number, ``content`` the SHA-256 of its pixels, None if unreadable."""

    split: str
    label: str
    place: str
    content: str | None
    size: tuple[int, int]
    error: str = ""


@dataclass
class Findings:
    """What the scan found. ``problems`` make the exit code 1; ``warnings`` do not.

    Attributes:
        images: for each split the number of images by class (in domain data by ``<domain>/<class>``).
        problems: kind -> one sentence each.
        sizes: ``(width, height)`` -> images.
    """

    dataset: str
    images: dict[str, dict[str, int]] = field(default_factory=lambda: {"train": {}, "test": {}})
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: list[str] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)

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
    if config.dataset in ("digits", "cifar224"):
        scanned = _scan_arrays(config)
    else:
        scanned = _scan_folders(config, findings, workers)
    by_content: dict[str, list[Scanned]] = defaultdict(list)
    for image in scanned:
        counts = findings.images[image.split]
        counts[image.label] = counts.get(image.label, 0) + 1
        if image.content is None:
            findings.problems["unreadable"].append(f"{image.place}: {image.error}")
        else:
            findings.sizes[image.size] += 1
            by_content[image.content].append(image)
    for same in by_content.values():
        _judge_copies(same, findings)
    _compare_counts(findings, config)
    _compare_sizes(findings, config)
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
        findings.warnings.append(f"{small} images are smaller than image_size {config.image_size}: they are enlarged")


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
        raise DataError(f"{count}{'; '.join(faults[:10])}{more}; {HINT_REPLACE}")


def _fault_of(place: tuple[Split, int]) -> str | None:
    split, index = place
    try:
        split.load(index)
    except DataError as error:
        return str(error).removesuffix(f"; {HINT_REPLACE}")
    return None


# -- scanning ---------------------------------------------------------------------------------------------------------


def _scan_folders(config: Config, findings: Findings, workers: int | None) -> list[Scanned]:
    """Every image below train/ and test/; what is wrong with the folders goes to ``findings``."""
    work: list[tuple[str, str, Path]] = []
    for split, root in zip(("train", "test"), split_folders(data_folder(config)), strict=True):
        labels = _domain_labels(root) if config.scenario == "domain" else subfolders(root)
        if not labels:
            findings.problems["folders"].append(f"{root} holds no class folders")
        for label in labels:
            files = list_images(root, label)
            findings.images[split][label] = 0
            if not files:
                findings.problems["folders"].append(f"{root / label} holds no image")
            work += [(split, label, root / file) for file in files]
    train, test = (findings.images[split].keys() for split in ("train", "test"))
    findings.problems["folders"] += [f"{label} is in train but not in test" for label in sorted(train - test)]
    if config.continue_from is None:  # else these are what the saved run has learned
        findings.problems["folders"] += [f"{label} is in test but not in train" for label in sorted(test - train)]
    workers = workers or (available_cpus() if len(work) >= POOL_FROM else 1)
    return list(progress(_scanned(work, workers), total=len(work), desc="Images", unit="img"))


def _domain_labels(root: Path) -> list[str]:
    return [f"{domain}/{name}" for domain in subfolders(root) for name in subfolders(root / domain)]


def _scanned(work: Sequence[tuple[str, str, Path]], workers: int) -> Iterator[Scanned]:
    if workers == 1:
        yield from map(scan, work)
        return
    # spawned, not forked: a caller may have threads
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(scan, work, chunksize=32)


def scan(item: tuple[str, str, Path]) -> Scanned:
    """Decode one file."""
    split, label, path = item
    try:
        image = decode(path)
    except UnreadableImage as error:
        return Scanned(split, label, str(path), None, (0, 0), str(error))
    return Scanned(split, label, str(path), _content(image), image.size)


def _scan_arrays(config: Config) -> list[Scanned]:
    data = load_dataset(config)
    scanned = []
    for name in ("train", "test"):
        split = data.split(name)
        for index, label in enumerate(split.labels.tolist()):
            image = split.load(index)
            place = f"{name} image {split.keys[index]}"
            scanned.append(Scanned(name, data.class_names[label], place, _content(image), image.size))
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
        line = f"  {split:5}  {facts['images'][split]} images of {facts['classes'][split]} classes"
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
    lines.append("no problem found" if findings.good else f"{sum(map(len, facts['problems'].values()))} problems")
    return lines


def _size_line(sizes: Counter) -> str:
    (w, h), most = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return f"all {w}×{h}"
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    ends = " to ".join(f"{a}×{b}" for a, b in (by_area[0], by_area[-1]))
    return f"{ends}; most often {w}×{h} ({most})"


def as_json(findings: Findings) -> str:
    return json.dumps(findings.as_dict(), indent=1, ensure_ascii=False)
