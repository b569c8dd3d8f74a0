"""What a run says. The log file has PILOT's lines in full; the terminal has one line a task and the summary.

PILOT counts tasks and classes from 0, and its lines keep that; words count tasks from 1 (docs/outputs.md).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import module
from utils.config.config import Config
from utils.config.grid import SweepCell
from utils.config.methods import SELECTIONS
from utils.data.tasks import Task, TaskStream
from utils.logs import FILE_ONLY
from utils.results.metrics import SELECTION_NAMES, cost_summary, new_classes_alone
from utils.runs.manifest import BaseFacts, EpochStats, TaskRecord
from utils.words import counted, fixed, task_place

log = logging.getLogger(__name__)


def log_header(config: Config, backbone: object, stream: TaskStream, seed: int) -> None:
    """What is about to be done; the file also has a line for each key and the class order as numbers."""
    for name, value in config.as_dict().items():
        log.info("%s: %s", name, value, extra=FILE_ONLY)
    for line in config.remarks:
        log.info("Config: %s", line)
    log.info("Backbone: %s", backbone)
    sizes, classes = stream.task_sizes, len(stream.class_names)
    tasks = counted(len(sizes), "domain" if stream.domains else "task")
    log.info("%s on %s, seed %d: %s, %s", config.model_name, config.dataset, seed, counted(classes, "class"), tasks)
    number = {name: place for place, name in enumerate(sorted(stream.class_names))}
    log.info("%s", [number[name] for name in stream.class_names], extra=FILE_ONLY)
    log.info("Seed %d, class order: %s", seed, list(stream.class_names), extra=FILE_ONLY)


def log_base(folder: object, facts: BaseFacts) -> None:
    """Which saved run is continued, and what is tested."""
    learned = f"{counted(facts.tasks, 'task')}, {counted(facts.classes, 'class')}"
    log.info("Continuing the run in %s: %s; evaluation covers %s", folder, learned, facts.evaluation)


# -- one task ---------------------------------------------------------------------------------------------------------


def log_task_start(task: Task, parameters: Mapping[str, int]) -> None:
    """PILOT's counts of parameters, as they will be after the task, and its line of the classifier rows until then."""
    everything = parameters["backbone"] + parameters["luca_per_task"] * (task.index + 1) + parameters["classifier"]
    log.info("All params: %d", everything, extra=FILE_ONLY)
    log.info("Trainable params: %d", parameters["trainable"], extra=FILE_ONLY)
    log.info("Learning on %d-%d", task.rows.start, task.rows.stop, extra=FILE_ONLY)


def epoch_logger(task: int, epochs: int) -> Callable[[int, EpochStats], None]:
    """What writes PILOT's line of each epoch of a task; all count from 0."""

    def log_epoch(epoch: int, stats: EpochStats) -> None:
        shown = task, epoch + 1, epochs, stats.loss, stats.accuracy
        log.info("Task %d, Epoch %d/%d => Loss %.3f, Train_accy %.2f", *shown, extra=FILE_ONLY)

    return log_epoch


def log_saved(method: str, path: object | None) -> None:
    """Where the task's module is (None: the method has none)."""
    if path is not None:
        log.info("%s parameters saved to %s", method, path, extra=FILE_ONLY)


def log_task(record: TaskRecord, selection: str) -> None:
    """PILOT's ``CNN: {...}`` line for ``selection``; the others beside it, each under its own name."""
    for name, result in record.results.items():
        _to_file(name, f"{'CNN' if name == selection else 'Accuracy'}: {result['groups']}")


def log_curves(results: dict[str, Any], selection: str) -> None:
    """PILOT's curve and average lines for ``selection``; the others beside it, each under its own name."""
    for name, result in results.items():
        label = "CNN " if name == selection else ""
        for curve in ("top1", "top5"):
            _to_file(name, f"{label}{curve} curve: {[round(value, 2) for value in result[f'{curve}_curve']]}")
        _to_file(name, f"Average Accuracy{' (CNN)' if label else ''}: {result['average']:.2f}")


def _to_file(selection: str, text: str) -> None:
    log.info("[selection: %s] %s", SELECTION_NAMES[selection], text, extra=FILE_ONLY)


def log_task_line(record: TaskRecord, selection: str, stream: TaskStream, task: int) -> None:
    """The one line of a task on the terminal: the selection asked for, ``sample`` and the oracle."""
    names = [name for name in dict.fromkeys((selection, "sample", "oracle")) if name in record.results]
    shown = ", ".join(f"{SELECTION_NAMES[name]} {fixed(record.results[name]['top1'], 1)}" for name in names)
    log.info("%s: %s %% of all test images so far", task_title(stream, task), shown or "not tested,")


