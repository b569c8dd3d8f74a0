import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA
from benchmarks.answers import all_answers
from models.ranpac import RanPAC
from models.selection import entropy
from models.streaming.lda import StreamingLDA
from models.streaming.ridge import RandomRidge
from models.streaming.ridge_pair import RidgePair
from models.streaming.whitening import Whitening, make_whitening
from models.tosca import class_means
from models.tosca_white import DIRECTIONS, WHITENING, WhiteTOSCA, own_means
from models.training import train
from tests.conftest import Outcome, tiny_config
from tests.models.test_tosca import CPU, DIM, FakeTask, some_features
from utils.errors import ConfigError, NumericError
from utils.runs.checkpoint import CheckpointFolder
from utils.seeds import derive_seed

ORDER_FREE = ("sample", "ridges", "blend")
# the keys that the method fixes get their defaults back: the tiny config sets other values
KEYS = {"model_name": "tosca_white", "flow": "tosca", "mlp_ratio": 4, "se_ratio": 4, "epochs": 3, "batch_size": 5}


MIXING = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(11))


class MixedTask(FakeTask):
    """Features that spread unequally: of equal spread the shrunk covariance is a multiple of the identity."""

    def view(self, number: int) -> torch.Tensor:
        return super().view(number) @ MIXING


def fake_task(index: int, classes: int = 2, images: int = 30) -> MixedTask:
    first = index * classes
    return MixedTask(index, first, classes, torch.arange(first, first + classes).repeat_interleave(images))


def white_config(**keys):
    return tiny_config(**{**KEYS, "lr": 0.05, "white_features": 40, **keys})


def make_white(**keys) -> WhiteTOSCA:
    return WhiteTOSCA(white_config(**keys), DIM, CPU, 1993)


def learned(tasks: int, **keys) -> WhiteTOSCA:
    learner = make_white(**keys)
    for index in range(tasks):
        learner.learn(fake_task(index))
    return learner


@pytest.fixture(scope="module")
def three_tasks() -> WhiteTOSCA:
    return learned(3)


def whitening_of(learner: WhiteTOSCA, task: int) -> Whitening:
    return Whitening(*(learner.modules[WHITENING + name][task] for name in Whitening._fields))


def luca_of(learner: WhiteTOSCA, task: int) -> LuCA:
    luca = LuCA(DIM, mlp_ratio=4, se_ratio=4)
    luca.load_state_dict(learner.luca_state(task))
    return luca


@torch.no_grad()
def naive_logits(learner: WhiteTOSCA, features: torch.Tensor) -> torch.Tensor:
    """One module at a time: ``(modules, samples, rows)``."""
    classifier = CosineClassifier(learner.weight, torch.tensor(16.0))
    parts = [classifier(luca_of(learner, t)(whitening_of(learner, t)(features))) for t in range(learner.tasks)]
    return torch.stack(parts)


@torch.no_grad()
def inside_tasks(learner: WhiteTOSCA, features: torch.Tensor) -> torch.Tensor:
    """log p(row | its task, module of that task), one module at a time: ``(samples, rows)``."""
    logits = naive_logits(learner, features)
    return torch.cat([logits[t][:, learner.row_task == t].log_softmax(dim=1) for t in range(learner.tasks)], dim=1)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_a_module_starts_as_the_identity_times_one_half():
    for index in (0, 1):
        luca = make_white().fresh_luca(fake_task(index))
        z = some_features()
        torch.testing.assert_close(luca(z), F.layer_norm(z, (DIM,)) / 2)
        assert (luca.mlp[0].weight != 0).any() and (luca.se[0].weight != 0).any()  # or nothing would ever be trained


def test_the_whitening_of_a_task_is_that_of_all_classes_so_far(three_tasks):
    statistics = StreamingLDA(DIM)
    for index in range(3):
        task = fake_task(index)
        statistics.update(task.test_view(), task.labels, task.first_row + task.new_rows)
        kept, expected = whitening_of(three_tasks, index), make_whitening(statistics)
        torch.testing.assert_close(kept.directions, expected.directions, rtol=0, atol=2**-11)  # half precision
        assert torch.equal(kept.scales, expected.scales) and torch.equal(kept.mean, expected.mean)
    assert not torch.equal(whitening_of(three_tasks, 0).mean, whitening_of(three_tasks, 2).mean)


