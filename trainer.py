"""A run as a story: prepare data and backbone; for each seed and task learn, evaluate, save, report."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from models.api.classifier import ContinualClassifier
from models.api.predictor import Known
from models.cost import CostMeter
from models.evaluation import BankTask, evaluate
from models.preparation import prepare, wanted_features
from utils import module
from utils.cli import fault_of
from utils.config.config import Config
from utils.config.grid import SweepCell
from utils.data.tasks import TaskStream
from utils.errors import BackboneError, ConfigError, DataError, NumericError, UserError
from utils.hardware import peak_bytes, use_full_fp32
from utils.logs import logging_to, logging_to_terminal, progress
from utils.ranks import ONE_RANK, Ranks, joined_ranks, world_size
from utils.results import record, run_log
from utils.runs.checkpoint import CheckpointFolder, module_name
from utils.runs.manifest import RunManifest
from utils.runs.setup import (
    RunPaths,
    Setup,
    Start,
    changed_versions,
    find_earlier_start,
    held_folders,
    run_paths,
    start_over,
)

if TYPE_CHECKING:
    from utils.results.tracker import Tracker

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One seed of one cell."""

    cell: SweepCell
    setup: Setup
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell.name}, seed {self.seed}".removeprefix(", ")


def run(cells: Sequence[SweepCell], *, fresh: bool = False, jobs: int = 1) -> list[dict[str, Any]]:
    """Run every cell under every seed; return what the runs' JSONs hold (under torchrun, on rank 0).

    All are checked before the first one starts. Of several, one whose data is missing or whose training diverges is
    told at the end, and the others go on; what an earlier start finished is kept.

    Args:
        cells: what to do: one config, several files, or the grid of a sweep.
        fresh: start over; what is there is moved aside.
        jobs: so many runs side by side, each in a process of its own, once the feature bank is filled.
    """
    runs, failed = list[dict[str, Any]](), list[str]()
    with joined_ranks() as ranks:
        _check_jobs(cells, ranks, jobs)
        ready = _prepared(cells, ranks, failed)
        todo = [Job(cell, setup, seed) for cell, setup in ready for seed in setup.config.seed]
        if fresh and ranks.first:
            start_over([setup.config for _, setup in ready])
        for job, found in _side_by_side(todo, jobs) if jobs > 1 else _one_by_one(todo):
            if isinstance(found, UserError):
                if ranks.count > 1 or len(cells) == jobs == 1:  # other ranks wait in a barrier
                    raise found
                failed.append(f"{job.name}: {found}")
                log.error("%s", failed[-1])
            elif found is not None:
                runs.append(found)
    if ranks.first and len(cells) > 1:
        run_log.log_sweep(cells, runs)
    elif len(runs) > 1:
        run_log.log_seeds(runs)
    if failed:
        raise UserError(f"{len(failed)} of {len(failed) + len(runs)} runs are missing: {'; '.join(failed)}")
    return runs


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


def _prepared(cells: Sequence[SweepCell], ranks: Ranks, failed: list[str]) -> list[tuple[SweepCell, Setup]]:
    """Check all cells; of several, those whose data or backbone cannot be had are added to ``failed``."""
    ready: list[tuple[SweepCell, Setup]] = []
    for cell in cells:
        try:
            ready.append((cell, prepare(cell.config, ranks, ready[-1][1] if ready else None)))
        except (DataError, BackboneError) as error:
            if len(cells) == 1 or ranks.count > 1:
                raise
            failed.append(f"{cell.name}: {error}")
            log.error("%s", failed[-1])
    return ready


Outcome = dict[str, Any] | UserError | None  # what a run's JSON holds, or why there is none; None on other ranks


