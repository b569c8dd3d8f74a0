"""On top of a saved run: which run that is, whether a new one fits it, and how its files come along.

A continued run has a checkpoint folder of its own, which begins as a copy of the saved run. If both are the same
folder, a copy of the saved run is set aside first and the folder grows.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.config.config import Config
from utils.data.tasks import LearnedClasses, TaskStream
from utils.errors import CheckpointError, ConfigError, DamagedRunError, DataError
from utils.runs.checkpoint import MANIFEST, MODULE_FILE, RESULTS, CheckpointFolder, moving_folder
from utils.runs.manifest import BaseFacts, RunManifest, fixed_once_saved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedRun:
    """A saved run on top of which another one learns.

    Attributes:
        folder: where its files are.
        manifest: one that begins with its tasks: its own, or that of the run that continues it.
        tasks: how many they are.
        sha256: of all that it has learned.
    """

    folder: Path
    manifest: RunManifest
    tasks: int
    sha256: str

    @property
    def learned(self) -> LearnedClasses:
        return self.manifest.learned(self.tasks)


def read_run(checkpoint: CheckpointFolder) -> RunManifest:
    """The manifest of a run that has learned something; where there is none, a fault says what is there instead."""
    manifest, folder = checkpoint.read_manifest(), checkpoint.folder
    if manifest is not None and manifest.tasks:
        return manifest
    if manifest is not None:
        raise CheckpointError(f"the run in {str(folder)!r} has not finished its first task")
    if seeds := sorted(path.parent.name for path in folder.glob(f"seed*/{MANIFEST}")):
        raise CheckpointError(f"{str(folder)!r} holds the runs of several seeds; choose one: {folder / seeds[0]}")
    names = [path.name for path in checkpoint.run_files()]
    if names and all(map(MODULE_FILE.fullmatch, names)):
        raise CheckpointError(
            f"{str(folder)!r} holds modules but no {MANIFEST}: the release's files come without a classifier, so they "
            "cannot predict; train with this project"
        )
    raise CheckpointError(f"{str(folder)!r} holds no run (no {MANIFEST}); give a run's checkpoint_dir")


def find_saved_run(config: Config, identity: Callable[[str], dict[str, Any]]) -> SavedRun:
    """The saved run that ``continue_from`` names.

    Where it is also the ``checkpoint_dir``, the run there may be the continued one, from an earlier start: then its
    own base is meant, and the same command goes on instead of learning the same images twice.

    Args:
        config: of the run that continues.
        identity: of that run on top of a base of the given SHA-256.
    """
    checkpoint = CheckpointFolder(Path(config.continue_from or "").expanduser())
    manifest = read_run(checkpoint)
    if config.seed != (manifest.seed,):
        raise ConfigError(
            f"seed {list(config.seed)} is not the seed of the run in {config.continue_from!r}, {manifest.seed}: a "
            f"continued run goes on with that; set seed={manifest.seed}"
        )
    earlier = manifest.base
    own = checkpoint.folder.resolve() == Path(config.checkpoint_dir).expanduser().resolve()
    if own and earlier and identity(earlier.sha256) == manifest.identity:
        return SavedRun(Path(earlier.folder), manifest, earlier.tasks, earlier.sha256)
    if not manifest.finished:
        raise CheckpointError(
            f"the run in {config.continue_from!r} has learned {len(manifest.tasks)} of {len(manifest.task_sizes)} "
            "tasks; finish it with its own config first, then continue"
        )
    base = SavedRun(checkpoint.folder, manifest, len(manifest.tasks), _sha256(manifest))
    _check_fits(config, base, identity(base.sha256))
    return base


def _check_fits(config: Config, base: SavedRun, new: dict[str, Any]) -> None:
    old = base.manifest.identity
    for key in fixed_once_saved(config):
        if old.get(key) != new.get(key):  # what departs from a default may stand in one of them alone
            advice = f"set {key}={old[key]}" if key in old else f"remove the key {key}"
            if key == "weights_sha256":
                advice = f"use the weights of {base.manifest.backbone['name']} that it was trained on"
            raise ConfigError(
                f"{key} {new.get(key)!r} is not that of the run in {config.continue_from!r}, {old.get(key)!r}; what it "
                f"has learned fits that alone: {advice}"
            )


def on_top(base: SavedRun, manifest: RunManifest, stream: TaskStream) -> RunManifest:
    """The ``manifest`` of a new run with the tasks and files of the ``base`` in front; nothing is written."""
    saved = read_run(CheckpointFolder(base.folder))
    if _sha256(saved) != base.sha256:
        raise CheckpointError(f"the run in {str(base.folder)!r} has other files than when it was found; start again")
    tested = tests_old(base, stream)
    untested = [number for number, record in enumerate(saved.tasks, start=1) if not record.results]
    facts = BaseFacts(
        folder=str(base.folder.resolve()),
        tasks=base.tasks,
        classes=len(base.learned.class_names),
        sha256=base.sha256,
        evaluation="old and new classes" if tested else "new classes alone",
        reported_from_task=max([saved.first_reported, *untested]) if tested else base.tasks,
    )
    return replace(manifest, files=saved.files, results_bytes=saved.results_bytes, tasks=saved.tasks, base=facts)


def bring_files(facts: BaseFacts, checkpoint: CheckpointFolder, manifest: RunManifest) -> RunManifest:
    """Copy the files of the saved run to ``checkpoint``, or, where they lie there, to a folder beside it."""
    source = CheckpointFolder(Path(facts.folder))
    if source.folder != checkpoint.folder.resolve():
        checkpoint.copy_files(source, manifest)
        return manifest
    folder = source.copy_aside(read_run(source))
    log.info("A copy of the run that is continued is in %s", folder)
    return replace(manifest, base=replace(facts, folder=str(folder)))


def holds_copies_alone(checkpoint: CheckpointFolder, manifest: RunManifest) -> bool:
    """Whether all files of runs in ``checkpoint`` are those of ``manifest``: ``bring_files`` was killed at work."""
    try:
        for path in checkpoint.run_files():
            checkpoint.check(manifest, path.name)
    except DamagedRunError:
        return False
    return not moving_folder(checkpoint.folder.resolve()).is_dir()


def tests_old(base: SavedRun, stream: TaskStream) -> bool:
    """Whether the data tests what the base has learned: all of it or nothing; only some of it is a fault."""
    old = [(task, number) for task in stream.tasks[: base.tasks] for number in stream.row_class[task.rows]]
    lacking = [stream.class_names[number] for task, number in old if number not in task.test_classes]
    if 0 < len(lacking) < len(old):
        raise DataError(
            f"the test folder holds {len(old) - len(lacking)} of the classes of the saved run, but not {lacking[0]!r}; "
            "give the test images of all of them, or of none to test the new classes alone"
        )
    return not lacking


def _sha256(manifest: RunManifest) -> str:
    tensors = {name: sha256 for name, sha256 in manifest.files.items() if name != RESULTS}
    facts = {"files": tensors, **manifest.learned().as_json()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()
