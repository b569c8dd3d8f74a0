"""A run as a story: prepare data and backbone; for each seed and task learn, evaluate, save, report."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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
from utils.data.loader import load_ahead
from utils.data.tasks import TaskStream
from utils.errors import BackboneError, ConfigError, DataError, NumericError, UserError
from utils.features.bank import FeatureBank
from utils.hardware import use_full_fp32
from utils.logs import logging_to, progress
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
        ready = _prepared(cells, ranks, failed)
        with started_over([setup.config for _, setup in ready] if fresh and ranks.first else []):
            todo = []
            for cell, setup in ready:
                for seed in setup.config.seed:
                    kept = _finished(setup, seed) if len(cells) > 1 or jobs > 1 else None
                    runs += [] if kept is None else [kept]
                    todo += [(cell, setup, seed)] if kept is None else []
            done = len(runs)
            finished = side_by_side(todo, jobs, failed) if jobs > 1 else _one_by_one(todo, failed, len(cells))
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
        try:
            ready.append((cell, prepare(cell.config, ranks, ready[-1][1] if ready else None)))
        except (DataError, BackboneError) as error:
            if len(cells) == 1 or ranks.count > 1:
                raise
            log.error("%s: %s", cell.name, error)
            failed.append(f"{cell.name}: {error}")
    return ready


def _one_by_one(todo: Todo, failed: list[str], cells: int) -> Iterator[dict[str, Any] | None]:
    for number, (cell, setup, seed) in enumerate(todo, start=1):
        if cells > 1:
            log.info("%s, seed %d (run %d of %d)", cell.name, seed, number, len(todo))
        try:
            yield run_seed(setup, seed)
        except NumericError as error:
            if cells == 1 or setup.ranks.count > 1:  # the other ranks wait in a barrier that this one would not reach
                raise
            failed.append(f"{cell.name}, seed {seed}: {error}")
            log.error("%s", failed[-1])


def dry_run(cells: Sequence[SweepCell]) -> list[dict[str, Any]]:
    """Check config, data and backbone as a run does; log what would be done; write nothing but the images' hashes."""
    if world_size() > 1:
        raise ConfigError("--dry-run looks at one process; start it without torchrun")
    failed = list[str]()
    ready = _prepared(cells, ONE_RANK, failed)
    plan = module("utils.runs.plan")
    planned = []
    for _, setup in ready:
        session = () if setup.config.first_session == "none" else module("models.first_session").planned(setup)
        planned.append(plan.plan(setup, wanted_features(setup.config), *session))
    if len(cells) > 1:
        plan.log_total(planned)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cannot start: {'; '.join(failed)}")
    return planned


# -- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(setup: Setup, seed: int) -> dict[str, Any] | None:
    """Learn all tasks under one seed, from wherever an earlier start of the same run stopped."""
    if not setup.ranks.first:
        if not setup.ranks.share(None):  # rank 0 says whether there is anything left to do
            _features(setup, seed)[1].fill(wanted_features(setup.config))
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
    config, checkpoint, stream, manifest = setup.config, outputs.checkpoint, setup.stream(seed), start.manifest
    _log_start(setup, seed, outputs, stream, manifest)
    seconds, meter, wanted = dict(manifest.seconds), CostMeter(manifest.cost), wanted_features(config)
    with _timed(seconds, "train"), meter.learning(setup.backbone.device):
        backbone, bank = _features(setup, seed, start)
    known = Known.read(config, backbone.feature_dim, backbone.device, start.source, manifest)
    missing = bank.missing(wanted)
    first_missing = missing if manifest.missing_at_start is None else manifest.missing_at_start
    manifest = replace(manifest, config=config.as_dict(), missing_at_start=first_missing)
    record.write_run_json(outputs.paths, manifest)
    with _timed(seconds, "features"):
        bank.fill(wanted)
    manifest = start.begin(manifest)
    # what earlier, interrupted starts of this run computed counts as well
    manifest = replace(manifest, backbone_forwards=max(0, first_missing - missing) + bank.forwards)

    model = ContinualClassifier(config, backbone, known._replace(manifest=manifest))
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
            module("utils.results.predictions").write_predictions(outputs.paths.file(".npz"), answers)
            cost = meter.summary(config, model.learner, stream, manifest, backbone)
            manifest = manifest.with_last_results(answers.details(), cost)
        outputs.check_folders()
        modules = {task.index: model.learner.module_state(task.index)}
        model.note(checkpoint.commit(manifest, model.learner.state_dict(), modules, backbone.adapters))
        run = _report_task(config, outputs, stream, model.manifest)
    outputs.check_folders()
    checkpoint.verify(model.manifest)
    record.draw_curves(outputs.paths, run)
    outputs.tracker.finish(run, [outputs.paths.file(".png")])
    run_log.log_summary(run, _shown_selection(config, model.manifest))
    return run


def _features(setup: Setup, seed: int, start: Start | None = None) -> tuple[Backbone, FeatureBank]:
    """What the run's learner reads. All ranks call it; where there is a first session, rank 0 trains its adapters."""
    if setup.config.first_session == "none":
        return cast(Backbone, setup.backbone), setup.bank(seed)
    session = module("models.first_session")
    backbone = session.with_adapters(setup.config, setup.backbone, session.run_adapters(setup, seed, start))
    return backbone, session.Banks(setup, seed, backbone)


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


def side_by_side(todo: Todo, jobs: int, failed: list[str]) -> Iterator[dict[str, Any] | None]:
    """Fill the bank here, then let each run learn in a process of its own, ``jobs`` of them at a time."""
    for _, setup, seed in todo:
        if setup.config.cache_dir == "none":
            raise ConfigError("--jobs needs a feature bank that processes share; cache_dir is none")
        _features(setup, seed)[1].fill(wanted_features(setup.config))
    work = [(setup.config, seed, torch.get_num_threads()) for _, setup, seed in todo]
    os.environ["TQDM_DISABLE"] = "1"  # in the processes: there is one bar, this one
    try:
        results = load_ahead(run_alone, work, workers=min(jobs, len(work)), ahead=len(work) + 1, processes=True)
        with closing(results), progress(total=len(todo), desc="Runs", unit="run") as bar:
            for (cell, _, seed), (_, found) in zip(todo, results, strict=True):
                bar.update()
                log.info(
                    "%s: %s",
                    f"{cell.name}, seed {seed}".removeprefix(", "),
                    found if isinstance(found, str) else "finished",
                )
                if isinstance(found, str):
                    failed.append(f"{cell.name}, seed {seed}: {found}".removeprefix(", "))
                yield None if isinstance(found, str) else found
    finally:
        del os.environ["TQDM_DISABLE"]


def run_alone(job: tuple[Config, int, int]) -> dict[str, Any] | str | None:
    """One seed of one config, in a process of its own: what its JSON holds, or why it stopped."""
    config, seed, threads = job
    torch.set_num_threads(threads)  # as in the process that would run it otherwise: its last bits are the same
    logging.getLogger().setLevel(logging.INFO)  # for the run's own log; nothing goes to the terminal
    use_full_fp32()
    try:
        return run_seed(prepare(config, ONE_RANK), seed)
    except Exception as error:
        return str(fault_of(error))
