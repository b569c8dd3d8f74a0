"""The frozen timm ViT: uint8 images in, final [CLS] features out. It is loaded once and never trained."""

import hashlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from utils.config import Config
from utils.errors import BackboneError

log = logging.getLogger(__name__)


class Backbone:
    """Images to features, by one frozen ViT on one device at one precision.

    Attributes:
        name: the resolved timm name.
        weights_sha256: over names, shapes and values of all weights as loaded (after any resizing of positions).
        feature_dim: width of a feature.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, model: nn.Module, *, name: str, device: torch.device, precision: str, normalize: bool) -> None:
        self.name, self.device, self.precision, self.normalize = name, device, precision, normalize
        self.feature_dim: int = model.num_features if not hasattr(model, "head_hidden_size") else model.head_hidden_size
        self.parameters = sum(p.numel() for p in model.parameters())
        self.weights_sha256 = _sha256(model)
        self.cls_only = supports_cls_only(model)
        if precision == "bf16":  # autocast would cast these weights anew in every batch; the products are the same
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(torch.bfloat16)
        self.model = model.to(device)
        cfg = model.pretrained_cfg
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(cfg.get("mean", (0.0,) * 3), device=device).view(shape)
        self._std = torch.tensor(cfg.get("std", (1.0,) * 3), device=device).view(shape)

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.feature_dim} features, {self.parameters / 1e6:.1f} M parameters, {self.precision} on "
            f"{self.device}, weights SHA-256 {self.weights_sha256}"
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8 on any device -> ``(images, feature_dim)`` float32 on the backbone's device."""
        pixels = images.to(self.device, non_blocking=True).float() / 255
        if self.normalize:
            pixels = (pixels - self._mean) / self._std
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with autocast:
            features = cls_features(self.model, pixels) if self.cls_only else plain_features(self.model, pixels)
        return features.float()


def plain_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """timm's own path: ``(images, 3, S, S) -> (images, dim)``."""
    return model.forward_head(model.forward_features(pixels), pre_logits=True)


def supports_cls_only(model: nn.Module) -> bool:
    """Whether ``cls_features`` computes exactly what ``plain_features`` does: a plain ViT read at its class token."""
    if type(model) is not VisionTransformer or model.cls_token is None or model.global_pool != "token":
        return False
    if getattr(model, "attn_pool", None) is not None or len(model.blocks) == 0:
        return False
    block = model.blocks[-1]
    return type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None


