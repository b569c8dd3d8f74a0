"""Every number that is reported, as a pure function. NumPy only.

The definitions, used word for word in log, JSON, tables and README, are in ``GLOSSARY``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from utils.config.methods import SELECTIONS

GLOSSARY = {
    "Ā": "average accuracy: the mean over tasks of the top-1 accuracy on all test images of the classes seen so far, "
    "measured after each task (%)",
    "A_T": "last accuracy: the top-1 accuracy on all test images after the last task (%)",
    "forgetting": "the mean over all tasks but the last of (best accuracy on the task before the end − its final "
    "accuracy), in percentage points",
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


def task_accuracies(hits: np.ndarray, task: np.ndarray, tasks: int) -> list[float | None]:
    """One row of the accuracy matrix: percent correct on each of the ``tasks`` so far."""
    return _percent_of_groups(hits, task, tasks)


def _percent_of_groups(hits: np.ndarray, group: np.ndarray, groups: int) -> list[float | None]:
    """``percent`` of the hits in each group, in one pass over them: ``(samples,), (samples,)``, groups from 0."""
    right, images = np.bincount(group[hits], minlength=groups), np.bincount(group, minlength=groups)
    return [float(r / n * 100) if n else None for r, n in zip(right[:groups], images[:groups], strict=True)]


def average_accuracy(curve: Sequence[float]) -> float:
    """Ā of a top-1 curve."""
    return float(np.mean(curve))


def forgetting(matrix: Sequence[Sequence[float | None]]) -> float:
    """Mean over all but the last task of (best accuracy before the end − final accuracy), in percentage points.

    ``matrix[t][k]`` is the accuracy on task ``k`` after learning task ``t``; only ``k <= t`` is read. A task that
    improves to its best at the very end has negative forgetting. One task alone: 0.
    """
    last = len(matrix) - 1
    table = np.full((len(matrix), len(matrix)), -np.inf)  # of a task that is still to come: never the best
    for t, row in enumerate(matrix):
        table[t, : t + 1] = np.array(row[: t + 1], dtype=float)  # None becomes NaN
    drops = table[:last, :last].max(axis=0, initial=-np.inf) - table[last, :last]
    drops = drops[~np.isnan(drops)]
    return float(drops.mean()) if len(drops) else 0.0


def backward_transfer(matrix: Sequence[Sequence[float | None]]) -> float:
    """Mean over all but the last task of (final accuracy − accuracy right after learning it), in percentage points.

    After Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, Section 2; ``matrix``
    as in ``forgetting``. Forward transfer is not defined for class-incremental learning: before a task is learned the
    classifier has no rows for its classes. One task alone: 0.
    """
    last = len(matrix) - 1
    changes = []
    for k in range(last):
        first, final = matrix[k][k], matrix[last][k]
        if first is not None and final is not None:
            changes.append(final - first)
    return float(np.mean(changes)) if changes else 0.0


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1); the deviation of one value is 0."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


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


# -- after the last task ----------------------------------------------------------------------------------------------

BINS = 15  # of the reliability diagram, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017


@dataclass(frozen=True)
class ReliabilityBin:
    """The images whose answer had a probability in one of the equal bins of (0, 1].

    Attributes:
        count: how many.
        probability: their mean probability in percent; None for an empty bin.
        accuracy: their accuracy in percent; None for an empty bin.
    """

    count: int
    probability: float | None = None
    accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values under the names of the attributes."""
        return asdict(self)


def reliability(probability: np.ndarray, hits: np.ndarray) -> list[ReliabilityBin]:
    """Sort images by the probability of their answer into ``BINS`` equal bins: ``(images,), (images,)``."""
    place = np.clip(np.ceil(probability.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for index in range(BINS):
        inside = place == index
        count = int(inside.sum())
        mean = float(probability[inside].astype(np.float64).mean() * 100) if count else None
        bins.append(ReliabilityBin(count, mean, percent(hits[inside])))
    return bins


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float | None:
    """Mean distance between probability and accuracy, weighted by images, in percentage points; None: no images."""
    total = sum(b.count for b in bins)
    distances = [
        b.count * abs(b.accuracy - b.probability) for b in bins if b.accuracy is not None and b.probability is not None
    ]
    return sum(distances) / total if total else None


def class_accuracies(hits: np.ndarray, true: np.ndarray, classes: int) -> list[float | None]:
    """Percent correct on the test images of each class; None for a class without any."""
    return _percent_of_groups(hits, true, classes)


def class_confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts of (true class, predicted class): ``(images,), (images,) -> (classes, classes)`` int64."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (true, predicted), 1)
    return table
