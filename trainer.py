"""A run as a story: for each seed and task, learn, evaluate on all classes seen, record, save."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbone.vit import Backbone, load_backbone, resolve_device
from models import LEARNERS, make_learner, training_features
from models.bank_task import BankTask
from models.evaluation import evaluate
from utils import report
from utils.arrays import Wanted
from utils.checkpoint import FORMAT, CheckpointFolder, run_identity
from utils.config import Config
from utils.continuing import Base, adopt, find_base, tests_old
from utils.data import Dataset, available_cpus, check_images, load_dataset
from utils.distributed import Ranks, joined_ranks
from utils.errors import ConfigError
from utils.features import FeatureBank, resolve_cache_dir
from utils.files import FolderLock, remove_partials
from utils.fingerprints import fingerprint_splits
from utils.loading import TEST_VIEW
from utils.tasks import TaskStream, make_stream
from utils.tracker import Tracker, check_tracker, tracking

log = logging.getLogger(__name__)


def run(config: Config, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Run every seed of ``config``; return what each run's JSON holds (under torchrun, on rank 0).

    Args:
        config: what to do.
        fresh: start over; what an earlier start left is moved aside.

    Raises:
        UserError: bad data, weights, files or numbers, in one line.
    """
    with joined_ranks() as ranks:
        setup = prepare(config, ranks)
        runs = [run_seed(setup, seed, fresh=fresh) for seed in config.seed]
    if ranks.first and len(runs) > 1:
        report.log_seeds(runs)
    return runs if ranks.first else []


# -- what all seeds share ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Config, data and backbone, checked against each other."""

    config: Config
    data: Dataset
    backbone: Backbone
    fingerprints: dict[str, str]  # of each split's images
    ranks: Ranks
    base: Base | None = None  # the saved run that this one continues

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
        return self.identity_on(self.base.sha256 if self.base else None, seed)

    def identity_on(self, base_sha256: str | None, seed: int) -> dict[str, Any]:
        """The identity of a run on top of a saved one (or of none)."""
        identity = run_identity(
            self.config,
            seed,
            weights_sha256=self.backbone.weights_sha256,
            precision=self.backbone.precision,
            images_sha256=self.fingerprints,
        )
        return identity if base_sha256 is None else {**identity, "base": base_sha256}

    def checkpoint(self, seed: int) -> CheckpointFolder:
        """``tosca/``, or with several seeds ``tosca/seed<seed>/``."""
        folder = Path(self.config.checkpoint_dir).expanduser()
        return CheckpointFolder(folder / f"seed{seed}" if len(self.config.seed) > 1 else folder)


def prepare(config: Config, ranks: Ranks, loaded: Setup | None = None) -> Setup:
    """Load data and backbone, cheap checks first; ``loaded`` has the same ones at hand."""
    check_tracker(config)
    device = loaded.backbone.device if loaded else resolve_device(config, ranks.local_rank, ranks.count)
    data = loaded.data if loaded else load_dataset(config)
    if config.continue_from is None:
        make_stream(data, config, config.seed[0])  # more classes asked for than there are is known here
    elif not LEARNERS[config.model_name].continual:
        raise ConfigError(f"{config.model_name} needs the data of all tasks; it cannot continue a saved run")
    if config.num_workers is not None and config.num_workers > available_cpus():
        log.warning("num_workers %d is above the %d CPUs of this process", config.num_workers, available_cpus())
    if config.check_images and ranks.first and not loaded:
        check_images(data, threads=available_cpus())
    backbone = loaded.backbone if loaded else load_backbone(config, device)
    for name in ("mlp_ratio", "se_ratio"):
        if getattr(config, name) > backbone.feature_dim:
            raise ConfigError(
                f"{name} {getattr(config, name)} is above the feature width {backbone.feature_dim} of {backbone.name}"
            )
    if loaded:
        fingerprints = loaded.fingerprints
    else:
        own = fingerprint_splits(data, resolve_cache_dir(config.cache_dir)) if ranks.first else None
        fingerprints = ranks.share(own)
    setup = Setup(config, data, backbone, fingerprints, ranks)
    return setup if config.continue_from is None else _on_top(setup)


