"""A run as a story: for each seed and task, learn, evaluate on all classes seen, record, save."""

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbone.vit import load_backbone, resolve_device
from models import make_learner, training_features
from models.cost import CostMeter
from models.evaluation import evaluate
from models.task_data import BankTask
from utils.config import Config
from utils.data.check import check_images
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.tasks import TaskStream, make_stream
from utils.errors import ConfigError, NumericError
from utils.features.arrays import View
from utils.features.bank import resolve_cache_dir
from utils.features.batches import TEST_VIEW
from utils.files import FolderLock, remove_partials
from utils.grid import Cell
from utils.hardware import ONE_RANK, Ranks, available_cpus, joined_ranks
from utils.logs import logging_to
from utils.results import record as report
from utils.results.predictions import write_predictions
from utils.results.read import Run
from utils.results.render import as_text
from utils.results.tables import make_sections
from utils.results.tracker import Tracker, check_tracker, tracking
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import SavedRun, find_saved_run, tests_old
from utils.runs.manifest import BaseFacts, RunManifest
from utils.runs.paths import RunPaths, run_paths
from utils.runs.plan import plan
from utils.runs.resume import changed_versions, find_earlier_start
from utils.runs.setup import Setup

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


def dry_run(config: Config) -> dict[str, Any]:
    """Check config, data and backbone as a run does; log what it would do; write nothing but the images' hashes.

    Raises:
        UserError: what a run would stop at before its first forward pass.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--dry-run looks at one process; start it without torchrun")
    setup = prepare(config, ONE_RANK)
    return plan(setup, wanted_features(config), with_modules=config.method.modular)


# -- what all seeds share ---------------------------------------------------------------------------------------------


def prepare(config: Config, ranks: Ranks, loaded: Setup | None = None) -> Setup:
    """Load data and backbone, cheap checks first; ``loaded`` has the same ones at hand."""
    check_tracker(config)
    device = loaded.backbone.device if loaded else resolve_device(config, ranks.local_rank, ranks.count)
    data = loaded.data if loaded else load_dataset(config)
    if config.continue_from is None:
        make_stream(data, config, config.seed[0])  # more classes asked for than there are is known here
    elif not config.method.continual:
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

    base = setup.ranks.share(find_saved_run(setup.config, identity) if setup.ranks.first else None)
    setup = replace(setup, base=base)
    tests_old(base, setup.stream(seed))
    return setup


def wanted_features(config: Config) -> list[View]:
    """Every (split, view) that a run reads."""
    return [("test", TEST_VIEW), *training_features(config)]


# -- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(setup: Setup, seed: int, *, fresh: bool) -> dict[str, Any] | None:
    """Learn all tasks under one seed, from wherever an earlier start of the same run stopped."""
    if not setup.ranks.first:
        if not setup.ranks.share(None):  # rank 0 says whether there is anything left to do
            setup.bank(seed).fill(wanted_features(setup.config))
        return None
    paths, checkpoint = run_paths(setup.config, seed), setup.checkpoint(seed)
    with (
        FolderLock(checkpoint.folder / ".lock", f"checkpoint_dir {str(checkpoint.folder)!r}"),
        FolderLock(paths.folder / f".{paths.stem}.lock", f"log {str(paths.file('.log'))!r}"),
    ):
        checkpoint.remove_partials()
        remove_partials(paths.folder, re.escape(paths.stem) + r"\.(json|png|csv|npz)")
        manifest = find_earlier_start(setup, seed, paths, checkpoint, fresh=fresh)
        report.write_run_json(paths, manifest)  # before the log begins, so that the next start knows whose log it is
        with (
            logging_to(paths.file(".log")),
            tracking(setup.config, paths.folder, paths.stem) as tracker,
        ):
            return _run_tasks(setup, seed, paths, checkpoint, manifest, tracker)


def _run_tasks(
    setup: Setup,
    seed: int,
    paths: RunPaths,
    checkpoint: CheckpointFolder,
    manifest: RunManifest,
    tracker: Tracker,
) -> dict[str, Any]:
    config, backbone = setup.config, setup.backbone
    stream = setup.stream(seed)
    done, total = len(manifest.tasks), len(stream.tasks)
    setup.ranks.share(manifest.finished)
    learner = make_learner(config, backbone.feature_dim, backbone.device, seed)
    if done:
        learner.load_state_dict(*checkpoint.load(manifest))
    if manifest.finished:
        log.info("This run is finished (%s); --fresh starts it over", checkpoint.folder)
        run = report.run_json(manifest)
        report.log_curves(run["results"], _shown_selection(config, manifest))
        report.log_summary(run)
        tracker.update(manifest.tasks)  # the start that finished it may have been killed before this
        report.draw_curves(paths, run)
        tracker.finish(run, [paths.file(".png")])
        return run

    _log_header(setup, seed, stream)
    if setup.base and manifest.base:
        _log_base(setup.base, manifest.base)
    if done > (setup.base.tasks if setup.base else 0):
        log.info("Resuming from %s after task %d of %d", checkpoint.folder, done, total)
        if changed := changed_versions(manifest):
            log.warning("Versions changed since this run began: %s; its end may differ", ", ".join(changed))
    seconds = dict(manifest.seconds)
    bank, wanted = setup.bank(seed), wanted_features(config)
    missing = bank.missing(wanted)
    first_missing = missing if manifest.missing_at_start is None else manifest.missing_at_start
    manifest = replace(manifest, config=config.as_dict(), missing_at_start=first_missing)
    checkpoint.write_manifest(manifest)
    report.write_run_json(paths, manifest)
    with _timed(seconds, "features"):
        bank.fill(wanted)
    # what earlier, interrupted starts of this run computed counts as well
    manifest = replace(manifest, backbone_forwards=max(0, first_missing - missing) + bank.forwards)

    meter = CostMeter(config, learner, stream, manifest.cost)
    for task in stream.tasks[done:]:
        log.info("Task %d of %d: learning rows %d to %d", task.index + 1, total, task.rows.start, task.rows.stop - 1)
        with _timed(seconds, "train"), meter.learning():
            learner.learn(BankTask(bank, stream, task, config.views, backbone.device))
        with _timed(seconds, "evaluate"):
            tested = evaluate(learner, bank, stream, task.index, seed)
        record = replace(tested.record, parameters={"backbone": backbone.parameters, **learner.parameter_counts()})
        manifest = manifest.with_task(record, seconds=dict(seconds), cost=meter.counted)
        if manifest.finished:
            answers = tested.predictions(setup.data.test.keys, stream.class_names)
            write_predictions(paths.file(".npz"), answers)
            manifest = manifest.with_last_results(answers.details(), meter.summary(manifest, backbone))
        manifest = checkpoint.commit(manifest, learner.state_dict(), learner.module_state(task.index), task.index)
        run = report.write_run_json(paths, manifest)
        tracker.update(manifest.tasks)
        selection = _shown_selection(config, manifest)
        report.log_task(record, selection)
        report.log_curves(run["results"], selection)
    report.log_summary(run)
    report.draw_curves(paths, run)
    tracker.finish(run, [paths.file(".png")])
    return run


def _shown_selection(config: Config, manifest: RunManifest) -> str:
    """The selection of the log's ``CNN`` lines: the one asked for, if the method has it."""
    return config.selection if config.selection in manifest.tasks[-1].results else "sample"


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] += time.monotonic() - started


