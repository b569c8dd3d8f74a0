"""What is in a data set, as one hash for each split: over the contents of its images, not their dates.

Reading every file at every start would take minutes for large data, so the hashes of files are remembered under what
the file system says of them, as git does. That alone would not notice files that were exchanged under equal sizes,
times and inode numbers (another image of a disk, mounted in the place of the first): so each start reads some files
again, chosen at random, all of them where they are few; one that differs makes it read all. And whatever is decoded
for the feature bank is compared with its hash in any case (``utils.features.views``).
"""

import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.data.images import content_of_file
from utils.data.modes import kind_sentences, row_content
from utils.data.splits import Dataset, ImageFiles, Split
from utils.errors import DataError, UserError
from utils.files import atomic_write, open_regular, remove_partials
from utils.logs import progress

log = logging.getLogger(__name__)

CHECKED_FILES, CHECKED_BYTES = 4096, 256_000_000  # of the remembered hashes, at most so much is verified at each start
_THREADS = 8  # hashing releases the interpreter's lock, and a network disk answers several requests at once


class Fingerprints(dict[str, str]):
    """For each split a SHA-256 over the names and contents of its images, in order.

    Attributes:
        stats: for each split of files, ``(images, 2)`` int64, the size and ``mtime_ns`` of each file.
    """

    def __init__(self, digests: dict[str, str], stats: dict[str, np.ndarray]) -> None:
        super().__init__(digests)
        self.stats = stats


def fingerprint_splits(data: Dataset, cache_dir: Path | None) -> Fingerprints:
    """Look at the images of both splits.

    Args:
        data: the images.
        cache_dir: where hashes of files are remembered under (path, size, mtime, ctime, inode); None: nowhere.

    Raises:
        DataError: a file cannot be read.
    """
    memory = _HashMemory(cache_dir / "hashes" if cache_dir else None, data)
    digests, stats = {}, {}
    kinds: list[str] = []
    try:
        for name, found in memory.contents_of(data).items():
            split = data.split(name)
            digest = hashlib.sha256()
            for key, content in zip(split.keys, found.astype(str).tolist(), strict=True):
                kinds += filter(None, content.partition(":")[2].split(","))
                digest.update(f"{key}\x00{row_content(content)}\n".encode("utf-8", "surrogateescape"))
            digests[name] = digest.hexdigest()
            if isinstance(split, ImageFiles):
                stats[name] = np.array([_stat(str(split.path(row)))[:2] for row in range(len(split))], dtype=np.int64)
    finally:
        memory.save()  # also when it is stopped: what is hashed need not be hashed again
    for sentence in kind_sentences(kinds):
        log.info("Images: %s", sentence)
    return Fingerprints(digests, stats)


