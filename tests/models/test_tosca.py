import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbone.luca import FLOWS, LuCA
from benchmarks.answers import all_answers
from models.selection import choose_by_batch, choose_by_sample, entropy
from models.tosca import TOSCA, class_means
from models.training import build_optimizer, build_schedule, shuffled_epochs, train
from tests.conftest import tiny_config
from utils.errors import NumericError

DIM = 16
CPU = torch.device("cpu")


@dataclass
class FakeTask:
    """Features drawn around one centre for each row; another view is the same images with other noise."""

    index: int
    first_row: int
    new_rows: int
    labels: torch.Tensor
    spread: float = 0.5

    def view(self, number: int) -> torch.Tensor:
        centres = torch.randn(self.first_row + self.new_rows, DIM, generator=torch.Generator().manual_seed(7))
        noise = torch.Generator().manual_seed(100 * self.index + number)
        return centres[self.labels] + self.spread * torch.randn(len(self.labels), DIM, generator=noise)

    def epoch(self, epoch: int) -> torch.Tensor:
        return self.view(epoch)

    def test_view(self) -> torch.Tensor:
        return self.view(99)


def fake_task(index: int, classes: int = 2, images: int = 6) -> FakeTask:
    first = index * classes
    return FakeTask(index, first, classes, torch.arange(first, first + classes).repeat_interleave(images))


def make_tosca(**keys) -> TOSCA:
    settings = {"mlp_ratio": 4, "se_ratio": 4, "epochs": 3, "batch_size": 5, "lr": 0.05, "flow": "tosca"}
    return TOSCA(tiny_config(**{**settings, **keys}), DIM, CPU, 1993)


def learned(tasks: int, **keys) -> TOSCA:
    learner = make_tosca(**keys)
    for index in range(tasks):
        learner.learn(fake_task(index))
    return learner


@pytest.fixture(scope="module")
def three_tasks() -> TOSCA:
    return learned(3)


