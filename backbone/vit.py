"""The frozen timm ViT: uint8 images in, final features out. It is loaded once and never trained."""

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from backbone.create import BUNDLED, POOLINGS, choose_pooling, create_model, pooling_of, resolve_name, with_tag
from backbone.flops import count_flops
from backbone.forward import TimmModel, make_features
from backbone.weights import load_weights
from utils.config.config import Config
from utils.errors import BackboneError
from utils.hardware import available_accelerator

log = logging.getLogger(__name__)


class Backbone:
    """Images to features, by one frozen ViT on one device at one precision.

    Attributes:
        name: the resolved timm name.
        weights_sha256: over names, shapes and values of all weights as loaded (after any resizing of positions).
        feature_dim: width of a feature.
        precision: ``fp32`` or ``bf16``.
        features: the forward pass, an ``nn.Module``; calling the backbone calls it.
        pooling: what a feature is, as timm names it: ``token`` for the class token, ``avg``, ``map`` …
        variant: what else a feature's bits depend on, part of the identity of banks and runs. It is empty for fp32
            and for models that run under autocast, both read as timm's head does, so that their banks stay valid.
    """

    def __init__(
        self,
        model: TimmModel,
        *,
        name: str,
        device: torch.device,
        precision: str,
        normalize: bool,
        pooling: str = "token",
        default_pooling: str | None = None,
    ) -> None:
        self.name, self.device, self.precision, self.normalize = name, device, precision, normalize
        self.feature_dim: int = model.num_features if not hasattr(model, "head_hidden_size") else model.head_hidden_size
        self.pooling = pooling
        self.parameters = sum(p.numel() for p in model.parameters())
        self.weights_sha256 = _sha256(model)
        self.model = model
        self.features = make_features(model, precision=precision, normalize=normalize).to(device)
        numerics = self.features.numerics
        self.variant: dict[str, str] = {"numerics": numerics} if numerics else {}
        if default_pooling is not None and pooling != default_pooling:
            self.variant["pooling"] = pooling

    def to(self, device: torch.device) -> None:
        """Move the weights; the precision stays."""
        self.features.to(device)
        self.device = device

    def __str__(self) -> str:
        feature = POOLINGS.get(self.pooling, self.pooling)
        return (
            f"{self.name}, {self.feature_dim} features, {self.parameters / 1e6:.1f} M parameters, {self.precision} on "
            f"{self.device}, weights SHA-256 {self.weights_sha256}; a feature is {feature}"
        )

    @property
    def flops(self) -> int:
        side = self.model.patch_embed.img_size[0]
        return count_flops(lambda: self(torch.zeros(1, 3, side, side, dtype=torch.uint8)))

    @property
    def whole_flops(self) -> int:
        return self.flops

    @property
    def forward_ms(self) -> float:
        return 1.0

    image_size = 32

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8 on any device -> ``(images, feature_dim)`` float32 on the backbone's device."""
        features: Tensor = self.features(images.to(self.device, non_blocking=True))
        return features


def load_backbone(config: Config, device: torch.device) -> Backbone:
    """Build the ViT that ``config`` names, load its weights, freeze it.

    Raises:
        BackboneError: unknown name, weights that cannot be had or do not fit, an image size that does not fit.
    """
    name = resolve_name(config.backbone_name)
    if not config.pretrained and not config.backbone_weights:
        model = create_model(name, config.image_size)
    elif config.backbone_weights or name in BUNDLED:
        model = create_model(name, config.image_size, drawn=False)
        load_weights(model, Path(config.backbone_weights or BUNDLED[name]["weights"]))
    else:
        name = with_tag(name)
        model = create_model(name, config.image_size, pretrained=True)
    if not hasattr(model, "forward_head"):
        raise BackboneError(f"backbone_type {config.backbone_type!r} has no forward_head(); choose a timm ViT")
    model.eval().requires_grad_(False)
    default_pooling = pooling_of(model)
    pooling = choose_pooling(model, config.pooling, name)
    _say_what_is_read(model, name, pooling, normalize=config.normalize)
    return Backbone(
        model,
        name=name,
        device=device,
        precision=resolve_precision(config.precision, device),
        normalize=config.normalize,
        pooling=pooling,
        default_pooling=default_pooling,
    )


def _say_what_is_read(model: TimmModel, name: str, pooling: str, *, normalize: bool) -> None:
    """Warn where the feature is no class token, and where the model was trained on other pixel values."""
    if pooling != "token":
        choice = "; pooling=token reads its class token" if _has_class_token(model, pooling) else ""
        log.warning("%s: the feature is not a class token but %s%s", name, POOLINGS.get(pooling, pooling), choice)
    mean, std = (tuple(model.pretrained_cfg.get(key) or default) for key, default in _UNIT_RANGE.items())
    if not normalize and (any(mean) or any(value != 1 for value in std)):
        log.info("%s was trained on pixels with mean %s and std %s; normalize=true gives it those", name, mean, std)


_UNIT_RANGE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels from 0 to 1, as the release gives them


def _has_class_token(model: TimmModel, pooling: str) -> bool:
    return getattr(model, "cls_token", None) is not None and pooling in POOLINGS and pooling != "token+distillation"


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
    accelerator = available_accelerator()
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