def _one_by_one(todo: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
    for number, job in enumerate(todo, start=1):
        if job.cell.name:
            log.info("%s (run %d of %d)", job.name, number, len(todo))
        try:
            yield job, run_seed(job.setup, job.seed)
        except (DataError, BackboneError, NumericError) as error:
            yield job, error


def _side_by_side(todo: Sequence[Job], jobs: int) -> Iterator[tuple[Job, Outcome]]:
    """Fill the bank here, then let each run learn in a process of its own, ``jobs`` of them at a time."""
    filled = dict[tuple[Config, int], Job]()
    for job in todo:
        try:
            job.setup.bank(job.seed).fill(wanted_features(job.setup.config))
            filled[job.setup.config, job.seed] = job
        except (DataError, BackboneError, NumericError) as error:
            yield job, error
    alone, as_done = RunAlone(torch.get_num_threads()), module("utils.data.loader").as_done
    found = as_done(alone, filled, workers=jobs)
    with closing(found), progress(total=len(filled), desc="Runs", unit="run") as bar:
        for key, result in found:
            bar.update()
            if isinstance(result, dict):
                log.info("%s: finished", filled[key].name)
            yield filled[key], result


@dataclass
class RunAlone:
    """Runs one seed of a config after another, in a process of its own."""

    threads: int  # as in the process that would run them otherwise: their last bits are the same
    before: Setup | None = None  # of the run before, whose data and backbone may serve the next

    def __call__(self, job: tuple[Config, int]) -> Outcome:
        config, seed = job
        torch.set_num_threads(self.threads)
        use_full_fp32()
        with logging_to_terminal(shown=False):
            try:
                self.before = prepare(config, ONE_RANK, self.before)
                return run_seed(self.before, seed)
            except Exception as error:
                return fault_of(error)


def dry_run(cells: Sequence[SweepCell], *, jobs: int = 1) -> list[dict[str, Any]]:
    """Check config, data and backbone as a run does; log what would be done; write nothing but the images' hashes."""
    if world_size() > 1:
        raise ConfigError("--dry-run looks at one process; start it without torchrun")
    failed = list[str]()
    _check_jobs(cells, ONE_RANK, jobs)
    plan, ready = module("utils.runs.plan"), _prepared(cells, ONE_RANK, failed)
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


@dataclass(frozen=True)
class Outputs:
    """Where a run's results go, and a check that this is still the same place."""

    config: Config
    paths: RunPaths
    checkpoint: CheckpointFolder
    tracker: "Tracker | None"
    check_folders: Callable[[], None]

    def report(self, manifest: RunManifest) -> dict[str, Any]:
        """Bring JSON and tracker to what the manifest says; return what the JSON holds."""
        run = record.write_run_json(self.paths, manifest)
        if self.tracker and manifest.tasks:
            self.tracker.update(manifest.tasks[manifest.first_reported :])
        return run

    def end(self, manifest: RunManifest) -> dict[str, Any]:
        """Check what was saved, say how the run ended; make again what an earlier start was killed before."""
        self.check_folders()
        self.checkpoint.verify(manifest)  # damage shows here
        run = self.report(manifest)
        record.draw_curves(self.paths, run)
        if self.tracker:
            self.tracker.finish(run, [self.paths.file(".png")])
        run_log.log_summary(run, self.selection(manifest))
        return run

    def selection(self, manifest: RunManifest) -> str:
        """The selection of the log's ``CNN`` lines: the one asked for, if the method has it."""
        return self.config.selection if self.config.selection in manifest.tasks[-1].results else "sample"


def run_seed(setup: Setup, seed: int) -> dict[str, Any] | None:
    """Learn all tasks under one seed, from wherever an earlier start of the same run stopped."""
    config, ranks = setup.config, setup.ranks
    if not ranks.first:
        if not ranks.share(None):  # rank 0 says whether there is anything left to do
            setup.bank(seed).fill(wanted_features(config))
        return None
    paths, checkpoint = run_paths(config, seed), setup.checkpoint(seed)
    with held_folders(paths, checkpoint) as check_folders:
        start = find_earlier_start(setup, seed, paths, checkpoint)
        manifest = start.manifest
        run = record.write_run_json(paths, manifest)  # before the log begins: the next start knows whose log it is
        tracked = config.tracker != "none"
        tracking = module("utils.results.tracker").tracking(config, paths.folder, paths.stem) if tracked else None
        with logging_to(paths.file(".log")), tracking or nullcontext() as tracker:
            outputs = Outputs(config, paths, checkpoint, tracker, check_folders)
            ranks.share(manifest.finished)
            if manifest.finished:
                log.info("This run is finished (%s); --fresh starts it over", checkpoint.folder)
                run_log.log_curves(run["results"], outputs.selection(manifest))
            else:
                manifest = _learn_tasks(setup, seed, outputs, start)
            return outputs.end(manifest)


def _learn_tasks(setup: Setup, seed: int, outputs: Outputs, start: Start) -> RunManifest:
    """Extract what the bank lacks, then learn, evaluate, save and report task after task."""
    config, backbone, stream, bank = setup.config, setup.backbone, setup.stream(seed), setup.bank(seed)
    known = Known.read(config, backbone.feature_dim, backbone.device, start.source, start.manifest)
    _log_start(setup, seed, stream, start)
    wanted, seconds, saved = wanted_features(config), dict(start.manifest.seconds), start.saved
    forwards = start.manifest.backbone_forwards or bank.missing(wanted)
    manifest = replace(start.manifest, config=config.as_dict(), backbone_forwards=forwards)
    record.write_run_json(outputs.paths, manifest)
    with _timed(seconds, "features"):
        bank.fill(wanted)
    start.begin(manifest)
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
            answers = tested.named(setup.data.test.keys, stream.class_names)
            record.write_answers(outputs.paths.file(".npz"), answers)
            cost = meter.summary(config, model.learner, stream, manifest, backbone)
            manifest = manifest.with_last_results(record.details(answers), cost)
        outputs.check_folders()
        modules = {number: model.learner.module_state(number) for number in range(saved, model.tasks)}
        model.note(outputs.checkpoint.commit(manifest, model.learner.state_dict(), modules))
        saved = model.tasks
        _report_task(outputs, stream, model.manifest)
    return model.manifest


def _report_task(outputs: Outputs, stream: TaskStream, manifest: RunManifest) -> None:
    """Write what the newest task gave to JSON, tracker and log."""
    run, selection = outputs.report(manifest), outputs.selection(manifest)
    task, newest = len(manifest.tasks) - 1, manifest.tasks[-1]
    name = module_name(task)
    run_log.log_saved(outputs.config.model_name, outputs.checkpoint.folder / name if name in manifest.files else None)
    run_log.log_task(newest, selection)
    run_log.log_curves(run["results"], selection)
    run_log.log_task_line(newest, selection, stream, task)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] += time.monotonic() - started


def _log_start(setup: Setup, seed: int, stream: TaskStream, start: Start) -> None:
    run_log.log_header(setup.config, setup.backbone, stream, seed)
    if setup.base and start.manifest.base:
        run_log.log_base(setup.base.folder, start.manifest.base)
    if start.saved:
        log.info("Resuming from %s after task %d of %d", start.checkpoint.folder, start.saved, len(stream.tasks))
        if changed := changed_versions(start.manifest):
            log.warning("Versions changed since this run began: %s; its end may differ", ", ".join(changed))
