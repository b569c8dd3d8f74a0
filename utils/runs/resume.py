"""What a start of a run finds on disk: an earlier start to go on from, or another run to move aside."""

import logging
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.cli import Stopped, fault_of
from utils.config.config import Config
from utils.errors import ConfigError
from utils.files import FolderLock, read_json, remove_partials
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import bring_files, holds_copies_alone, on_top
from utils.runs.manifest import RunManifest, backbone_facts, versions
from utils.runs.paths import WRITTEN_WHOLE, RunPaths, run_paths
from utils.runs.setup import Setup, checkpoint_of

log = logging.getLogger(__name__)


@contextmanager
def held_folders(config: Config, seed: int) -> Iterator[Callable[[], None]]:
    """Hold the checkpoint folder and the report of a run for this process; what killed writes left there is removed.

    Gives a function that raises a ``UserError`` if one of the two was removed or exchanged meanwhile.
    """
    paths, checkpoint = run_paths(config, seed), checkpoint_of(config, seed)
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
        manifest: to go on from.
        source: the folder with the files that it names: a run on top of a saved one begins with that one's.
        begun: whether ``checkpoint`` holds this run already.
    """

    checkpoint: CheckpointFolder
    manifest: RunManifest
    source: CheckpointFolder
    begun: bool

    def begin(self, manifest: RunManifest) -> RunManifest:
        """Make the folder this run's: move another one's files aside, bring those of the saved run.

        To be called before the first ``commit``, once all features are there: a run that stops at an image that
        cannot be read has then moved nothing.
        """
        if self.begun:
            return manifest
        in_place = self.source.folder.resolve() == self.checkpoint.folder.resolve()
        if manifest.base is None or not (in_place or holds_copies_alone(self.checkpoint, manifest)):
            _move_aside(self.checkpoint)
        if manifest.base is not None:
            manifest = bring_files(manifest.base, self.checkpoint, manifest)
        self.checkpoint.write_manifest(manifest)
        return manifest


def find_earlier_start(setup: Setup, seed: int, paths: RunPaths, checkpoint: CheckpointFolder) -> Start:
    """Find what to go on from, or else make a new run's manifest. Of another run the report alone is moved aside.

    The caller holds both folders (``held_folders``).
    """
    identity, manifest = setup.identity(seed), checkpoint.read_manifest()
    begun = manifest is not None and manifest.identity == identity
    if not report_belongs_to(paths, identity) or (not begun and _report(paths).get("status") == "finished"):
        _move_report_aside(paths)
    if manifest is not None and begun:
        checkpoint.remove_old_files(manifest)  # an earlier start may have been killed before it could
        return Start(checkpoint, manifest, checkpoint, begun=True)
    if manifest is not None and setup.base is None:
        old = manifest.identity
        different = sorted(k for k in identity.keys() | old.keys() if old.get(k) != identity.get(k))
        log.info("%s holds another run (%s differ)", checkpoint.folder, ", ".join(different))
    new = _new_manifest(setup, seed, identity)
    # a start that ended before the run could begin has left its report: what it computed counts as well
    new = replace(new, missing_at_start=_report(paths).get("missing_at_start"))
    return Start(checkpoint, new, CheckpointFolder(setup.base.folder) if setup.base else checkpoint, begun=False)


def start_over(config: Config, seed: int) -> None:
    """Move what an earlier start of this or another run left aside, whatever its state.

    A checkpoint that the run is to continue in place stays: it is the beginning.
    """
    paths, checkpoint = run_paths(config, seed), checkpoint_of(config, seed)
    continued = Path(config.continue_from).expanduser().resolve() if config.continue_from else None
    with held_folders(config, seed):
        in_place = checkpoint.read_manifest() if continued == checkpoint.folder.resolve() else None
        if in_place is None or in_place.base is not None:
            _move_aside(checkpoint)
        _move_report_aside(paths)


@contextmanager
def started_over(configs: Sequence[Config]) -> Iterator[None]:
    """Move all that earlier starts of ``configs`` left aside first; whoever stops it then goes on without --fresh."""
    for config in configs:
        for seed in config.seed:
            start_over(config, seed)
    try:
        yield
    except Exception as error:
        fault = fault_of(error)
        if configs and fault.goes_on:
            fault.args = (f"{fault}; leave out --fresh then, which would start over",)
        if fault is error:
            raise
        raise fault from error
    except KeyboardInterrupt as stop:
        if not configs:
            raise
        raise Stopped(
            stop.number if isinstance(stop, Stopped) else signal.SIGINT,
            "start the same command again without --fresh to go on",
        ) from None


def _move_aside(checkpoint: CheckpointFolder) -> None:
    if aside := checkpoint.move_aside():
        log.info("Moved the files of an earlier run from %s to %s", checkpoint.folder, aside)


def _move_report_aside(paths: RunPaths) -> None:
    for moved in paths.move_aside():
        log.info("Moved the report of an earlier run to %s", moved)


def report_belongs_to(paths: RunPaths, identity: dict[str, Any]) -> bool:
    """Whether the JSON at ``paths`` (if any) is of the run with this identity."""
    if not paths.file(".json").exists():
        return not paths.file(".log").exists()
    return bool(_report(paths).get("identity") == identity)


def _report(paths: RunPaths) -> dict[str, Any]:
    try:
        return read_json(paths.file(".json"))
    except ConfigError:
        return {}


def _new_manifest(setup: Setup, seed: int, identity: dict[str, Any]) -> RunManifest:
    """Of a run that has done nothing yet, but for what the saved run has learned that it continues."""
    backbone, stream = setup.backbone, setup.stream(seed)
    manifest = RunManifest(
        identity=identity,
        config=setup.config.as_dict(),
        seed=seed,
        backbone=backbone_facts(backbone),
        data={
            "classes": len(setup.data.class_names),
            "train_images": len(setup.data.train),
            "test_images": len(setup.data.test),
            "images_sha256": setup.fingerprints,
        },
        versions=versions(),
        class_order=tuple(stream.class_names),
        task_sizes=tuple(stream.task_sizes),
        row_class=tuple(stream.row_class.tolist()),
        domains=tuple(stream.domains),
        continual=setup.config.method.continual,
    )
    return on_top(setup.base, manifest, stream) if setup.base else manifest


def changed_versions(manifest: RunManifest) -> list[str]:
    """``name old -> new`` for each version that changed since the run of ``manifest`` began."""
    old, now = manifest.versions, versions()
    return [f"{name} {old.get(name)} -> {now[name]}" for name in now if old.get(name) != now[name]]
