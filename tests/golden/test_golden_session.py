"""LAMDA-PILOT's first session, number for number: the same start and batches give the same numbers (README.md)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import backbone.adapters
from backbone.adapters import add_adapters, load_adapters
from backbone.classifier import CosineClassifier
from backbone.forward import Features, TimmModel, make_features
from models.aper import APER
from models.first_session import adapt
from tests.conftest import tiny_config
from tests.models.test_baselines import Task

with np.load(Path(__file__).with_name("first_session.npz")) as archive:
    GOLDEN = {name: torch.from_numpy(archive[name]) for name in archive.files}
CASES = {
    "cifar": {"epochs": 4, "lr": 0.01, "weight_decay": 0.0005},
    "inr": {"epochs": 3, "lr": 0.05, "weight_decay": 0.005},
    "strong": {"epochs": 8, "lr": 1.0, "weight_decay": 0.0005},
}
every_case = pytest.mark.parametrize("case", CASES)


def below(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}


def adapters(prefix: str) -> dict[str, Tensor]:
    """Those of the file, under this project's names."""
    named = {name.replace("adaptmlp", "adapter").replace("_proj", ""): value for name, value in below(prefix).items()}
    return {name: value for name, value in named.items() if ".adapter." in name}


def plain_model() -> TimmModel:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)
    model.load_state_dict(below("vit."))
    model.pretrained_cfg = {}
    return model.eval()


def features_of(model: TimmModel, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return make_features(model, precision="fp32", normalize=False)(images)


def beginning(case: str) -> tuple[Features, CosineClassifier]:
    model = plain_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.adapters, "WIDTH", 8)
        add_adapters(model, seed=0)
    model.load_state_dict(adapters(f"{case}.start."), strict=False)
    for block in model.blocks:
        block.adapter.dropout.p = 0.0
    classifier = CosineClassifier(GOLDEN["start.fc"].clone(), torch.ones(()))
    return make_features(model, precision="fp32", normalize=False), classifier


@every_case
def test_the_first_session_computes_the_numbers_of_lamda_pilot(case):
    features, classifier = beginning(case)
    rows_now, losses = [], []
    classifier.register_forward_hook(
        lambda _module, _inputs, logits: losses.append(F.cross_entropy(logits.detach(), rows_now.pop()).item())
    )

    def batches(steps: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for images in steps:
            images = images[images >= 0]
            rows_now.append(GOLDEN["labels.first"][images])
            yield GOLDEN["images.first"][images], rows_now[-1]

    keys, steps = CASES[case], GOLDEN[f"{case}.batches"]
    config = tiny_config(first_session="adapter", **{f"first_session_{name}": value for name, value in keys.items()})
    found = adapt(features, classifier, map(batches, steps.chunk(keys["epochs"])), config, seed=0)
    torch.testing.assert_close(torch.tensor(losses).double(), GOLDEN[f"{case}.losses"], rtol=0, atol=1e-6)
    wanted = {**adapters(f"{case}.end."), "fc": GOLDEN[f"{case}.end.fc"], "sigma": GOLDEN[f"{case}.end.sigma"][0]}
    found |= {"fc": classifier.weight.detach(), "sigma": classifier.sigma.detach()}
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@every_case
@pytest.mark.parametrize("images", ["train", "test"])
def test_plain_and_adapted_features_are_those_of_lamda_pilot(case, images):
    model = plain_model()
    pixels = GOLDEN[f"images.{images}"]
    torch.testing.assert_close(features_of(model, pixels), GOLDEN[f"plain.{images}"], rtol=0, atol=1e-5)
    load_adapters(model, adapters(f"{case}.end."))
    torch.testing.assert_close(features_of(model, pixels), GOLDEN[f"{case}.adapted.{images}"], rtol=0, atol=1e-5)


@every_case
def test_aper_scores_as_lamda_pilot(case):
    model = plain_model()
    train, test = ([features_of(model, GOLDEN[f"images.{name}"])] for name in ("train", "test"))
    load_adapters(model, adapters(f"{case}.end."))
    for found, name in ((train, "train"), (test, "test")):
        found.append(features_of(model, GOLDEN[f"images.{name}"]))
    learner = APER(tiny_config(model_name="aper"), 96, torch.device("cpu"), seed=0)
    learner.learn(Task(0, 0, 9, torch.cat(train, dim=1), GOLDEN["labels.train"]))
    scores = learner.scores(torch.cat(test, dim=1))
    torch.testing.assert_close(scores, GOLDEN[f"{case}.aper.scores"], rtol=0, atol=1e-5)
