"""What a start of a run finds on disk: an earlier start to go on from, or another run to move aside."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.config.config import Config
from utils.errors import ConfigError
from utils.files import FolderLock, read_json, remove_partials
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import adopt, holds_copies_alone
from utils.runs.identity import versions
from utils.runs.manifest import RunManifest
from utils.runs.paths import WRITTEN_WHOLE, RunPaths, run_paths
from utils.runs.setup import Setup, checkpoint_of

log = logging.getLogger(__name__)


@contextmanager
def held_folders(config: Config, seed: int) -> Iterator[Callable[[], None]]:
    """Hold the checkpoint folder and the report of a run for this process; what killed writes left there is removed.

    Gives a function that raises a ``UserError`` if one of the two was removed or exchanged meanwhile.

    Raises:
        UserError: another process is at work there.
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


def start_over(config: Config, seed: int) -> None:
    """Move what an earlier start of this or another run left aside, whatever its state.

    A checkpoint that the run is to continue in place stays: it is the beginning.
    """
    paths, checkpoint = run_paths(config, seed), checkpoint_of(config, seed)
    with held_folders(config, seed):
        if not _continues_here(config, checkpoint):
            _move_aside(checkpoint)
        _move_report_aside(paths)


def find_earlier_start(setup: Setup, seed: int, paths: RunPaths, checkpoint: CheckpointFolder) -> RunManifest:
    """Return the manifest to go on from, which is on disk; that of a new run where there is none of this run.

    Files of another run are moved aside first. The caller holds both folders (``held_folders``).

    Raises:
        CheckpointError: what is there is damaged or cannot be moved.
    """
    identity = setup.identity(seed)
    manifest = checkpoint.read_manifest()
    grows_in_place = setup.base is not None and setup.base.folder.resolve() == checkpoint.folder.resolve()
    if manifest is not None and manifest.identity != identity:
        if not grows_in_place:
            old = manifest.identity
            different = sorted(k for k in identity.keys() | old.keys() if old.get(k) != identity.get(k))
            log.info("%s holds another run (%s differ)", checkpoint.folder, ", ".join(different))
        manifest = None
    unfinished_copy = setup.base is not None and holds_copies_alone(checkpoint, setup.base)
    if manifest is None and not grows_in_place and not unfinished_copy:
        _move_aside(checkpoint)
    if manifest is None or not report_belongs_to(paths, identity):
        _move_report_aside(paths)
    if manifest is None:
        manifest = _new_manifest(setup, seed, identity, checkpoint)
        checkpoint.write_manifest(manifest)
    checkpoint.remove_old_files(manifest)  # an earlier start may have been killed before it could
    return manifest


def _continues_here(config: Config, checkpoint: CheckpointFolder) -> bool:
    """Whether the folder holds the very run that ``continue_from`` names, not yet continued."""
    if config.continue_from is None:
        return False
    same = Path(config.continue_from).expanduser().resolve() == checkpoint.folder.resolve()
    if not same:
        return False
    manifest = checkpoint.read_manifest()
    return manifest is not None and manifest.base is None


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
    try:
        return bool(read_json(paths.file(".json")).get("identity") == identity)
    except ConfigError:
        return False


def _new_manifest(setup: Setup, seed: int, identity: dict[str, Any], checkpoint: CheckpointFolder) -> RunManifest:
    """Of a run that has done nothing yet; on top of a saved run, after its files are in ``checkpoint``."""
    backbone, stream = setup.backbone, setup.stream(seed)
    manifest = RunManifest(
        identity=identity,
        config=setup.config.as_dict(),
        seed=seed,
        backbone={
            "name": backbone.name,
            "weights_sha256": backbone.weights_sha256,
            "feature_dim": backbone.feature_dim,
            "precision": backbone.precision,
            "parameters": backbone.parameters,
            "pooling": backbone.pooling,
        },
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
    return adopt(setup.base, checkpoint, manifest, stream) if setup.base else manifest


def changed_versions(manifest: RunManifest) -> list[str]:
    """Return ``name old -> new`` for each version that changed since the run of ``manifest`` began."""
    old, now = manifest.versions, versions()
    return [f"{name} {old.get(name)} -> {now[name]}" for name in now if old.get(name) != now[name]]
