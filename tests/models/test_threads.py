"""Threads that share one learner answer as one thread does: nothing that answering touches is shared and changed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from torch import Tensor

from benchmarks.answers import all_answers
from models.base import Learner, Prediction, make_learner
from tests.conftest import tiny_config
from utils.config.methods import METHODS

DIM, TASKS, THREADS, CALLS = 64, 4, 8, 40


class Task:
    """Two classes of random features around their centres."""

    def __init__(self, index: int) -> None:
        self.index, self.first_row, self.new_rows = index, 2 * index, 2
        self.labels = torch.arange(24) % 2 + self.first_row
        generator = torch.Generator().manual_seed(index)
        self.features = torch.randn(24, DIM, generator=generator) + 2 * torch.eye(DIM)[self.labels]

    def epoch(self, epoch: int) -> Tensor:
        return self.features

    def test_view(self) -> Tensor:
        return self.features

    def seen(self) -> tuple[Tensor, Tensor]:
        tasks = [Task(index) for index in range(self.index + 1)]
        return torch.cat([task.features for task in tasks]), torch.cat([task.labels for task in tasks])


def learner_of(name: str) -> Learner:
    return make_learner(tiny_config(model_name=name, epochs=2), DIM, torch.device("cpu"), seed=0)


@pytest.fixture(scope="module", params=METHODS)
def learned(request: pytest.FixtureRequest) -> Learner:
    learner = learner_of(request.param)
    for index in range(TASKS):
        learner.learn(Task(index))
    return learner


def in_threads(work: Callable[[int], Prediction]) -> list[Prediction]:
    """``CALLS`` calls in each of ``THREADS`` threads that start together, in the order of their numbers."""
    start = Barrier(THREADS)

    def calls(thread: int) -> list[Prediction]:
        start.wait()
        return [work(thread * CALLS + call) for call in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return [prediction for found in pool.map(calls, range(THREADS)) for prediction in found]


def test_eight_threads_on_one_learner_answer_as_one_does(learned):
    batches = torch.randn(32, 16, DIM, generator=torch.Generator().manual_seed(1)) + torch.eye(DIM)[:16]
    for selection in learned.selections:
        wanted = [learned.answer(features, selection) for features in batches]
        # restored, so that whatever is made at the first use would be made by all threads at once
        restored = learner_of(learned.config.model_name)
        modules = [learned.module_state(task) for task in range(TASKS)]
        restored.load_state_dict(learned.state_dict(), [module for module in modules if module is not None])
        asked = partial(restored.answer, selection=selection)
        found = in_threads(lambda call, ask=asked: ask(batches[call % len(batches)]))
        for call, prediction in enumerate(found):
            assert torch.equal(prediction.scores, wanted[call % len(batches)].scores)
            if prediction.module is not None:
                assert torch.equal(prediction.module, wanted[call % len(batches)].module)


def test_answering_leaves_the_threads_of_the_process_alone(learned, monkeypatch):
    def forbidden(count: int) -> None:
        raise AssertionError("the number of threads is the whole process's")

    monkeypatch.setattr(torch, "set_num_threads", forbidden)
    for selection in learned.selections:
        learned.answer(torch.ones(3, DIM), selection)
    all_answers(learned, torch.ones(3, DIM), torch.zeros(3, dtype=torch.long), torch.arange(3))
