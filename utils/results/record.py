"""What a run tells: PILOT's log lines, the run's JSON, and the closing summary."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write, write_json
from utils.results import metrics
from utils.results.cost import cost_summary
from utils.results.metrics import GLOSSARY, SELECTION_NAMES
from utils.runs.manifest import RunManifest, TaskRecord
from utils.runs.paths import RunPaths

log = logging.getLogger(__name__)

FORMAT = 1


# -- one task ---------------------------------------------------------------------------------------------------------


def log_task(record: TaskRecord, selection: str) -> None:
    """PILOT's ``CNN: {...}`` line for ``selection``; the others beside it, each under its own name."""
    for name, result in record.results.items():
        label = "CNN" if name == selection else "Accuracy"
        log.info("[selection: %s] %s: %s", SELECTION_NAMES[name], label, result["groups"])


def log_curves(results: dict[str, Any], selection: str) -> None:
    """PILOT's curve and average lines for ``selection``; the others beside it, each under its own name."""
    for name, result in results.items():
        place, label = SELECTION_NAMES[name], "CNN " if name == selection else ""
        log.info("[selection: %s] %stop1 curve: %s", place, label, _rounded(result["top1_curve"]))
        log.info("[selection: %s] %stop5 curve: %s", place, label, _rounded(result["top5_curve"]))
        average = f"Average Accuracy{' (CNN)' if name == selection else ''}: {result['average']:.2f}"
        log.info("[selection: %s] %s", place, average)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


# -- one run ----------------------------------------------------------------------------------------------------------


def collect_results(tasks: Sequence[TaskRecord]) -> dict[str, Any]:
    """The records of the tasks so far -> for each selection its curves, matrix, average, last and forgetting.

    A matrix's row is "after task", its column "on task"; tasks not learned yet are null.
    """
    results = {}
    for name in tasks[-1].results if tasks else ():
        of_name = [task.results[name] for task in tasks]
        matrix = [r["per_task"] + [None] * (len(tasks) - len(r["per_task"])) for r in of_name]
        curve = [r["top1"] for r in of_name]
        results[name] = {
            "top1_curve": curve,
            "top5_curve": [r["top5"] for r in of_name],
            "matrix": matrix,
            "average": metrics.average_accuracy(curve),
            "last": curve[-1],
            "forgetting": metrics.forgetting(matrix),
            "backward_transfer": metrics.backward_transfer(matrix),
        }
    return results


def run_json(manifest: RunManifest) -> dict[str, Any]:
    """Everything that a table needs, from the run's manifest.

    A continued run whose data does not test the classes of the saved run reports its own tasks alone.
    """
    values, first = manifest.to_json(whole=False), manifest.first_reported
    tasks = [_without_tasks(record, first) for record in manifest.tasks[first:]]
    last = tasks[-1] if tasks else TaskRecord()
    selecting = {name: [task.results[name].get("selection_accuracy") for task in tasks] for name in last.results}
    own = ("status", "config", "seed", "identity", "backbone", "data", "versions", "class_order")
    return {
        "format": FORMAT,
        **{name: values[name] for name in own},
        "task_sizes": values["task_sizes"][first:],
        **{name: values[name] for name in ("base", "domains") if values.get(name)},
        "continual": manifest.continual,
        "results": collect_results(tasks),
        "selection_accuracy": {n: of for n, of in selecting.items() if n != "oracle" and None not in of},
        "parameters": last.parameters or None,
        "sparsity": [task.sparsity for task in tasks if task.sparsity is not None],
        "confusion": last.confusion,
        "entropy": last.entropy,
        "details": last.details,
        "epochs": [task.to_json()["epochs"] for task in tasks],
        "cost": manifest.cost,
        "seconds": _rounded_seconds(manifest.seconds),
        "backbone_forwards": manifest.backbone_forwards,
        "glossary": GLOSSARY,
    }


def _rounded_seconds(seconds: dict[str, float]) -> dict[str, float]:
    return {phase: round(value, 3) for phase, value in {**seconds, "total": sum(seconds.values())}.items()}


