"""The frozen timm ViT: uint8 images in, final features out. It is loaded once and never trained."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbone.adapters import Adapters, load_adapters
from backbone.create import HEADS_OWN, POOLINGS, choose_pooling, load_model, pooling_of, source_files, weights_file
from backbone.flops import count_flops, quickest_ms, whole_forward_flops
from backbone.forward import Features, ProductFeatures, TimmModel, make_features
from backbone.weights import Remarks
from utils.config.config import Config
from utils.errors import BackboneError, UserError
from utils.files import atomic_write
from utils.hardware import available_accelerator

log = logging.getLogger(__name__)

if hasattr(os, "register_at_fork"):  # PyTorch's threads do not come along into a forked process: it would wait for them
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass(eq=False)
class Backbone:
    """Images to features, by one frozen ViT on one device at one precision; it may be built when it is first called.

    Attributes:
        name: the resolved timm name.
        weights_sha256: over names, shapes and values of all weights as loaded (after any resizing of positions).
        feature_dim: width of a feature.
        parameters: how many numbers all weights are.
        precision: ``fp32`` or ``bf16``.
        pooling: what a feature is, as timm names it: ``token`` for the class token, ``avg``, ``map`` …
        variant: what else a feature's bits depend on, part of the identity of banks and runs. It is empty for fp32
            and for models that run under autocast, both read as timm's head does.
        image_size: side of its images in pixels.
        remarks: what is said where it is loaded.
        sources: files whose change would mean other weights.
        cost: FLOPs of one image here, FLOPs through the whole timm model, and milliseconds here; None: not measured.
        build: makes the same backbone, ready.
        ready: the forward pass, once it is built.
        adapters: those of the first session, None without any.
        parts: the backbones whose features make up this one's, side by side; empty: it is one.
    """

    name: str
    weights_sha256: str
    feature_dim: int
    parameters: int
    precision: str
    normalize: bool
    pooling: str
    variant: dict[str, str]
    device: torch.device
    image_size: int = 224
    remarks: Remarks = field(default_factory=list)
    sources: list[Path] = field(default_factory=list)
    cost: tuple[int, int, float] | None = None
    build: "Callable[[], Backbone] | None" = None
    ready: Features | None = None
    adapters: Adapters | None = None
    parts: "tuple[Backbone, ...]" = ()
    _building: threading.Lock = field(default_factory=threading.Lock, init=False)

    @classmethod
    def of(
        cls,
        model: TimmModel,
        *,
        device: torch.device,
        precision: str,
        normalize: bool,
        pooling: str = "token",
        default_pooling: str = "token",
        **about: Any,
    ) -> "Backbone":
        """The backbone that takes over ``model``; ``about`` are further attributes."""
        parameters, weights = sum(p.numel() for p in model.parameters()), _sha256(model)
        features = make_features(model, precision=precision, normalize=normalize).to(device)
        variant = {"numerics": features.numerics} if features.numerics else {}
        if pooling != default_pooling:
            variant["pooling"] = pooling
        return cls(
            weights_sha256=weights,
            feature_dim=getattr(model, "head_hidden_size", model.num_features),
            parameters=parameters,
            precision=precision,
            normalize=normalize,
            pooling=pooling,
            variant=variant,
            device=device,
            ready=features,
            **about,
        )

    @property
    def features(self) -> Features:
        """The forward pass, an ``nn.Module``; the first asking builds it."""
        with self._building:
            if self.ready is None:
                assert self.build is not None
                with torch.inference_mode(False):  # also at a call: its tensors can be copied and exported later
                    self.ready = self.build().features.to(self.device)
            return self.ready

    @property
    def model(self) -> TimmModel:
        """timm's model, as the forward pass left it."""
        return self.features.model

    def measure(self) -> tuple[int, int, float]:
        """Measure ``cost`` if it is not known."""
        if self.cost is None:
            image = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
            whole = sum(whole_forward_flops(part.model, self.image_size) for part in self.parts or (self,))
            self.cost = count_flops(lambda: self(image)), whole, quickest_ms(lambda: self(image), self.device)
        return self.cost

    @property
    def flops(self) -> int:
        """Of one image through this backbone."""
        return self.measure()[0]

    @property
    def whole_flops(self) -> int:
        """Of one image through the whole timm model."""
        return self.measure()[1]

    @property
    def forward_ms(self) -> float:
        """Of one image through this backbone, on its device."""
        return self.measure()[2]

    def to(self, device: torch.device) -> None:
        """Move the weights; the precision stays."""
        self.device = device
        if self.ready is not None:
            self.ready.to(device)

    def __str__(self) -> str:
        feature = POOLINGS.get(self.pooling, self.pooling)
        return (
            f"{self.name}, {self.feature_dim} features, {self.parameters / 1e6:.1f} M parameters, {self.precision} on "
            f"{self.device}, weights SHA-256 {self.weights_sha256}; a feature is {feature}"
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8 on any device -> ``(images, feature_dim)`` float32 on the backbone's device."""
        features: Tensor = self.features(images.to(self.device, non_blocking=True))
        return features


def load_backbone(config: Config, device: torch.device, cache_dir: Path | None = None) -> Backbone:
    """The ViT that ``config`` names, its weights frozen.

    Below ``cache_dir`` a small record keeps what is known of it: with one, it is built at its first call, if ever.
    """
    precision = resolve_precision(config.precision, device)
    record = None if cache_dir is None else Record(config, device, precision, cache_dir)
    facts = record.read() if record else None
    if record and facts:

        def build() -> Backbone:
            built = build_backbone(config, device, precision)
            if built.weights_sha256 != facts["weights_sha256"]:
                record.path.unlink(missing_ok=True)
                raise BackboneError(
                    f"the weights of {built.name} are others than its features were computed with, though its files "
                    f"look as before (SHA-256 {built.weights_sha256[:12]}…, before {facts['weights_sha256'][:12]}…); "
                    "put the old ones back, or start again to compute features with these"
                )
            return built

        backbone = Backbone(**facts, device=device, build=build)
    else:
        backbone = build_backbone(config, device, precision)
        if record:
            record.write(backbone)
    for level, text in backbone.remarks:
        log.log(level, "%s", text)
    return backbone


def build_backbone(config: Config, device: torch.device, precision: str, adapters: Adapters | None = None) -> Backbone:
    """A new model with its weights, and with ``adapters``, if any."""
    name, model, remarks = load_model(config)
    own, pooling = pooling_of(model), choose_pooling(model, config.pooling, name)
    if pooling != "token":
        has_token = getattr(model, "cls_token", None) is not None and pooling not in ("token+distillation", HEADS_OWN)
        choice = "; pooling=token reads its class token" if has_token else ""
        text = f"{name}: the feature is not a class token but {POOLINGS.get(pooling, pooling)}{choice}"
        remarks.append((logging.WARNING, text))
    if adapters:
        load_adapters(model, adapters)
    return Backbone.of(
        model,
        name=name,
        device=device,
        precision=precision,
        normalize=config.normalize,
        pooling=pooling,
        default_pooling=own,
        image_size=config.image_size,
        remarks=remarks,
        sources=source_files(model, config),
        adapters=adapters,
    )


def _sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Record:
    """What is known of a backbone without building it: a file that counts while nothing changed that it depends on."""

    FACTS = (
        *("name", "weights_sha256", "feature_dim", "parameters", "precision", "normalize", "pooling", "variant"),
        *("image_size", "remarks", "cost"),
    )

    def __init__(self, config: Config, device: torch.device, precision: str, cache_dir: Path) -> None:
        weights = weights_file(config)
        self.key = {
            "backbone_type": config.backbone_name,
            "pretrained": config.pretrained,
            "weights": str(weights.resolve()) if weights else "",
            "image_size": config.image_size,
            "normalize": config.normalize,
            "pooling": config.pooling,
            "precision": precision,
            "numerics": ProductFeatures.numerics,
            "device": device.type,
            "versions": [version("timm"), version("torch")],
        }
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_dir / "backbones" / f"{name}.json"

    def read(self) -> dict[str, Any] | None:
        """The facts; None where there is no record, or its files have changed."""
        try:
            record = json.loads(self.path.read_bytes())
            facts = {name: record["facts"][name] for name in self.FACTS}
            if record["key"] != self.key or record["files"] != _stamps(map(Path, record["files"])):
                return None
            return facts
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, backbone: Backbone) -> None:
        """Measure what ``backbone`` costs, and keep it with the facts; where that cannot be written there is none."""
        with suppress(UserError, OSError):
            backbone.measure()
            facts = {name: getattr(backbone, name) for name in self.FACTS}
            record = {"key": self.key, "files": _stamps(backbone.sources), "facts": facts}
            atomic_write(self.path, json.dumps(record, indent=1).encode(), flush=False)


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    return {str(path): [(found := path.stat()).st_size, found.st_mtime_ns] for path in files}


# -- precision and device ---------------------------------------------------------------------------------------------


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