def _on_top(setup: Setup) -> Setup:
    """The setup with the saved run that it continues."""
    seed = setup.config.seed[0]

    def identity(base_sha256: str) -> dict[str, Any]:
        return setup.identity_on(base_sha256, seed)

    base = setup.ranks.share(find_base(setup.config, identity) if setup.ranks.first else None)
    setup = replace(setup, base=base)
    tests_old(base, setup.stream(seed))
    return setup


def wanted_features(config: Config) -> list[Wanted]:
    """Every (split, view) that a run reads."""
    return [("test", TEST_VIEW), *training_features(config)]


# -- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(setup: Setup, seed: int, *, fresh: bool) -> dict[str, Any] | None:
    """Learn all tasks under one seed, from wherever an earlier start of the same run stopped."""
    if not setup.ranks.first:
        if not setup.ranks.share(None):  # rank 0 says whether there is anything left to do
            setup.bank(seed).fill(wanted_features(setup.config))
        return None
    paths, checkpoint = report.run_paths(setup.config, seed), setup.checkpoint(seed)
    with (
        FolderLock(checkpoint.folder / ".lock", f"checkpoint_dir {str(checkpoint.folder)!r}"),
        FolderLock(paths.folder / f".{paths.stem}.lock", f"log {str(paths.file('.log'))!r}"),
    ):
        checkpoint.remove_partials()
        remove_partials(paths.folder, re.escape(paths.stem) + r"\.(json|png|csv)")
        manifest = _find_earlier_start(setup, seed, paths, checkpoint, fresh=fresh)
        with (
            report.logging_to(paths.file(".log")),
            tracking(setup.config, paths.file(".tensorboard")) as tracker,
        ):
            return _run_tasks(setup, seed, paths, checkpoint, manifest, tracker)


def _find_earlier_start(
    setup: Setup, seed: int, paths: report.RunPaths, checkpoint: CheckpointFolder, *, fresh: bool
) -> dict[str, Any]:
    """The manifest to go on from. Files of another run, and with ``fresh`` of this one, are moved aside first."""
    identity = setup.identity(seed)
    manifest = None if fresh else checkpoint.read_manifest()
    if manifest is not None and manifest["identity"] != identity:
        old = manifest["identity"]
        different = sorted(k for k in identity.keys() | old.keys() if old.get(k) != identity.get(k))
        log.info("%s holds another run (%s differ)", checkpoint.folder, ", ".join(different))
        manifest = None
    grows_in_place = setup.base is not None and setup.base.folder.resolve() == checkpoint.folder.resolve()
    if manifest is None and not grows_in_place and (aside := checkpoint.move_aside()):
        log.info("Moved the files of an earlier run from %s to %s", checkpoint.folder, aside)
    if manifest is None or not report.belongs_to(paths, identity):
        for moved in paths.move_aside():
            log.info("Moved the report of an earlier run to %s", moved)
    if manifest is None:
        manifest = _new_manifest(setup, seed, identity, checkpoint)
        checkpoint.write_manifest(manifest)
    checkpoint.remove_old_classifiers(manifest)  # an earlier start may have been killed before it could
    report.write_run_json(paths, manifest)  # before the log begins, so that the next start knows whose log it is
    return manifest


def _new_manifest(setup: Setup, seed: int, identity: dict[str, Any], checkpoint: CheckpointFolder) -> dict[str, Any]:
    """Of a run that has done nothing yet; on top of a saved run, after its files are in ``checkpoint``."""
    config, backbone = setup.config, setup.backbone
    stream = setup.stream(seed)
    manifest = {
        "format": FORMAT,
        "status": "running",
        "identity": identity,
        "config": config.as_dict(),
        "seed": seed,
        "backbone": {
            "name": backbone.name,
            "weights_sha256": backbone.weights_sha256,
            "feature_dim": backbone.feature_dim,
            "precision": backbone.precision,
            "parameters": backbone.parameters,
        },
        "data": {
            "classes": len(setup.data.class_names),
            "train_images": len(setup.data.train),
            "test_images": len(setup.data.test),
            "images_sha256": setup.fingerprints,
        },
        "versions": report.versions(),
        "class_order": list(stream.class_names),
        "task_sizes": stream.task_sizes,
        "row_class": stream.row_class.tolist(),
        "domains": list(stream.domains),
        "continual": LEARNERS[config.model_name].continual,
        "missing_at_start": None,
        "backbone_forwards": 0,
        "seconds": {"features": 0.0, "train": 0.0, "evaluate": 0.0},
        "files": {},
        "tasks": [],
    }
    return adopt(setup.base, checkpoint, manifest, stream) if setup.base else manifest


