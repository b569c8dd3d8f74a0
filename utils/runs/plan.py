"""``main.py --dry-run``: check everything, say what a run would do and take, and stop."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.config.config import Config
from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.features.rows import TEST_VIEW, View
from utils.files import human_size
from utils.runs.checkpoint import MANIFEST, classifier_name, evaluation_name, module_name
from utils.runs.paths import WRITTEN_WHOLE, run_paths
from utils.runs.setup import Setup
from utils.words import counted

log = logging.getLogger(__name__)


def plan(setup: Setup, wanted: Sequence[View], *, with_modules: bool) -> dict[str, Any]:
    """Log the tasks, forward passes, disk, files and time of a run that was only set up. Nothing is written.

    Args:
        setup: the run.
        wanted: every (split, view) that it reads.
        with_modules: whether its method saves a module for each task.

    Returns:
        ``forwards`` and ``bytes`` that the feature bank lacks, ``seconds`` that the forward passes would take
        (estimated; None if there are none) and ``files``, what the run would write.
    """
    config = setup.config
    log.info("Backbone: %s", setup.backbone)
    _log_tasks(setup)
    lacking = _lacking(setup, wanted)
    forwards = sum(bank.missing(wanted) for bank, wanted in lacking)
    size = sum(bank.bytes_needed(wanted) for bank, wanted in lacking)
    log.info("Forward passes missing from the feature bank, all seeds: %d", forwards)
    _log_space(config, size)
    seconds = _probe(lacking, forwards)
    files = [str(path) for seed in config.seed for path in _files(setup, seed, with_modules=with_modules)]
    log.info("Files that the run writes:")
    note = " (there is one: resumed if of the same run, else moved aside)"
    for path in files:
        log.info("  %s%s", path, note if Path(path).exists() else "")
    return {"forwards": forwards, "bytes": size, "seconds": seconds, "files": files}


def _log_tasks(setup: Setup) -> None:
    for seed in setup.config.seed:
        stream = setup.stream(seed)
        log.info("Seed %d: %s", seed, counted(len(stream.tasks), "task"))
        for task in stream.tasks:
            names = [stream.class_names[c] for c in stream.row_class[task.rows.start : task.rows.stop]]
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            log.info(
                "  task %d: %s (%s), %d training and %d test images",
                *(task.index + 1, counted(len(names), "class"), shown, len(task.train), len(task.test)),
            )


def _lacking(setup: Setup, wanted: Sequence[View]) -> list[tuple[FeatureBank, list[View]]]:
    """For each seed its bank and what no earlier seed will have put there; in memory every seed begins anew."""
    found: list[tuple[FeatureBank, list[View]]] = []
    known: set[tuple[str, int, int | None]] = set()
    for seed in setup.config.seed:
        bank = setup.bank(seed)
        augment_seed = bank.augment_seed
        keys = {(split, view, None if view == TEST_VIEW else augment_seed): (split, view) for split, view in wanted}
        found.append((bank, [want for key, want in keys.items() if key not in known]))
        if bank.cache_dir is not None:
            known |= keys.keys()
    return found


def _log_space(config: Config, size: int) -> None:
    cache_dir = resolve_cache_dir(config.cache_dir)
    if cache_dir is None:
        log.info("Memory for features: %s (cache_dir=none)", human_size(size // len(config.seed)))
        return
    free = shutil.disk_usage(_existing(cache_dir)).free
    log.info("Disk for features: %s more in %s, %s are free", human_size(size), cache_dir, human_size(free))
    if size > free:
        log.warning("That is too little space: the run would stop before its first forward pass")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _probe(lacking: list[tuple[FeatureBank, list[View]]], forwards: int) -> float | None:
    """Estimated seconds of all missing forward passes."""
    if not forwards:
        log.info("Time: every feature is there; only learning and evaluation remain")
        return None
    bank, wanted = next((bank, wanted) for bank, wanted in lacking if bank.missing(wanted))
    rate = bank.probe(wanted)
    log.info(
        "Time, an estimate from a short probe of this backbone, device and images: %.1f images a second, %s for all "
        "missing forward passes; learning and evaluation come on top",
        *(rate, _duration(forwards / rate)),
    )
    return forwards / rate


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def _files(setup: Setup, seed: int, *, with_modules: bool) -> list[Path]:
    """Modules, evaluations, classifier and report of one seed."""
    folder, paths, tasks = setup.checkpoint(seed).folder, run_paths(setup.config, seed), len(setup.stream(seed).tasks)
    modules = [module_name(task) for task in range(tasks)] if with_modules else []
    last = [*map(evaluation_name, range(tasks)), classifier_name(tasks - 1), MANIFEST]
    suffixes = [suffix for suffix in (".log", *WRITTEN_WHOLE) if with_modules or suffix != ".epochs.csv"]
    return [*(folder / name for name in (*modules, *last)), *(paths.file(suffix) for suffix in suffixes)]
