"""``test_old: auto``: test images of what a saved run has learned, from the folders where its own data had them.

A run records the test folder of its data, with a hash over names and contents, and so does each run that continues it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.class_folders import list_test_classes, list_test_domains
from utils.data.fingerprints import Fingerprints
from utils.data.names import normal_name
from utils.data.splits import Dataset, ImageFiles
from utils.data.tasks import LearnedClasses
from utils.errors import DataError

TestFolder = Mapping[str, Any]  # JSON-ready: ``folder``, ``images`` and ``sha256`` of one test folder


def folders_to_record(
    data: Dataset, fingerprints: Mapping[str, str], earlier: Sequence[TestFolder]
) -> list[TestFolder]:
    """What a run records: the test folders of the runs that it continues, then its own, if its images are in one."""
    own = str(data.test.root.resolve()) if isinstance(data.test, ImageFiles) else None
    found = _facts(data, fingerprints)
    return [*(facts for facts in earlier if facts["folder"] != own), *([found[own]] if own in found else [])]


def with_old_tests(data: Dataset, recorded: Sequence[TestFolder], learned: LearnedClasses) -> Dataset:
    """Add to the test split of ``data`` the images of the learned classes (or domains) that it lacks.

    The result is what it would be if these images had been copied beside the new ones. They are listed, not yet read;
    ``check_unchanged`` compares them with the record.

    Raises:
        DataError: they cannot be had; the message says why, without saying what follows.
    """
    domains = data.train_domains is not None
    if domains and not learned.domains:
        raise DataError("the saved run learned its classes outside any domain")
    lacking = _lacking(data, learned.domains if domains else learned.class_names, domains=domains)
    if not lacking:
        return data
    if not isinstance(data.test, ImageFiles):
        raise DataError(f"the images of {data.name} are not in folders")
    if not recorded:
        raise DataError("the saved run records no test folder: its images lay in none, or it is of an earlier version")
    listed: dict[str, dict[str, list[str]]] = {}  # domain ("" without domains) -> class -> files
    elsewhere: dict[str, Path] = {}
    for facts in reversed(recorded):  # the newest first: it may have the images of all runs before it
        root = Path(facts["folder"])
        if not lacking or root == data.test.root.resolve():
            continue
        found = _list(root, domains=domains)
        if other := sorted(_parts(found, domains=domains) - lacking):
            raise DataError(f"{root} holds {_what(domains)} {other[0]!r}, which is not one of those to be tested there")
        lacking -= _parts(found, domains=domains)
        listed |= found if domains else {"": {**listed.get("", {}), **found[""]}}
        files = (file for classes in found.values() for below in classes.values() for file in below)
        elsewhere |= {file.split("/", 1)[0]: root for file in files}
    if lacking:
        raise DataError(f"the saved run records no test folder with {_what(domains)} {sorted(lacking)[0]!r}")
    return _joined(data, data.test, listed, elsewhere)


def check_unchanged(data: Dataset, fingerprints: Mapping[str, str], recorded: Sequence[TestFolder]) -> None:
    """Compare the images that ``with_old_tests`` added with what the saved run recorded of them.

    Raises:
        DataError: other images than then.
    """
    known = {facts["folder"]: facts for facts in recorded}
    own = str(data.test.root.resolve()) if isinstance(data.test, ImageFiles) else None
    for folder, facts in _facts(data, fingerprints).items():
        expected = known.get(folder)
        if folder == own or expected == facts:
            continue
        counts = f"{facts['images']} images now, {expected['images'] if expected else 0} then"
        raise DataError(f"the images in {folder} are not those that the saved run was tested on ({counts})")


def _facts(data: Dataset, fingerprints: Mapping[str, str]) -> dict[str, TestFolder]:
    """Folder -> its facts, of each root that test images lie below."""
    split = data.test
    if not isinstance(split, ImageFiles) or not isinstance(fingerprints, Fingerprints):
        return {}
    contents, lines = fingerprints.contents["test"], dict[str, list[str]]()
    resolved = {root: str(root.resolve()) for root in {split.root, *split.elsewhere.values()}}
    for index, key in enumerate(split.keys):
        lines.setdefault(resolved[split.root_of(index)], []).append(f"{key}\x00{contents[index].tobytes().hex()}\n")
    return {
        folder: {
            "folder": folder,
            "images": len(found),
            "sha256": hashlib.sha256("".join(sorted(found)).encode("utf-8", "surrogateescape")).hexdigest(),
        }
        for folder, found in lines.items()
    }


def _lacking(data: Dataset, learned: Sequence[str], *, domains: bool) -> set[str]:
    """Which of the names of a saved run have no test images; none where some have: then all are to have some."""
    names = data.domain_names if domains else data.class_names
    train, test = (data.train_domains, data.test_domains) if domains else (data.train.labels, data.test.labels)
    assert train is not None and test is not None  # domain data has both
    trained, tested = ({normal_name(names[number]) for number in np.unique(part).tolist()} for part in (train, test))
    old = {normal_name(name) for name in learned if name} - trained  # a run that grew in place has learned new ones
    return set() if old & tested else old


def _list(root: Path, *, domains: bool) -> dict[str, dict[str, list[str]]]:
    if not root.is_dir():
        raise DataError(f"{root} does not exist any more")
    return list_test_domains(root) if domains else {"": list_test_classes(root)}


def _parts(listed: Mapping[str, Mapping[str, object]], *, domains: bool) -> set[str]:
    return set(listed) if domains else set(listed[""])


def _what(domains: bool) -> str:
    return "domain" if domains else "class"


def _joined(
    data: Dataset, test: ImageFiles, listed: Mapping[str, Mapping[str, Sequence[str]]], elsewhere: Mapping[str, Path]
) -> Dataset:
    """``data`` with the listed test images in the places that they would have if they lay beside its own."""
    old = {name for classes in listed.values() for name in classes} - set(data.class_names)
    names = (*data.class_names, *sorted(old))
    if data.domain_names:
        names = tuple(sorted(names))
    place = np.array([names.index(name) for name in data.class_names], dtype=np.int64)
    files, labels, counts = list(test.keys), place[test.labels].tolist(), []
    for domain in sorted(listed):
        counts.append(sum(map(len, listed[domain].values())))
        for name in sorted(listed[domain]):
            files += listed[domain][name]
            labels += [names.index(name)] * len(listed[domain][name])
    split = ImageFiles(test.root, files, labels, test.max_pixels, elsewhere)
    train = data.train
    if isinstance(train, ImageFiles):
        train = ImageFiles(train.root, train.keys, place[train.labels], train.max_pixels)
    joined = replace(data, train=train, test=split, class_names=names)
    if data.test_domains is None:
        return joined
    numbers = np.repeat(len(data.domain_names) + np.arange(len(counts)), counts)
    return replace(
        joined,
        domain_names=(*data.domain_names, *sorted(listed)),
        test_domains=np.concatenate([data.test_domains, numbers]),
    )
