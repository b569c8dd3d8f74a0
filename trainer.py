"""A run as a story: for each seed and task, learn, evaluate on all classes seen, record, save."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from backbone.vit import Backbone
from models import load_learner
from models.base import Learner
from models.cost import CostMeter
from models.evaluation import evaluate
from models.preparation import prepare, wanted_features
from models.task_data import BankTask
from utils.cli import Stopped, fault_of
from utils.config.config import Config
from utils.config.grid import Cell
from utils.data.tasks import TaskStream
from utils.errors import ConfigError, NumericError
from utils.logs import epoch_bar, logging_to
from utils.ranks import ONE_RANK, Ranks, joined_ranks
from utils.results import record, run_log
from utils.results.predictions import write_predictions
from utils.results.tracker import Tracker, tracking
from utils.runs.checkpoint import CheckpointFolder, module_name
from utils.runs.manifest import EpochStats, RunManifest
from utils.runs.paths import RunPaths, run_paths
from utils.runs.plan import plan
from utils.runs.resume import changed_versions, find_earlier_start, held_folders, report_belongs_to, start_over
from utils.runs.setup import Setup

log = logging.getLogger(__name__)


HINT_LEAVE_OUT_FRESH = "leave out --fresh then, which would start over"
HINT_WITHOUT_FRESH = "start the same command again without --fresh to go on"


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
        with _started_over([config] if fresh else [], ranks):
            found = [run_seed(setup, seed) for seed in config.seed]
    runs = [run for run in found if run is not None]
    if len(runs) > 1:
        run_log.log_seeds(runs)
    return runs


@contextmanager
def _started_over(configs: Sequence[Config], ranks: Ranks) -> Iterator[None]:
    """Move all that earlier starts of ``configs`` left aside first; whoever stops it then goes on without --fresh."""
    if ranks.first:
        for config in configs:
            for seed in config.seed:
                start_over(config, seed)
    try:
        yield
    except Exception as error:
        fault = fault_of(error)
        if configs and fault.goes_on:
            fault.args = (f"{fault}; {HINT_LEAVE_OUT_FRESH}",)
        if fault is error:
            raise
        raise fault from error
    except KeyboardInterrupt as stop:
        if not configs:
            raise
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        raise Stopped(number, HINT_WITHOUT_FRESH) from None


def dry_run(config: Config) -> dict[str, Any]:
    """Check config, data and backbone as a run does; log what it would do; write nothing but the images' hashes.

    Raises:
        UserError: what a run would stop at before its first forward pass.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--dry-run looks at one process; start it without torchrun")
    setup = prepare(config, ONE_RANK)
    return plan(setup, wanted_features(config), with_modules=config.method.modular)


# -- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(setup: Setup, seed: int) -> dict[str, Any] | None:
    """Learn all tasks under one seed, from wherever an earlier start of the same run stopped."""
    if not setup.ranks.first:
        if not setup.ranks.share(None):  # rank 0 says whether there is anything left to do
            setup.bank(seed).fill(wanted_features(setup.config))
        return None
    paths, checkpoint = run_paths(setup.config, seed), setup.checkpoint(seed)
    with held_folders(setup.config, seed) as check_folders:
        manifest = find_earlier_start(setup, seed, paths, checkpoint)
        record.write_run_json(paths, manifest)  # before the log begins, so that the next start knows whose log it is
        with (
            logging_to(paths.file(".log")),
            tracking(setup.config, paths.folder, paths.stem) as tracker,
        ):
            setup.ranks.share(manifest.finished)
            outputs = Outputs(paths, checkpoint, tracker, check_folders)
            if manifest.finished:
                return _finished_already(setup, seed, outputs, manifest)
            return _run_tasks(setup, seed, outputs, manifest)


@dataclass(frozen=True)
class Outputs:
    """Where a run's results go, and a check that this is still the same place."""

    paths: RunPaths
    checkpoint: CheckpointFolder
    tracker: Tracker
    check_folders: Callable[[], None]


