"""A run as a story: prepare data and backbone; for each seed and task learn, evaluate, save, report."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from backbone.vit import Backbone
from models.api.classifier import ContinualClassifier
from models.api.predictor import Known
from models.cost import CostMeter
from models.evaluation import BankTask, evaluate
from models.preparation import prepare, wanted_features
from utils import module
from utils.cli import fault_of
from utils.config.config import Config
from utils.config.grid import SweepCell
from utils.data.loader import as_done
from utils.data.tasks import TaskStream
from utils.errors import BackboneError, ConfigError, DataError, NumericError, UserError
from utils.hardware import peak_bytes, use_full_fp32
from utils.logs import logging_to, logging_to_terminal, progress
from utils.ranks import ONE_RANK, Ranks, joined_ranks, world_size
from utils.results import record, run_log
from utils.results.tracker import Tracker, tracking
from utils.runs.checkpoint import CheckpointFolder, module_name
from utils.runs.manifest import RunManifest
from utils.runs.paths import RunPaths, run_paths
from utils.runs.resume import Start, changed_versions, find_earlier_start, held_folders, report_belongs_to, started_over
from utils.runs.setup import Setup

log = logging.getLogger(__name__)


def run(cells: Sequence[SweepCell], *, fresh: bool = False, jobs: int = 1) -> list[dict[str, Any]]:
    """Run every cell under every seed; return what the runs' JSONs hold (under torchrun, on rank 0).

    All are checked before the first one starts. Of several, one whose data is missing or whose training diverges is
    told at the end, and the others go on; what an earlier start finished is kept.

    Args:
        cells: what to do: one config, several files, or the grid of a sweep.
        fresh: start over; what is there is moved aside.
        jobs: so many runs side by side, each in a process of its own, once the feature bank is filled.
    """
    runs, failed, done = list[dict[str, Any]](), list[str](), 0
    with joined_ranks() as ranks:
        _check_jobs(cells, ranks, jobs)
        ready = _prepared(cells, ranks, failed)
        with started_over([setup.config for _, setup in ready] if fresh and ranks.first else []):
            todo = []
            for cell, setup in ready:
                for seed in setup.config.seed:
                    kept = _finished(setup, seed) if len(cells) > 1 or jobs > 1 else None
                    runs += [] if kept is None else [kept]
                    todo += [(cell, setup, seed)] if kept is None else []
            done = len(runs)
            several = len(cells) > 1
            finished = side_by_side(todo, jobs, failed, several) if jobs > 1 else _one_by_one(todo, failed, several)
            runs += [result for result in finished if result is not None]
    if ranks.first and len(cells) > 1:
        run_log.log_sweep(cells, runs, done)
    elif len(runs) > 1:
        run_log.log_seeds(runs)
    if failed:
        raise UserError(f"{len(failed)} of {len(failed) + len(runs)} runs are missing: {'; '.join(failed)}")
    return runs


Todo = Sequence[tuple[SweepCell, Setup, int]]


def _prepared(cells: Sequence[SweepCell], ranks: Ranks, failed: list[str]) -> list[tuple[SweepCell, Setup]]:
    """Check all cells; of several, those whose data or backbone cannot be had are added to ``failed``."""
    ready: list[tuple[SweepCell, Setup]] = []
    for cell in cells:
        with _told(cell.name, failed, among_others=len(cells) > 1 and ranks.count == 1):
            ready.append((cell, prepare(cell.config, ranks, ready[-1][1] if ready else None)))
    return ready


@contextmanager
def _told(name: str, failed: list[str], *, among_others: bool) -> Iterator[None]:
    """What keeps one of several runs from its end is told and added to ``failed``, and the others go on.

    Under torchrun it is raised: the other ranks would wait in a barrier that this one does not reach.
    """
    try:
        yield
    except (DataError, BackboneError, NumericError) as error:
        if not among_others:
            raise
        log.error("%s: %s", name, error)
        failed.append(f"{name}: {error}")


def _one_by_one(todo: Todo, failed: list[str], several: bool) -> Iterator[dict[str, Any] | None]:
    for number, (cell, setup, seed) in enumerate(todo, start=1):
        if several:
            log.info("%s, seed %d (run %d of %d)", cell.name, seed, number, len(todo))
        with _told(_name(cell, seed), failed, among_others=several and setup.ranks.count == 1):
            yield run_seed(setup, seed)


def _name(cell: SweepCell, seed: int) -> str:
    return f"{cell.name}, seed {seed}".removeprefix(", ")


def dry_run(cells: Sequence[SweepCell], *, jobs: int = 1) -> list[dict[str, Any]]:
    """Check config, data and backbone as a run does; log what would be done; write nothing but the images' hashes."""
    if world_size() > 1:
        raise ConfigError("--dry-run looks at one process; start it without torchrun")
    failed = list[str]()
    _check_jobs(cells, ONE_RANK, jobs)
    ready = _prepared(cells, ONE_RANK, failed)
    plan = module("utils.runs.plan")
    process, filled = peak_bytes(), set[Path]()  # a probe builds the backbone, which takes memory of its own
    planned = [plan.plan(setup, wanted_features(setup.config), filled) for _, setup in ready]
    if len(cells) > 1:
        plan.log_total(planned)
    if jobs > 1:
        plan.log_memory([setup for _, setup in ready], jobs, process)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cannot start: {'; '.join(failed)}")
    return planned