def test_training_sees_whitened_features_with_fresh_unit_noise_and_rows_of_the_task_alone():
    task, learner = fake_task(1, classes=2, images=2000), make_white(batch_size=1000, epochs=2)
    whitening = Whitening(torch.eye(DIM), torch.full((DIM,), 2.0), torch.ones(DIM))
    residues = []
    for epoch, steps in enumerate(learner.noisy_epochs(task, whitening)):
        batches = list(steps)
        generator = torch.Generator().manual_seed(derive_seed("batches", 1993, 1, epoch))
        order = torch.randperm(4000, generator=generator)
        noise = torch.cat([z for z, _ in batches]) - 2 * (task.epoch(epoch)[order] - 1)
        assert torch.equal(torch.cat([rows for _, rows in batches]), task.labels[order] - 2)
        assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)
        residues.append(noise)
    assert not torch.allclose(*residues, atol=0.1)


def test_a_task_is_learned_as_the_method_says():
    """Start, loss and end, step by step: rows from the fresh module, the task's own rows, σ = 16, rows of the end."""
    learner, task = make_white(), fake_task(0)
    statistics = StreamingLDA(DIM)
    statistics.update(task.test_view(), task.labels, 2)
    whitening = learner.task_whitening(statistics)
    luca = learner.fresh_luca(task)
    with torch.no_grad():
        rows = class_means(F.layer_norm(whitening(task.test_view()), (DIM,)) / 2, task.labels, 2)
    classifier = CosineClassifier(rows, torch.tensor(16.0))
    classifier.sigma.requires_grad_(False)
    train(luca, classifier, learner.noisy_epochs(task, whitening), learner.config)
    learner.learn(task)
    assert all(torch.equal(p, learner.modules[name][0]) for name, p in luca.named_parameters())
    assert torch.equal(learner.weight, own_means(luca, whitening, task))
    assert not torch.equal(learner.weight, classifier.weight) and learner.sigma == 16


def test_learning_a_task_leaves_earlier_modules_and_rows_bit_identical():
    learner = learned(2)
    before, rows = copy.deepcopy(learner.module_state(0)), learner.weight.clone()
    learner.learn(fake_task(2))
    assert all(torch.equal(value, before[name]) for name, value in learner.module_state(0).items())
    assert torch.equal(learner.weight[: len(rows)], rows)


def test_the_seed_alone_decides(three_tasks):
    torch.manual_seed(5)
    again = learned(3)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in three_tasks.state_dict().items())
    other = WhiteTOSCA(white_config(), DIM, CPU, 7)
    other.learn(fake_task(0))
    assert not torch.equal(other.weight, three_tasks.weight[:2])


def test_a_task_that_diverges_leaves_the_learner_as_it_was():
    learner = learned(1)
    before = copy.deepcopy(learner.state_dict())
    learner.config = white_config(lr=1e18, weight_decay=1e18)
    with pytest.raises(NumericError, match=r"task 2, epoch \d, step \d: the loss is .*lower lr"):
        learner.learn(fake_task(1))
    assert learner.tasks == 1
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


# -- prediction -------------------------------------------------------------------------------------------------------


def test_every_selection_answers_as_defined(three_tasks):
    h = some_features()
    true_task = torch.arange(100) % 3
    found = all_answers(three_tasks, h, true_task)
    assert set(found) == {*ORDER_FREE, "oracle"}
    logits, own = naive_logits(three_tasks, h), inside_tasks(three_tasks, h)
    pair = three_tasks.routers["ridges"].scores(h)
    torch.testing.assert_close(found["blend"].scores, pair + own / 2, rtol=1e-4, atol=1e-4)
    assert found["blend"].module is None
    chosen = {"sample": entropy(logits).argmin(dim=0), "oracle": true_task, "ridges": pair.argmax(dim=1) // 2}
    for name, module in chosen.items():
        assert torch.equal(found[name].module, module), name
        expected = own.masked_fill(three_tasks.row_task != module[:, None], -torch.inf)
        torch.testing.assert_close(found[name].scores, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name].entropy, entropy(logits).gather(0, module[None])[0], rtol=0, atol=1e-4)


def test_blend_worked_by_hand(three_tasks, monkeypatch):
    """Two rows of equal regression scores are told apart by the module; a module says nothing about another task."""
    learner = copy.copy(three_tasks)
    learner.row_task = torch.tensor([0, 0, 1])
    pair = torch.tensor([[0.4, 0.4, 0.2]]).log()
    monkeypatch.setattr(RidgePair, "scores", lambda self, features: pair)
    monkeypatch.setattr(
        learner, "all_logits", lambda features: [(0, torch.tensor([[[3.0, 1.0, 9.0]], [[7.0, 7.0, 5.0]]]))]
    )
    p = torch.tensor([3.0, 1.0]).softmax(dim=0)
    expected = torch.stack([0.4 * p[0].sqrt(), 0.4 * p[1].sqrt(), torch.tensor(0.2)]).log()
    torch.testing.assert_close(learner.answer(torch.zeros(1, DIM), "blend").scores[0], expected)


