"""NaN and infinity stop the run and say where; what has no information gives no NaN."""

import numpy as np
import pytest
import torch

from backbone.classifier import CosineClassifier
from backbone.luca import FLOWS, make_luca
from backbone.vit import Backbone
from models import training
from models.fast_step import FastStep
from models.selection import entropy


def test_an_infinite_loss_names_task_epoch_step_and_earlier_tasks_stay(half, tree, undisturbed, monkeypatch):
    before = tree(half.checkpoints)
    real, calls = FastStep.__call__, [0]

    def infinite_once(self: FastStep, h: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls[0] += 1
        loss, hits = real(self, h, rows)
        return loss * (float("inf") if calls[0] == 5 else 1), hits  # after the trial of the first step

    with monkeypatch.context() as patch:
        patch.setattr(FastStep, "__call__", infinite_once)
        error = half().error
    assert "task 3, epoch 2, step 2: the loss is inf" in error
    assert "lower lr" in error
    assert {name: tree(half.checkpoints)[name] for name in before if name.endswith(".pth")} == {
        name: content for name, content in before.items() if name.endswith(".pth")
    }
    assert half().code == 0
    assert half.end() == undisturbed


def test_a_learning_rate_beyond_reason_stops_the_run_and_saves_nothing_of_it(run):
    error = run(lr=1e18, scheduler="constant").error
    assert "task 1, " in error
    assert "lower lr" in error
    assert not list(run.checkpoints.glob("*.pth"))


def test_losses_whose_sum_overflows_are_not_infinite():
    assert training.checked_mean(torch.full((4,), 3e38), epoch=0) > 0


def test_nan_parameters_after_the_last_step_are_named(run, monkeypatch):
    real = training.train

    def train(luca: torch.nn.Module, *args: object, **options: object) -> None:
        real(luca, *args, **options)
        luca.se[0].weight.data[0, 0] = float("nan")

    monkeypatch.setattr("models.modular.train", train)
    error = run().error
    assert "task 1, after its last step: LuCA.se.0.weight is not finite" in error


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_names_the_image_and_the_bank_keeps_the_rest(run, tmp_path, monkeypatch, value):
    run.keys["cache_dir"] = str(tmp_path / "bank")
    real, calls = Backbone.__call__, [0]

    def broken(self: Backbone, images: torch.Tensor) -> torch.Tensor:
        features = real(self, images).clone()
        calls[0] += len(images) > 1  # one image alone is asked what it costs
        if calls[0] == 2:
            features[1, 3] = value
        return features

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "__call__", broken)
        error = run().error
    assert "feature of test image '" in error or "feature of train image '" in error
    assert ".png' (view " in error
    arrays = [np.load(path) for path in (tmp_path / "bank").rglob("*.npy")]
    assert sum(np.isfinite(array).all(axis=1).sum() for array in arrays) >= 8  # the first batch
    assert run().code == 0


def test_the_entropy_of_equal_logits_and_of_one_class_is_a_number():
    assert entropy(torch.zeros(2, 5)).tolist() == pytest.approx([np.log(5)] * 2)
    assert entropy(torch.zeros(2, 1)).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert entropy(torch.tensor([[1e30, -1e30]])).tolist() == pytest.approx([0], abs=1e-6)


@pytest.mark.parametrize("flow", FLOWS)
def test_zero_features_and_zero_rows_give_numbers_and_finite_gradients(flow):
    luca = make_luca(32, mlp_ratio=16, se_ratio=16, flow=flow, first=False, seed=0)
    classifier = CosineClassifier(torch.zeros(3, 32), torch.tensor(1.0))
    loss = torch.nn.functional.cross_entropy(classifier(luca(torch.zeros(4, 32))), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(
        torch.isfinite(p.grad).all() for p in [*luca.parameters(), *classifier.parameters()] if p.grad is not None
    )


def test_black_images_one_class_a_task_and_one_task_give_no_nan(run, make_folder, tmp_path):
    from PIL import Image

    folder = make_folder(tmp_path / "black", classes=2, train=2, test=1)
    for path in folder.rglob("*.png"):
        Image.new("RGB", (40, 36)).save(path)
    run.keys["data_path"] = str(folder)
    for init_cls in (1, 2):  # json.dumps would refuse a NaN in the results
        assert run(init_cls=init_cls, increment=1).code == 0
