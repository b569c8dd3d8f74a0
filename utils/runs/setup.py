"""What all seeds of a run share, where each one's files go, and what a start finds there.

That is an earlier start to go on from, or another run to move aside.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import module
from utils.config.config import Config
from utils.data.splits import Dataset
from utils.data.tasks import TaskStream, make_stream
from utils.errors import ConfigError, UserError
from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.files import FolderLock, free_name, read_json, remove_partials
from utils.ranks import Ranks
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.manifest import RunManifest, first_manifest, run_identity, versions

if TYPE_CHECKING:
    from utils.runs.continuing import SavedRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """Config, data and backbone, checked against each other."""

    config: Config
    data: Dataset
    backbone: Any  # a ``backbone.vit.Backbone``
    fingerprints: dict[str, str]  # of each split's images
    ranks: Ranks
    base: "SavedRun | None" = None  # the saved run that this one continues

    def stream(self, seed: int) -> TaskStream:
        return make_stream(self.data, self.config, seed, self.base.learned if self.base else None)

    def bank(self, seed: int) -> FeatureBank:
        c = self.config
        return FeatureBank(
            self.data,
            self.backbone,
            image_size=c.image_size,
            augment_seed=c.view_seed(seed),
            fingerprints=self.fingerprints,
            cache_dir=resolve_cache_dir(c.cache_dir),
            batch_size=c.feature_batch_size,
            num_workers=c.num_workers,
            ranks=self.ranks,
        )

    def identity(self, seed: int) -> dict[str, Any]:
        identity = run_identity(self.config, seed, self.backbone, self.fingerprints)
        return identity if self.base is None else {**identity, "base": self.base.sha256}

    def checkpoint(self, seed: int) -> CheckpointFolder:
        return checkpoint_of(self.config, seed)


def checkpoint_of(config: Config, seed: int) -> CheckpointFolder:
    """``tosca/``, or with several seeds ``tosca/seed<seed>/``."""
    folder = Path(config.checkpoint_dir).expanduser()
    return CheckpointFolder(folder / f"seed{seed}" if len(config.seed) > 1 else folder)


WRITTEN_WHOLE = (".json", ".png", ".npz")  # by a temporary file, which a kill may leave
SUFFIXES = (".log", *WRITTEN_WHOLE, ".tensorboard", ".wandb")


@dataclass(frozen=True)
class RunPaths:
    """Where one seed's log, JSON and pictures go: files that share a stem, in PILOT's folders."""

    folder: Path
    stem: str

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}{suffix}"

    def move_aside(self) -> list[Path]:
        """Rename another run's files at this stem; return their new names."""
        stamp, moved = time.strftime("%Y%m%d-%H%M%S"), []
        for suffix in SUFFIXES:
            path = self.file(suffix)
            if path.exists():
                new = free_name(path.with_name(f"{self.stem}.{stamp}{suffix}"))
                try:
                    path.rename(new)
                except OSError as error:
                    raise UserError(f"{path} cannot be moved aside ({error.strerror})") from error
                moved.append(new)
        return moved


