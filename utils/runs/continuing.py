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
from utils.files import sha256_of_file
from utils.runs.checkpoint import EVALUATION_FILE, MANIFEST, MODULE_FILE, CheckpointFolder, moving_folder
from utils.runs.identity import fixed_once_saved
from utils.runs.json_values import JsonValues
from utils.runs.manifest import BaseFacts, RunManifest, TaskRecord

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


def _check_facts(manifest: RunManifest) -> None:
    """Check what is read by name from the manifest's free parts.

    Raises:
        CheckpointError: something is absent or of another kind; it is named.
    """
    backbone, data = JsonValues(manifest.backbone, "backbone's "), JsonValues(manifest.data, "data's ")
    for name in ("name", "weights_sha256", "precision"):
        backbone.read(name, str)
    data.read("train_images", int)
    JsonValues(manifest.identity, "identity's ").items("learned_by_hand", str, [])


def read_run(checkpoint: CheckpointFolder) -> RunManifest:
    """The manifest of a run that has learned something.

    Raises:
        CheckpointError: there is none; the message says what is there instead. DamagedRunError: it is damaged.
    """
    manifest = checkpoint.read_manifest()
    if manifest is not None and manifest.tasks:
        try:
            _check_facts(manifest)
        except CheckpointError as error:
            raise DamagedRunError(f"{checkpoint.manifest_path} is damaged ({error})") from None
        return manifest
    folder = checkpoint.folder
    if manifest is not None:
        raise CheckpointError(f"the run in {str(folder)!r} has not finished its first task")
    if seeds := sorted(path.parent.name for path in folder.glob(f"seed*/{MANIFEST}")):
        raise CheckpointError(f"{str(folder)!r} holds the runs of several seeds; choose one: {folder / seeds[0]}")
    if any(MODULE_FILE.fullmatch(path.name) for path in checkpoint.run_files()):
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

    Raises:
        CheckpointError: no run there, a damaged or an unfinished one. ConfigError: this run does not fit it.
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


def adopt(base: SavedRun, checkpoint: CheckpointFolder, manifest: RunManifest, stream: TaskStream) -> RunManifest:
    """Copy the base's files to ``checkpoint`` and return the ``manifest`` of a run that begins with its tasks.

    Nothing of the base is changed or lost: if it lies in ``checkpoint``, a copy is set aside.

    Raises:
        CheckpointError: it changed since ``find_saved_run``, or is damaged. DataError: see ``tests_old``.
    """
    source = CheckpointFolder(base.folder)
    saved = read_run(source)
    if _sha256(saved) != base.sha256:
        raise CheckpointError(f"the run in {str(base.folder)!r} has changed while it was read; start again")
    source.load(saved)  # damage shows here, before anything is written
    folder = base.folder
    if base.folder.resolve() == checkpoint.folder.resolve():
        folder = source.copy_aside(saved)
        log.info("A copy of the run that is continued is in %s", folder)
    else:
        checkpoint.copy_files(source, saved)
    first = base.tasks
    if tests_old(base, stream):
        first = max((i + 1 for i, record in enumerate(saved.tasks) if not record.results), default=0)
    return replace(
        manifest,
        files=dict(saved.files),
        tasks=tuple(record if i >= first else _untested(record) for i, record in enumerate(saved.tasks)),
        base=BaseFacts(
            folder=str(folder.resolve()),
            tasks=base.tasks,
            classes=len(base.learned.class_names),
            sha256=base.sha256,
            evaluation="old and new classes" if tests_old(base, stream) else "new classes alone",
            reported_from_task=first,
        ),
    )


def holds_copies_alone(checkpoint: CheckpointFolder, base: SavedRun) -> bool:
    """Whether all files of runs in ``checkpoint`` are copies of the base's: ``adopt`` was killed while it copied."""
    files, saved = checkpoint.run_files(), base.manifest.files
    try:
        same = [sha256_of_file(path) == saved.get(path.name) for path in files]
    except OSError:
        return False
    return bool(files) and all(same) and not moving_folder(checkpoint.folder.resolve()).is_dir()


def _untested(record: TaskRecord) -> TaskRecord:
    return replace(record, results={}, confusion={}, entropy={}, details={})


def tests_old(base: SavedRun, stream: TaskStream) -> bool:
    """Whether the data tests what the base has learned: all of it or nothing.

    Raises:
        DataError: some of its classes have test images, others have none.
    """
    lacking = [
        name
        for task in stream.tasks[: base.tasks]
        for row, name in zip(task.rows, (stream.class_names[c] for c in stream.row_class[task.rows]), strict=True)
        if not (task.test_classes == stream.row_class[row]).any()
    ]
    tested = sum(len(task.rows) for task in stream.tasks[: base.tasks]) - len(lacking)
    if tested and lacking:
        raise DataError(
            f"the test folder holds {tested} of the classes of the saved run, but not {lacking[0]!r}; give the test "
            "images of all of them, or of none to test the new classes alone"
        )
    return not lacking


def _sha256(manifest: RunManifest) -> str:
    tensors = {name: sha256 for name, sha256 in manifest.files.items() if not EVALUATION_FILE.fullmatch(name)}
    facts = {"files": tensors, **manifest.learned().as_json()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()
