"""The frozen ViT: the [CLS]-only last block against timm's own forward pass, precision and devices."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from backbone.forward import plain_features, supports_cls_only
from backbone.vit import Backbone, resolve_device, resolve_precision
from tests.conftest import tiny_config

CPU = torch.device("cpu")
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}

# name, arguments, whether the last block may be computed for the class token alone
CLASS_TOKEN = {
    "plain": ("vit_tiny_patch16_224", {}),
    "one block": ("vit_tiny_patch16_224", {"depth": 1}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "layer scale": ("vit_small_patch14_dinov2", {}),
    "swiglu": ("vit_giant_patch14_dinov2", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "scale-norm": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "fc_norm": ("vit_tiny_patch16_224", {"fc_norm": True}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "pre-norm": ("vit_base_patch32_clip_224", {}),
    "no position for the class token": ("vit_tiny_patch16_224", {"no_embed_class": True}),
}
PLAIN = {
    "mean of tokens": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "gated attention": ("vit_tiny_patch16_224", {"attn_layer": "gated"}),
    "post-norm blocks": ("vit_relpos_small_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {"img_size": 32}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28}),
}


def _model(name: str, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **{"img_size": 28 if "14" in name else 32, **SMALL, **arguments})
    for parameter in model.parameters():  # layer scales near zero and zero biases would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _images(model: nn.Module, count: int = 3) -> torch.Tensor:
    size = model.patch_embed.img_size[0]
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _backbone(model: nn.Module, precision: str = "fp32", normalize: bool = False) -> Backbone:
    return Backbone(model, name="tiny", device=CPU, precision=precision, normalize=normalize)


@pytest.mark.parametrize("kind", CLASS_TOKEN)
@torch.inference_mode()
def test_the_class_token_alone_gives_timms_feature(kind: str) -> None:
    model = _model(*CLASS_TOKEN[kind])
    assert supports_cls_only(model)
    images = _images(model)
    found, expected = _backbone(model)(images), plain_features(model, images / 255)
    assert found.shape == (3, model.num_features) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_last_block_is_computed_for_the_class_token_alone() -> None:
    model = _model(*CLASS_TOKEN["plain"])
    tokens = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _module, inputs, _output: tokens.append(inputs[0].shape[1]))
    _backbone(model)(_images(model))
    assert tokens == [5, 1]  # 2 x 2 patches and the class token; then the class token


@pytest.mark.parametrize("kind", PLAIN)
@torch.inference_mode()
def test_other_poolings_and_architectures_take_timms_path(kind: str) -> None:
    name, arguments = PLAIN[kind]
    if arguments.get("attn_layer") == "gated":
        model = _model(name, {})
        for block in model.blocks:
            block.attn.gate = nn.Linear(48, 48)
    else:
        model = _model(name, arguments)
    assert not supports_cls_only(model)
    images = _images(model)
    torch.testing.assert_close(_backbone(model)(images), plain_features(model, images / 255), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*CLASS_TOKEN, *(k for k in PLAIN if k != "gated attention")])
def test_bf16_is_close_to_fp32_and_comes_back_as_float32(kind: str) -> None:
    name, arguments = (CLASS_TOKEN | PLAIN)[kind]
    torch.manual_seed(0)
    exact, half = (
        timm.create_model(name, num_classes=0, **{"img_size": 28 if "14" in name else 32, **SMALL, **arguments}).eval()
        for _ in range(2)
    )
    half.load_state_dict(exact.state_dict())
    images = _images(exact)
    expected, found = _backbone(exact)(images), _backbone(half, "bf16")(images)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(found, expected)


@torch.inference_mode()
def test_pixels_are_scaled_to_one_and_normalised_only_if_asked() -> None:
    model = _model(*CLASS_TOKEN["plain"])
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    images = _images(model)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    expected = plain_features(model, (images / 255 - mean) / std)
    torch.testing.assert_close(_backbone(model, normalize=True)(images), expected, rtol=1e-5, atol=1e-5)
    assert (_backbone(model)(images) - expected).abs().max() > 0.1


def test_a_feature_does_not_depend_on_its_place_in_the_batch() -> None:
    backbone = _backbone(_model(*CLASS_TOKEN["plain"]))
    images, order = _images(backbone.model, 7), torch.tensor([3, 6, 0, 5, 1, 2, 4])
    assert torch.equal(backbone(images)[order], backbone(images[order]))


def test_weights_are_told_apart_by_their_values_at_either_precision() -> None:
    first, second = _model(*CLASS_TOKEN["plain"]), _model(*CLASS_TOKEN["plain"])
    second.blocks[0].mlp.fc1.bias.data[0] += 1e-6
    sha = _backbone(first).weights_sha256
    assert sha != _backbone(second).weights_sha256
    assert sha == _backbone(_model(*CLASS_TOKEN["plain"]), "bf16").weights_sha256


def test_auto_is_bf16_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr("backbone.vit._native_bf16", lambda device, native=native: native)
        assert resolve_precision("auto", CPU) == ("bf16" if native else "fp32")
        assert resolve_precision("fp32", CPU) == "fp32" and resolve_precision("bf16", CPU) == "bf16"


def test_minus_one_and_cpu_are_the_cpu_and_each_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device(tiny_config(device="-1")) == resolve_device(tiny_config(device="cpu")) == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert resolve_device(tiny_config(device=["3"])) == torch.device("xpu", 3)
    assert resolve_device(tiny_config(device=["3", "1"]), local_rank=1, ranks=2) == torch.device("xpu", 1)
    assert resolve_device(tiny_config(device=["0"]), local_rank=2, ranks=4) == torch.device("xpu", 2)
