"""Every number that is reported: its name, its definition in words (``GLOSSARY``), and a pure function.

SciPy is imported where it is needed: a run that only trains does not wait for it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.config.methods import SELECTIONS

GLOSSARY = {
    "Ā": "average accuracy: the mean over tasks of the top-1 accuracy on all test images of the classes seen so far, "
    "measured after each task (%)",
    "A_T": "last accuracy: the top-1 accuracy on all test images after the last task (%)",
    "forgetting": "the mean over all tasks but the last of (the highest accuracy on the task after any task, the last "
    "included, − that after the last), in percentage points",
    "backward transfer": "the mean over all tasks but the last of (final accuracy − accuracy right after the task was "
    "learned), in percentage points; forward transfer, the accuracy on a task before it is learned, is not defined "
    "here: a classifier without rows for a task's classes cannot answer with them",
    "ECE": "expected calibration error: over 15 equal bins of the probability of the answer, the mean distance between "
    "probability and accuracy, weighted by images, in percentage points",
    "selection accuracy": "the share of test images for which the module of their own task was chosen (%)",
    "oracle": "the accuracy when each image's true task chooses the module: what a perfect selection would give (%)",
    **{selection.name: selection.definition for selection in SELECTIONS.values()},
}


def _selection_names() -> dict[str, str]:
    names = {}
    for selection in SELECTIONS.values():
        names[selection.name] = selection.title
        if selection.ordered:
            names[f"{selection.name}_shuffled"] = f"{selection.name} (shuffled test set)"
    return {**names, "oracle": "oracle (true task)"}


# how every log line, table and picture names a selection
SELECTION_NAMES = _selection_names()


def selection_name(selection: str) -> str:
    """Return how every table and picture names a selection."""
    return SELECTION_NAMES.get(selection, selection)


def terms(runs: Iterable[Mapping[str, Any]], selections: Sequence[str] | None = None) -> dict[str, str]:
    """The definitions of what is shown of these runs (their JSON), or of some selections of theirs.

    ``sample`` and the like are defined only where there are modules to choose from.
    """
    shown = {"Ā", "A_T", "forgetting"}
    for run in runs:
        if len(run["results"]) > 1:
            shown |= {name for name in run["results"] if selections is None or name in selections}
            shown |= {"selection accuracy"} if run["selection_accuracy"] else set()
    return {term: meaning for term, meaning in GLOSSARY.items() if term in shown}


def new_classes_alone(run: Mapping[str, Any]) -> bool:
    """Whether a run's JSON is that of a continued run that did not test the classes of the saved one."""
    return bool(run.get("base") and run["base"]["reported_from_task"])


def top_k_hits(top: np.ndarray, true: np.ndarray, k: int) -> np.ndarray:
    """Whether the true class is among the first ``k``: ``(samples, ranks), (samples,) -> (samples,)`` bool."""
    hits: np.ndarray = (top[:, :k] == true[:, None]).any(axis=1)
    return hits


def percent(hits: np.ndarray) -> float | None:
    """Share of True in percent; None where there is nothing to count."""
    return float(hits.mean() * 100) if len(hits) else None


def accuracy_groups(
    predicted: np.ndarray, true: np.ndarray, task_classes: Sequence[range], known: int
) -> dict[str, float]:
    """PILOT's ``CNN: {...}`` line: total, each task's class range, classes known before this task, new classes.

    ``task_classes`` are the class ranges of the tasks so far; ``known`` counts the classes before the newest
    task. A range of one class is kept (the release drops it when it is the last); a group without test images is
    left out.
    """
    hits = predicted == true
    groups = {"total": percent(hits)}
    right, images = (np.bincount(c, minlength=task_classes[-1].stop).cumsum() for c in (true[hits], true))
    for classes in task_classes:
        first, last = classes.start - 1, classes.stop - 1
        inside = images[last] - (images[first] if classes.start else 0)
        found = right[last] - (right[first] if classes.start else 0)
        groups[f"{classes.start:02d}-{last:02d}"] = float(found / inside * 100) if inside else None
    groups["old"] = percent(hits[true < known]) if known else 0.0  # as PILOT writes it for the first task
    groups["new"] = percent(hits[true >= known])
    return {name: round(value, 2) for name, value in groups.items() if value is not None}


def group_accuracies(hits: np.ndarray, group: np.ndarray, groups: int) -> list[float | None]:
    """Percent correct in each group, in one pass: ``(images,), (images,)``, groups from 0; None: without images.

    By task it is a row of the accuracy matrix.
    """
    right, images = np.bincount(group[hits], minlength=groups), np.bincount(group, minlength=groups)
    return [float(r / n * 100) if n else None for r, n in zip(right[:groups], images[:groups], strict=True)]


