"""What is in a data set, as one hash for each split: over the contents of its images, not their dates.

Reading every file at every start would take minutes for large data, so the hashes of files are remembered under what
the file system says of them: name, size and modification time, as git does.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from utils import module
from utils.data.splits import Dataset
from utils.errors import DataError, UserError
from utils.files import atomic_write, read_regular, remove_partials
from utils.logs import progress

log = logging.getLogger(__name__)

_THREADS = 8  # hashing releases the interpreter's lock, and a network disk answers several requests at once
_FORGOTTEN_NS = 2_000_000_000  # a file changed within the clock's tick after it was hashed would look unchanged
_REMEMBERED = re.compile(rb"^([0-9a-f]{32}) ([0-9a-f]{64}(?::[a-z,]+)?)$", re.MULTILINE)


class Fingerprints(dict[str, str]):
    """For each split a SHA-256 over the names and contents of its images, in order.

    Attributes:
        stats: for each split of files, ``(images, 2)`` int64, size in bytes and modification time in nanoseconds.
    """

    def __init__(self, digests: dict[str, str], stats: dict[str, np.ndarray]) -> None:
        super().__init__(digests)
        self.stats = stats


def fingerprint_splits(data: Dataset, cache_dir: Path | None) -> Fingerprints:
    """Look at the images of both splits; hashes of files are remembered below ``cache_dir`` (None: nowhere)."""
    digests, stats = {}, {}
    kinds: list[str] = []
    for name in ("train", "test"):
        split = data.split(name)
        if split.root is None:
            contents = split.content_hashes()
        else:
            found = [_asked(os.stat, os.path.join(split.root, key)) for key in split.keys]
            stats[name] = np.array([(stat.st_size, stat.st_mtime_ns) for stat in found], dtype=np.int64).reshape(-1, 2)
            contents = _contents(split.root, split.keys, stats[name], cache_dir)
        digest = hashlib.sha256()
        for key, content in zip(split.keys, contents, strict=True):
            sha256, _, of_image = content.partition(":")
            kinds += filter(None, of_image.split(","))
            digest.update(f"{key}\x00{sha256}\n".encode("utf-8", "surrogateescape"))
        digests[name] = digest.hexdigest()
    for sentence in module("utils.data.images").kind_sentences(kinds) if kinds else ():
        log.info("Images: %s", sentence)
    return Fingerprints(digests, stats)


def _contents(root: Path, keys: Sequence[str], stats: np.ndarray, cache_dir: Path | None) -> list[str]:
    """``content_of_file`` of every file of a split, in order."""
    place = hashlib.sha256(str(root.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    memory = cache_dir / "hashes" / f"{place[:16]}.txt" if cache_dir else None
    started_ns = time.time_ns()
    looks = [
        hashlib.blake2b(f"{key}\0{size}\0{mtime}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        for key, (size, mtime) in zip(keys, stats.tolist(), strict=True)
    ]
    known = _recall(memory)
    todo = {look: root / key for look, key in zip(looks, keys, strict=True) if look not in known}
    try:
        if todo:
            _hash_files(todo, known)
    finally:  # also when it is stopped: what is hashed need not be hashed again
        if todo and memory:
            settled = stats[:, 1] < started_ns - _FORGOTTEN_NS
            _remember(memory, {look: known[look] for look in np.array(looks)[settled].tolist() if look in known})
    return [known[look] for look in looks]


def _hash_files(todo: dict[str, Path], known: dict[str, str]) -> None:
    """Read files and put their contents' hashes into ``known``."""
    content = partial(_asked, module("utils.data.images").content_of_file)
    hashed = module("utils.data.loader").load_ahead(content, todo.values(), workers=_THREADS, ahead=32 * _THREADS)
    bar = progress(hashed, total=len(todo), desc="Hashing images", unit="file", disable=len(todo) < 5000)
    for look, (_, found) in zip(todo, bar, strict=True):
        known[look] = found


def _asked(question: Callable[[Any], Any], path: Any) -> Any:
    """The answer of the file system about a file; its refusal names the file."""
    try:
        return question(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); correct its permissions or remove it") from None


def _recall(memory: Path | None) -> dict[str, str]:
    """What an earlier start left, line by line; what is damaged, or no file, is forgotten: it is only a memory."""
    try:
        lines = read_regular(memory) if memory else b""
    except OSError:
        return {}
    return {look.decode(): content.decode() for look, content in _REMEMBERED.findall(lines)}


def _remember(memory: Path, known: dict[str, str]) -> None:
    lines = "".join(f"{look} {content}\n" for look, content in known.items())
    try:
        remove_partials(memory.parent, re.escape(memory.name), locked=False)
        atomic_write(memory, lines.encode())
    except (UserError, OSError) as error:
        log.info("The hashes of the images are not remembered: %s", error)
