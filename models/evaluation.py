"""What a learner reads of the bank: a task's training images, and the test images of all tasks so far."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.base import Learner, Prediction
from utils.data.tasks import Task, TaskStream
from utils.features.bank import FeatureBank
from utils.features.rows import TEST_VIEW
from utils.results import metrics
from utils.results.metrics import SELECTION_NAMES
from utils.runs.manifest import TaskRecord
from utils.seeds import derive_seed


class BankTask:
    """A task's training images as features of the bank, on the learner's device (``models.base.TaskData``)."""

    def __init__(self, bank: FeatureBank, stream: TaskStream, task: Task, views: int, device: torch.device) -> None:
        self._bank, self._stream, self._task, self._views, self._device = bank, stream, task, views, device
        self.index, self.first_row, self.new_rows = task.index, task.rows.start, len(task.rows)
        self.labels = torch.from_numpy(task.train_rows).to(device)
        self._test_view: Tensor | None = None

    def epoch(self, epoch: int) -> Tensor:
        return self._read("train", epoch % self._views, self._task.train) if self._views else self.test_view()

    def test_view(self) -> Tensor:
        if self._test_view is None:
            self._test_view = self._read("train", TEST_VIEW, self._task.train)
        return self._test_view

    def seen(self) -> tuple[Tensor, Tensor]:
        tasks = self._stream.tasks[: self.index + 1]
        features = self._read("train", TEST_VIEW, np.concatenate([t.train for t in tasks]))
        return features, torch.from_numpy(np.concatenate([t.train_rows for t in tasks])).to(self._device)

    def _read(self, split: str, view: int, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self._bank.read(split, view, rows)).to(self._device)


@dataclass(frozen=True)
class Evaluation:
    """What a test after a task gave.

    Attributes:
        record: the numbers of the task.
        images: ``(images,)`` which images of the test split were answered, in this order.
        answers: to each image, the arrays of ``utils.results.record`` by name, but those of names.
    """

    record: TaskRecord
    images: np.ndarray
    answers: dict[str, np.ndarray]

    def named(self, keys: Sequence[str], class_names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the arrays with the names of images (of the whole test split) and of all classes."""
        files = np.array([keys[image] for image in self.images], dtype=str)
        return {"files": files, "class_names": np.array(class_names, dtype=str), **self.answers}


def evaluate(learner: Learner, bank: FeatureBank, stream: TaskStream, task: int, seed: int) -> Evaluation:
    """Test on all tasks so far, in class order, under every selection."""
    seen = stream.tasks[: task + 1]
    images = np.concatenate([t.test for t in seen])
    true_class = np.concatenate([t.test_classes for t in seen])
    true_task = np.repeat(np.arange(len(seen)), [len(t.test) for t in seen])
    generator = torch.Generator().manual_seed(derive_seed("shuffled test set", seed, task))
    row_class = stream.row_class[: seen[-1].rows.stop]
    found = _collected(
        learner.predict_pieces(
            torch.from_numpy(bank.read("test", TEST_VIEW, images)).to(learner.device),
            torch.from_numpy(true_task).to(learner.device),
            torch.randperm(len(images), generator=generator).to(learner.device),
        ),
        row_class,
    )
    results: dict[str, dict[str, Any]] = {}
    confusion, entropy = {}, {}
    answers: dict[str, np.ndarray] = {"true_class": true_class.astype(np.int32)}
    for name, kept in found.items():
        predicted = kept.top[:, 0]
        hits = predicted == true_class
        results[name] = {
            "top1": metrics.percent(hits),
            "top5": metrics.percent(metrics.top_k_hits(kept.top, true_class, 5)),
            "per_task": metrics.group_accuracies(hits, true_task, len(seen)),
            "groups": _groups(stream, task, predicted, true_class, true_task),
        }
        answers |= {f"{name}.class": predicted.astype(np.int32), f"{name}.probability": kept.probability}
        if kept.module is not None:
            answers[f"{name}.module"] = kept.module.astype(np.int32)
            results[name]["selection_accuracy"] = metrics.percent(kept.module == true_task)
            confusion[name] = metrics.confusion(true_task, kept.module, len(seen))
            if kept.entropy is not None:
                entropy[name] = metrics.entropy_by_module(kept.entropy, kept.module, true_task, len(seen))
    return Evaluation(TaskRecord(results, confusion, entropy), images, answers)


class _Kept(NamedTuple):
    """What an evaluation keeps of the answers under one selection: a few numbers for each image, whatever the classes.

    Attributes:
        top: ``(images, up to 5)`` the best classes, best first.
        probability: ``(images,)`` of the best class.
        module: ``(images,)`` the module that was chosen, or None.
        entropy: ``(images,)`` of its prediction, or None.
    """

    top: np.ndarray
    probability: np.ndarray
    module: np.ndarray | None
    entropy: np.ndarray | None


def _collected(pieces: Iterable[tuple[Tensor, dict[str, Prediction]]], row_class: np.ndarray) -> dict[str, _Kept]:
    """Reduce the answers piece by piece, so that the scores of all images are never held together."""
    parts: dict[str, list[tuple[Tensor | None, ...]]] = {}
    for images, answers in pieces:
        for name, prediction in answers.items():
            scores = class_scores(prediction.scores, row_class)
            numbers = (best_classes(scores), scores.softmax(dim=1).amax(dim=1), prediction.module, prediction.entropy)
            parts.setdefault(name, []).append((images, *numbers))
    names = sorted(parts, key=list(SELECTION_NAMES).index)
    return {name: _in_order(*zip(*parts[name], strict=True)) for name in names}


def _in_order(images: Sequence[Tensor], *columns: Sequence[Any]) -> _Kept:
    """Join the pieces of each column, sorted by the numbers of the images."""
    back = torch.cat(list(images)).argsort()
    top, probability, module, entropy = (
        None if pieces[0] is None else torch.cat(list(pieces))[back].cpu().numpy() for pieces in columns
    )
    assert top is not None and probability is not None
    return _Kept(top, probability, module, entropy)


def _groups(
    stream: TaskStream, task: int, predicted: np.ndarray, true_class: np.ndarray, true_task: np.ndarray
) -> dict[str, float]:
    """PILOT's groups; in domain runs a group is a domain."""
    ranges = [t.rows for t in stream.tasks[: task + 1]]
    if not stream.domains:
        return metrics.accuracy_groups(predicted, true_class, ranges, ranges[-1].start)
    hits = predicted == true_class
    names = [f"domain {name}" if name else f"task {t + 1}" for t, name in enumerate(stream.domains[: task + 1])]
    per_task = {name: metrics.percent(hits[true_task == t]) for t, name in enumerate(names)}
    old_new = {"old": metrics.percent(hits[true_task < task]), "new": metrics.percent(hits[true_task == task])}
    return {name: round(v or 0.0, 2) for name, v in {"total": metrics.percent(hits), **per_task, **old_new}.items()}


def best_classes(of_class: Tensor, k: int = 5) -> Tensor:
    """The best classes, best first: ``(samples, classes) -> (samples, min(k, classes))``."""
    return of_class.topk(min(k, of_class.shape[1]), dim=1).indices


def class_scores(scores: Tensor, row_class: np.ndarray) -> Tensor:
    """A class scores its best row: ``(samples, rows), (rows,) -> (samples, classes)``.

    In domain-incremental runs a class has one row for each of its domains; one without a row scores ``-inf``.
    """
    of_class = scores.new_full((len(scores), int(row_class.max()) + 1), float("-inf"))
    index = torch.from_numpy(row_class).to(scores.device)
    return of_class.scatter_reduce_(1, index.expand_as(scores), scores, "amax")
