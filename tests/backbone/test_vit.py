"""The frozen ViT: the [CLS]-only last block against timm's own forward pass, precision and devices."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn

from backbone.forward import (
    PlainFeatures,
    ProductFeatures,
    plain_features,
    supports_cls_only,
)
from backbone.vit import Backbone, resolve_precision
from tests.conftest import ROOT

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
# plain but for their embedding, which stays timm's
ODD_PATCHES = {
    "positions that are computed": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "no positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "a stem of convolutions": ("vit_tiny_r_s16_p8_224", SMALL),
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
    return Backbone.of(model, name="tiny", device=CPU, precision=precision, normalize=normalize)


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


@pytest.mark.parametrize("kind", [*CLASS_TOKEN, *(k for k in PLAIN if k != "gated attention"), *ODD_PATCHES])
def test_bf16_is_close_to_fp32_and_comes_back_as_float32(kind: str) -> None:
    name, arguments = (CLASS_TOKEN | PLAIN | ODD_PATCHES)[kind]
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
    assert torch.equal(found, expected) == (kind == "one block")  # the last block stays fp32


PRODUCTS = {
    **CLASS_TOKEN,
    "mean of tokens": PLAIN["mean of tokens"],
    "no class token": PLAIN["no class token"],
    **ODD_PATCHES,
    "an image that patches do not fill": ("vit_tiny_patch16_224", {"img_size": 40}),
}


def _exact_and_half(kind: str, normalize: bool) -> tuple[torch.Tensor, torch.Tensor, Backbone]:
    model = _model(*PRODUCTS[kind])
    for parameter in model.parameters():
        parameter.data.mul_(0.2)  # so that rounding, and no saturated softmax, is what sets bf16 apart
    images = _images(model, 8)
    pixels = (images / 255 - 0.5) / 0.5 if normalize else images / 255
    expected = plain_features(model, pixels)
    backbone = _backbone(model, "bf16", normalize)
    return expected, backbone(images), backbone


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
@torch.inference_mode()
def test_bf16_products_give_timms_feature_but_for_their_rounding(kind: str, normalize: bool) -> None:
    expected, found, backbone = _exact_and_half(kind, normalize)
    assert isinstance(backbone.features, ProductFeatures) and found.dtype == torch.float32
    centred = expected - expected.mean(dim=0)  # what tells the images apart, not what all features share
    error = (found - expected).norm() / max(centred.norm(), 0.1 * expected.norm())
    assert error < 0.05


@torch.inference_mode()
def test_large_biases_of_the_keys_cost_bf16_products_nothing() -> None:
    model = _model(*CLASS_TOKEN["plain"])
    for block in model.blocks:  # they add one number to all logits of a query: softmax ignores it
        block.attn.qkv.bias.data[48:96] += 300
    images = _images(model, 16)
    expected = plain_features(model, images / 255)
    autocast = PlainFeatures(copy.deepcopy(model), normalize=False, autocast=True)(images)
    products = _backbone(model, "bf16")(images)
    assert (products - expected).norm() < 0.5 * (autocast - expected).norm()


def test_rows_of_bf16_products_have_an_identity_of_their_own_and_all_others_keep_theirs() -> None:
    assert _backbone(_model(*CLASS_TOKEN["plain"]), "bf16").variant == {"numerics": "bf16-products-5"}
    assert _backbone(_model(*CLASS_TOKEN["plain"])).variant == {}
    assert _backbone(_model(*PLAIN["eva"]), "bf16").variant == {}


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


FORKED = """
import os, signal, torch
import backbone.vit
torch.set_num_threads(2)
features = torch.randn(512, 512)
(features @ features).relu().sum()
if (child := os.fork()) == 0:
    signal.alarm(30)  # ends it where it waits for ever
    (features @ features).relu().sum()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_process_that_is_forked_after_pytorch_computed_something_computes_on() -> None:
    """As web servers do that load a model first and then start their workers; plain PyTorch waits for ever there."""
    subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, check=True, timeout=60)
