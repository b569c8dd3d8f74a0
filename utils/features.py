"""The feature bank: the backbone never changes, so each (image, view) is worth one forward pass, ever.

A bank is a folder below ``cache_dir`` for one split of one data set under one backbone, image size, normalisation
and precision. It holds a ``manifest.json`` that says so in words, and one ``.npy`` array ``(images, dim)`` float32
for each view. A row that is not computed yet is NaN. An array still being filled ends in ``.filling.npy`` and is
renamed once every row is there. Only this file calls the backbone.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.data import Dataset, ImageFiles, Split, Transforms
from utils.distributed import Ranks
from utils.errors import BankError, DataError, NumericError
from utils.files import FolderLock, sha256_of_file, write_json

log = logging.getLogger(__name__)

TEST_VIEW = -1  # the view that the test transform gives
SYNC_SECONDS = 30  # at most this much work is lost when the power fails (nothing when only the process dies)


class FeatureExtractor(Protocol):
    """What the bank needs of a backbone (``backbone.vit.Backbone`` is one)."""

    name: str
    weights_sha256: str
    feature_dim: int
    precision: str
    normalize: bool
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8 -> ``(images, feature_dim)`` float32."""


Wanted = tuple[str, int]  # (split, view)


class FeatureBank:
    """Features by (split, view, rows), computed at most once.

    Args:
        data: the images.
        extractor: the backbone.
        image_size: side of the square that it sees.
        augment_seed: where the views' random numbers come from.
        fingerprints: of each split's images (``fingerprint_splits``).
        cache_dir: the folder of all banks, or None to keep this one in memory.
        batch_size: images in one forward pass.
        num_workers: processes that load images; 0 loads in this one.
        ranks: the processes that share the work.

    Attributes:
        forwards: images that this object passed through the backbone.
    """

    def __init__(
        self,
        data: Dataset,
        extractor: FeatureExtractor,
        *,
        image_size: int,
        augment_seed: int,
        fingerprints: dict[str, str],
        cache_dir: Path | None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        if cache_dir is None and ranks.count > 1:
            raise BankError("cache_dir=none keeps features in one process; under torchrun give a shared folder")
        self.data, self.extractor, self.ranks = data, extractor, ranks
        self.transforms = Transforms(image_size, augment_seed)
        self.batch_size = batch_size or default_batch_size(extractor.device)
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.forwards = 0
        self.image_size, self.cache_dir = image_size, cache_dir
        self.fingerprints = fingerprints
        self._memory: dict[Wanted, np.ndarray] = {}

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        """Features of the images ``rows`` of ``split`` under ``view``: ``(len(rows), dim)`` float32.

        Raises:
            BankError: the array is not filled, damaged, or of another size.
        """
        if self.cache_dir is None:
            array = self._memory.get((split, view))
        else:
            array = _open_array(self._path(split, view), (len(self.data.split(split)), self.extractor.feature_dim))
        if array is None:
            raise BankError(f"the features of {split}, view {view} are not filled yet")
        values = np.array(array[rows])  # a copy: the map is closed on return and its pages do not stay resident
        if not np.isfinite(values).all():
            raise BankError(
                f"{self._path(split, view) if self.cache_dir else 'the feature bank'} holds rows that are not finite "
                f"numbers; remove the damaged bank: python -m utils.bank remove {self._folder(split).name}"
            )
        return values

    def missing(self, wanted: Sequence[Wanted]) -> int:
        """How many forward passes ``fill(wanted)`` would make."""
        return sum(len(rows) for rows in self._missing_rows(wanted).values())

    def bytes_needed(self, wanted: Sequence[Wanted]) -> int:
        """Bytes that ``fill(wanted)`` would add to the disk (or to memory)."""
        return sum(self._nbytes(*w) for w in wanted if not self._exists(*w))

    # -- filling ---------------------------------------------------------------------------------------------------

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Compute every row of ``wanted`` that is not there yet. All ranks call it; each computes its share.

        Raises:
            DataError: an image cannot be read. BankError: no space. NumericError: a feature is not finite.
        """
        if self.ranks.share(self._complete(wanted) if self.ranks.first else None):
            return
        if self.cache_dir is None:
            self._fill_missing(wanted)
            return
        for split in sorted({split for split, _ in wanted}):
            views = [w for w in wanted if w[0] == split]
            if self.ranks.first:
                with FolderLock(self._folder(split) / "lock", f"bank {split}", wait=True, on_wait=_say_waiting):
                    self._prepare(split, views)
                    self.ranks.barrier()
                    self._fill_missing(views)
                    self.ranks.barrier()
                    self._finish(views)
                    self.ranks.barrier()
            else:
                self.ranks.barrier()
                self._fill_missing(views)
                self.ranks.barrier()
                self.ranks.barrier()

    def _prepare(self, split: str, views: Sequence[Wanted]) -> None:
        """Check the space, then lay out the arrays, every row NaN."""
        folder, need = self._folder(split), self.bytes_needed(views)
        if need:
            free = shutil.disk_usage(folder).free
            log.info("Feature bank %s: needs %s of disk, %s are free", folder, _size(need), _size(free))
            if need > free:
                raise BankError(
                    f"the feature bank needs {_size(need)} in {self.cache_dir}, {_size(free)} are free; free some, set "
                    "cache_dir to a larger disk, lower train_views, or list banks to remove: python -m utils.bank list"
                )
        write_json(folder / "manifest.json", self.describe(split))
        for want in views:
            if not self._exists(*want):
                _create_array(_filling(self._path(*want)), (len(self.data.split(split)), self.extractor.feature_dim))

    def _finish(self, views: Sequence[Wanted]) -> None:
        for want in views:
            path = self._path(*want)
            if not path.exists():
                _sync(_filling(path))
                os.replace(_filling(path), path)

    def _fill_missing(self, wanted: Sequence[Wanted]) -> None:
        missing = self._missing_rows(wanted)
        work = list(_image_major(missing, self.ranks))
        total = sum(len(views) for _, _, views in work)
        if not total:
            return
        writers = {want: self._writer(want) for want in missing}
        started, last_sync = time.monotonic(), time.monotonic()
        bar = tqdm(
            total=total, unit="img", desc="Features", disable=not self.ranks.first, file=sys.stderr, dynamic_ncols=True
        )
        try:
            for places, images in _batches(
                self.data, self.transforms, work, self.batch_size, self.num_workers, self._pin
            ):
                features = self._forward(images)
                _check_finite(features, places, self.data)
                for want in {(split, view) for split, view, _ in places}:
                    chosen = [i for i, (split, view, _) in enumerate(places) if (split, view) == want]
                    writers[want].write([places[i][2] for i in chosen], features[chosen])
                self.forwards += len(places)
                bar.update(len(places))
                if time.monotonic() - last_sync > SYNC_SECONDS:
                    for writer in writers.values():
                        writer.sync()
                    last_sync = time.monotonic()
        finally:
            bar.close()
            for writer in writers.values():
                writer.close()
        log.info("Features: %d forward passes in %.1f s", total, time.monotonic() - started)

    @property
    def _pin(self) -> bool:
        return self.extractor.device.type != "cpu"

    def _forward(self, images: Tensor) -> np.ndarray:
        """Features of one batch. The shape is always the same, and so is every row, whatever else is in the batch.

        A matrix product may pick another algorithm for another number of rows; then an image's last bits would
        depend on how an interrupted extraction was cut.
        """
        count = len(images)
        if count < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - count, -1, -1, -1)])
        return self.extractor(images)[:count].cpu().numpy()

    # -- what is where ---------------------------------------------------------------------------------------------

    def describe(self, split: str) -> dict[str, Any]:
        """What the bank of ``split`` holds, in words: its identity and its manifest."""
        return {
            "what": f"final [CLS] features of the {split} images of {self.data.name}, float32, one row an image",
            "dataset": self.data.name,
            "split": split,
            "images": len(self.data.split(split)),
            "images_sha256": self.fingerprints[split],
            "backbone": self.extractor.name,
            "weights_sha256": self.extractor.weights_sha256,
            "feature_dim": self.extractor.feature_dim,
            "image_size": self.image_size,
            "normalize": self.extractor.normalize,
            "precision": self.extractor.precision,
            "views": "test.npy: the test transform; augmented-<seed>-<view>.npy: that augmented view",
        }

    def _folder(self, split: str) -> Path:
        identity = self.describe(split)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        backbone = self.extractor.name.split(".")[0]
        name = f"{self.data.name}-{split}-{backbone}-{self.image_size}px-{self.extractor.precision}-{digest}"
        return self.cache_dir / name

    def _path(self, split: str, view: int) -> Path:
        name = "test.npy" if view == TEST_VIEW else f"augmented-{self.transforms.augment_seed}-{view:04d}.npy"
        return self._folder(split) / name

    def _exists(self, split: str, view: int) -> bool:
        if self.cache_dir is None:
            return (split, view) in self._memory
        path = self._path(split, view)
        return path.exists() or _filling(path).exists()

    def _nbytes(self, split: str, view: int) -> int:
        return len(self.data.split(split)) * self.extractor.feature_dim * 4

    def _complete(self, wanted: Sequence[Wanted]) -> bool:
        return self.cache_dir is not None and all(self._path(*want).exists() for want in wanted)

    def _missing_rows(self, wanted: Sequence[Wanted]) -> dict[Wanted, np.ndarray]:
        return {want: rows for want in wanted if len(rows := self._missing_of(*want))}

    def _missing_of(self, split: str, view: int) -> np.ndarray:
        everything = np.arange(len(self.data.split(split)))
        if self.cache_dir is None:
            return everything if (split, view) not in self._memory else np.empty(0, dtype=np.int64)
        path = self._path(split, view)
        if path.exists():
            return np.empty(0, dtype=np.int64)
        if not _filling(path).exists():
            return everything
        array = _open_array(_filling(path), (len(everything), self.extractor.feature_dim))
        blocks = np.array_split(everything, max(1, len(everything) // 4096))
        return np.concatenate([block[np.isnan(array[block]).any(axis=1)] for block in blocks])

    def _writer(self, want: Wanted) -> "_Writer":
        shape = (len(self.data.split(want[0])), self.extractor.feature_dim)
        if self.cache_dir is None:
            self._memory[want] = np.full(shape, np.nan, dtype=np.float32)
            return _MemoryWriter(self._memory[want])
        return _FileWriter(_filling(self._path(*want)), shape)


def default_cache_dir() -> Path:
    """The user's cache folder, as the platform defines it."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tosca"


def resolve_cache_dir(value: str | None) -> Path | None:
    """The key ``cache_dir``: a folder, the default, or None for ``none`` (in memory)."""
    if value == "none":
        return None
    return Path(value).expanduser() if value else default_cache_dir()


def default_batch_size(device: torch.device) -> int:
    """Images in a forward pass: few on a CPU, where caches are small, many on an accelerator."""
    return 16 if device.type == "cpu" else 256


def default_workers() -> int:
    """Loader processes: every CPU this process may use but one, which drives the backbone; at most 16."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus - 1, 16)


# -- fingerprints -----------------------------------------------------------------------------------------------------


def fingerprint_splits(data: Dataset, cache_dir: Path | None) -> dict[str, str]:
    """A SHA-256 for each split over the names and *contents* of its images, in order.

    Hashes of files are remembered in ``cache_dir`` under (path, size, mtime, ctime, inode), as git does.
    """
    index = _HashIndex(cache_dir / "hashes" if cache_dir else None, data)
    found = {}
    for name in ("train", "test"):
        split = data.split(name)
        digest = hashlib.sha256()
        for key, content in zip(split.keys, index.hashes(split), strict=True):
            digest.update(f"{key}\x00{content}\n".encode("utf-8", "surrogateescape"))
        found[name] = digest.hexdigest()
    index.save()
    return found


class _HashIndex:
    """Content hashes of files, remembered as long as the file system says that a file is the same."""

    def __init__(self, folder: Path | None, data: Dataset) -> None:
        roots = "|".join(str(s.root.resolve()) for s in (data.train, data.test) if isinstance(s, ImageFiles))
        name = hashlib.sha256(roots.encode("utf-8", "surrogateescape")).hexdigest()[:16] + ".json"
        self.path = folder / name if folder else None
        self.started_ns = time.time_ns()
        self.changed = False
        try:
            self.known: dict[str, list[Any]] = json.loads(self.path.read_text()) if self.path else {}
        except (OSError, ValueError):
            self.known = {}  # only a memory: lost, it is made again

    def hashes(self, split: Split) -> list[str]:
        if not isinstance(split, ImageFiles):
            return split.content_hashes(sha256_of_file)
        todo = [str(split.path(i)) for i in range(len(split)) if self._known(str(split.path(i))) is None]
        if todo:
            self.changed = True
            with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the interpreter's lock
                hashed = pool.map(_stat_and_hash, todo)
                bar = tqdm(
                    hashed,
                    total=len(todo),
                    desc="Hashing images",
                    unit="file",
                    file=sys.stderr,
                    disable=len(todo) < 5000,
                )
                for path, entry in zip(todo, bar, strict=True):
                    self.known[path] = entry
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
        return [*_stat(path), sha256_of_file(Path(path))]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend its permissions or remove it") from None


# -- arrays on disk ---------------------------------------------------------------------------------------------------


def _filling(path: Path) -> Path:
    return path.with_suffix(".filling.npy")


def _create_array(path: Path, shape: tuple[int, int]) -> None:
    """An ``.npy`` of NaN rows, complete on disk before it has its name."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    header = np.lib.format.header_data_from_array_1_0(np.empty((0, shape[1]), dtype=np.float32)) | {"shape": shape}
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            block = np.full((min(shape[0], 4096), shape[1]), np.nan, dtype=np.float32)
            for start in range(0, shape[0], len(block)):
                file.write(block[: shape[0] - start].tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise BankError(f"{path} cannot be written ({error.strerror}); set cache_dir to another disk") from error
    finally:
        partial.unlink(missing_ok=True)


def _open_array(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array as a read-only memory map, or None if it is not there."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise BankError(f"{path} is damaged ({error}); remove it, its features are computed again") from error
    if array.shape != shape or array.dtype != np.float32:
        raise BankError(f"{path} is damaged (shape {array.shape}, expected {shape}); remove it")
    return array


class _Writer(Protocol):
    def write(self, rows: list[int], features: np.ndarray) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class _FileWriter:
    """Rows straight into the file: nothing of it becomes resident in memory."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path, self.row_bytes = path, shape[1] * 4
        self.offset = path.stat().st_size - shape[0] * self.row_bytes  # the header's length
        self.file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, rows: list[int], features: np.ndarray) -> None:
        try:
            for row, feature in zip(rows, features, strict=True):
                self.file.seek(self.offset + row * self.row_bytes)
                self.file.write(feature.tobytes())
        except OSError as error:
            raise BankError(f"{self.path} cannot be written ({error.strerror}); what is there stays valid") from error

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class _MemoryWriter:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def write(self, rows: list[int], features: np.ndarray) -> None:
        self.array[rows] = features

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


# -- images to batches ------------------------------------------------------------------------------------------------

Place = tuple[str, int, int]  # (split, view, row)


def _image_major(missing: dict[Wanted, np.ndarray], ranks: Ranks) -> Iterator[tuple[str, int, list[int]]]:
    """(split, row, its missing views): an image is decoded once for all its views. Each rank has rows of its own."""
    views_of: dict[tuple[str, int], list[int]] = {}
    for (split, view), rows in missing.items():
        for row in rows.tolist():
            views_of.setdefault((split, row), []).append(view)
    for (split, row), views in sorted(views_of.items()):
        if row % ranks.count == ranks.rank:  # not by place in this list: other ranks may have begun to write
            yield split, row, views


class _Images(torch.utils.data.Dataset):
    """Item -> the places and the uint8 pixels ``(views, 3, S, S)`` of one image under its missing views."""

    def __init__(self, data: Dataset, transforms: Transforms, work: list[tuple[str, int, list[int]]]) -> None:
        self.data, self.transforms, self.work = data, transforms, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, item: int) -> tuple[list[Place], Tensor] | DataError:
        split_name, row, views = self.work[item]
        split = self.data.split(split_name)
        try:
            image = split.load(row)
        except DataError as error:
            return error  # raised in the main process, as it is: a worker would wrap it into a traceback
        pixels = [
            self.transforms.test(image) if view == TEST_VIEW else self.transforms.view(image, split.keys[row], view)
            for view in views
        ]
        return [(split_name, view, row) for view in views], torch.stack(pixels)


def _together(items: list[tuple[list[Place], Tensor] | DataError]) -> tuple[list[Place], Tensor] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    return [place for places, _ in items for place in places], torch.cat([pixels for _, pixels in items])


def _batches(
    data: Dataset,
    transforms: Transforms,
    work: list[tuple[str, int, list[int]]],
    batch_size: int,
    num_workers: int,
    pin: bool,
) -> Iterator[tuple[list[Place], Tensor]]:
    """Batches of exactly ``batch_size`` (image, view) pairs, but for the last."""
    views = max(len(v) for _, _, v in work)
    loader = torch.utils.data.DataLoader(
        _Images(data, transforms, work),
        batch_size=max(1, batch_size // views),
        num_workers=min(num_workers, len(work)),
        collate_fn=_together,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if num_workers else None,
    )
    places: list[Place] = []
    pixels: list[Tensor] = []
    try:
        for loaded in loader:
            if isinstance(loaded, DataError):
                raise loaded
            places += loaded[0]
            pixels.append(loaded[1])
            while len(places) >= batch_size:
                images = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
                yield places[:batch_size], images[:batch_size]
                places, pixels = places[batch_size:], [images[batch_size:]]
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise BankError(
                f"a process that loads images was killed ({str(error).splitlines()[0]}); often memory is short: lower "
                "num_workers. Start again: the features that are done stay"
            ) from error
        raise
    if places:
        yield places, torch.cat(pixels)


def _start_worker(_: int) -> None:
    """One thread a worker, and Ctrl-C is the main process's to answer."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _check_finite(features: np.ndarray, places: list[Place], data: Dataset) -> None:
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        split, view, row = places[bad[0]]
        raise NumericError(
            f"the backbone's feature of {split} image {data.split(split).keys[row]!r} (view {view}) is not finite; "
            "try precision=fp32, or check the weights"
        )


def _say_waiting(holder: str) -> None:
    log.info("Waiting for %s to fill the same feature bank", holder)


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    raise AssertionError