class _HashMemory:
    """Content hashes of files, remembered as long as the file system says that a file is the same.

    Three arrays with an entry for each file, sorted by the first: a hash of its path, ``(files,)`` of 16 bytes; size,
    mtime, ctime and inode number, ``(files, 4)`` int64; and its content's hash in ASCII.
    """

    def __init__(self, folder: Path | None, data: Dataset) -> None:
        roots = "|".join(str(s.root.resolve()) for s in (data.train, data.test) if isinstance(s, ImageFiles))
        name = hashlib.sha256(roots.encode("utf-8", "surrogateescape")).hexdigest()[:16] + ".npz"
        self._path = folder / name if folder else None
        self._started_ns = time.time_ns()
        self._known = self._load()
        self._learned: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._changed = self._was_wrong = False

    def contents_of(self, data: Dataset) -> dict[str, np.ndarray]:
        """For each split, ``(images,)`` ASCII: of each image its content's hash, in order."""
        found = {name: self._contents_of(data.split(name)) for name in ("train", "test")}
        if self._was_wrong:
            self._known = _nothing()
            self._learned.clear()
            found = {name: self._contents_of(data.split(name)) for name in found}
        return found

    def _contents_of(self, split: Split) -> np.ndarray:
        if not isinstance(split, ImageFiles):
            return np.array(split.content_hashes(), dtype="S")
        paths = [os.path.join(split.root, key) for key in split.keys]
        names = np.array([_hash_of_path(path) for path in paths], dtype="S16")
        stats = np.array([_stat(path) for path in paths], dtype=np.int64).reshape(-1, 4)
        contents, known = self._remembered(names, stats)
        self._was_wrong |= not self._still_true(paths, stats, contents, known)
        todo = np.flatnonzero(~known)
        if len(todo):
            self._changed = True
            fresh = np.array(_hashes([paths[i] for i in todo.tolist()]), dtype="S")
            contents = contents.astype(max(contents.dtype, fresh.dtype, key=lambda kind: kind.itemsize))
            contents[todo] = fresh
        self._learned.append((names, stats, contents))
        return contents

    def _remembered(self, names: np.ndarray, stats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is known of these files: their contents, and whether that still holds."""
        known_names, known_stats, known_contents = self._known
        if not len(known_names):
            return np.zeros(len(names), dtype="S64"), np.zeros(len(names), dtype=bool)
        places = np.searchsorted(known_names, names).clip(max=len(known_names) - 1)
        known = (known_names[places] == names) & (known_stats[places] == stats).all(axis=1)
        return known_contents[places], known

    def _still_true(self, paths: Sequence[str], stats: np.ndarray, contents: np.ndarray, known: np.ndarray) -> bool:
        """Read some of the files again whose contents are known."""
        chosen = np.random.default_rng().permutation(np.flatnonzero(known))  # others at each start
        chosen = chosen[: max(1, int(np.searchsorted(stats[chosen, 0].cumsum(), CHECKED_BYTES, side="right")))]
        chosen = chosen[:CHECKED_FILES]
        fresh = _hashes([paths[i] for i in chosen.tolist()])
        different = [i for i, content in zip(chosen.tolist(), fresh, strict=True) if content.encode() != contents[i]]
        if different:
            log.warning(
                "%s has other content than before, though size, times and inode number are the same (%d of the %d "
                "files that were looked at): all images are read again",
                *(paths[different[0]], len(different), len(chosen)),
            )
        return not different

    def save(self) -> None:
        """Write what is known now; where that cannot be, the next start hashes again."""
        if self._path is None or not self._changed or not self._learned:
            return
        names, stats = (np.concatenate([part[i] for part in self._learned]) for i in (0, 1))
        contents = np.concatenate([part[2] for part in self._learned])
        # a file changed within the clock's tick after it was hashed would look unchanged: forget the newest
        stable = np.flatnonzero(stats[:, 1:3].max(axis=1) < self._started_ns - 2_000_000_000)
        order = stable[np.argsort(names[stable], kind="stable")]
        file = io.BytesIO()
        np.savez(file, names=names[order], stats=stats[order], contents=contents[order])
        try:
            remove_partials(self._path.parent, re.escape(self._path.name), locked=False)
            atomic_write(self._path, file.getbuffer())
        except (UserError, OSError) as error:
            log.info("The hashes of the images are not remembered: %s", error)

    def _load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What an earlier start left; nothing if there is none, or if it is damaged: it is only a memory."""
        if self._path is None:
            return _nothing()
        try:
            with open_regular(self._path) as file, np.load(file, allow_pickle=False) as archive:
                names, stats, contents = archive["names"], archive["stats"], archive["contents"]
        except Exception:  # a damaged archive makes NumPy and what unpacks it raise nearly anything
            return _nothing()
        fits = names.dtype == "S16" and stats.dtype == np.int64 and contents.dtype.kind == "S"
        fits = fits and names.ndim == contents.ndim == 1 and stats.shape == (len(names), 4)
        return (names, stats, contents) if fits and len(contents) == len(names) else _nothing()


def _nothing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros(0, dtype="S16"), np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype="S64")


def _hash_of_path(path: str) -> bytes:
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _stat(path: str) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise _cannot_be_read(path, error) from None
    # an inode number may use all 64 bits
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & 0x7FFFFFFFFFFFFFFF


def _hashes(paths: Sequence[str]) -> list[str]:
    """The content's hash of each file."""
    found: list[str] = []
    bar = progress(total=len(paths), desc="Hashing images", unit="file", disable=len(paths) < 5000)
    with bar, ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for start in range(0, len(paths), 256):  # in blocks, so that Ctrl-C has little to wait for
            found += pool.map(_hash, paths[start : start + 256])
            bar.update(len(found) - bar.n)
    return found


def _hash(path: str) -> str:
    try:
        return content_of_file(Path(path))
    except OSError as error:
        raise _cannot_be_read(path, error) from None


def _cannot_be_read(path: str, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror}); correct its permissions or remove it")