def _finished_already(setup: Setup, seed: int, outputs: Outputs, manifest: RunManifest) -> dict[str, Any]:
    """Say how a finished run ended; make again what the start that finished it may have been killed before."""
    load_learner(setup.config, setup.backbone, seed, outputs.checkpoint, manifest)  # damage shows here
    log.info("This run is finished (%s); --fresh starts it over", outputs.checkpoint.folder)
    run, selection = record.run_json(manifest), _shown_selection(setup.config, manifest)
    run_log.log_curves(run["results"], selection)
    outputs.tracker.update(manifest.tasks)
    record.draw_curves(outputs.paths, run)
    outputs.tracker.finish(run, [outputs.paths.file(".png")])
    run_log.log_summary(run, selection)
    return run


def _run_tasks(setup: Setup, seed: int, outputs: Outputs, manifest: RunManifest) -> dict[str, Any]:
    """Extract what the bank lacks, then learn, evaluate, save and report task after task."""
    config, backbone, checkpoint = setup.config, setup.backbone, outputs.checkpoint
    stream = setup.stream(seed)
    learner = load_learner(config, backbone, seed, checkpoint, manifest)
    _log_start(setup, seed, outputs, stream, manifest)
    seconds = dict(manifest.seconds)
    bank, wanted = setup.bank(seed), wanted_features(config)
    missing = bank.missing(wanted)
    first_missing = missing if manifest.missing_at_start is None else manifest.missing_at_start
    manifest = replace(manifest, config=config.as_dict(), missing_at_start=first_missing)
    checkpoint.write_manifest(manifest)
    record.write_run_json(outputs.paths, manifest)
    with _timed(seconds, "features"):
        bank.fill(wanted)
    # what earlier, interrupted starts of this run computed counts as well
    manifest = replace(manifest, backbone_forwards=max(0, first_missing - missing) + bank.forwards)

    meter = CostMeter(config, learner, stream, manifest.cost)
    for task in stream.tasks[len(manifest.tasks) :]:
        data = BankTask(bank, stream, task, config.views, backbone.device)
        parameters = {"backbone": backbone.parameters, **learner.parameter_counts(data)}
        run_log.log_task_start(task, parameters)
        with _timed(seconds, "train"), meter.learning():
            epochs = _learn(learner, data, config, run_log.task_title(stream, task.index))
        with _timed(seconds, "evaluate"):
            tested = evaluate(learner, bank, stream, task.index, seed)
        newest = replace(tested.record, parameters=parameters, epochs=epochs)
        manifest = manifest.with_task(newest, seconds=dict(seconds), cost=meter.counted)
        if manifest.finished:
            answers = tested.predictions(setup.data.test.keys, stream.class_names)
            write_predictions(outputs.paths.file(".npz"), answers)
            manifest = manifest.with_last_results(answers.details(), meter.summary(manifest, cast(Backbone, backbone)))
        outputs.check_folders()
        manifest = checkpoint.commit(manifest, learner.state_dict(), learner.module_state(task.index), task.index)
        run = _report_task(config, outputs, stream, manifest)
    outputs.check_folders()
    checkpoint.verify(manifest)
    record.draw_curves(outputs.paths, run)
    outputs.tracker.finish(run, [outputs.paths.file(".png")])
    run_log.log_summary(run, _shown_selection(config, manifest))
    return run


def _learn(learner: Learner, data: BankTask, config: Config, title: str) -> tuple[EpochStats, ...]:
    """Learn a task beside a progress bar and PILOT's lines; return what each epoch gave."""
    epochs: list[EpochStats] = []
    with epoch_bar(title, config.epochs, shown=config.method.augmented) as advance:

        def on_epoch(epoch: int, stats: EpochStats) -> None:
            epochs.append(stats)
            run_log.log_epoch(data.index, epoch, config.epochs, stats)
            advance(stats.loss, stats.accuracy)

        learner.learn(data, on_epoch)
    return tuple(epochs)


def _report_task(config: Config, outputs: Outputs, stream: TaskStream, manifest: RunManifest) -> dict[str, Any]:
    """Write what the newest task gave to JSON, CSV, tracker and log; return what the JSON holds."""
    run = record.write_run_json(outputs.paths, manifest)
    outputs.tracker.update(manifest.tasks)
    task, newest, selection = len(manifest.tasks) - 1, manifest.tasks[-1], _shown_selection(config, manifest)
    module = module_name(task)
    path = outputs.checkpoint.folder / module if module in manifest.files else None
    run_log.log_saved(config.model_name, path)
    run_log.log_task(newest, selection)
    run_log.log_curves(run["results"], selection)
    run_log.log_task_line(newest, selection, stream, task)
    return run