def some_features(count: int = 100, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


# -- entropy and selection --------------------------------------------------------------------------------------------


def test_entropy_on_logits_worked_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0], [200.0, 0.0], [0.0, -200.0]])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))  # softmax((0, ln 3)) = (1/4, 3/4)
    torch.testing.assert_close(entropy(logits), torch.tensor([quarter, math.log(2), 0.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("level", [-50.0, 0.0, 1000.0])
def test_equal_logits_have_the_entropy_of_a_uniform_guess(rows, level):
    assert entropy(torch.full((rows,), level)).item() == pytest.approx(math.log(rows), abs=1e-5)


def test_entropy_adds_the_releases_epsilon_inside_the_logarithm():
    p = 1e-9 / (1 + 1e-9)
    expected = -((1 - p) * math.log(1 - p + 1e-9) + p * math.log(p + 1e-9))
    logits = torch.tensor([0.0, math.log(1e-9)], dtype=torch.float64)
    assert entropy(logits).item() == pytest.approx(expected, rel=1e-6)


def test_each_sample_goes_to_its_module_of_lowest_entropy_and_of_equal_ones_to_the_first():
    assert choose_by_sample(torch.tensor([[0.3, 0.1, 0.2], [0.2, 0.2, 0.5], [0.0, 0.7, 0.1]])).tolist() == [1, 0, 0]


def test_a_batch_of_48_and_a_partial_last_one_choose_by_their_mean_entropy():
    entropies = torch.ones(100, 3)
    entropies[:48, 1] = 0.9  # batch 0: module 1 by a little on every sample …
    entropies[0, 2] = -40.0  # … but module 2 by its mean, for one sample alone
    entropies[48:96, 0] = torch.where(torch.arange(48) < 47, 0.9, 100.0)  # batch 1: one sample spoils module 0
    entropies[48:96, 1] = 0.99
    entropies[96:, 0] = torch.tensor([0.1, 0.1, 0.1, 0.1])  # the last four are a batch of their own
    assert choose_by_batch(entropies).tolist() == [2, 1, 0]


@pytest.mark.parametrize(("samples", "batches"), [(1, 1), (48, 1), (49, 2), (96, 2), (0, 0)])
def test_every_sample_belongs_to_exactly_one_batch(samples, batches):
    entropies = torch.ones(samples, batches + 1)
    for batch in range(batches):
        entropies[48 * batch : 48 * (batch + 1), batch] = 0
    assert choose_by_batch(entropies).tolist() == list(range(batches))


def naive_logits(learner: TOSCA, features: torch.Tensor) -> torch.Tensor:
    """One module at a time, through LuCA and the classifier as they stand: ``(modules, samples, rows)``."""
    logits = []
    for task in range(learner.tasks):
        luca = LuCA(DIM, mlp_ratio=learner.config.mlp_ratio, se_ratio=learner.config.se_ratio, flow=learner.config.flow)
        luca.load_state_dict(learner.module_state(task))
        z = F.normalize(luca(features).detach(), dim=1)
        logits.append(learner.sigma * z @ F.normalize(learner.weight, dim=1).T)
    return torch.stack(logits)


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_stacked_evaluation_equals_one_module_at_a_time(flow, monkeypatch):
    learner, features = learned(3, flow=flow), some_features()
    logits = naive_logits(learner, features)
    expected = entropy(logits).T
    torch.testing.assert_close(learner.answer(features).entropies, expected)
    monkeypatch.setattr("models.modular.EVALUATION_BYTES", 1)  # one module at a time
    monkeypatch.setattr("models.modular.SAMPLES", 7)
    torch.testing.assert_close(learner.answer(features).entropies, expected)
    answers = all_answers(learner, features)
    for name, module in {
        "sample": expected.argmin(dim=1),
        "batch": choose_by_batch(expected).repeat_interleave(48)[:100],
    }.items():
        assert torch.equal(answers[name].module, module)
        torch.testing.assert_close(answers[name].scores, logits[module, torch.arange(len(features))])
        torch.testing.assert_close(answers[name].entropy, expected[torch.arange(len(features)), module])


@pytest.mark.parametrize("selection", ["sample", "lda", "ridge"])
def test_answers_of_an_order_free_selection_do_not_depend_on_order_or_company(three_tasks, selection):
    features = some_features()
    whole = all_answers(three_tasks, features)[selection]
    assert len(whole.module.unique()) > 1  # else every order would agree
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    shuffled = all_answers(three_tasks, features[order])[selection]
    assert torch.equal(shuffled.module, whole.module[order])
    torch.testing.assert_close(shuffled.scores, whole.scores[order])
    for size in (1, 7, 48):
        parts = [all_answers(three_tasks, part)[selection] for part in features.split(size)]
        assert torch.equal(torch.cat([part.module for part in parts]), whole.module)
        torch.testing.assert_close(torch.cat([part.scores for part in parts]), whole.scores)


def test_batch_shuffled_is_batch_on_the_shuffled_samples_put_back(three_tasks):
    features = some_features(150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(5))
    answers = all_answers(three_tasks, features, shuffled=order)
    on_shuffled = all_answers(three_tasks, features[order])["batch"]
    assert torch.equal(answers["batch_shuffled"].module[order], on_shuffled.module)
    torch.testing.assert_close(answers["batch_shuffled"].scores[order], on_shuffled.scores)


def test_oracle_answers_with_the_module_of_the_true_task(three_tasks):
    features, true_task = some_features(30), torch.arange(30) % 3
    oracle = all_answers(three_tasks, features, true_task=true_task)["oracle"]
    assert torch.equal(oracle.module, true_task)
    torch.testing.assert_close(oracle.scores, naive_logits(three_tasks, features)[true_task, torch.arange(30)])


def test_oracle_and_batch_shuffled_are_given_only_when_asked_for(three_tasks):
    answers = all_answers(three_tasks, some_features(3))
    assert {"batch", "sample"} <= answers.keys() and answers.keys().isdisjoint({"oracle", "batch_shuffled"})


@pytest.mark.parametrize("selection", ["sample", "lda", "ridge"])
def test_a_single_image_is_answered_as_the_evaluation_answers_it(three_tasks, selection):
    features = some_features(500)  # more than are answered at a time
    answer, wanted = three_tasks.answer(features, selection), all_answers(three_tasks, features)[selection]
    assert torch.equal(answer.module, wanted.module) and len(answer.module.unique()) > 1
    torch.testing.assert_close(answer.scores, wanted.scores)
    torch.testing.assert_close(answer.entropy, wanted.entropy)
    one = three_tasks.answer(features[7:8], selection)
    torch.testing.assert_close(one.scores, answer.scores[7:8])


# -- learning ---------------------------------------------------------------------------------------------------------


def one_step(flow: str, l1: float, **keys) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], FakeTask]:
    """A LuCA and classifier before and after one SGD step on task 0, all its images in one batch."""
    learner = make_tosca(flow=flow, l1=l1, epochs=1, batch_size=100, scheduler="constant", lr=0.1, **keys)
    task = fake_task(0)
    luca = learner.fresh_luca(task)
    classifier = learner.grown_classifier(task)
    both = torch.nn.ModuleDict({"luca": luca, "classifier": classifier})
    before = copy.deepcopy(both)
    train(luca, classifier, shuffled_epochs(task, learner.config, learner.seed), learner.config)
    return before, both, task


@pytest.mark.parametrize("l1", [0.0, 0.01])
def test_a_step_descends_cross_entropy_plus_l1_times_the_sum_over_all_parameters(l1):
    before, after, task = one_step("tosca", l1)
    logits = before["classifier"](before["luca"](task.epoch(0)))
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    loss = -log_p[torch.arange(len(task.labels)), task.labels].mean()
    for parameter in before["luca"].parameters():
        loss = loss + l1 * parameter.abs().sum()
    loss.backward()
    moved = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        assert parameter.grad.any(), name
        torch.testing.assert_close(moved[name].detach(), (parameter - 0.1 * parameter.grad).detach(), msg=name)


def test_l1_alone_moves_the_branch_that_the_flow_does_not_use():
    before, after, _ = one_step("adapter", 0.01)
    for name in ("se.0.weight", "se.2.weight"):
        old, new = (dict(luca["luca"].named_parameters())[name].detach() for luca in (before, after))
        torch.testing.assert_close(new, old - 0.1 * 0.01 * old.sign(), rtol=0, atol=1e-8)
        assert not torch.equal(new, old)


@pytest.mark.parametrize("sigma", ["learned", 16])
def test_sigma_is_learned_or_fixed(sigma):
    learner = learned(2, sigma=sigma)
    if sigma == "learned":
        assert learner.sigma.item() != 1.0
    else:
        assert learner.sigma.item() == 16.0
        logits = all_answers(learner, some_features())["sample"].scores
        assert logits.abs().max() <= 16.0001 and logits.abs().max() > 2


def test_a_learned_sigma_starts_at_one():
    assert make_tosca().grown_classifier(fake_task(0)).sigma.item() == 1


def test_sigma_is_carried_to_the_next_task():
    learner = learned(1)
    sigma = learner.sigma.item()
    assert learner.grown_classifier(fake_task(1)).sigma.item() == sigma != 1.0


def test_new_rows_start_at_zero_and_the_first_ones_at_random(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "models.modular.train", lambda luca, classifier, *_, **__: seen.append(classifier.weight.clone())
    )
    learner = make_tosca()
    learner.learn(fake_task(0))
    prototypes = learner.weight.clone()
    learner.learn(fake_task(1))
    assert 0 < seen[0].abs().max() <= 1 / math.sqrt(DIM)
    assert torch.equal(seen[1][:2], prototypes) and not seen[1][2:].any()


def test_new_rows_can_start_at_class_means_of_the_untrained_module(monkeypatch):
    seen, modules = [], []
    monkeypatch.setattr(
        "models.modular.train",
        lambda luca, classifier, *_, **__: (
            seen.append(classifier.weight.clone()),
            modules.append(copy.deepcopy(luca)),
        ),
    )
    learner = make_tosca(new_rows="prototypes")
    for task in (fake_task(0), fake_task(1)):
        learner.learn(task)
        z = modules[-1](task.test_view()).detach()
        means = torch.stack([z[task.labels == row].mean(dim=0) for row in task.labels.unique()])
        torch.testing.assert_close(seen[-1][task.first_row :], means)


def test_after_a_task_its_rows_are_the_unnormalised_class_means_of_luca_under_the_test_view():
    learner = learned(2)
    task = fake_task(1)
    luca = LuCA(DIM, mlp_ratio=4, se_ratio=4, flow="tosca")
    luca.load_state_dict(learner.module_state(1))
    z = luca(task.test_view()).detach()
    for row in (2, 3):
        torch.testing.assert_close(learner.weight[row], z[task.labels == row].mean(dim=0))
    assert (learner.weight[2:].norm(dim=1) - 1).abs().min() > 0.05


def test_old_rows_drift_in_training_and_are_not_reset():
    learner = learned(1)
    prototypes = learner.weight.clone()
    learner.learn(fake_task(1))
    assert ((learner.weight[:2] - prototypes).abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_frozen_old_rows_stay_bit_identical_whatever_the_optimiser(optimizer, weight_decay):
    learner = learned(1, old_rows="freeze", optimizer=optimizer, weight_decay=weight_decay)
    prototypes = learner.weight.clone()
    learner.learn(fake_task(1))
    assert torch.equal(learner.weight[:2], prototypes)
    assert learner.weight[2:].any()


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_learning_the_next_task_leaves_earlier_modules_bit_identical(flow):
    learner = learned(1, flow=flow)
    before = copy.deepcopy(learner.module_state(0))
    learner.learn(fake_task(1))
    torch.testing.assert_close(learner.module_state(0), before, rtol=0, atol=0)
    assert any(not torch.equal(p, before[name]) for name, p in learner.module_state(1).items())


def test_the_first_module_starts_from_the_default_and_later_ones_from_xavier(monkeypatch):
    biases = []
    monkeypatch.setattr("models.modular.train", lambda luca, *_, **__: biases.append(luca.mlp[0].bias.detach().clone()))
    learner = make_tosca()
    for index in range(3):
        learner.learn(fake_task(index))
    assert [bool(bias.any()) for bias in biases] == [True, False, False]


def test_learning_is_decided_by_the_seed_alone():
    torch.manual_seed(0)
    first = learned(2)
    torch.manual_seed(1)
    again = learned(2)
    assert torch.equal(first.weight, again.weight)
    torch.testing.assert_close(first.modules, again.modules, rtol=0, atol=0)
    other = TOSCA(first.config, DIM, CPU, 1994)
    other.learn(fake_task(0))
    assert not torch.equal(other.module_state(0)["mlp.0.weight"], first.module_state(0)["mlp.0.weight"])


def test_each_epoch_sees_every_image_of_its_own_view_once_with_the_last_batch_kept():
    learner, task = make_tosca(epochs=2, batch_size=5), fake_task(0)  # 12 images: batches of 5, 5 and 2
    epochs = shuffled_epochs(task, learner.config, learner.seed)
    batches = [h for epoch in epochs for h, _ in epoch]
    assert [len(h) for h in batches] == [5, 5, 2] * 2
    epochs = [torch.cat(batches[:3]), torch.cat(batches[3:])]
    places = []
    for number, features in enumerate(epochs):
        same = (features[:, None] == task.view(number)[None]).all(dim=2)
        assert same.sum(dim=1).tolist() == same.sum(dim=0).tolist() == [1] * 12
        places.append(same.int().argmax(dim=1).tolist())
    assert places[0] != places[1] and places[0] != list(range(12))


def test_each_epoch_reports_its_mean_loss_and_its_accuracy_while_training():
    learner, task = make_tosca(epochs=2, batch_size=100, lr=0.5, scheduler="constant"), fake_task(0)
    luca, classifier = learner.fresh_luca(task), learner.grown_classifier(task)
    h, rows, found, wanted = task.test_view(), task.labels, [], []
    for _ in range(2):
        with torch.no_grad():
            logits = classifier(luca(h))
        loss = F.cross_entropy(logits, rows) + learner.config.l1 * sum(p.abs().sum() for p in luca.parameters())
        wanted.append((0, loss.item(), 100 * (logits.argmax(dim=1) == rows).double().mean().item()))
        config = make_tosca(epochs=1, lr=0.5, scheduler="constant").config
        one = []
        train(luca, classifier, [[(h, rows)]], config, on_epoch=lambda *seen, into=one: into.append(seen))
        found += [(number, stats.loss, stats.accuracy) for number, stats in one]
    assert 0 < wanted[0][2] < 100  # else any accuracy would do
    assert [epoch[0] for epoch in found] == [0, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_learn_hands_on_what_each_epoch_gave():
    seen = []
    make_tosca(epochs=3).learn(fake_task(0), on_epoch=lambda *epoch: seen.append(epoch))
    assert [number for number, _ in seen] == [0, 1, 2]
    assert seen[0][1].loss > seen[2][1].loss and all(0 <= stats.accuracy <= 100 for _, stats in seen)


def test_class_means_worked_by_hand_with_a_class_of_one_image():
    features = torch.tensor([[1.0, 2.0], [5.0, 5.0], [3.0, 4.0]])
    assert class_means(features, torch.tensor([1, 0, 1]), 2).tolist() == [[5, 5], [2, 3]]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where():
    class Broken(FakeTask):
        def view(self, number):
            features = super().view(number)
            if number == 1:
                features[3] = float("nan")
            return features

    task = fake_task(0)
    with pytest.raises(NumericError, match=r"task 1, epoch 2, step [123]: the loss is nan"):
        make_tosca().learn(Broken(task.index, task.first_row, task.new_rows, task.labels))


# -- optimisers and schedules -----------------------------------------------------------------------------------------


def rates(epochs: int, **keys) -> list[float]:
    """The learning rate of every epoch."""
    config = tiny_config(epochs=epochs, **keys)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    schedule = build_schedule(optimizer, config)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return found


def test_cosine_follows_its_formula():
    expected = [1e-8 + (0.025 - 1e-8) * (1 + math.cos(math.pi * epoch / 20)) / 2 for epoch in range(20)]
    np.testing.assert_allclose(rates(20, scheduler="cosine", lr=0.025), expected, rtol=1e-9)


def test_steplr_divides_by_ten_at_each_milestone():
    found = rates(7, scheduler="steplr", lr=0.5, milestones=[2, 5])
    np.testing.assert_allclose(found, [0.5, 0.5, 0.05, 0.05, 0.05, 0.005, 0.005])


def test_constant_stays():
    assert rates(4, scheduler="constant", lr=0.3) == [0.3] * 4


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01, "nesterov": False}),
        ("adam", torch.optim.Adam, {"lr": 0.2, "betas": (0.9, 0.999), "weight_decay": 0.01}),
        ("adamw", torch.optim.AdamW, {"lr": 0.2, "betas": (0.9, 0.999), "weight_decay": 0.01}),
    ],
)
def test_optimisers_have_the_releases_options(name, kind, options):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([parameter], tiny_config(optimizer=name, lr=0.2, weight_decay=0.01))
    assert type(optimizer) is kind
    assert options.items() <= optimizer.param_groups[0].items()
    assert optimizer.param_groups[0]["params"] == [parameter]


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_restored_learner_answers_and_goes_on_learning_bit_identically(three_tasks):
    whole = learned(2)
    copied = [{name: p.clone() for name, p in whole.module_state(task).items()} for task in range(2)]
    restored = make_tosca()
    restored.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()}, copied)
    features = some_features()
    for name, answer in all_answers(whole, features).items():
        assert torch.equal(all_answers(restored, features)[name].scores, answer.scores)
    restored.learn(fake_task(2))
    assert torch.equal(restored.weight, three_tasks.weight)
    torch.testing.assert_close(restored.modules, three_tasks.modules, rtol=0, atol=0)