def _run_tasks(
    setup: Setup,
    seed: int,
    paths: report.RunPaths,
    checkpoint: CheckpointFolder,
    manifest: dict[str, Any],
    tracker: Tracker,
) -> dict[str, Any]:
    config, backbone = setup.config, setup.backbone
    stream = setup.stream(seed)
    done, total = len(manifest["tasks"]), len(stream.tasks)
    finished = manifest["status"] == "finished"
    setup.ranks.share(finished)
    learner = make_learner(config, backbone.feature_dim, backbone.device, seed)
    if done:
        learner.load_state_dict(*checkpoint.load(manifest))
    if finished:
        log.info("This run is finished (%s); --fresh starts it over", checkpoint.folder)
        run = report.run_json(manifest)
        report.log_curves(run["results"], _shown_selection(config, manifest))
        report.log_summary(run)
        tracker.update(manifest["tasks"])  # the start that finished it may have been killed before this
        report.draw_curves(paths, run)
        return run

    _log_header(setup, seed, stream)
    if setup.base:
        _log_base(setup.base, manifest["base"])
    if done > (setup.base.tasks if setup.base else 0):
        log.info("Resuming from %s after task %d of %d", checkpoint.folder, done, total)
        if (old := manifest["versions"]) != (now := report.versions()):
            changed = [f"{name} {old.get(name)} -> {now[name]}" for name in now if old.get(name) != now[name]]
            log.warning("Versions changed since this run began: %s; its end may differ", ", ".join(changed))
    seconds = dict(manifest["seconds"])
    bank, wanted = setup.bank(seed), wanted_features(config)
    missing = bank.missing(wanted)
    first_missing = missing if manifest["missing_at_start"] is None else manifest["missing_at_start"]
    manifest = {**manifest, "config": config.as_dict(), "missing_at_start": first_missing}
    checkpoint.write_manifest(manifest)
    report.write_run_json(paths, manifest)
    with _timed(seconds, "features"):
        bank.fill(wanted)
    # what earlier, interrupted starts of this run computed counts as well
    manifest["backbone_forwards"] = max(0, first_missing - missing) + bank.forwards

    for task in stream.tasks[done:]:
        log.info("Task %d of %d: learning rows %d to %d", task.index + 1, total, task.rows.start, task.rows.stop - 1)
        with _timed(seconds, "train"):
            learner.learn(BankTask(bank, stream, task, config.views, backbone.device))
        with _timed(seconds, "evaluate"):
            record = evaluate(learner, bank, stream, task.index, seed)
        record["parameters"] = {"backbone": backbone.parameters, **learner.parameter_counts()}
        manifest = {
            **manifest,
            "tasks": [*manifest["tasks"], record],
            "seconds": seconds,
            "status": "finished" if task.index + 1 == total else "running",
        }
        manifest = checkpoint.commit(manifest, learner.state_dict(), learner.module_state(task.index), task.index)
        run = report.write_run_json(paths, manifest)
        tracker.update(manifest["tasks"])
        selection = _shown_selection(config, manifest)
        report.log_task(record, selection)
        report.log_curves(run["results"], selection)
    report.log_summary(run)
    report.draw_curves(paths, run)
    return run


def _shown_selection(config: Config, manifest: dict[str, Any]) -> str:
    """The selection of the log's ``CNN`` lines: the one asked for, if the method has it."""
    return config.selection if config.selection in manifest["tasks"][-1]["results"] else "sample"


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] += time.monotonic() - started


def _log_header(setup: Setup, seed: int, stream: TaskStream) -> None:
    log.info("Config: %s", setup.config.as_dict())
    log.info("Backbone: %s", setup.backbone)
    log.info("Seed %d, class order: %s", seed, list(stream.class_names))


def _log_base(base: Base, facts: dict[str, Any]) -> None:
    log.info(
        "Continuing the run in %s: %d tasks, %d classes; evaluation covers %s",
        *(base.folder, facts["tasks"], facts["classes"], facts["evaluation"]),
    )