# -- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(setup: Setup, seed: int) -> dict[str, Any] | None:
    """Learn all tasks under one seed, from wherever an earlier start of the same run stopped."""
    if not setup.ranks.first:
        if not setup.ranks.share(None):  # rank 0 says whether there is anything left to do
            setup.bank(seed).fill(wanted_features(setup.config))
        return None
    paths, checkpoint = run_paths(setup.config, seed), setup.checkpoint(seed)
    with held_folders(setup.config, seed) as check_folders:
        start = find_earlier_start(setup, seed, paths, checkpoint)
        manifest = start.manifest
        record.write_run_json(paths, manifest)  # before the log begins, so that the next start knows whose log it is
        with (
            logging_to(paths.file(".log")),
            tracking(setup.config, paths.folder, paths.stem) as tracker,
        ):
            setup.ranks.share(manifest.finished)
            outputs = Outputs(paths, checkpoint, tracker, check_folders)
            if manifest.finished:
                return _finished_already(setup.config, outputs, manifest)
            return _run_tasks(setup, seed, outputs, start)


@dataclass(frozen=True)
class Outputs:
    """Where a run's results go, and a check that this is still the same place."""

    paths: RunPaths
    checkpoint: CheckpointFolder
    tracker: Tracker
    check_folders: Callable[[], None]


def _finished_already(config: Config, outputs: Outputs, manifest: RunManifest) -> dict[str, Any]:
    """Say how a finished run ended; make again what the start that finished it may have been killed before."""
    outputs.checkpoint.verify(manifest)  # damage shows here
    log.info("This run is finished (%s); --fresh starts it over", outputs.checkpoint.folder)
    run, selection = record.run_json(manifest), _shown_selection(config, manifest)
    run_log.log_curves(run["results"], selection)
    outputs.tracker.update(manifest.tasks[manifest.first_reported :])
    record.draw_curves(outputs.paths, run)
    outputs.tracker.finish(run, [outputs.paths.file(".png")])
    run_log.log_summary(run, selection)
    return run


def _run_tasks(setup: Setup, seed: int, outputs: Outputs, start: Start) -> dict[str, Any]:
    """Extract what the bank lacks, then learn, evaluate, save and report task after task."""
    config, backbone, checkpoint = setup.config, cast(Backbone, setup.backbone), outputs.checkpoint
    stream, manifest = setup.stream(seed), start.manifest
    known = Known.read(config, backbone.feature_dim, backbone.device, start.source, manifest)
    _log_start(setup, seed, outputs, stream, manifest)
    seconds = dict(manifest.seconds)
    bank, wanted = setup.bank(seed), wanted_features(config)
    missing = bank.missing(wanted)
    first_missing = missing if manifest.missing_at_start is None else manifest.missing_at_start
    manifest = replace(manifest, config=config.as_dict(), missing_at_start=first_missing)
    record.write_run_json(outputs.paths, manifest)
    with _timed(seconds, "features"):
        bank.fill(wanted)
    manifest = start.begin(manifest)
    # what earlier, interrupted starts of this run computed counts as well
    manifest = replace(manifest, backbone_forwards=max(0, first_missing - missing) + bank.forwards)

    model, meter = ContinualClassifier(config, backbone, known._replace(manifest=manifest)), CostMeter(manifest.cost)
    for task in stream.tasks[model.tasks :]:
        data = BankTask(bank, stream, task, config.views, backbone.device)
        run_log.log_task_start(task, {"backbone": backbone.parameters, **model.learner.parameter_counts()})
        with _timed(seconds, "train"), meter.learning(backbone.device):
            model.learn_task(data, model.manifest, run_log.epoch_logger(task.index, config.epochs))
        with _timed(seconds, "evaluate"):
            tested = evaluate(model.learner, bank, stream, task.index, seed)
        manifest = replace(model.manifest.tested(tested.record), seconds=dict(seconds), cost=meter.counted)
        if manifest.finished:
            answers = tested.predictions(setup.data.test.keys, stream.class_names)
            record.write_answers(outputs.paths.file(".npz"), answers)
            cost = meter.summary(config, model.learner, stream, manifest, backbone)
            manifest = manifest.with_last_results(answers.details(), cost)
        outputs.check_folders()
        modules = {task.index: model.learner.module_state(task.index)}
        model.note(checkpoint.commit(manifest, model.learner.state_dict(), modules))
        run = _report_task(config, outputs, stream, model.manifest)
    outputs.check_folders()
    checkpoint.verify(model.manifest)
    record.draw_curves(outputs.paths, run)
    outputs.tracker.finish(run, [outputs.paths.file(".png")])
    run_log.log_summary(run, _shown_selection(config, model.manifest))
    return run


