"""On top of a saved run: which run that is, and whether a new one fits it.

A continued run has a checkpoint folder of its own. Until its first task is learned it reads the saved run's files where
they are; with that task it saves all that it knows.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.config.config import Config
from utils.data.tasks import LearnedClasses, TaskStream
from utils.errors import CheckpointError, ConfigError, DataError
from utils.runs.checkpoint import RESULTS, CheckpointFolder, read_run
from utils.runs.manifest import BaseFacts, RunManifest


@dataclass(frozen=True)
class SavedRun:
    """A saved run on top of which another one learns: where its files are, and its manifest."""

    folder: Path
    manifest: RunManifest

    @property
    def learned(self) -> LearnedClasses:
        return self.manifest.learned()

    @property
    def sha256(self) -> str:
        """Of all that it has learned."""
        tensors = {name: sha256 for name, sha256 in self.manifest.files.items() if name != RESULTS}
        facts = {"files": tensors, **self.learned.as_json()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()


def find_saved_run(config: Config, identity: dict[str, Any]) -> SavedRun:
    """The saved run that ``continue_from`` names, on which a run of this identity can learn."""
    folder = Path(config.continue_from or "").expanduser()
    manifest = read_run(CheckpointFolder(folder))
    if config.seed != (manifest.seed,):
        raise ConfigError(
            f"seed {list(config.seed)} is not the seed of the run in {config.continue_from!r}, {manifest.seed}: a "
            f"continued run goes on with that; set seed={manifest.seed}"
        )
    if folder.resolve() == Path(config.checkpoint_dir).expanduser().resolve():
        raise ConfigError(
            f"continue_from and checkpoint_dir are both {config.checkpoint_dir!r}; set checkpoint_dir=<another>: "
            "it will hold all that is learned, and the saved run stays as it is"
        )
    if not manifest.finished:
        raise CheckpointError(
            f"the run in {config.continue_from!r} has learned {len(manifest.tasks)} of {len(manifest.task_sizes)} "
            "tasks; finish it with its own config first, then continue"
        )
    old = manifest.identity
    for key in fixed_once_saved(config):
        if old.get(key) != identity.get(key):  # what departs from a default may stand in one of them alone
            advice = f"set {key}={old[key]}" if key in old else f"remove the key {key}"
            if key == "weights_sha256":
                advice = f"use the weights of {manifest.backbone['name']} that it was trained on"
            raise ConfigError(
                f"{key} {identity.get(key)!r} is not that of the run in {config.continue_from!r}, {old.get(key)!r}; "
                f"what it has learned fits that alone: {advice}"
            )
    return SavedRun(folder, manifest)


def fixed_once_saved(config: Config) -> list[str]:
    """The entries of a run's identity in which a run that continues a saved one must agree with it.

    Modules and classifier were made for them; the rest (epochs, rate, views …) a new task may choose for itself.
    """
    return list(dict.fromkeys(key.identity_name for key in config.keys.values() if key.must_agree))


def on_top(base: SavedRun, manifest: RunManifest, stream: TaskStream) -> RunManifest:
    """The ``manifest`` of a new run with the tasks of the ``base`` in front; its files are still the base's own."""
    saved, tested = base.manifest, tests_old(base, stream)
    untested = [number for number, record in enumerate(saved.tasks, start=1) if not record.results]
    facts = BaseFacts(
        folder=str(base.folder.resolve()),
        tasks=len(saved.tasks),
        classes=len(base.learned.class_names),
        sha256=base.sha256,
        evaluation="old and new classes" if tested else "new classes alone",
        reported_from_task=max([saved.first_reported, *untested]) if tested else len(saved.tasks),
    )
    return replace(manifest, files=saved.files, results_bytes=saved.results_bytes, tasks=saved.tasks, base=facts)


def tests_old(base: SavedRun, stream: TaskStream) -> bool:
    """Whether the data tests what the base has learned: all of it or nothing; only some of it is a fault."""
    tasks = stream.tasks[: len(base.manifest.tasks)]
    old = [(task, number) for task in tasks for number in stream.row_class[task.rows]]
    lacking = [stream.class_names[number] for task, number in old if number not in task.test_classes]
    if 0 < len(lacking) < len(old):
        raise DataError(
            f"the test folder holds {len(old) - len(lacking)} of the classes of the saved run, but not {lacking[0]!r}; "
            "give the test images of all of them, or of none to test the new classes alone"
        )
    return not lacking
