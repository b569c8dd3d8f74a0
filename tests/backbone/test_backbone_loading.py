import argparse
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from backbone.create import POOLINGS
from backbone.vit import load_backbone, resolve_device
from models import ContinualClassifier
from tests.conftest import tiny_config
from utils.errors import BackboneError

NAME = "vit_tiny_patch16_224"
CPU = torch.device("cpu")


def load(**keys):
    return load_backbone(tiny_config(backbone_type=NAME, **keys), CPU)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A ViT with a classification head at 64 px, as a model hub would have it: a grid of 4 x 4 patches."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return timm.create_model(NAME, num_classes=7, img_size=64).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def plain_feature(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(images / 255), pre_logits=True)


def save_jax(model: nn.Module, path: Path) -> None:
    """The layout of Google's ViT checkpoints (.npz), the inverse of what timm reads."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    dim = model.embed_dim
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for number in range(len(model.blocks)):
        ours, theirs = f"blocks.{number}.", f"Transformer/encoderblock_{number}/"
        for index, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{index}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{index}/bias"] = state[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights, biases = state[f"{ours}attn.qkv.weight"].reshape(3, dim, dim), state[f"{ours}attn.qkv.bias"]
        for name, weight, bias in zip(("query", "key", "value"), weights, biases.reshape(3, dim), strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(dim, heads, dim // heads)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, dim // heads)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, dim // heads, dim)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for index, layer in ((0, "fc1"), (1, "fc2")):
            arrays[f"{theirs}MlpBlock_3/Dense_{index}/kernel"] = state[f"{ours}mlp.{layer}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{index}/bias"] = state[f"{ours}mlp.{layer}.bias"]
    np.savez(path, **arrays)


def save(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".npz":
        save_jax(model, path)
    elif path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_local_weights_give_the_features_of_the_model_they_come_from(tmp_path, trained, images, suffix, caplog):
    backbone = load(backbone_weights=str(save(trained, tmp_path / f"vit{suffix}")), image_size=64)
    torch.testing.assert_close(backbone(images), plain_feature(trained, images))
    assert backbone.feature_dim == 192 and backbone.name == NAME
    assert not caplog.records  # the head that is not used is no news


def test_the_digest_of_the_weights_does_not_depend_on_the_kind_of_file(tmp_path, trained):
    digests = {
        load(backbone_weights=str(save(trained, tmp_path / f"vit{suffix}")), image_size=64).weights_sha256
        for suffix in (".pth", ".safetensors", ".npz")
    }
    assert len(digests) == 1
    with torch.no_grad():
        changed = timm.create_model(NAME, num_classes=7, img_size=64)
        changed.load_state_dict(trained.state_dict())
        changed.norm.bias[3] += 1e-6
    other = load(backbone_weights=str(save(changed, tmp_path / "other.pth")), image_size=64).weights_sha256
    assert other not in digests


@pytest.mark.parametrize(("suffix", "how"), [(".pth", ("bicubic", True)), (".npz", ("bilinear", False))])
def test_the_position_grid_is_resized_to_another_image_size_as_timm_does(tmp_path, trained, suffix, how):
    mode, antialias = how
    backbone = load(backbone_weights=str(save(trained, tmp_path / f"vit{suffix}")), image_size=96)
    positions = backbone.model.pos_embed
    assert positions.shape == (1, 1 + 6 * 6, 192)
    torch.testing.assert_close(positions[:, 0], trained.pos_embed[:, 0])  # that of the class token stays
    grid, old = (p[0, 1:].T.reshape(192, n, n) for p, n in ((positions, 6), (trained.pos_embed, 4)))
    expected = nn.functional.interpolate(old[None], size=(6, 6), mode=mode, antialias=antialias)[0]
    torch.testing.assert_close(grid, expected, rtol=0, atol=1e-5)
    assert backbone(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).shape == (1, 192)


def test_missing_keys_are_named(tmp_path, trained):
    state = trained.state_dict()
    del state["blocks.3.mlp.fc1.bias"], state["norm.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(BackboneError, match=r"part\.pth.* lacks 2 keys.*blocks\.3\.mlp\.fc1\.bias.*norm\.weight"):
        load(backbone_weights=str(tmp_path / "part.pth"), image_size=64)


@pytest.mark.parametrize(
    ("array", "words"), [(None, r"Transformer/encoder_norm/scale"), (np.zeros(191, dtype=np.float32), r"191|192")]
)
def test_an_array_of_an_npz_that_is_missing_or_misshapen_is_named(tmp_path, trained, array, words):
    save_jax(trained, tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as archive:
        arrays = {name: archive[name] for name in archive if "encoder_norm/scale" not in name}
    bent = {} if array is None else {"Transformer/encoder_norm/scale": array}
    np.savez(tmp_path / "part.npz", **arrays, **bent)
    with pytest.raises(BackboneError, match=words):
        load(backbone_weights=str(tmp_path / "part.npz"), image_size=64)


def test_keys_of_other_parts_are_not_used_and_said(tmp_path, trained, caplog):
    torch.save(trained.state_dict() | {"decoder.weight": torch.zeros(1)}, tmp_path / "more.pth")
    load(backbone_weights=str(tmp_path / "more.pth"), image_size=64)
    assert "1 key not used: decoder.weight" in caplog.text


NESTINGS = {
    "backbone.": lambda state: _under("backbone.", state),
    "module.": lambda state: _under("module.", state) | {"module.decoder.weight": torch.zeros(2)},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: torch.zeros(3)}}},
    "module.backbone. in teacher": lambda state: {
        "student": _under("module.backbone.", {k: v + 1 for k, v in state.items()}),
        "teacher": _under("module.backbone.", state) | {"module.head.mlp.0.weight": torch.zeros(3)},
        "args": argparse.Namespace(lr=0.1),
    },
    "ema": lambda state: {"model": {k: v + 1 for k, v in state.items()}, "ema": state},
    "two dictionaries deep": lambda state: {"ckpt": {"model": _under("module.", state)}},
}


def _under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_weights_are_found_under_prefixes_and_in_dictionaries_and_it_is_said(
    tmp_path, trained, images, nesting, caplog
):
    torch.save(NESTINGS[nesting](trained.state_dict()), tmp_path / "vit.bin")
    with caplog.at_level(logging.INFO):
        backbone = load(backbone_weights=str(tmp_path / "vit.bin"), image_size=64)
    torch.testing.assert_close(backbone(images), plain_feature(trained, images))
    assert "the weights lie under" in caplog.text
    prefixes = ("state_dict.", "teacher.module.backbone.", "ema.", "ckpt.model.module.", "backbone.", "module.")
    assert any(f"the weights lie under {prefix!r}" in caplog.text for prefix in prefixes)


@pytest.mark.parametrize(("suffix", "name"), [(".pth", "a.npz"), (".safetensors", "a"), (".npz", "a.safetensors")])
def test_the_content_of_a_file_decides_and_not_its_suffix(tmp_path, trained, images, suffix, name):
    path = save(trained, tmp_path / f"vit{suffix}").rename(tmp_path / name)
    backbone = load(backbone_weights=str(path), image_size=64)
    torch.testing.assert_close(backbone(images), plain_feature(trained, images))


class Foreign:
    """An object that a training script saved beside its weights."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not weights", "does not fit or cannot be read: Unsupported operand 110; give a .pth"),
        (b"", "EOFError"),
        (b"PK\x03\x04abc", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (
            {"args": Foreign()},
            r"holds objects of \S*test_backbone_loading\.Foreign, which would run code",
        ),
        ([torch.zeros(3)], "looked for a dictionary of tensors, found list"),
        (
            {"layer1.0.conv1.weight": torch.zeros(3, 3, 3, 3)},
            r"looked for 150 keys such as blocks\.0\..*layer1\.0\.conv1",
        ),
        (None, "is not a file"),
    ],
)
def test_a_file_that_holds_no_weights_is_a_line_that_says_what_it_is(tmp_path, content, words):
    path = tmp_path / "vit.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(BackboneError, match=rf"vit\.pth.*{words}") as caught:
        load(backbone_weights=str(path))
    assert not {"\n", "\x1b"} & set(str(caught.value)) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_what_timm_adapts_is_one_line_and_patches_of_another_size_are_refused(tmp_path, trained, suffix, caplog):
    path = save(trained, tmp_path / f"vit{suffix}")
    with caplog.at_level(logging.INFO):
        load(backbone_weights=str(path), image_size=96)
    (line,) = [text for text in caplog.messages if "adapted" in text]
    assert "pos_embed from (1, 17, 192) to (1, 37, 192)" in line
    assert suffix == ".npz" or "the classifier of 7 outputs is left out" in line
    with pytest.raises(BackboneError, match="has patches of 16 x 16 pixels, backbone_type has patches of 32 x 32"):
        load_backbone(
            tiny_config(backbone_type="vit_small_patch32_224", backbone_weights=str(path), image_size=64), CPU
        )