def run_paths(config: Config, seed: int) -> RunPaths:
    """``logs/<model>/<dataset>/<init_cls>/<increment>/[<prefix>_]<seed>_<backbone>``; equal steps: 0.

    Domain-incremental runs have ``domain/1``: a task is one domain. What some system refuses in a file's name, such as
    the colon of ``hf-hub:user/repo``, becomes ``_``.
    """
    first, step = str(0 if config.init_cls == config.increment else config.init_cls), str(config.increment)
    if config.scenario == "domain":
        first, step = "domain", "1"
    folder = Path(config.log_dir).expanduser() / config.model_name / config.dataset / first / step
    stem = f"{config.prefix}_{seed}_{config.backbone_type}" if config.prefix else f"{seed}_{config.backbone_type}"
    return RunPaths(folder, re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", stem))


# -- what a start finds ---------------------------------------------------------------------------------------------


@contextmanager
def held_folders(paths: RunPaths, checkpoint: CheckpointFolder) -> Iterator[Callable[[], None]]:
    """Hold the checkpoint folder and the report of a run for this process; what killed writes left there is removed.

    Gives a function that raises a ``UserError`` if one of the two was removed or exchanged meanwhile.
    """
    folder, report = f"checkpoint_dir {str(checkpoint.folder)!r}", f"log {str(paths.file('.log'))!r}"
    with (
        FolderLock(checkpoint.folder / ".lock", folder) as first,
        FolderLock(paths.folder / f".{paths.stem}.lock", report) as second,
    ):
        checkpoint.remove_partials()
        suffixes = "|".join(map(re.escape, WRITTEN_WHOLE))
        remove_partials(paths.folder, f"{re.escape(paths.stem)}({suffixes})")

        def check() -> None:
            first.check()
            second.check()

        yield check


@dataclass(frozen=True)
class Start:
    """What a start of a run found in its checkpoint folder. Another run's files stay there until ``begin``.

    Attributes:
        checkpoint: the folder, which the caller holds (``held_folders``).
        manifest: to go on from; a run on top of a saved one begins with that one's tasks.
        source: the folder with the files that it names.
        begun: whether ``checkpoint`` holds this run already.
    """

    checkpoint: CheckpointFolder
    manifest: RunManifest
    source: CheckpointFolder
    begun: bool

    @property
    def saved(self) -> int:
        """How many tasks ``checkpoint`` holds."""
        return len(self.manifest.tasks) if self.source is self.checkpoint else 0

    def begin(self, manifest: RunManifest) -> None:
        """Make the folder this run's: move another one's files aside.

        To be called before the first ``commit``, once all features are there: a run that stops at an image that
        cannot be read has then moved nothing.
        """
        if not self.begun:
            _move_aside(self.checkpoint)
            self.checkpoint.write_manifest(replace(manifest, files={}, results_bytes=0))


def find_earlier_start(setup: Setup, seed: int, paths: RunPaths, checkpoint: CheckpointFolder) -> Start:
    """Find what to go on from, or else make a new run's manifest. Of another run the report alone is moved aside.

    The caller holds both folders (``held_folders``).
    """
    identity, manifest = setup.identity(seed), checkpoint.read_manifest()
    begun = manifest is not None and manifest.identity == identity
    if not _belongs_to(paths, identity) or (not begun and _report(paths).get("status") == "finished"):
        _move_report_aside(paths)
    if manifest is not None and begun and (manifest.tasks or setup.base is None):
        checkpoint.remove_old_files(manifest)  # an earlier start may have been killed before it could
        return Start(checkpoint, manifest, checkpoint, begun)
    if manifest is not None and not begun:
        old = manifest.identity
        different = sorted(k for k in identity.keys() | old.keys() if old.get(k) != identity.get(k))
        log.info("%s holds another run (%s differ)", checkpoint.folder, ", ".join(different))
    data, stream = setup.data, setup.stream(seed)
    new = replace(
        first_manifest(setup.config, seed, setup.backbone).with_classes(stream),
        status="running",
        identity=identity,
        data={
            "classes": len(data.class_names),
            "train_images": len(data.train),
            "test_images": len(data.test),
            "images_sha256": setup.fingerprints,
        },
        backbone_forwards=_report(paths).get("backbone_forwards", 0),  # of a start that ended before it could begin
    )
    if setup.base is None:
        return Start(checkpoint, new, checkpoint, begun)
    on_top = module("utils.runs.continuing").on_top
    return Start(checkpoint, on_top(setup.base, new, stream), CheckpointFolder(setup.base.folder), begun)


def start_over(configs: Sequence[Config]) -> None:
    """Move all aside that earlier starts of these or of other runs left, whatever its state."""
    for config in configs:
        for seed in config.seed:
            paths, checkpoint = run_paths(config, seed), checkpoint_of(config, seed)
            with held_folders(paths, checkpoint):
                _move_aside(checkpoint)
                _move_report_aside(paths)
    log.info("All runs start over; whatever stops them, leave out --fresh to go on")


def _move_aside(checkpoint: CheckpointFolder) -> None:
    if aside := checkpoint.move_aside():
        log.info("Moved the files of an earlier run from %s to %s", checkpoint.folder, aside)


def _move_report_aside(paths: RunPaths) -> None:
    for moved in paths.move_aside():
        log.info("Moved the report of an earlier run to %s", moved)


def _belongs_to(paths: RunPaths, identity: dict[str, Any]) -> bool:
    """Whether the JSON at ``paths`` (if any) is of the run with this identity."""
    if not paths.file(".json").exists():
        return not paths.file(".log").exists()
    return bool(_report(paths).get("identity") == identity)


def _report(paths: RunPaths) -> dict[str, Any]:
    try:
        return read_json(paths.file(".json"))
    except ConfigError:
        return {}


def changed_versions(manifest: RunManifest) -> list[str]:
    """``name old -> new`` for each version that changed since the run of ``manifest`` began."""
    old, now = manifest.versions, versions()
    return [f"{name} {old.get(name)} -> {now[name]}" for name in now if old.get(name) != now[name]]