@pytest.mark.parametrize("selection", ORDER_FREE)
def test_order_and_company_of_the_test_images_change_no_answer(three_tasks, selection):
    h = some_features(600)
    together = all_answers(three_tasks, h)[selection].scores
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    apart = all_answers(three_tasks, h[order])[selection].scores
    assert torch.equal(apart.argmax(dim=1), together.argmax(dim=1)[order])
    for size in (1, 7, 300):
        parts = torch.cat([three_tasks.answer(part, selection).scores for part in h.split(size)])
        torch.testing.assert_close(parts, together, rtol=1e-5, atol=1e-5)
        assert torch.equal(parts.argmax(dim=1), together.argmax(dim=1))


@pytest.mark.parametrize("selection", ORDER_FREE)
def test_answering_changes_nothing(three_tasks, selection):
    before = copy.deepcopy(three_tasks.state_dict())
    three_tasks.answer(100 * some_features(), selection)
    assert all(torch.equal(value, before[name]) for name, value in three_tasks.state_dict().items())


@pytest.mark.parametrize("selection", ["batch", "oracle", "lda"])
def test_what_cannot_answer_single_images_is_refused(three_tasks, selection):
    with pytest.raises(ConfigError, match="choose one of: sample, ridges, blend"):
        three_tasks.answer(some_features(), selection)


def test_probabilities_are_over_all_classes(three_tasks):
    for name, prediction in all_answers(three_tasks, some_features()).items():
        p = prediction.scores.softmax(dim=1)
        torch.testing.assert_close(p.sum(dim=1), torch.ones(100), msg=name)


def test_no_image_and_one_task_are_answered():
    learner = learned(1)
    assert learner.answer(torch.zeros(0, DIM), "blend").scores.shape == (0, 2)
    assert learner.answer(torch.zeros(3, DIM), "ridges").scores.isfinite().all()


def test_a_task_of_one_class_is_no_black_hole():
    """Over its own rows alone a module of one class would never be uncertain: entropies are taken over all rows."""
    learner = learned(2)
    learner.learn(MixedTask(2, 4, 1, torch.full((30,), 4)))
    features = torch.cat([fake_task(index).test_view() for index in (0, 1)])
    assert (all_answers(learner, features)["sample"].module != 2).float().mean() > 0.5


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_restored_learner_answers_and_learns_on_bit_for_bit(three_tasks):
    original, restored = learned(2), make_white()
    restored.load_state_dict(original.state_dict(), [original.module_state(task) for task in range(2)])
    for learner in (original, restored):
        learner.learn(fake_task(2))
    again = make_white()
    again.load_state_dict(restored.state_dict(), [restored.module_state(task) for task in range(3)])
    assert torch.equal(again.answer(some_features(), "blend").scores, original.answer(some_features(), "blend").scores)
    assert original.state_dict().keys() == restored.state_dict().keys()
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in original.state_dict().items())
    for name, prediction in all_answers(original, some_features()).items():
        assert torch.equal(all_answers(restored, some_features())[name].scores, prediction.scores)


def test_directions_are_saved_in_half_precision_without_loss(three_tasks):
    saved = three_tasks.module_state(1)
    assert saved[DIRECTIONS].dtype == torch.half
    assert torch.equal(saved[DIRECTIONS].float(), three_tasks.modules[DIRECTIONS][1])
    assert not torch.equal(saved[DIRECTIONS].float(), torch.eye(DIM))  # which any precision would keep
    others = [value for name, value in saved.items() if name != DIRECTIONS]
    assert all(value.dtype == torch.float for value in others)


def test_numbers_are_counted_of_luca_alone(three_tasks):
    luca = sum(p.numel() for p in LuCA(DIM, mlp_ratio=4, se_ratio=4).parameters())
    assert three_tasks.parameter_counts() == {
        "luca_per_task": luca,
        "classifier": 6 * DIM + 1,
        "trainable": luca + 2 * DIM,
    }
    small = sum(int((p[0].abs() < 1e-3).sum()) for n, p in three_tasks.modules.items() if not n.startswith(WHITENING))
    assert three_tasks.sparsity(0) == pytest.approx(small / luca)


# -- config -----------------------------------------------------------------------------------------------------------


def test_a_config_may_repeat_the_default_of_a_key_that_the_method_fixes():
    assert white_config(old_rows="train") == white_config()
    assert white_config().old_rows == "freeze"


@pytest.mark.parametrize(("key", "value"), [("flow", "adapter"), ("sigma", 8.0)])
def test_keys_that_the_method_fixes_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"{key} is always .* under tosca_white, got .*; remove the key"):
        white_config(**{key: value})


