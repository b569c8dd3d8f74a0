"""What is in a data set, as one hash for each split: over the contents of its images, not their dates."""

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.data.images import content_of_file
from utils.data.modes import kind_sentences, row_content
from utils.data.splits import Dataset, ImageArray, ImageFiles
from utils.errors import DataError
from utils.files import write_json
from utils.progress import progress

log = logging.getLogger(__name__)


def fingerprint_splits(data: Dataset, cache_dir: Path | None) -> dict[str, str]:
    """A SHA-256 for each split over the names and *contents* of its images, in order.

    Hashes of files are remembered in ``cache_dir`` under (path, size, mtime, ctime, inode), as git does.
    """
    index = _HashIndex(cache_dir / "hashes" if cache_dir else None, data)
    found = {}
    kinds: list[str] = []
    try:
        for name in ("train", "test"):
            split = data.split(name)
            digest = hashlib.sha256()
            for key, content in zip(split.keys, index.hashes(split), strict=True):
                kinds += filter(None, content.partition(":")[2].split(","))
                digest.update(f"{key}\x00{row_content(content)}\n".encode("utf-8", "surrogateescape"))
            found[name] = digest.hexdigest()
    finally:
        index.save()  # also when it is stopped: what is hashed need not be hashed again
    for sentence in kind_sentences(kinds):
        log.info("Images: %s", sentence)
    return found


class _HashIndex:
    """Content hashes of files, remembered as long as the file system says that a file is the same."""

    def __init__(self, folder: Path | None, data: Dataset) -> None:
        roots = "|".join(str(s.root.resolve()) for s in (data.train, data.test) if isinstance(s, ImageFiles))
        name = hashlib.sha256(roots.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        name += "-2.json"  # 2: contents with the kinds of pictures
        self.path = folder / name if folder else None
        self.started_ns = time.time_ns()
        self.changed = False
        try:
            self.known: dict[str, list[Any]] = json.loads(self.path.read_text()) if self.path else {}
        except (OSError, ValueError):
            self.known = {}  # only a memory: lost, it is made again

    def hashes(self, split: ImageArray | ImageFiles) -> list[str]:
        if isinstance(split, ImageArray):
            return split.content_hashes()
        todo = [str(split.path(i)) for i in range(len(split)) if self._known(str(split.path(i))) is None]
        if todo:
            self.changed = True
            quiet = len(todo) < 5000
            bar = progress(total=len(todo), desc="Hashing images", unit="file", disable=quiet)
            with bar, ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the interpreter's lock
                for start in range(0, len(todo), 256):  # in blocks, so that Ctrl-C has little to wait for
                    block = todo[start : start + 256]
                    self.known.update(zip(block, pool.map(_stat_and_hash, block), strict=True))
                    bar.update(len(block))
        return [self.known[str(split.path(i))][-1] for i in range(len(split))]

    def _known(self, path: str) -> str | None:
        entry = self.known.get(path)
        try:
            return entry[-1] if entry is not None and entry[:-1] == _stat(path) else None
        except OSError:
            return None

    def save(self) -> None:
        # a file changed within the clock's tick after it was hashed would look unchanged: forget the newest
        recent = self.started_ns - 2_000_000_000
        stable = {path: entry for path, entry in self.known.items() if max(entry[1], entry[2]) < recent}
        if self.changed and self.path:
            write_json(self.path, stable)


def _stat(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _stat_and_hash(path: str) -> list[Any]:
    try:
        return [*_stat(path), content_of_file(Path(path))]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend its permissions or remove it") from None
