"""What a start of a run finds on disk: an earlier start to go on from, or another run to move aside."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from utils import module
from utils.config.config import Config
from utils.errors import ConfigError
from utils.files import FolderLock, read_json, remove_partials
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.manifest import RunManifest, first_manifest, versions
from utils.runs.setup import WRITTEN_WHOLE, RunPaths, Setup, checkpoint_of, run_paths

log = logging.getLogger(__name__)


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
