"""``main.py --dry-run``: check everything, say what a run would do and take, and stop."""

import logging
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.features.rows import View
from utils.files import human_size
from utils.hardware import total_memory
from utils.runs.checkpoint import MANIFEST, RESULTS, classifier_name, module_name
from utils.runs.setup import WRITTEN_WHOLE, Setup, run_paths
from utils.words import counted

log = logging.getLogger(__name__)


def plan(setup: Setup, wanted: Sequence[View], counted_before: set[Path]) -> dict[str, Any]:
    """Log the tasks, forward passes, disk, files and time of a run that was only set up. Nothing is written.

    Args:
        setup: the run.
        wanted: every (split, view) that it reads.
        counted_before: the arrays of features that an earlier run of the same start fills; this run's are added.

    Returns:
        ``forwards`` and ``bytes`` that the feature bank lacks, ``seconds`` that the forward passes would take
        (estimated; None if there are none) and ``files``, what the run would write.
    """
    log.info("Backbone: %s", setup.backbone)
    for seed in setup.config.seed:
        _log_tasks(setup, seed)
    lacking = _lacking(setup, wanted, counted_before)
    forwards = sum(bank.missing(views) for bank, views in lacking)
    size = sum(bank.bytes_needed(views) for bank, views in lacking)
    log.info("Forward passes missing from the feature bank, all seeds: %d", forwards)
    _log_space(setup, size)
    seconds = _probe(lacking, forwards) if forwards else None
    if seconds is None:
        log.info("Time: every feature is there; only learning and evaluation remain")
    files = [path for seed in setup.config.seed for path in _files(setup, seed)]
    log.info("Files that the run writes:")
    for path in files:
        note = " (there is one: resumed if of the same run, else moved aside)" if path.exists() else ""
        log.info("  %s%s", path, note)
    return {"forwards": forwards, "bytes": size, "seconds": seconds, "files": list(map(str, files))}


def _log_tasks(setup: Setup, seed: int) -> None:
    stream = setup.stream(seed)
    log.info("Seed %d: %s", seed, counted(len(stream.tasks), "task"))
    for task in stream.tasks:
        names = [stream.class_names[c] for c in stream.row_class[task.rows]]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        log.info(
            "  task %d: %s (%s), %d training and %d test images",
            *(task.index + 1, counted(len(names), "class"), shown, len(task.train), len(task.test)),
        )


def _lacking(setup: Setup, wanted: Sequence[View], before: set[Path]) -> list[tuple[FeatureBank, Sequence[View]]]:
    """For each seed its bank and what no earlier seed or run will have put there; in memory every seed begins anew."""
    lacking = list[tuple[FeatureBank, Sequence[View]]]()
    for seed in setup.config.seed:
        bank = setup.bank(seed)
        paths = {view: bank.path(view) for view in wanted}
        lacking.append((bank, [view for view in wanted if paths[view] not in before]))
        before |= {path for path in paths.values() if path}
    return lacking


def _log_space(setup: Setup, size: int) -> None:
    folder = resolve_cache_dir(setup.config.cache_dir)
    if folder is None:
        log.info("Memory for features: %s (cache_dir=none)", human_size(size // len(setup.config.seed)))
        return
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    log.info("Disk for features: %s more in %s, %s are free", human_size(size), folder, human_size(free))
    if size > free:
        log.warning("That is too little space: the run would stop before its first forward pass")


def _probe(lacking: Sequence[tuple[FeatureBank, Sequence[View]]], forwards: int) -> float:
    """Estimated seconds of all missing forward passes."""
    rate = next(bank.probe(views) for bank, views in lacking if bank.missing(views))
    log.info(
        "Time, an estimate from a short probe of this backbone, device and images: %.1f images a second, %s "
        "(hours:minutes:seconds) for all missing forward passes; learning and evaluation come on top",
        *(rate, timedelta(seconds=round(forwards / rate))),
    )
    return forwards / rate


def _files(setup: Setup, seed: int) -> list[Path]:
    """Modules, results, classifier and report of one seed."""
    folder, paths, tasks = setup.checkpoint(seed).folder, run_paths(setup.config, seed), len(setup.stream(seed).tasks)
    modules = [module_name(task) for task in range(tasks)] if setup.config.method.modular else []
    names = (*modules, RESULTS, classifier_name(tasks - 1), MANIFEST)
    return [*(folder / name for name in names), *(paths.file(suffix) for suffix in (".log", *WRITTEN_WHOLE))]


def log_memory(setups: Sequence[Setup], jobs: int, process: int) -> None:
    """Log what runs beside each other take of this machine's memory; ``process``: the bytes of one before it learns."""
    jobs = min(jobs, sum(len(setup.config.seed) for setup in setups))
    each, total = process + max(map(_bytes_of_features, setups), default=0), total_memory()
    log.info(
        "Memory: about %s for each of %s side by side, %s together; this machine has %s",
        *(human_size(each), counted(jobs, "run"), human_size(jobs * each), human_size(total) if total else "?"),
    )
    if total and jobs * each > total:
        log.warning("That is too little memory: give a smaller --jobs")


def _bytes_of_features(setup: Setup) -> int:
    """What a run holds at a time: the test images, and a task's training images under two views."""
    largest = max(len(task.train) for task in setup.stream(setup.config.seed[0]).tasks)
    return int((len(setup.data.test) + 2 * largest) * setup.backbone.feature_dim * 4)


def log_total(planned: Sequence[dict[str, Any]]) -> None:
    """Log what several runs need together."""
    forwards, size = (sum(of[name] for of in planned) for name in ("forwards", "bytes"))
    seconds = sum(of["seconds"] or 0 for of in planned)
    log.info(
        "All together: %d forward passes, %s of disk, about %s for the forward passes",
        *(forwards, human_size(size), timedelta(seconds=round(seconds))),
    )