def cls_features(model: VisionTransformer, pixels: Tensor) -> Tensor:
    """``plain_features`` with the last block computed for the class token alone, 7 % less work in a ViT-B.

    Nothing reads the other tokens after the last block, so only their keys and values are needed there.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels))))  # (images, tokens, dim)
    x = model.blocks[:-1](x)
    return model.forward_head(model.norm(_cls_block(model.blocks[-1], x)), pre_logits=True)


def _cls_block(block: Block, x: Tensor) -> Tensor:
    """The class token's output of a timm ``Block``: ``(images, tokens, dim) -> (images, 1, dim)``."""
    attn, y = block.attn, block.norm1(x)
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias

    def heads(tokens: Tensor, rows: slice) -> Tensor:  # -> (images, heads, tokens, head_dim)
        projected = F.linear(tokens, weight[rows], None if bias is None else bias[rows])
        return projected.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)

    q = attn.q_norm(heads(y[:, :1], slice(0, width)))
    k = attn.k_norm(heads(y, slice(width, 2 * width)))
    v = heads(y, slice(2 * width, 3 * width))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (images, 1, width)
    x = x[:, :1] + block.ls1(attn.proj(attn.norm(out)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def load_backbone(config: Config, device: torch.device) -> Backbone:
    """Build the ViT that ``config`` names, load its weights, freeze it.

    Raises:
        BackboneError: unknown name, weights that cannot be had or do not fit, an image size that does not fit.
    """
    name = config.backbone_name
    if not timm.is_model(name.partition(".")[0]) and name not in BUNDLED:
        near = timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]
        raise BackboneError(
            f"backbone_type {config.backbone_type!r} is not a timm model"
            + (f"; timm has for example {', '.join(near)}" if near else "; timm.list_models('vit*') lists the names")
        )
    if not config.pretrained and not config.backbone_weights:
        model = _create(name, config.image_size)
    elif config.backbone_weights or name in BUNDLED:
        model = _create(name, config.image_size)
        _load_file(model, Path(config.backbone_weights or BUNDLED[name]["weights"]))
    else:
        name = with_tag(name)
        model = _create(name, config.image_size, pretrained=True)
    if not hasattr(model, "forward_head"):
        raise BackboneError(f"backbone_type {config.backbone_type!r} has no forward_head(); choose a timm ViT")
    model.eval().requires_grad_(False)
    return Backbone(
        model,
        name=name,
        device=device,
        precision=resolve_precision(config.precision, device),
        normalize=config.normalize,
    )


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


def _create(name: str, image_size: int, pretrained: bool = False) -> nn.Module:
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


def _load_file(model: nn.Module, path: Path) -> None:
    """Load a local file through timm, which resizes the position grid where the image size differs."""
    if not path.is_file():
        raise BackboneError(f"backbone_weights {str(path)!r} is not a file")
    if path.suffix not in (".pth", ".pt", ".bin", ".safetensors", ".npz"):
        raise BackboneError(f"backbone_weights {str(path)!r}: give a .pth, .safetensors or .npz file")
    # each architecture of timm keeps the filter that its own downloads pass in its module, under this name
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        result = timm.models.load_checkpoint(model, str(path), strict=False, filter_fn=filter_fn)
    except KeyError as error:  # an .npz without an array that the model needs
        raise BackboneError(f"backbone_weights {str(path)!r}: key {error} is missing") from error
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise BackboneError(
            f"backbone_weights {str(path)!r} does not fit or cannot be read: {' '.join(lines)[:600]}"
        ) from error
    if result is None:  # .npz: timm raises where something is missing
        return
    if result.missing_keys:
        raise BackboneError(
            f"backbone_weights {str(path)!r} lacks {len(result.missing_keys)} keys of {type(model).__name__}: "
            f"{', '.join(result.missing_keys[:8])}; it belongs to another architecture"
        )
    heads = ("head.", "head_dist.", "fc.", "pre_logits.", "classifier.")
    if extra := [key for key in result.unexpected_keys if not key.startswith(heads)]:
        log.warning("backbone_weights %s: %d keys not used: %s", path, len(extra), ", ".join(extra[:8]))


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bf16`` where the hardware computes it natively, else ``fp32``."""
    if precision != "auto":
        return precision
    return "bf16" if _native_bf16(device) else "fp32"


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if supported is None:
        return False
    try:
        return bool(supported(including_emulation=False))
    except TypeError:  # older torch and some devices: no such argument
        return bool(supported())


def resolve_device(config: Config, local_rank: int = 0, ranks: int = 1) -> torch.device:
    """The device that ``config.device`` names; under torchrun, the one of this rank.

    Raises:
        BackboneError: several devices in one process, or an accelerator that this machine does not have.
    """
    if len(config.device) > 1 and ranks == 1:
        count = len(config.device)
        raise BackboneError(
            f"device {list(config.device)}: one process uses one device; for {count} devices start "
            f"torchrun --nproc_per_node={count} main.py --config=..."
        )
    names = config.device
    name = names[local_rank % len(names)] if len(names) > 1 else names[0]
    if name in ("-1", "cpu"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        log.warning("device %s: this machine has no accelerator that PyTorch can use; running on the CPU", name)
        return torch.device("cpu")
    index = local_rank if ranks > 1 and len(names) == 1 else int(name)
    if index >= (count := torch.accelerator.device_count()):
        raise BackboneError(
            f"device {index} does not exist: this machine has {count} {accelerator.type} device(s), 0 to {count - 1}"
        )
    return torch.device(accelerator.type, index)


def _sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
