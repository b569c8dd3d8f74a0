"""Which timm model a name means, and building it: from its name, the model hub or the repository's own small ViT."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from utils.errors import BackboneError

HUB_SECONDS = 3.0  # how long the model hub may take to accept a connection before it counts as out of reach


def with_tag(name: str) -> str:
    """``name`` with the pre-training tag that timm takes where none is given: which weights those are, in words."""
    cfg = None if "." in name else timm.models.get_pretrained_cfg(name)
    return f"{name}.{cfg.tag}" if cfg is not None and cfg.tag else name


# The small ViT that ships with the repository, for a first run without a model hub (assets/README.md).
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED: dict[str, dict[str, Any]] = {
    "glyphs_vit": {
        "weights": _ASSETS / "glyphs_vit.safetensors",
        "build": {
            "model_name": "vit_tiny_patch16_224",
            "patch_size": 8,
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
        },
    }
}


def create_model(name: str, image_size: int, pretrained: bool = False) -> nn.Module:
    build = BUNDLED[name]["build"] if name in BUNDLED else {"model_name": name}
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(0)  # a random ViT (pretrained: false) is the same one in every run
        try:
            model = _build({**build, "pretrained": pretrained, "num_classes": 0}, image_size)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if pretrained:
                raise BackboneError(
                    f"the weights of {name!r} cannot be had from the model hub ({type(error).__name__}: {first}). "
                    "Two ways out: run once on a machine with internet and copy its hub cache here (HF_HOME), or "
                    "download the weights and set backbone_weights=<file>.pth, .safetensors or .npz"
                ) from error
            raise BackboneError(f"{name!r} cannot be built for image_size {image_size}: {first}") from error
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and min(grid) < 1:
        raise BackboneError(f"image_size {image_size} is smaller than one patch of {name!r}")
    return model


def _build(options: dict[str, Any], image_size: int) -> nn.Module:
    try:
        return timm.create_model(**options, img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(**options)  # takes any size


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