def _without_tasks(record: TaskRecord, first: int) -> TaskRecord:
    """A task's record without its columns for the tasks before ``first``."""
    results = {name: {**result, "per_task": result["per_task"][first:]} for name, result in record.results.items()}
    return dataclasses.replace(record, results=results)


def write_run_json(paths: RunPaths, manifest: RunManifest) -> dict[str, Any]:
    """Replace the run's JSON, and the CSV of its curves; return what the JSON holds."""
    values = run_json(manifest)
    write_json(paths.file(".json"), values)
    atomic_write(paths.file(".csv"), curves_csv(values).encode())
    return values


def curves_csv(run: dict[str, Any]) -> str:
    """One line for each task (from 1) and selection: what a plot of the curves needs."""
    lines = ["task,classes_seen,selection,top1,top5,selection_accuracy"]
    classes_seen = list(itertools.accumulate(run["task_sizes"]))
    if run["config"]["scenario"] == "domain":  # every domain brings the same classes
        classes_seen = run["task_sizes"]
    for name, result in run["results"].items():
        chosen = run["selection_accuracy"].get(name, [""] * len(result["top1_curve"]))
        for task, values in enumerate(zip(result["top1_curve"], result["top5_curve"], chosen, strict=True)):
            lines.append(",".join(map(str, (task + 1, classes_seen[task], name, *values))))
    return "\n".join(lines) + "\n"


def draw_curves(paths: RunPaths, run: dict[str, Any]) -> None:
    """The run's curves as a picture beside its JSON. A run never fails for want of a picture."""
    try:
        from utils.results import drawing, figures

        drawing.save(figures.run_curves(run), paths.file(".png"))
    except ImportError:
        log.info("No picture of the curves: it needs matplotlib (pip install matplotlib)")
    except UserError as error:
        log.warning("No picture of the curves: %s", error)


def summary_table(run: dict[str, Any]) -> list[str]:
    """The closing lines of a run: every selection beside the others, as they are."""
    lines = [f"{'':27}{'Ā':>8}{'A_T':>8}{'forgetting':>12}{'selection accuracy':>20}"]
    for name, result in run["results"].items():
        selecting = run["selection_accuracy"].get(name)
        chosen = f"{selecting[-1]:.1f}" if selecting else "–"
        numbers = f"{result['average']:8.1f}{result['last']:8.1f}{result['forgetting']:12.1f}{chosen:>20}"
        lines.append(f"{SELECTION_NAMES[name]:27}{numbers}")
    return lines


def log_summary(run: dict[str, Any]) -> None:
    tasks = len(run["task_sizes"])
    log.info(
        "Summary: %s on %s, %d tasks, seed %d (%%)",
        run["config"]["model_name"],
        run["config"]["dataset"],
        tasks,
        run["seed"],
    )
    for line in summary_table(run):
        log.info("  %s", line)
    log.info("  Backbone %s, read at: %s", run["backbone"]["name"], run["backbone"].get("pooling", "token"))
    seconds = run["seconds"]
    log.info(
        "  %.1f s (features %.1f, training %.1f, evaluation %.1f), %d images through the backbone",
        *(seconds[k] for k in ("total", "features", "train", "evaluate")),
        run["backbone_forwards"],
    )
    if run["cost"]:
        log.info("Cost summary: %s", cost_summary(run["cost"]))
    for term in ("Ā", "A_T", "forgetting", "selection accuracy", "oracle"):
        log.info("  %s: %s", term, GLOSSARY[term])


def log_seeds(runs: Sequence[dict[str, Any]]) -> None:
    """Mean ± sample standard deviation over seeds, for each selection."""
    for name in runs[0]["results"]:
        a, last = ([r["results"][name][k] for r in runs] for k in ("average", "last"))
        (a_mean, a_std), (l_mean, l_std) = metrics.mean_std(a), metrics.mean_std(last)
        log.info(
            "[selection: %s] over %d seeds: Ā %.2f ± %.2f, A_T %.2f ± %.2f",
            *(SELECTION_NAMES[name], len(runs), a_mean, a_std, l_mean, l_std),
        )