def test_keys_that_the_method_fixes_make_no_other_run():
    method = white_config().method
    keys = white_config().keys
    assert all(method.ignores(keys[name]) for name in ("flow", "sigma", "new_rows", "old_rows"))
    assert not any(method.ignores(keys[name]) for name in ("lr", "mlp_ratio", "train_views"))


# -- the control: RanPAC with the same two regressions ----------------------------------------------------------------


def test_ranpac_has_the_same_two_regressions_as_an_option(monkeypatch):
    monkeypatch.setattr("models.ranpac.RANDOM_FEATURES", 80)
    control = RanPAC(tiny_config(model_name="ranpac", ranpac_whitened=True), DIM, CPU, 1993)
    learner = learned(2)
    for index in range(2):
        control.learn(fake_task(index))
    h = some_features()
    assert torch.equal(control.scores(h), learner.routers["ridges"].scores(h))
    assert control.ridge.width == 80
    copied = RanPAC(control.config, DIM, CPU, 1993)
    copied.load_state_dict(control.state_dict())
    assert torch.equal(copied.scores(h), control.scores(h))


def test_plain_ranpac_is_one_regression():
    control = RanPAC(tiny_config(model_name="ranpac"), DIM, CPU, 1993)
    assert isinstance(control.ridge, RandomRidge) and control.ridge.width == 10_000


# -- whole runs -------------------------------------------------------------------------------------------------------


RUN_KEYS = {**KEYS, "white_features": 30, "train_views": 1, "shuffle": False}


@pytest.fixture(scope="module")
def whole(run_main, make_folder, tmp_path_factory):
    """Six classes in three tasks from the start."""
    folder = tmp_path_factory.mktemp("whole")
    return run_main(folder, data_path=str(make_folder(folder / "data", classes=6)), **RUN_KEYS)


def saved(outcome: Outcome) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    checkpoint = CheckpointFolder(outcome.checkpoints)
    return checkpoint.load(checkpoint.read_manifest())


def test_a_run_reports_every_selection(whole):
    assert whole.code == 0
    assert set(whole.json()["results"]) == {*ORDER_FREE, "oracle"}
    assert set(whole.json()["selection_accuracy"]) == {"sample", "ridges"}


def test_an_interrupted_run_ends_as_if_it_had_not_been(whole, run_main, tmp_path, monkeypatch):
    fit = WhiteTOSCA.fit

    def interrupted(self, task, on_epoch):
        if task.index == 2:
            raise KeyboardInterrupt
        fit(self, task, on_epoch)

    keys = {**RUN_KEYS, "data_path": whole.config["data_path"]}
    monkeypatch.setattr(WhiteTOSCA, "fit", interrupted)
    assert run_main(tmp_path, **keys).code != 0
    monkeypatch.setattr(WhiteTOSCA, "fit", fit)
    parts = run_main(tmp_path, **keys)
    assert parts.code == 0
    torch.testing.assert_close(saved(parts), saved(whole), rtol=0, atol=0)
    assert parts.json()["results"] == whole.json()["results"]


def test_a_run_continued_from_a_saved_one_equals_the_whole(whole, run_main, tmp_path):
    for name, digits in (("first", "0123"), ("then", "45")):
        for digit in digits:
            for split in ("train", "test"):
                shutil.copytree(f"{whole.config['data_path']}/{split}/{digit}", tmp_path / name / split / digit)
    for digit in "0123":
        shutil.copytree(tmp_path / "first" / "test" / digit, tmp_path / "then" / "test" / digit)
    first = run_main(tmp_path / "a", data_path=str(tmp_path / "first"), **RUN_KEYS)
    base = str(first.checkpoints)
    grown = run_main(tmp_path / "b", data_path=str(tmp_path / "then"), continue_from=base, **RUN_KEYS)
    assert grown.code == 0
    torch.testing.assert_close(saved(grown), saved(whole), rtol=0, atol=0)
    assert grown.json()["results"] == whole.json()["results"]
    other = {**RUN_KEYS, "white_features": 31}
    assert run_main(tmp_path / "c", data_path=str(tmp_path / "then"), continue_from=base, **other).code == 2


def test_domains_are_learned(run_main, make_folder, tmp_path):
    for domain in ("plain", "other"):
        make_folder(tmp_path / domain, classes=3)
        for split in ("train", "test"):
            shutil.copytree(tmp_path / domain / split, tmp_path / "data" / split / domain)
    keys = {**RUN_KEYS, "scenario": "domain", "data_path": str(tmp_path / "data")}
    outcome = run_main(tmp_path, **keys)
    assert outcome.code == 0
    (path,) = (tmp_path / "logs").rglob("*.json")
    run = json.loads(path.read_text())
    assert run["task_sizes"] == [3, 3] and len(run["results"]["blend"]["top1_curve"]) == 2