def test_a_learner_counts_its_tasks_rows_parameters_and_zeros(three_tasks):
    per_module = sum(p.numel() for p in LuCA(DIM, mlp_ratio=4, se_ratio=4).parameters())
    assert three_tasks.tasks == 3 and three_tasks.row_task.tolist() == [0, 0, 1, 1, 2, 2]
    assert three_tasks.parameter_counts() == {
        "luca_per_task": per_module,
        "classifier": 6 * DIM + 1,
        "trainable": per_module + 6 * DIM + 1,
    }


def test_sparsity_is_the_share_of_parameters_below_a_thousandth(three_tasks):
    parameters = {name: torch.full_like(p, 0.5) for name, p in three_tasks.module_state(0).items()}
    parameters["norm.bias"][:5] = torch.tensor([0.00099, -0.00099, 0.0011, 0.0, -0.0011])
    learner = make_tosca()
    learner.load_state_dict(three_tasks.state_dict(), [three_tasks.module_state(1), parameters])
    per_module = sum(p.numel() for p in parameters.values())
    assert learner.sparsity(1) == pytest.approx(3 / per_module)


@pytest.mark.parametrize(("keys", "trained"), [({"sigma": 16}, 5 * DIM), ({"old_rows": "freeze"}, 3 * DIM + 1)])
def test_trainable_counts_what_the_last_task_trained(keys, trained):
    learner = learned(1, **keys)
    learner.learn(FakeTask(1, 2, 3, torch.arange(2, 5).repeat_interleave(6)))
    counts = learner.parameter_counts()
    assert counts["trainable"] == counts["luca_per_task"] + trained