def _shown_selection(config: Config, manifest: RunManifest) -> str:
    """The selection of the log's ``CNN`` lines: the one asked for, if the method has it."""
    return config.selection if config.selection in manifest.tasks[-1].results else "sample"


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] += time.monotonic() - started


def _log_start(setup: Setup, seed: int, outputs: Outputs, stream: TaskStream, manifest: RunManifest) -> None:
    run_log.log_header(setup.config, setup.backbone, stream, seed)
    if setup.base and manifest.base:
        run_log.log_base(setup.base.folder, manifest.base)
    if (done := len(manifest.tasks)) > (setup.base.tasks if setup.base else 0):
        log.info("Resuming from %s after task %d of %d", outputs.checkpoint.folder, done, len(stream.tasks))
        if changed := changed_versions(manifest):
            log.warning("Versions changed since this run began: %s; its end may differ", ", ".join(changed))


# -- a sweep -----------------------------------------------------------------------------------------------------------


def run_sweep(cells: Sequence[Cell], *, fresh: bool = False) -> list[dict[str, Any]]:
    """Run every cell under every seed; what an earlier start finished is kept. Return what the runs' JSONs hold.

    A cell whose training diverges is told at the end; the others go on.

    Raises:
        UserError: as in ``run``. NumericError: some cells diverged.
    """
    runs: list[dict[str, Any]] = []
    failed: list[str] = []
    done = 0
    with joined_ranks() as ranks:
        if cells[0].config.cache_dir == "none":
            log.warning("cache_dir=none: every run of the sweep computes its features anew")
        setup = prepare(cells[0].config, ranks)
        with _started_over([cell.config for cell in cells] if fresh else [], ranks):
            for number, cell in enumerate(cells, start=1):
                setup = setup if number == 1 else _prepare_cell(cell.config, ranks, setup)
                for seed in cell.config.seed:
                    kept = _finished(setup, seed)
                    done += kept is not None
                    if kept is None:
                        log.info("Sweep: %s, seed %d (cell %d of %d)", cell.name, seed, number, len(cells))
                        kept = _run_cell(setup, cell, seed, failed)
                    runs += [] if kept is None else [kept]
    if ranks.first:
        run_log.log_sweep(cells, runs, done)
    if failed:
        raise NumericError(f"{len(failed)} of {len(runs) + len(failed)} runs diverged: {'; '.join(failed)}")
    return runs


def _run_cell(setup: Setup, cell: Cell, seed: int, failed: list[str]) -> dict[str, Any] | None:
    """Run a cell; one whose training diverges is added to ``failed``, so that the others go on."""
    try:
        return run_seed(setup, seed)
    except NumericError as error:
        if setup.ranks.count > 1:  # the other ranks wait in a barrier that this one would never reach
            raise
        failed.append(f"{cell.name}, seed {seed}: {error}")
        log.error("Sweep: %s", failed[-1])
        return None


def _prepare_cell(config: Config, ranks: Ranks, before: Setup) -> Setup:
    """The setup of a cell, with data and backbone of the cell before it where they are the same."""
    return prepare(config, ranks, loaded=before if config.shares_backbone_with(before.config) else None)


def _finished(setup: Setup, seed: int) -> dict[str, Any] | None:
    """What the JSON of a finished run holds, made again where it does not say so; None if something is left to do."""
    manifest: RunManifest | None = None
    if setup.ranks.first:
        paths, checkpoint = run_paths(setup.config, seed), setup.checkpoint(seed)
        manifest = checkpoint.read_manifest()
        if manifest and (not manifest.finished or manifest.identity != setup.identity(seed)):
            manifest = None
        if manifest and not report_belongs_to(paths, manifest.identity):
            manifest = None
        if manifest:
            with held_folders(setup.config, seed):
                manifest = find_earlier_start(setup, seed, paths, checkpoint)
                record.draw_curves(paths, record.write_run_json(paths, manifest))
    manifest = setup.ranks.share(manifest)
    return record.run_json(manifest) if manifest else None