def average_accuracy(curve: Sequence[float]) -> float:
    """Ā of a top-1 curve."""
    return float(np.mean(curve))


def forgetting(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over all but the last task of (highest accuracy − final accuracy), in percentage points, as the release.

    ``matrix[t][k]`` is the accuracy on task ``k`` after learning task ``t``; only ``k <= t`` is read. The highest may
    be the final one: a task that improves to its best at the very end has lost nothing. One task alone: None.
    """
    last = len(matrix) - 1
    table = np.full((len(matrix), len(matrix)), -np.inf)  # of a task that is still to come: never the highest
    for t, row in enumerate(matrix):
        table[t, : t + 1] = np.array(row[: t + 1], dtype=float)  # None becomes NaN
    drops = (table.max(axis=0, initial=-np.inf) - table[last])[:last]
    drops = drops[~np.isnan(drops)]
    return float(drops.mean()) if len(drops) else None


def backward_transfer(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over all but the last task of (final accuracy − accuracy right after learning it), in percentage points.

    After Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, Section 2; ``matrix``
    as in ``forgetting``. Forward transfer is not defined for class-incremental learning: before a task is learned the
    classifier has no rows for its classes. One task alone: None.
    """
    last = len(matrix) - 1
    changes = []
    for k in range(last):
        first, final = matrix[k][k], matrix[last][k]
        if first is not None and final is not None:
            changes.append(final - first)
    return float(np.mean(changes)) if changes else None


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation over ``count`` seeds, and half the width of the mean's 95 % interval."""

    mean: float
    std: float
    count: int
    half_width: float | None = None


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1); the deviation of one value is 0."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def over_seeds(values: Sequence[float | None]) -> MeanStd | None:
    """Mean, deviation and interval of one value for each seed; None if any is absent."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return MeanStd(*mean_std(known), len(known), half_width(known))


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % t interval of the mean: ``t · s / √n``; None for values that do not vary."""
    count = len(values)
    if count < 2 or not np.ptp(np.round(values, 9)):  # closer values differ through rounding alone
        return None
    from scipy import stats

    return float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)


def confusion(true_task: np.ndarray, module: np.ndarray, tasks: int) -> list[list[int]]:
    """Counts of (true task, chosen module)."""
    table = np.zeros((tasks, tasks), dtype=np.int64)
    np.add.at(table, (true_task, module), 1)
    counts: list[list[int]] = table.tolist()
    return counts


def entropy_by_module(
    entropy: np.ndarray, module: np.ndarray, true_task: np.ndarray, tasks: int
) -> dict[str, list[float | None]]:
    """Mean entropy (nats) of each module where it was the right choice and where it was not; None: never chosen so."""
    means = {}
    for name, side in (("right", module == true_task), ("wrong", module != true_task)):
        chosen = module[side]
        order = np.argsort(chosen, kind="stable")  # so that one pass serves all modules
        of_module = np.split(entropy[side][order], np.searchsorted(chosen[order], np.arange(1, tasks)))
        means[name] = [float(values.mean()) if len(values) else None for values in of_module]
    return means


BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017


def expected_calibration_error(probability: np.ndarray, hits: np.ndarray) -> float | None:
    """ECE of answers sorted by their probability into ``BINS`` equal bins of (0, 1]: ``(images,), (images,)``.

    The mean distance between probability and accuracy, weighted by images, in percentage points; None: no images.
    """
    if not len(hits):
        return None
    place = np.clip(np.ceil(probability.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    distances = np.bincount(place, weights=probability.astype(np.float64) - hits)  # of a bin, times its images
    return float(100 * np.abs(distances).sum() / len(hits))


# -- cost: measured by models.cost ------------------------------------------------------------------------------------

TRAIN_MINUTES = "Train Time (min)"
EVAL_MS = "Eval (ms/smp)"
INFERENCE = "Inference (GFLOPs)"
TRAIN = "Train (GFLOPs)"
PEAK_MB = "Peak Train Mem. (MB)"
PARAMS = "Params (M)"
TRAINABLE = "Trainable Params (M)"
COLUMNS = (TRAIN_MINUTES, EVAL_MS, INFERENCE, TRAIN, PEAK_MB, PARAMS, TRAINABLE)
BY_RELEASE = " by the release procedure"
RELEASE_COLUMNS = tuple(name + BY_RELEASE for name in (EVAL_MS, INFERENCE, TRAIN))
LEARNER = "Learner (GFLOPs)"  # of training, without the backbone


def cost_summary(cost: Mapping[str, float]) -> dict[str, float]:
    """The columns in their order, rounded to four significant digits, for the log's ``Cost summary`` line."""
    return {name: float(f"{cost[name]:.4g}") for name in (*COLUMNS, *RELEASE_COLUMNS) if name in cost}
