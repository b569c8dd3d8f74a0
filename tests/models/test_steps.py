"""The step with hand-written gradients computes what autograd computes, to the last bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbone import luca as luca_file
from backbone.classifier import CosineClassifier
from backbone.luca import FLOWS, LuCA, make_luca
from models import training
from models.fast_step import GRADIENTS, FastStep
from models.training import Step, checked_mean, make_step, train
from tests.conftest import tiny_config
from utils.config.config import Config
from utils.errors import NumericError

DIM, ROWS = 48, 7


def both(flow: str = "tosca", sigma: bool = True, dim: int = DIM) -> tuple[LuCA, CosineClassifier]:
    """A module and a classifier some way into a run: old rows, and new ones at zero."""
    luca = make_luca(dim, mlp_ratio=3, se_ratio=4, flow=flow, first=True, seed=1)
    rows = torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(2))
    rows[-2:] = 0
    classifier = CosineClassifier(rows, torch.tensor(1.5))
    classifier.sigma.requires_grad_(sigma)
    return luca, classifier


def fast_step(luca: LuCA, classifier: CosineClassifier, config: Config) -> FastStep:
    return FastStep(luca, classifier, config, training.build_optimizer)


def batches(sizes: tuple[int, ...] = (16, 16, 5), dim: int = DIM) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, dim, generator=generator), torch.randint(ROWS, (n,), generator=generator)) for n in sizes]


def assert_same(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("flow", sorted(FLOWS))
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"l1": 0.0},
        {"weight_decay": 0.03, "l1": 0.01},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sigma", [True, False])
def test_both_steps_agree_to_the_bit(flow, keys, sigma):
    config, results = tiny_config(**keys), []
    for kind in (Step, fast_step):
        luca, classifier = both(flow, sigma)
        step = kind(luca, classifier, config)
        found = [step(h, rows) for _ in range(4) for h, rows in batches()]
        step.finish()
        results.append((luca, classifier, found))
    (luca, classifier, wanted), (fast_luca, fast_classifier, found) = results
    assert_same(fast_luca, luca)
    assert_same(fast_classifier, classifier)
    for (loss, hits), (fast_loss, fast_hits) in zip(wanted, found, strict=True):
        assert torch.equal(fast_loss, loss)
        assert torch.equal(fast_hits, hits)
    start = both(flow, sigma)
    assert torch.equal(start[1].sigma, fast_classifier.sigma) is not sigma


def test_features_and_rows_of_length_zero_have_the_gradient_of_autograd():
    config, results = tiny_config(l1=0.0), []
    for kind in (Step, fast_step):
        luca, classifier = both("calibrator")
        step = kind(luca, classifier, config)
        step(torch.zeros(4, DIM), torch.arange(4))  # the calibrator leaves zero at zero
        assert all(p.isfinite().all() for p in (*luca.parameters(), *classifier.parameters()))
        results.append((luca, classifier))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


def test_training_goes_by_hand_where_it_can_and_frozen_rows_stay():
    luca, classifier = both()
    assert isinstance(make_step(luca, classifier, tiny_config(), *batches()[0]), FastStep)
    luca, classifier = both()
    before = classifier.weight.detach().clone()
    train(luca, classifier, [batches()] * 2, tiny_config(weight_decay=0.1), frozen_rows=3)
    assert torch.equal(classifier.weight[:3], before[:3])
    assert (classifier.weight[3:] != before[3:]).any(dim=1).all()


def test_after_training_every_tensor_has_storage_of_its_own():
    luca, classifier = both()
    train(luca, classifier, [batches()], tiny_config())
    for p in (*luca.parameters(), *classifier.parameters()):  # a saved view would carry the whole buffer with it
        assert p.untyped_storage().nbytes() == 4 * p.numel()
    F.cross_entropy(classifier(luca(torch.ones(2, DIM))), torch.tensor([0, 1])).backward()


def test_a_flow_without_gradients_of_its_own_is_trained_by_autograd(monkeypatch):
    monkeypatch.setitem(luca_file.FLOWS, "double", lambda luca, h: 2 * h + luca.mlp(h))
    assert "double" not in GRADIENTS
    luca, classifier = both("double")
    assert isinstance(make_step(luca, classifier, tiny_config(), *batches()[0]), Step)
    before = copy.deepcopy(luca)
    train(luca, classifier, [batches()], tiny_config())
    assert not torch.equal(luca.mlp[0].weight, before.mlp[0].weight)


def test_nothing_large_is_allocated_after_the_first_step():
    luca, classifier = both(dim=256)
    step = fast_step(luca, classifier, tiny_config())
    (h, rows), parameters = batches((16,), 256)[0], sum(p.numel() for p in luca.parameters())
    step(h, rows)
    with torch.profiler.profile(profile_memory=True) as profile:
        step(h, rows)
    largest = max(event.cpu_memory_usage for event in profile.events())
    activation = 4 * 16 * 256  # bytes
    assert 0 < largest < 2 * activation < 4 * parameters


def smoothed(module: torch.nn.Module, logits: Tensor, rows: Tensor, config: Config) -> Tensor:
    penalty = sum(p.abs().sum() for p in module.parameters())
    return F.cross_entropy(logits, rows, label_smoothing=0.1) + config.l1 * penalty


def test_an_edited_loss_is_the_one_that_trains(monkeypatch, caplog):
    """The step that is read is the definition: the fast one gives way where it computes something else."""
    trained = {}
    for name in ("as it stands", "edited"):
        luca, classifier = both()
        with monkeypatch.context() as patch, caplog.at_level("INFO"):
            if name == "edited":
                patch.setattr(training, "loss_of", smoothed)
            kind = Step if name == "edited" else FastStep
            assert type(make_step(luca, classifier, tiny_config(), *batches()[0])) is kind
            train(luca, classifier, [batches()], tiny_config())
        trained[name] = luca
    assert ["fast training step differs" in r.message for r in caplog.records] == [True, True]
    assert not torch.equal(trained["edited"].mlp[0].weight, trained["as it stands"].mlp[0].weight)


def test_an_edited_optimizer_is_the_one_that_trains(monkeypatch):
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    monkeypatch.setattr(training, "build_optimizer", lambda parameters, _: torch.optim.SGD(parameters, **options))
    results = []
    for kind in (Step, fast_step):
        luca, classifier = both()
        step = kind(luca, classifier, tiny_config())
        for h, rows in batches() * 2:
            step(h, rows)
        results.append(luca)
    assert_same(results[1], results[0])


# -- what an epoch tells ----------------------------------------------------------------------------------------------


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps_and_a_bad_one_is_named():
    assert checked_mean(torch.tensor([1.0, 4.0]), epoch=0) == 2.5
    with pytest.raises(NumericError, match=r"^epoch 3, step 2: the loss is nan; "):
        checked_mean(torch.tensor([1.0, torch.nan, torch.inf]), epoch=2)
