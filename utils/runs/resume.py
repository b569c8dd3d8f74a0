"""What a start of a run finds on disk: an earlier start to go on from, or another run to move aside."""

import logging
from typing import Any

from utils.errors import ConfigError
from utils.json_files import read_json
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import adopt
from utils.runs.manifest import RunManifest, versions
from utils.runs.paths import RunPaths
from utils.runs.setup import Setup

log = logging.getLogger(__name__)


def find_earlier_start(
    setup: Setup, seed: int, paths: RunPaths, checkpoint: CheckpointFolder, *, fresh: bool
) -> RunManifest:
    """Return the manifest to go on from, which is on disk; that of a new run where there is none of this run.

    Files of another run, and with ``fresh`` of this one, are moved aside first. The caller holds both folders' locks.

    Args:
        setup: what all seeds share.
        seed: which of them this is.
        paths: where the run's report goes.
        checkpoint: where its modules go.
        fresh: take nothing from an earlier start.

    Raises:
        CheckpointError: what is there is damaged or cannot be moved.
    """
    identity = setup.identity(seed)
    manifest = None if fresh else checkpoint.read_manifest()
    if manifest is not None and manifest.identity != identity:
        old = manifest.identity
        different = sorted(k for k in identity.keys() | old.keys() if old.get(k) != identity.get(k))
        log.info("%s holds another run (%s differ)", checkpoint.folder, ", ".join(different))
        manifest = None
    grows_in_place = setup.base is not None and setup.base.folder.resolve() == checkpoint.folder.resolve()
    if manifest is None and not grows_in_place and (aside := checkpoint.move_aside()):
        log.info("Moved the files of an earlier run from %s to %s", checkpoint.folder, aside)
    if manifest is None or not _report_belongs_to(paths, identity):
        for moved in paths.move_aside():
            log.info("Moved the report of an earlier run to %s", moved)
    if manifest is None:
        manifest = _new_manifest(setup, seed, identity, checkpoint)
        checkpoint.write_manifest(manifest)
    checkpoint.remove_old_files(manifest)  # an earlier start may have been killed before it could
    return manifest


def _report_belongs_to(paths: RunPaths, identity: dict[str, Any]) -> bool:
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
