"""What the routers read, how an evaluation counts, and what the seed reaches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.answers import all_answers
from models.base import Learner, OnEpoch, Prediction, TaskData
from models.evaluation import best_classes, evaluate
from models.ranpac import RanPAC
from models.streaming.lda import StreamingLDA
from models.streaming.ridge import RandomRidge
from models.tosca import TOSCA
from tests.conftest import tiny_config
from utils.errors import NumericError
from utils.seeds import derive_seed

DIM, CPU = 16, torch.device("cpu")


class Task:
    """Two classes; the augmented view is another one than the test view."""

    def __init__(self, index: int) -> None:
        self.index, self.first_row, self.new_rows = index, 2 * index, 2
        self.labels = torch.arange(20) % 2 + self.first_row

    def epoch(self, epoch: int) -> Tensor:
        return -self.test_view()

    def test_view(self) -> Tensor:
        noise = torch.randn(20, DIM, generator=torch.Generator().manual_seed(self.index))
        return noise + torch.eye(DIM)[self.labels]


def learned(seed: int = 7) -> TOSCA:
    learner = TOSCA(tiny_config(), DIM, CPU, seed)
    for index in range(3):
        learner.learn(Task(index))
    return learner


FEATURES = torch.randn(60, DIM, generator=torch.Generator().manual_seed(50)) + torch.eye(DIM)[torch.arange(60) % 6]


def test_each_router_reads_the_test_view_and_its_task_answers_among_its_own_rows():
    learner = learned()
    routers = {"lda": StreamingLDA(DIM), "ridge": RandomRidge(DIM, 1000, derive_seed("ridge", 7))}
    answers, chosen = all_answers(learner, FEATURES), {}
    for name, router in routers.items():
        for task in (Task(0), Task(1), Task(2)):
            router.update(task.test_view(), task.labels, task.first_row + 2)
        chosen[name] = router.scores(FEATURES).argmax(dim=1) // 2
        for answer in (answers[name], learner.answer(FEATURES, name)):
            assert torch.equal(answer.module, chosen[name])
            own = torch.arange(6) // 2 == chosen[name][:, None]
            assert answer.scores[own].isfinite().all() and (answer.scores[~own] == -torch.inf).all()
    assert not torch.equal(chosen["lda"], chosen["ridge"])  # else they could be exchanged unseen


def test_the_seed_reaches_module_classifier_and_random_features():
    first, same, other = (TOSCA(tiny_config(), DIM, CPU, seed) for seed in (1, 1, 2))
    for what in (
        lambda learner: learner.fresh_luca(Task(0)).mlp[0].weight,
        lambda learner: learner.fresh_luca(Task(1)).mlp[0].weight,
        lambda learner: learner.grown_classifier(Task(0)).weight,
        lambda learner: learner.routers["ridge"].projection,
    ):
        assert torch.equal(what(first), what(same)) and not torch.equal(what(first), what(other))
    projections = [RanPAC(tiny_config(model_name="ranpac"), DIM, CPU, seed).ridge.projection for seed in (1, 1, 2)]
    assert torch.equal(projections[0], projections[1]) and not torch.equal(projections[0], projections[2])


def test_each_later_module_starts_elsewhere():
    second, third = (TOSCA(tiny_config(), DIM, CPU, 1).fresh_luca(Task(index)) for index in (1, 2))
    assert not torch.equal(second.mlp[0].weight, third.mlp[0].weight)


@pytest.mark.parametrize("name", ["weight", "sigma"])
def test_a_classifier_that_is_not_finite_is_not_saved(monkeypatch, name):
    def train(luca: object, classifier: torch.nn.Module, *_: object, **__: object) -> None:
        value = getattr(classifier, name).data
        value.view(-1)[0] = float("nan")

    learner = learned()
    monkeypatch.setattr("models.modular.train", train)
    with pytest.raises(NumericError, match=rf"task 4, after its last step: {name} is not finite"):
        learner.learn(Task(3))
    assert learner.tasks == 3 and len(learner.modules["norm.weight"]) == 3


class Fixed(Learner):
    """Scores that are written down, and the order in which the test set was shuffled."""

    table: Tensor
    order: Tensor

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None: ...

    def scores(self, features: Tensor) -> Tensor:
        return self.table

    def predict_pieces(self, features, true_task=None, shuffled=None):
        self.order = shuffled
        return super().predict_pieces(features, true_task, shuffled)


class FixedModules(Fixed):
    """Scores and modules that are written down, in two pieces, the later one first; nothing is said of entropies."""

    module: Tensor = torch.tensor([0, 1, 1, 1])

    def predict_pieces(self, features, true_task=None, shuffled=None):
        for images in (torch.tensor([2, 3]), torch.tensor([0, 1])):
            yield images, {"sample": Prediction(self.table[images], self.module[images])}


def evaluated(
    table: Tensor,
    tasks: list[tuple[range, list[int]]],
    row_class: list[int],
    seed: int = 0,
    kind: type[Fixed] = Fixed,
    after: int | None = None,
    domains: tuple[str, ...] = ("photo", "sketch"),
):
    """Evaluate written scores: tasks are (rows, true classes of the test images), ``after`` one of them or the last."""
    learner = kind(tiny_config(model_name="simplecil"), DIM, CPU, 0)
    learner.table = table
    starts = np.cumsum([0, *(len(true) for _, true in tasks)])
    stream = SimpleNamespace(
        tasks=tuple(
            SimpleNamespace(rows=rows, test=np.arange(start, start + len(true)), test_classes=np.asarray(true))
            for start, (rows, true) in zip(starts, tasks, strict=False)
        ),
        row_class=np.asarray(row_class),
        domains=domains if len(set(row_class)) < len(row_class) else (),
    )
    bank = SimpleNamespace(read=lambda split, view, rows: np.zeros((len(rows), DIM), np.float32))
    evaluation = evaluate(learner, bank, stream, len(tasks) - 1 if after is None else after, seed)
    return evaluation.record.results["sample"], learner, evaluation


def test_top_five_counts_the_fifth_class_and_not_the_sixth():
    table = torch.arange(7, 0, -1).float().repeat(4, 1)  # class 0 is best, class 6 last
    found, *_ = evaluated(table, [(range(7), [0, 4, 4, 5])], list(range(7)))
    assert (found["top1"], found["top5"]) == (25, 75)
    assert best_classes(table).tolist() == [[0, 1, 2, 3, 4]] * 4


def test_an_answer_s_probability_is_the_largest_of_the_softmax_over_classes():
    table = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    *_, evaluation = evaluated(table, [(range(3), [0, 0])], [0, 1, 2])
    np.testing.assert_allclose(evaluation.answers["sample.probability"], [0.5, 0.7], rtol=1e-6)


def test_the_choice_of_modules_is_counted_with_and_without_entropies():
    tasks = [(range(1), [0, 0]), (range(1, 2), [1, 1])]
    found, _, evaluation = evaluated(torch.zeros(4, 2), tasks, [0, 1], kind=FixedModules)
    assert found["selection_accuracy"] == 75
    assert evaluation.answers["sample.module"].tolist() == [0, 1, 1, 1]
    assert evaluation.record.confusion["sample"] == [[1, 1], [0, 2]]  # [true task][chosen module]
    assert evaluation.record.entropy == {}


def test_old_and_new_in_domain_runs_are_earlier_tasks_and_the_newest():
    table = torch.eye(4)[[0, 0, 0, 0, 1, 1, 1, 1]]
    found, *_ = evaluated(table, [(range(2), [0, 0, 0, 1]), (range(2, 4), [0, 0, 0, 1])], [0, 1, 0, 1])
    assert found["groups"] == {"total": 50, "domain photo": 75, "domain sketch": 25, "old": 75, "new": 25}


def test_groups_leave_out_what_is_still_to_come():
    tasks = [(range(2), [0, 0, 1, 1]), (range(2, 4), [2, 3])]
    found, *_ = evaluated(torch.eye(2)[[0, 0, 0, 1]], tasks, [0, 1, 2, 3], after=0)
    assert found["groups"] == {"total": 75, "00-01": 75, "old": 0, "new": 75}


def test_domains_that_are_still_to_come_are_left_out_and_one_without_a_name_has_its_number():
    tasks = [(range(2), [0, 0, 1]), (range(2, 4), [0, 1])]
    found, *_ = evaluated(torch.eye(2)[[0, 0, 0]], tasks, [0, 1, 0, 1], after=0)
    assert found["groups"] == {"total": 66.67, "domain photo": 66.67, "old": 0, "new": 66.67}
    tasks = [(range(2), [0, 1]), (range(2, 4), [0, 1])]
    found, *_ = evaluated(torch.eye(4)[[0, 0, 0, 1]], tasks, [0, 1, 0, 1], domains=("", "sketch"))
    assert found["groups"] == {"total": 75, "task 1": 50, "domain sketch": 100, "old": 50, "new": 100}


def test_the_shuffled_test_set_depends_on_the_seed():
    tasks = [(range(2), [0, 1] * 10)]
    orders = [evaluated(torch.zeros(20, 2), tasks, [0, 1], seed)[1].order for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], torch.arange(20))
