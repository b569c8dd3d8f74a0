"""All answers of a learner at once, for studies and tests of few samples."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.base import Learner, Prediction, joined
from models.evaluation import best_classes, class_scores


def all_answers(
    learner: Learner, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
) -> dict[str, Prediction]:
    """What ``predict_pieces`` yields, put together in the order of the samples."""
    pieces: dict[str, list[tuple[Tensor, Prediction]]] = {}
    for samples, answers in learner.predict_pieces(features, true_task, shuffled):
        for name, prediction in answers.items():
            pieces.setdefault(name, []).append((samples, prediction))
    found = {}
    for name, parts in pieces.items():
        back, whole = torch.cat([samples for samples, _ in parts]).argsort(), joined([answer for _, answer in parts])
        found[name] = replace(whole, **{key: v[back] for key, v in vars(whole).items() if v is not None})
    return found


def top_classes(scores: Tensor, row_class: np.ndarray, k: int = 5) -> Tensor:
    """The best classes, best first: ``(samples, rows), (rows,) -> (samples, min(k, classes))``."""
    return best_classes(class_scores(scores, row_class), k)
