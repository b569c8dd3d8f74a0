"""What evaluation and learning hold in memory, as laws of size: tensors are counted, no process is measured."""

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.base import SAMPLES, Learner, make_learner
from models.evaluation import evaluate
from models.tosca import TOSCA
from tests.conftest import tiny_config
from utils.config.methods import METHODS

DIM, CPU = 16, torch.device("cpu")
KEYS: dict[str, dict[str, Any]] = {"tosca_white": {"white_features": 64}}


class Tensors(TorchDispatchMode):
    """Counts the storages that are made under it: how many live, their bytes, the most at a time, and all ever made."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.bytes = self.peak = self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.living:
                self._born(storage)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.living[key] = size
        self.bytes, self.made = self.bytes + size, self.made + size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.bytes -= self.living.pop(key)


class Task:
    """Two images of each of ``rows`` classes."""

    def __init__(self, index: int, rows: int) -> None:
        self.index, self.first_row, self.new_rows = index, index * rows, rows
        self.labels = torch.arange(2 * rows) % rows + self.first_row

    def test_view(self) -> Tensor:
        return torch.randn(len(self.labels), DIM, generator=torch.Generator().manual_seed(self.index))

    def epoch(self, epoch: int) -> Tensor:
        return self.test_view()

    def seen(self) -> tuple[Tensor, Tensor]:
        tasks = [Task(index, self.new_rows) for index in range(self.index + 1)]
        return torch.cat([task.test_view() for task in tasks]), torch.cat([task.labels for task in tasks])


def learned(name: str, tasks: int, rows: int) -> Learner:
    keys: dict[str, Any] = {"epochs": 1, "batch_size": 512, **KEYS.get(name, {})}
    learner = make_learner(tiny_config(model_name=name, **keys), DIM, CPU, seed=0)
    for index in range(tasks):
        learner.learn(Task(index, rows))
    return learner


def peak_of_evaluation(learner: Learner, rows: int, images: int) -> int:
    """The most bytes that the tensors of an evaluation hold at a time, of ``images`` test images in two tasks."""
    halves = np.split(np.arange(images), 2)
    stream = SimpleNamespace(
        tasks=tuple(
            SimpleNamespace(rows=range(t * rows, (t + 1) * rows), test=half, test_classes=half % rows + t * rows)
            for t, half in enumerate(halves)
        ),
        row_class=np.arange(2 * rows),
        domains=(),
    )
    draw = np.random.default_rng(0)
    bank = SimpleNamespace(read=lambda split, view, rows: draw.standard_normal((len(rows), DIM), dtype=np.float32))
    with Tensors() as tensors:
        evaluate(learner, bank, stream, 1, seed=0)
    return tensors.peak


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_an_evaluation_holds_for_an_image_does_not_grow_with_the_classes(name, monkeypatch):
    monkeypatch.setattr("models.modular.EVALUATION_BYTES", 1 << 16)  # reached by few images already
    monkeypatch.setattr("models.ranpac.RANDOM_FEATURES", 64)
    rows = 150
    learner, more = learned(name, 2, rows), 4 * SAMPLES
    few, many = (peak_of_evaluation(learner, rows, images) for images in (2 * SAMPLES, 2 * SAMPLES + more))
    scores = 4 * 2 * rows  # bytes of one image's scores under one selection
    assert few > SAMPLES * scores  # the count sees the scores of a piece
    assert (many - few) / more < scores / 2, "the scores of all images are held at once"


def test_while_the_modules_pass_by_nothing_is_kept_but_what_was_laid_out_before(monkeypatch):
    """Small results kept between large ones that are not made a process grow by all modules: the allocator's room."""
    monkeypatch.setattr("models.modular.EVALUATION_BYTES", 1)  # one module at a time
    learner = learned("tosca", 8, 3)
    assert isinstance(learner, TOSCA)
    all_logits, counts, tensors = learner.all_logits, [], Tensors()

    def counted(features: Tensor):
        for first, logits in all_logits(features):
            counts.append(len(tensors.living))
            yield first, logits

    monkeypatch.setattr(learner, "all_logits", counted)
    with tensors:
        learner.answer(torch.randn(5, DIM))
    assert len(counts) == 8 and len(set(counts[1:])) == 1, counts
