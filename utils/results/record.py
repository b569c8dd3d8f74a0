"""What a finished task leaves beside the log: the run's JSON and picture, and at the end the answers as ``.npz``.

JSON and picture are made from the manifest, and made again whenever they differ from it. The arrays of the ``.npz``:
``files`` and ``true_class`` ``(images,)``, ``class_names`` ``(classes,)``, and for each selection, ``(images,)`` each,
``<selection>.class``, ``<selection>.probability`` and, with modules, ``<selection>.module``. Classes are places in
``class_names``, the order of learning; modules are tasks from 0.
"""

import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write, json_lines, read_regular
from utils.results import metrics
from utils.runs.manifest import RunManifest, TaskRecord
from utils.runs.setup import RunPaths

log = logging.getLogger(__name__)

FORMAT = 1


def collect_results(tasks: Sequence[TaskRecord], *, with_matrix: bool = True) -> dict[str, Any]:
    """The records of the tasks so far -> for each selection its curves, matrix, average, last and forgetting.

    A matrix's row is "after task", its column "on task"; tasks not learned yet are null. ``with_matrix`` false leaves
    it empty.
    """
    results = {}
    for name in tasks[-1].results if tasks else ():
        of_name = [task.results[name] for task in tasks]
        rows = [r["per_task"] for r in of_name]
        curve = [r["top1"] for r in of_name]
        results[name] = {
            "top1_curve": curve,
            "top5_curve": [r["top5"] for r in of_name],
            "matrix": [row + [None] * (len(tasks) - len(row)) for row in rows] if with_matrix else [],
            "average": metrics.average_accuracy(curve),
            "last": curve[-1],
            "forgetting": metrics.forgetting(rows),
            "backward_transfer": metrics.backward_transfer(rows),
        }
    return results


def run_json(manifest: RunManifest) -> dict[str, Any]:
    """Everything that a table needs, from the run's manifest; docs/outputs.md describes it.

    A continued run whose data does not test the classes of the saved run reports its own tasks alone.
    """
    first = manifest.first_reported
    values = dataclasses.replace(manifest, tasks=()).to_json()  # the tasks are laid out otherwise here
    tasks = [_without_tasks(record, first) for record in manifest.tasks[first:]]
    last = tasks[-1] if tasks else TaskRecord()
    selecting = {name: [task.results[name].get("selection_accuracy") for task in tasks] for name in last.results}
    own = ("status", "config", "seed", "identity", "backbone", "data", "versions", "class_order")
    seconds = {**manifest.seconds, "total": sum(manifest.seconds.values())}
    found: dict[str, Any] = {
        "format": FORMAT,
        **{name: values[name] for name in own},
        "task_sizes": values["task_sizes"][first:],
        "all_task_sizes": values["task_sizes"],
        **{name: values[name] for name in ("base", "domains") if values.get(name)},
        "continual": manifest.continual,
        "results": collect_results(tasks, with_matrix=manifest.shows_all),
        "selection_accuracy": {n: of for n, of in selecting.items() if n != "oracle" and None not in of},
        "parameters": last.parameters or None,
        "sparsity": [task.sparsity for task in tasks if task.sparsity is not None],
        "confusion": last.confusion,
        "entropy": last.entropy,
        "details": last.details,
        "epochs": [[epoch.to_json() for epoch in task.epochs] for task in tasks] if manifest.shows_all else [],
        "cost": manifest.cost,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "backbone_forwards": manifest.backbone_forwards,
    }
    return {**found, "glossary": metrics.terms([found])}


def _without_tasks(record: TaskRecord, first: int) -> TaskRecord:
    """A task's record without its columns for the tasks before ``first``."""
    results = {name: {**result, "per_task": result["per_task"][first:]} for name, result in record.results.items()}
    return dataclasses.replace(record, results=results)


def write_run_json(paths: RunPaths, manifest: RunManifest) -> dict[str, Any]:
    """Bring the run's JSON to what ``manifest`` says, if it says otherwise; return what it holds."""
    values, path = run_json(manifest), paths.file(".json")
    content = json_lines(values).encode() + b"\n"
    try:
        same = read_regular(path) == content
    except OSError:
        same = False
    if not same:
        atomic_write(path, content)
    return values


def draw_curves(paths: RunPaths, run: dict[str, Any]) -> None:
    """The run's curves as a picture beside its JSON, unless the one that is there is newer than that.

    A run never fails for want of a picture.
    """
    picture = paths.file(".png")
    if picture.is_file() and picture.stat().st_mtime_ns >= paths.file(".json").stat().st_mtime_ns:
        return
    try:
        from utils.results import figures

        figures.save(figures.run_curves(run), picture)
    except ImportError:
        log.info("No picture of the curves: it needs matplotlib (pip install matplotlib)")
    except UserError as error:
        log.warning("No picture of the curves: %s", error)


# -- the answers ------------------------------------------------------------------------------------------------------


def details(answers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """From the arrays of the ``.npz``: for each selection the accuracy on each class (%) and ECE (points), for JSON."""
    found, true = {}, answers["true_class"]
    for name in (array.removesuffix(".class") for array in answers if array.endswith(".class")):
        hits = answers[f"{name}.class"] == true
        found[name] = {
            "per_class": metrics.group_accuracies(hits, true, len(answers["class_names"])),
            "ece": metrics.expected_calibration_error(answers[f"{name}.probability"], hits),
        }
    return found


def write_answers(path: Path, answers: Mapping[str, np.ndarray]) -> None:
    """Write the ``.npz``; the same answers give the same bytes. ``np.load`` reads it without pickles."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **answers)  # type: ignore[arg-type]
    atomic_write(path, buffer.getbuffer())
