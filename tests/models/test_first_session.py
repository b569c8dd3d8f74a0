"""The first session's training: what learns, what it draws, and what its images are."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.classifier import CosineClassifier
from backbone.forward import Features
from models import first_session
from models.first_session import adapt, new_session, shuffled_views
from tests.conftest import tiny_config
from utils.config.config import Config
from utils.data.splits import ImageArray
from utils.data.transforms import Transforms
from utils.errors import NumericError


def settings(epochs: int = 3, lr: float = 0.5) -> Config:
    return tiny_config(first_session="adapter", first_session_epochs=epochs, first_session_lr=lr, augment_seed=7)


SETTINGS = settings()
LABELS = torch.arange(10) % 2


def begin(seed: int = 0) -> tuple[Features, CosineClassifier]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=0)
    return new_session(model, 2, seed, normalize=False)


def images() -> Tensor:
    """Ten of two kinds, dark and light."""
    noise = torch.randint(0, 128, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return noise + 100 * LABELS.to(torch.uint8)[:, None, None, None]


def epochs(epochs: int = 3) -> list[list[tuple[Tensor, Tensor]]]:
    return [list(zip(images().split(4), LABELS.split(4), strict=True))] * epochs


def test_adapters_classifier_and_sigma_learn_and_nothing_else():
    features, classifier = begin()
    before = {name: p.clone() for name, p in features.model.state_dict().items()}
    start = classifier.weight.detach().clone()
    adapt(features, classifier, epochs(), SETTINGS, seed=0)
    moved = {name for name, p in features.model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".adapter." in name}
    assert not torch.equal(classifier.weight, start) and classifier.sigma != 1
    gradients = {name for name, p in features.model.named_parameters() if p.grad is not None}
    assert gradients == moved
    assert not any(part.training for part in features.modules())


def test_it_learns():
    (features, classifier), logits = begin(), []
    classifier.register_forward_hook(lambda _module, _inputs, output: logits.append(output.detach()))
    adapt(features, classifier, epochs(12), settings(12, lr=0.2), seed=0)
    steps = list(zip(logits, LABELS.split(4) * 12, strict=True))
    losses = np.array([F.cross_entropy(found, rows).item() for found, rows in steps]).reshape(12, 3).mean(axis=1)
    assert losses[-1] < 0.95 * losses[0]


def test_a_seed_gives_the_same_adapters_to_the_bit_and_other_seeds_others():
    first, again, masks, start = (
        adapt(*begin(begun), epochs(), SETTINGS, seed) for begun, seed in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for other in (masks, start):
        assert not torch.equal(first["blocks.0.adapter.up.weight"], other["blocks.0.adapter.up.weight"])


def test_what_others_draw_stays_as_it_was():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    begun = begin()
    torch.manual_seed(0)
    adapt(*begun, epochs(), SETTINGS, seed=0)
    assert torch.equal(torch.rand(1), wanted)


def test_the_classifier_begins_between_the_limits_with_sigma_one():
    _, classifier = begin()
    assert classifier.sigma == 1 and classifier.weight.shape == (2, 48)
    assert 0.9 < classifier.weight.abs().max() * 48**0.5 <= 1


def test_the_rate_falls_to_zero_by_a_cosine_epoch_by_epoch(monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def noted(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        assert (self.param_groups[0]["momentum"], self.param_groups[0]["weight_decay"]) == (0.9, 0.0005)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    adapt(*begin(), epochs(), SETTINGS, seed=0)
    np.testing.assert_allclose(rates, np.repeat([0.5, 0.5 * 0.75, 0.5 * 0.25], 3))


def test_a_loss_that_is_no_number_is_named_by_epoch_and_step():
    features, classifier = begin()
    classifier.register_forward_hook(
        lambda _module, inputs, logits: logits * float("nan") if len(inputs[0]) == 2 else logits
    )
    with pytest.raises(NumericError, match="epoch 1, step 3: the loss is nan; lower the rate of the first session"):
        adapt(features, classifier, epochs(), SETTINGS, seed=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_epoch_sees_every_image_once_under_its_view_in_a_fresh_order(num_workers, monkeypatch):
    monkeypatch.setattr(first_session, "BATCH", 2)
    rng = np.random.default_rng(0)
    split = ImageArray(rng.integers(0, 256, (9, 40, 40, 3), dtype=np.uint8), np.zeros(9))
    chosen, rows, transforms = np.array([1, 3, 4, 6, 8]), np.array([1, 0, 1, 0, 1]), Transforms(32, augment_seed=7)
    found = [
        [(pixels.clone(), labels) for pixels, labels in epoch]
        for epoch in shuffled_views(split.subset(chosen), rows, settings(2), 0, num_workers)
    ]
    assert [[len(pixels) for pixels, _ in epoch] for epoch in found] == [[2, 2, 1]] * 2
    orders = []
    for number, epoch in enumerate(found):
        pixels, labels = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        views = [transforms.view(split.load(image), split.keys[image], number) for image in chosen]
        orders.append([next(i for i, view in enumerate(views) if torch.equal(view, one)) for one in pixels])
        assert sorted(orders[-1]) == list(range(5)) and labels.tolist() == rows[orders[-1]].tolist()
    assert orders[0] != orders[1]


def test_attention_pooling_has_no_part_in_it():
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=32, depth=1, embed_dim=48, num_heads=3)
    features, classifier = new_session(model, 2, 0, normalize=False)
    adapt(features, classifier, epochs(1), settings(1, lr=0.01), seed=0)
    assert isinstance(model.attn_pool, nn.Module) and all(p.grad is None for p in model.attn_pool.parameters())