@pytest.mark.parametrize("name", ["vit_tiny_patch61_224", "pretrained_vit_b16_225"])
def test_an_unknown_name_is_answered_with_names_that_exist(name):
    with pytest.raises(BackboneError, match=rf"backbone_type '{name}' is not a timm model.*vit"):
        load_backbone(tiny_config(backbone_type=name, pretrained=True), CPU)


@pytest.mark.parametrize(
    ("given", "asked_for"),
    [
        ("pretrained_vit_b16_224_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224", "vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    ],
)
def test_without_network_one_error_names_the_weights_and_the_two_ways_out(monkeypatch, given, asked_for):
    def offline(model_name, *, pretrained=False, **options):
        assert pretrained and model_name == asked_for
        if "tiny" not in given and "img_size" in options:
            raise TypeError("unexpected keyword argument 'img_size'")
        raise OSError("We couldn't connect to the hub\nsecond line")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(BackboneError) as caught:
        load_backbone(tiny_config(backbone_type=given, pretrained=True), CPU)
    message = str(caught.value)
    assert f"'{asked_for}'" in message and "couldn't connect" in message and "\n" not in message
    assert "HF_HOME" in message and "backbone_weights=" in message


@pytest.mark.parametrize(
    "given", ["timm/vit_tiny_patch16_224", "hf-hub:timm/vit_tiny_patch16_224", "hf_hub:timm/vit_tiny_patch16_224"]
)
def test_names_of_timm_on_the_hub_are_timms_own_names(given):
    backbone = load_backbone(tiny_config(backbone_type=given, pretrained=False), CPU)
    assert backbone.name == "vit_tiny_patch16_224" and backbone.weights_sha256 == load().weights_sha256


def test_a_model_of_another_user_of_the_hub_is_looked_for_there():
    with pytest.raises(BackboneError, match=r"'hf-hub:someone/their-vit' cannot be had from the model hub"):
        load_backbone(tiny_config(backbone_type="hf-hub:someone/their-vit", pretrained=True), CPU)
    with pytest.raises(BackboneError, match=r"someone/their-vit.*is hf-hub:<user>/<name>"):
        load_backbone(tiny_config(backbone_type="someone/their-vit", pretrained=True), CPU)


@pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 26),
    reason="timm reads no .safetensors there before 1.0.26",
)
def test_a_folder_in_the_hubs_form_loads(tmp_path, trained, images):
    config = {"architecture": NAME, "num_classes": 7, "pretrained_cfg": {"num_classes": 7, "classifier": "head"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(trained, tmp_path / "model.safetensors")
    backbone = load_backbone(tiny_config(backbone_type=f"local-dir:{tmp_path}", pretrained=True, image_size=64), CPU)
    torch.testing.assert_close(backbone(images), plain_feature(trained, images))


def in_the_hubs_cache(folder: Path, content: bytes) -> Path:
    """A cache in which ``timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k`` has this file of weights."""
    model = folder / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    commit = "0123456789" * 4
    for path, text in ((f"snapshots/{commit}/model.safetensors", content), ("refs/main", commit.encode())):
        (model / path).parent.mkdir(parents=True)
        (model / path).write_bytes(text)
    return model


def test_a_file_of_the_hub_that_is_half_there_is_named(tmp_path, monkeypatch, trained):
    save(trained, tmp_path / "whole.safetensors")
    model = in_the_hubs_cache(tmp_path / "hub", (tmp_path / "whole.safetensors").read_bytes()[:-100])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(BackboneError, match=rf"damaged or was not downloaded to its end .*: delete {model} and start"):
        load(pretrained=True)


def test_a_gated_model_says_where_to_ask_and_to_log_in(monkeypatch):
    gated = type("GatedRepoError", (OSError,), {"__module__": "huggingface_hub.errors"})
    monkeypatch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(gated("401 Client Error.\nurl")))
    with pytest.raises(BackboneError, match=r"ask for access on https://huggingface.co/someone/vit .*hf auth login"):
        load_backbone(tiny_config(backbone_type="hf-hub:someone/vit", pretrained=True), CPU)


# -- what a feature is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pooling", "words"),
    [
        (NAME, "token", None),
        ("vit_base_patch16_siglip_224", "map", "attention pooling"),
        ("deit_tiny_distilled_patch16_224", "token+distillation", "class and distillation token"),
        ("eva02_tiny_patch14_224", "avg", "pooling=token reads its class token"),
    ],
)
def test_what_the_feature_is_stands_in_the_backbones_line_and_a_warning_says_where_it_is_no_class_token(
    name, pooling, words, caplog
):
    backbone = load_backbone(tiny_config(backbone_type=name, image_size=28 if "14" in name else 32), CPU)
    assert backbone.pooling == pooling and backbone.variant == {}
    assert POOLINGS[pooling] in str(backbone)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == (words is not None) and (words is None or words in warnings[0])