def _report_task(config: Config, outputs: Outputs, stream: TaskStream, manifest: RunManifest) -> dict[str, Any]:
    """Write what the newest task gave to JSON, tracker and log; return what the JSON holds."""
    run = record.write_run_json(outputs.paths, manifest)
    outputs.tracker.update(manifest.tasks[manifest.first_reported :])
    task, newest, selection = len(manifest.tasks) - 1, manifest.tasks[-1], _shown_selection(config, manifest)
    name = module_name(task)
    run_log.log_saved(config.model_name, outputs.checkpoint.folder / name if name in manifest.files else None)
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


def _finished(setup: Setup, seed: int) -> dict[str, Any] | None:
    """What the JSON of a finished run holds, made again where it does not say so; None if something is left to do."""
    manifest: RunManifest | None = None
    if setup.ranks.first:
        paths, checkpoint = run_paths(setup.config, seed), setup.checkpoint(seed)
        manifest = checkpoint.read_manifest()
        same = manifest is not None and manifest.finished and manifest.identity == setup.identity(seed)
        if manifest is not None and same and report_belongs_to(paths, manifest.identity):
            with held_folders(setup.config, seed):
                manifest = find_earlier_start(setup, seed, paths, checkpoint).manifest
                record.draw_curves(paths, record.write_run_json(paths, manifest))
        else:
            manifest = None
    manifest = setup.ranks.share(manifest)
    return record.run_json(manifest) if manifest else None


# -- side by side ------------------------------------------------------------------------------------------------------


def _check_jobs(cells: Sequence[SweepCell], ranks: Ranks, jobs: int) -> None:
    """Say before anything is touched why runs cannot stand side by side."""
    wrong = {
        "torchrun": ranks.count > 1,
        "Windows": sys.platform == "win32",  # which hands no socket down to a process
        "cache_dir=none": any(cell.config.cache_dir == "none" for cell in cells),
    }
    found = [name for name, is_so in wrong.items() if is_so]
    if jobs < 1 or (jobs > 1 and found):
        raise ConfigError(f"--jobs {jobs}: a number from 1 on, and above 1 not with {', '.join(found or wrong)}")


def side_by_side(todo: Todo, jobs: int, failed: list[str], several: bool) -> Iterator[dict[str, Any]]:
    """Fill the bank here, then let each run learn in a process of its own, ``jobs`` of them at a time."""
    named = dict[tuple[Config, int], str]()
    for cell, setup, seed in todo:
        with _told(name := _name(cell, seed), failed, among_others=several):
            setup.bank(seed).fill(wanted_features(setup.config))
            named[setup.config, seed] = name
    alone = RunAlone(torch.get_num_threads())
    found = as_done(alone, named, workers=jobs)
    with closing(found), progress(total=len(named), desc="Runs", unit="run") as bar:
        for job, result in found:
            bar.update()
            with _told(named[job], failed, among_others=True):
                if not isinstance(result, dict):
                    raise DataError(str(result))
                log.info("%s: finished", named[job])
                yield result


@dataclass
class RunAlone:
    """Runs one seed of a config after another, in a process of its own."""

    threads: int  # as in the process that would run them otherwise: their last bits are the same
    before: Setup | None = None  # of the run before, whose data and backbone may serve the next

    def __call__(self, job: tuple[Config, int]) -> dict[str, Any] | str | None:
        """What the run's JSON holds, or why it stopped."""
        config, seed = job
        torch.set_num_threads(self.threads)
        use_full_fp32()
        with logging_to_terminal(shown=False):
            try:
                self.before = prepare(config, ONE_RANK, self.before)
                return run_seed(self.before, seed)
            except Exception as error:
                return str(fault_of(error))
