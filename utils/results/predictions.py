"""What a run answered to each test image after its last task: an ``.npz`` beside its JSON, and numbers from it.

The arrays of the file: ``files`` and ``true_class`` ``(images,)``, ``class_names`` ``(classes,)``, and for each
selection ``<selection>.class``, ``<selection>.probability`` and, with modules, ``<selection>.module``, ``(images,)``
each. Classes are places in ``class_names``, the order of learning; modules are tasks from 0.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write
from utils.results import metrics


@dataclass(frozen=True)
class SelectionPredictions:
    """The answers under one selection.

    Attributes:
        predicted: ``(images,)`` classes.
        probability: ``(images,)`` of the predicted class: a softmax over the scores of all classes seen.
        module: ``(images,)`` the task whose module answered, or None for a method without modules.
    """

    predicted: np.ndarray
    probability: np.ndarray
    module: np.ndarray | None = None


@dataclass(frozen=True)
class Predictions:
    """The answers to all test images.

    Attributes:
        files: ``(images,)`` where each image was read.
        true_class: ``(images,)`` places in ``class_names``.
        class_names: in the order of learning.
        selections: by name.
    """

    files: np.ndarray
    true_class: np.ndarray
    class_names: tuple[str, ...]
    selections: Mapping[str, SelectionPredictions]

    def details(self) -> dict[str, Any]:
        """Return for each selection the accuracy on each class (%), ECE (points) and the reliability bins, for JSON."""
        found = {}
        for name, answers in self.selections.items():
            hits = answers.predicted == self.true_class
            bins = metrics.reliability(answers.probability, hits)
            found[name] = {
                "per_class": metrics.class_accuracies(hits, self.true_class, len(self.class_names)),
                "ece": metrics.expected_calibration_error(bins),
                "reliability": [b.to_json() for b in bins],
            }
        return found


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write the ``.npz``; the same predictions give the same bytes.

    Raises:
        UserError: the disk refuses.
    """
    arrays: dict[str, Any] = {
        "files": predictions.files.astype(str),
        "true_class": predictions.true_class.astype(np.int32),
        "class_names": np.array(predictions.class_names, dtype=str),
    }
    for name, answers in predictions.selections.items():
        arrays[f"{name}.class"] = answers.predicted.astype(np.int32)
        arrays[f"{name}.probability"] = answers.probability.astype(np.float32)
        if answers.module is not None:
            arrays[f"{name}.module"] = answers.module.astype(np.int32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # no objects are among them: nothing is pickled
    atomic_write(path, buffer.getbuffer())


def read_predictions(path: Path) -> Predictions:
    """Read what ``write_predictions`` wrote.

    Raises:
        UserError: the file is absent, damaged or of another form.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        files, true_class, class_names = arrays.pop("files"), arrays.pop("true_class"), arrays.pop("class_names")
        selections = {}
        for name in dict.fromkeys(name.rpartition(".")[0] for name in arrays):
            chosen = arrays.get(f"{name}.module")
            selections[name] = SelectionPredictions(arrays[f"{name}.class"], arrays[f"{name}.probability"], chosen)
        predictions = Predictions(files, true_class, tuple(map(str, class_names)), selections)
        _check(predictions)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not the .npz of a run's answers ({error}); it is left out") from error
    return predictions


def _check(predictions: Predictions) -> None:
    """Check that shapes, kinds and class numbers fit each other.

    Raises:
        ValueError: they do not; in words.
    """
    count, classes = len(predictions.true_class), len(predictions.class_names)
    for answers in predictions.selections.values():
        arrays = [predictions.true_class, answers.predicted, answers.probability]
        arrays += [] if answers.module is None else [answers.module]
        if {array.shape for array in arrays} != {(count,)}:
            raise ValueError("arrays of different lengths")
        for numbers in (predictions.true_class, answers.predicted):
            if numbers.dtype.kind != "i" or (count and not 0 <= numbers.min() <= numbers.max() < classes):
                raise ValueError("class numbers that no class has")
        if answers.probability.dtype.kind != "f" or not np.isfinite(answers.probability).all():
            raise ValueError("probabilities that are not numbers")