def test_the_key_pooling_chooses_what_is_read(images):
    token, mean = load(image_size=64), load(image_size=64, pooling="avg")
    tokens = token.model.forward_features(images / 255)
    torch.testing.assert_close(mean(images), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(load(image_size=64, pooling="token")(images), tokens[:, 0])
    assert mean.pooling == "avg" and mean.variant == {"pooling": "avg"}
    assert load(image_size=64, pooling="token").variant == {}  # what auto reads: the same bank


def test_a_class_token_that_is_not_there_cannot_be_read():
    with pytest.raises(BackboneError, match=r"pooling 'token': .*siglip.* has no class token; pooling=auto reads att"):
        load_backbone(tiny_config(backbone_type="vit_base_patch16_siglip_224", pooling="token"), CPU)


@pytest.mark.parametrize("normalize", [False, True])
def test_how_the_hubs_weights_were_trained_is_said_and_nothing_is_guessed_of_others(
    tmp_path, monkeypatch, trained, normalize, caplog
):
    path = save(trained, tmp_path / "vit.safetensors")
    in_the_hubs_cache(tmp_path / "hub", path.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with caplog.at_level(logging.INFO):
        for guessed in ({}, {"backbone_weights": str(path)}):
            load(image_size=64, normalize=normalize, **guessed)
        load_backbone(tiny_config(backbone_type="glyphs_vit", pretrained=True, normalize=normalize), CPU)
        assert "normalize=true" not in caplog.text
        load(pretrained=True, image_size=64, normalize=normalize)
    assert ("trained on pixels with mean (0.5, 0.5, 0.5)" in caplog.text) != normalize
    assert "was trained at 224 px: timm resampled its positions to image_size 64" in caplog.text


def test_an_image_size_that_no_patch_fits_into_is_an_error():
    with pytest.raises(BackboneError, match="image_size 15 is smaller than one patch"):
        load(image_size=15)


def test_a_random_vit_is_the_same_one_every_time_and_leaves_the_generator_alone():
    config = tiny_config(backbone_type="deit_tiny_patch16_224")  # tests/conftest.py builds the other one once
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = load_backbone(config, CPU).weights_sha256
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert load_backbone(config, CPU).weights_sha256 == first


def test_the_callers_default_type_is_not_that_of_the_weights(finished_run):
    config = tiny_config(backbone_type="deit_tiny_patch16_224")  # tests/conftest.py builds the other one once
    image, expected = np.zeros((8, 8, 3), dtype=np.uint8), load_backbone(config, CPU).weights_sha256
    answer = ContinualClassifier.load(finished_run.checkpoints).predict(image)
    torch.set_default_dtype(torch.float64)
    try:
        assert load_backbone(config, CPU).weights_sha256 == expected
        there = ContinualClassifier.load(finished_run.checkpoints).predict(image)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(there.probabilities, answer.probabilities)


def test_the_backbone_is_frozen_and_in_evaluation_mode():
    backbone = load()
    assert not backbone.model.training and not any(p.requires_grad for p in backbone.model.parameters())
    assert backbone.parameters == sum(p.numel() for p in backbone.model.parameters())


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


@pytest.mark.parametrize("device", ["-1", "cpu", ["-1"], -1])
def test_minus_one_and_cpu_are_the_cpu_without_a_warning(device, caplog):
    assert resolve_device(tiny_config(device=device)) == CPU and not caplog.records


def test_an_accelerator_that_is_not_there_is_the_cpu_with_one_warning(no_accelerator, caplog):
    assert resolve_device(tiny_config(device=["0"])) == CPU
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "no accelerator" in record.getMessage()


def test_several_devices_are_refused_with_the_way_to_use_them(no_accelerator):
    with pytest.raises(BackboneError, match=r"\['0', '1'\].*torchrun --nproc_per_node=2"):
        resolve_device(tiny_config(device=["0", "1"]))


def test_the_number_of_an_accelerator_is_checked_and_each_rank_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    assert resolve_device(tiny_config(device=["3"])) == torch.device("cuda", 3)
    assert resolve_device(tiny_config(device=["3", "1"]), local_rank=1, ranks=2) == torch.device("cuda", 1)
    assert resolve_device(tiny_config(device=["0"]), local_rank=2, ranks=4) == torch.device("cuda", 2)
    with pytest.raises(BackboneError, match=r"device 4 does not exist.* has 4 cuda"):
        resolve_device(tiny_config(device=["4"]))