def _log_header(setup: Setup, seed: int, stream: TaskStream) -> None:
    log.info("Config: %s", setup.config.as_dict())
    for line in setup.config.remarks:
        log.info("Config: %s", line)
    log.info("Backbone: %s", setup.backbone)
    log.info("Seed %d, class order: %s", seed, list(stream.class_names))


def _log_base(base: SavedRun, facts: BaseFacts) -> None:
    log.info(
        "Continuing the run in %s: %d tasks, %d classes; evaluation covers %s",
        *(base.folder, facts.tasks, facts.classes, facts.evaluation),
    )


# -- a sweep -----------------------------------------------------------------------------------------------------------


def run_sweep(cells: Sequence[Cell], *, fresh: bool = False) -> list[dict[str, Any]]:
    """Run every cell under every seed; what an earlier start finished is kept. Return what the runs' JSONs hold.

    A cell whose training diverges is told at the end; the others go on.

    Raises:
        UserError: as in ``run``. NumericError: some cells diverged.
    """
    runs, failed, setup, done = [], [], None, 0
    with joined_ranks() as ranks:
        if cells[0].config.cache_dir == "none":
            log.warning("cache_dir=none: every run of the sweep computes its features anew")
        for number, cell in enumerate(cells, start=1):
            setup = _prepare_cell(cell.config, ranks, setup)
            for seed in cell.config.seed:
                kept = None if fresh else _finished(setup, seed)
                if kept is None:
                    log.info("Sweep: %s, seed %d (cell %d of %d)", cell.name, seed, number, len(cells))
                    try:
                        kept = run_seed(setup, seed, fresh=fresh)
                    except NumericError as error:
                        if ranks.count > 1:  # the other ranks wait in a barrier that this one would never reach
                            raise
                        failed.append(f"{cell.name}, seed {seed}: {error}")
                        log.error("Sweep: %s", failed[-1])
                else:
                    done += 1
                runs.append(kept)
    runs = [run for run in runs if run is not None]
    if ranks.first:
        _log_sweep(cells, runs, done)
    if failed:
        raise NumericError(f"{len(failed)} of {len(runs) + len(failed)} runs diverged: {'; '.join(failed)}")
    return runs


def _prepare_cell(config: Config, ranks: Ranks, before: Setup | None) -> Setup:
    """The setup of a cell, with data and backbone of the cell before it where they are the same."""
    if before is not None:
        return prepare(config, ranks, loaded=before if config.shares_backbone_with(before.config) else None)
    return prepare(config, ranks)


def _finished(setup: Setup, seed: int) -> dict[str, Any] | None:
    """What the JSON of a finished run holds; None if there is something left to do."""
    manifest = None
    if setup.ranks.first and run_paths(setup.config, seed).file(".json").exists():
        manifest = setup.checkpoint(seed).read_manifest()
        if manifest and (not manifest.finished or manifest.identity != setup.identity(seed)):
            manifest = None
    manifest = setup.ranks.share(manifest)
    return report.run_json(manifest) if manifest else None


def _log_sweep(cells: Sequence[Cell], runs: Sequence[dict[str, Any]], done: int) -> None:
    """The closing table: the selection asked for beside ``sample`` and ``oracle``."""
    selection = cells[0].config.selection
    sections, _ = make_sections([Run(run) for run in runs])
    for line in as_text(sections, [selection, "sample", "oracle"]).splitlines():
        log.info("%s", line)
    if done == len(runs) and runs:
        log.info("Sweep: all %d runs were finished already: nothing to do; --fresh starts them over", done)
    else:
        log.info("Sweep: %d runs, %d of them finished earlier", len(runs), done)
    log.info("Every selection, and pictures: python report.py %s", Path(cells[0].config.log_dir).parent)
