"""Adapters in the blocks of a ViT: their formula, and every forward pass with them."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbone import adapters
from backbone.adapters import AdaptedBlock, Adapter, adapter_state, add_adapters, load_adapters
from backbone.forward import PlainFeatures, ProductFeatures, make_features
from utils.errors import BackboneError

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 0}
# what differs between forward passes: arguments of the model, precision, the class that computes it
FORWARDS: dict[str, tuple[dict[str, Any], str, type]] = {
    "fp32, class token": ({}, "fp32", PlainFeatures),
    "fp32, layer scale": ({"init_values": 0.3}, "fp32", PlainFeatures),
    "fp32, mean of tokens": ({"global_pool": "avg"}, "fp32", PlainFeatures),
    "bf16, class token": ({}, "bf16", ProductFeatures),
    "bf16, layer scale": ({"init_values": 0.3}, "bf16", ProductFeatures),
    "bf16, normalised keys": ({"qk_norm": True}, "bf16", ProductFeatures),
    "bf16, mean of tokens": ({"global_pool": "avg"}, "bf16", ProductFeatures),
    "bf16, autocast": ({"init_values": 0.3, "global_pool": "map"}, "bf16", PlainFeatures),
}
every_forward = pytest.mark.parametrize("kind", FORWARDS)


def model_of(kind: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **FORWARDS[kind][0], **arguments}).eval()


def trained(model: nn.Module) -> nn.Module:
    """With adapters as large as training makes them, and larger."""
    add_adapters(model, seed=0)
    for name, parameter in model.named_parameters():
        if ".adapter.up." in name or name.endswith(".adapter.down.bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def pixels(images: int = 8) -> Tensor:
    return torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def features_of(model: nn.Module, precision: str) -> Tensor:
    return make_features(copy.deepcopy(model), precision=precision, normalize=False)(pixels())


@torch.inference_mode()
def test_a_block_worked_by_hand(monkeypatch):
    monkeypatch.setattr(adapters, "WIDTH", 1)
    block = AdaptedBlock(Block(2, num_heads=1, init_values=0.5).eval(), Adapter(2).eval())
    nn.init.zeros_(block.attn.proj.weight)  # attention and MLP add their biases alone: 0.5 · (2, 4) and 0.5 · (6, 8)
    block.attn.proj.bias.copy_(torch.tensor([2.0, 4.0]))
    nn.init.zeros_(block.mlp.fc2.weight)
    block.mlp.fc2.bias.copy_(torch.tensor([6.0, 8.0]))
    block.adapter.down.weight.copy_(torch.tensor([[1.0, -2.0]]))
    block.adapter.down.bias.fill_(3)
    block.adapter.up.weight.copy_(torch.tensor([[10.0], [20.0]]))
    block.adapter.up.bias.copy_(torch.tensor([1.0, -1.0]))
    stream = torch.tensor([[[1.0, 1.0], [0.0, 5.0]]])
    # after attention (2, 3) and (1, 7); down gives 2 - 6 + 3 = -1 and 1 - 14 + 3 = -10, both cut to 0
    torch.testing.assert_close(block(stream), torch.tensor([[[2 + 3 + 0.1, 3 + 4 - 0.1], [1 + 3 + 0.1, 7 + 4 - 0.1]]]))
    block.adapter.down.weight.copy_(torch.tensor([[1.0, 0.0]]))  # 2 + 3 = 5 and 1 + 3 = 4, neither scaled by ls2
    wanted = torch.tensor([[[2 + 3 + 5.1, 3 + 4 + 9.9], [1 + 3 + 4.1, 7 + 4 + 7.9]]])
    torch.testing.assert_close(block(stream), wanted)


def test_a_new_adapter_begins_as_papers_say():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    add_adapters(model, seed=3)
    state = adapter_state(model)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "blocks.0.adapter.down.weight": (64, 192),
        "blocks.0.adapter.down.bias": (64,),
        "blocks.0.adapter.up.weight": (192, 64),
        "blocks.0.adapter.up.bias": (192,),
    }
    down = state.pop("blocks.0.adapter.down.weight")
    assert not any(value.any() for value in state.values())
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(64, 192), a=5**0.5)
    torch.testing.assert_close(down, expected)


def test_a_tenth_of_the_inner_numbers_is_dropped_in_training_alone(monkeypatch):
    monkeypatch.setattr(adapters, "WIDTH", 400)
    adapter, x = Adapter(400), torch.ones(50, 400)
    nn.init.zeros_(adapter.down.weight)
    nn.init.ones_(adapter.down.bias)
    adapter.up.weight.data.copy_(torch.eye(400))
    values, counts = adapter(x).unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0, 1 / 0.9]))
    assert abs(counts[0] / counts.sum() - 0.1) < 0.01
    torch.testing.assert_close(adapter.eval()(x), x)


@every_forward
def test_with_new_adapters_features_are_the_plain_ones_to_the_bit(kind):
    _, precision, kind_of_forward = FORWARDS[kind]
    plain, with_new = model_of(kind), model_of(kind)
    add_adapters(with_new, seed=0)
    assert type(make_features(copy.deepcopy(with_new), precision=precision, normalize=False)) is kind_of_forward
    assert torch.equal(features_of(with_new, precision), features_of(plain, precision))


@every_forward
@torch.inference_mode()
def test_every_forward_computes_timms_own_with_adapters(kind):
    model, precision = trained(model_of(kind)), FORWARDS[kind][1]
    expected = model.forward_head(model.forward_features(pixels() / 255), pre_logits=True)
    found = features_of(model, precision)
    if precision == "fp32":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.cosine_similarity(found, expected).min() > 0.9999
    assert torch.cosine_similarity(features_of(model_of(kind), precision), expected).min() < 0.99  # they count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.inference_mode()
def test_the_last_blocks_adapter_sees_the_class_token_alone(precision):
    tokens, features = [], make_features(trained(model_of("fp32, class token")), precision=precision, normalize=False)
    for block in features.model.blocks:
        block.adapter.register_forward_hook(lambda _module, inputs, _output: tokens.append(inputs[0].shape[1]))
    features(pixels())
    assert tokens == [5, 5, 1]


def test_saved_adapters_give_the_same_features_on_a_plain_model():
    kind = "fp32, class token"
    first, second = trained(model_of(kind)), model_of(kind)
    load_adapters(second, adapter_state(first))
    assert torch.equal(features_of(second, "fp32"), features_of(first, "fp32"))
    assert not any(part.training for part in second.modules())
    assert not any(parameter.requires_grad for parameter in second.parameters())


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "resnet18"])
def test_a_model_without_plain_blocks_is_refused(name):
    with pytest.raises(BackboneError, match=r"plain blocks of a ViT, which (Eva|ResNet) does not have"):
        add_adapters(timm.create_model(name, num_classes=0), seed=0)