def task_title(stream: TaskStream, task: int) -> str:
    """``Task 1 of 5``, in a domain-incremental run with the domain's name; ``task`` counts from 0."""
    return f"Task {task_place(task, len(stream.tasks), stream.domains)}"


# -- one run ----------------------------------------------------------------------------------------------------------


def summary_table(run: dict[str, Any]) -> list[str]:
    """The closing lines of a run: every selection beside the others, as they are."""
    lines = [f"{'':27}{'Ā':>8}{'A_T':>8}{'forgetting':>12}{'selection accuracy':>20}"]
    for name, result in run["results"].items():
        chosen = fixed((run["selection_accuracy"].get(name) or [None])[-1], 1)
        average, last, forgetting = (fixed(result[key], 1) for key in ("average", "last", "forgetting"))
        lines.append(f"{SELECTION_NAMES[name]:27}{average:>8}{last:>8}{forgetting:>12}{chosen:>20}")
    return lines


def best_order_free(run: dict[str, Any]) -> str | None:
    """Say which selection that looks at one image at a time has the highest A_T, and how far ``sample`` is from it.

    None for a run that has one such selection alone, or no test images. Of equal ones the first declared counts.
    """
    last = {name: run["results"][name]["last"] for name in SELECTIONS if name in run["results"]}
    free = {name: value for name, value in last.items() if not SELECTIONS[name].ordered and value is not None}
    if len(free) < 2 or "sample" not in free:
        return None
    best = max(free, key=lambda name: free[name])
    highest = fixed(free[best], 1)
    words = f"Of the selections that look at one image at a time, {SELECTION_NAMES[best]} is best: A_T {highest}"
    return words if best == "sample" else f"{words}, sample is {fixed(free[best] - free['sample'], 1)} points below it"


def log_summary(run: dict[str, Any], selection: str) -> None:
    """The end of a run; the file has PILOT's matrix and forgetting and the meaning of all terms before it."""
    for name, result in run["results"].items():
        if name == selection:
            _to_file(name, "Accuracy Matrix (CNN):")
            for row in accuracy_matrix(result["matrix"]):
                log.info("%s", row, extra=FILE_ONLY)
        _to_file(name, f"Forgetting{' (CNN)' if name == selection else ''}: {fixed(result['forgetting'], 2)}")
    for term, meaning in run["glossary"].items():
        log.info("%s: %s", term, meaning, extra=FILE_ONLY)
    tasks = counted(len(run["task_sizes"]), "domain" if run.get("domains") else "task")
    config = run["config"]
    log.info("Summary: %s on %s, %s, seed %d (%%)", config["model_name"], config["dataset"], tasks, run["seed"])
    if new_classes_alone(run):
        log.info("  Of the new classes alone: the classes learned before were not tested")
    for line in summary_table(run):
        log.info("  %s", line)
    if (best := best_order_free(run)) is not None:
        log.info("  %s", best)
    log.info("  Backbone %s, read at: %s", run["backbone"]["name"], run["backbone"].get("pooling", "token"))
    seconds = run["seconds"]
    log.info(
        "  %.1f s (features %.1f, training %.1f, evaluation %.1f), %s through the backbone",
        *(seconds[k] for k in ("total", "features", "train", "evaluate")),
        counted(run["backbone_forwards"], "image"),
    )
    if run["cost"]:
        log.info("Cost summary: %s", cost_summary(run["cost"]))


def accuracy_matrix(matrix: Sequence[Sequence[float | None]]) -> list[str]:
    """PILOT's rows: accuracy on a task, after each task; 0 before it is learned, nan without test images."""
    tasks = len(matrix)
    on_task = [[0.0 if after < task else matrix[after][task] for after in range(tasks)] for task in range(tasks)]
    return [f"[{' '.join('nan' if value is None else f'{value:.2f}' for value in row)}]" for row in on_task]


def log_seeds(runs: Sequence[dict[str, Any]], selections: Sequence[str] | None = None) -> None:
    """A table of mean ± sample standard deviation over seeds, for each selection or for some."""
    read, tables, render = (module(f"utils.results.{name}") for name in ("read", "tables", "render"))
    sections, _ = tables.make_sections([read.Run(run) for run in runs])
    for line in render.as_text([tables.section_table(section, selections) for section in sections]).splitlines():
        log.info("%s", line)


def log_sweep(cells: Sequence[SweepCell], runs: Sequence[dict[str, Any]]) -> None:
    """The closing table: the selection asked for beside ``sample`` and ``oracle``."""
    log_seeds(runs, [cells[0].config.selection, "sample", "oracle"])
    folder = Path(cells[0].config.log_dir).parents[cells[0].name.count("/")]
    log.info("%s; every selection, and pictures: python report.py %s", counted(len(runs), "run"), folder)
