"""The authors' release, number for number: the same start and the same batches give the same numbers (README.md)."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA
from benchmarks.answers import all_answers, top_classes
from models.tosca import TOSCA, class_means
from models.training import train
from tests.conftest import tiny_config
from utils.config.config import Config
from utils.results.metrics import accuracy_groups, percent

DIM, BATCH, EPOCHS, TASKS = 32, 16, 6, 3
FIRST_ROWS = (0, 5, 7, 9)  # of the three tasks, and their end
with np.load(Path(__file__).with_name("release_trajectories.npz")) as archive:
    GOLDEN = {name: archive[name] for name in archive.files}
CASES: list[dict[str, Any]] = json.loads(str(GOLDEN["cases"]))
TRAIN, TEST = (torch.from_numpy(GOLDEN[f"{name}_x"]) for name in ("train", "test"))
TRAIN_ROWS, TEST_ROWS = (torch.from_numpy(GOLDEN[f"{name}_y"]) for name in ("train", "test"))

every_task = pytest.mark.parametrize("task", range(TASKS))
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def golden(case: dict[str, Any], what: str, task: int) -> Tensor:
    return torch.from_numpy(GOLDEN[f"{case['name']}/{what}/{task}"]).clone()


def luca_state(case: dict[str, Any], what: str, task: int) -> dict[str, Tensor]:
    prefix = f"{case['name']}/{what}/{task}/"
    return {name.removeprefix(prefix): torch.from_numpy(v) for name, v in GOLDEN.items() if name.startswith(prefix)}


def config_of(case: dict[str, Any]) -> Config:
    defaults = {"lr": 0.025, "l1": 0.0005, "weight_decay": 0, "milestones": [3, 5], "mlp_ratio": 4, "se_ratio": 4}
    keys = {key: value for key, value in case.items() if key not in ("name", "seed")}
    return tiny_config(**{**defaults, "epochs": EPOCHS, "batch_size": BATCH, **keys})


def start(case: dict[str, Any], task: int) -> tuple[LuCA, CosineClassifier]:
    luca = LuCA(DIM, mlp_ratio=4, se_ratio=4, flow=case["flow"])
    luca.load_state_dict(luca_state(case, "luca_start", task))
    return luca, CosineClassifier(golden(case, "rows_start", task), golden(case, "sigma_start", task)[0])


def batches(case: dict[str, Any], task: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    for images in golden(case, "batches", task):
        yield [(TRAIN[part], TRAIN_ROWS[part]) for part in images.split(BATCH)]


def learned_so_far(case: dict[str, Any], task: int) -> TOSCA:
    """The release's modules and classifier after ``task``, in a learner of this project."""
    learner = TOSCA(config_of(case), DIM, torch.device("cpu"), seed=0)
    seen = torch.isin(TRAIN_ROWS, torch.arange(FIRST_ROWS[task + 1]))
    for router in learner.routers.values():
        router.update(TRAIN[seen], TRAIN_ROWS[seen], FIRST_ROWS[task + 1])
    row_task = torch.repeat_interleave(torch.arange(task + 1), torch.tensor(FIRST_ROWS[: task + 2]).diff())
    state = {"weight": golden(case, "rows_end", task), "sigma": golden(case, "sigma_end", task)[0]}
    modules = [luca_state(case, "luca_end", t) for t in range(task + 1)]
    learner.load_state_dict({**learner.state_dict(), **state, "row_task": row_task}, modules)
    return learner


@pytest.fixture(scope="session")
def tolerance() -> float:
    """0 where this machine's products have the bits of the release's machine, else 1e-6.

    The loop of the paper, written with PyTorch's own layers, tells which: it uses nothing of this project's training.
    """
    case = CASES[0]
    luca, classifier = start(case, 0)
    parameters = [*luca.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.025, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=1e-8)
    for epoch in batches(case, 0):
        for h, rows in epoch:
            z = luca.norm(h + luca.mlp(h))
            cosines = F.linear(F.normalize(z * luca.se(z), dim=1), F.normalize(classifier.weight, dim=1))
            l1 = torch.cat([p.flatten() for p in luca.parameters()]).abs().sum()
            loss = F.cross_entropy(classifier.sigma * cosines, rows) + 0.0005 * l1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    end = luca_state(case, "luca_end", 0)
    return 0.0 if all(torch.equal(p, end[name]) for name, p in luca.state_dict().items()) else 1e-6


@every_case
@every_task
def test_training_computes_the_numbers_of_the_release(case, task, tolerance):
    luca, classifier = start(case, task)
    train(luca, classifier, batches(case, task), config_of(case))
    for name, wanted in luca_state(case, "luca_end", task).items():
        torch.testing.assert_close(luca.state_dict()[name], wanted, rtol=0, atol=tolerance, msg=name)
    directions, wanted = (
        F.normalize(rows) for rows in (classifier.weight.detach(), golden(case, "rows_trained", task))
    )
    torch.testing.assert_close(directions, wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(classifier.sigma.detach(), golden(case, "sigma_end", task)[0], rtol=0, atol=tolerance)


@every_case
@every_task
def test_the_new_rows_become_the_releases_class_means(case, task):
    luca = LuCA(DIM, mlp_ratio=4, se_ratio=4, flow=case["flow"])
    luca.load_state_dict(luca_state(case, "luca_end", task))
    first, end = FIRST_ROWS[task : task + 2]
    mine = torch.isin(TRAIN_ROWS, torch.arange(first, end))
    means = class_means(luca(TRAIN[mine]).detach(), TRAIN_ROWS[mine] - first, end - first)
    torch.testing.assert_close(means, golden(case, "rows_end", task)[first:], rtol=0, atol=1e-5)


@every_case
@every_task
def test_answers_and_accuracies_are_those_of_the_release(case, task):
    learner, images = learned_so_far(case, task), golden(case, "test_rows", task)
    assert TEST_ROWS[images].unique().tolist() == list(range(FIRST_ROWS[task + 1]))
    features = TEST[images]
    wanted = golden(case, "test_entropy", task).T
    torch.testing.assert_close(learner.answer(features).entropies, wanted, rtol=0, atol=1e-5)
    for module, logits in enumerate(golden(case, "test_logits", task)):
        found = all_answers(learner, features, true_task=torch.full((len(features),), module))["oracle"].scores
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    top = top_classes(all_answers(learner, features)["batch"].scores, np.arange(FIRST_ROWS[task + 1]))
    assert torch.equal(top, golden(case, "batch_top", task))
    best, true = top[:, 0].numpy(), TEST_ROWS[images].numpy()
    ranges = [range(*FIRST_ROWS[t : t + 2]) for t in range(task + 1)]
    assert accuracy_groups(best, true, ranges, FIRST_ROWS[task]) == ast.literal_eval(
        str(GOLDEN[f"{case['name']}/grouped/{task}"])
    )
    assert round(percent(best == true), 2) == float(GOLDEN[f"{case['name']}/top1/{task}"])
