"""Which timm model a name means, and building it: from its name, the model hub or the repository's own small ViT."""

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backbone.forward import TimmModel
from utils.errors import BackboneError
from utils.seeds import fixed_seed

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


# What a pooling of timm reads, in words.
POOLINGS = {
    "token": "the class token",
    "token+distillation": "the mean of class and distillation token",
    "avg": "the mean of all patch tokens",
    "avgmax": "mean and maximum of all patch tokens",
    "max": "the maximum of all patch tokens",
    "map": "attention pooling over all patch tokens",
    "prr": "attention pooling over all tokens",
}


def resolve_name(given: str) -> str:
    """The name to build: ``timm/NAME`` and ``hf-hub:timm/NAME`` are timm's own ``NAME``; other hub names stay.

    Raises:
        BackboneError: no timm model has this name; names that are near are listed.
    """
    name = given.replace("hf_hub:", "hf-hub:", 1)
    own = name.removeprefix("hf-hub:").removeprefix("timm/")
    if own in BUNDLED or (own != name and timm.is_model(own.partition(".")[0])):
        return own
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name.partition(".")[0]):
        return name
    near = timm.list_models(f"*{own.partition('.')[0][:8]}*")[:5] if own else []
    raise BackboneError(
        f"backbone_type {given!r} is not a timm model"
        + (f"; timm has for example {', '.join(near)}" if near else "; timm.list_models('vit*') lists the names")
        + ("; a model of another user of the hub is hf-hub:<user>/<name>" if "/" in given else "")
    )


def create_model(name: str, image_size: int, pretrained: bool = False, *, drawn: bool = True) -> TimmModel:
    """Build the timm model ``name`` without its classification head.

    Args:
        name: of the model, resolved.
        image_size: side of its images in pixels.
        pretrained: fetch the weights that timm names.
        drawn: let weights begin with random numbers; else they are zeros, for others that are loaded over them.

    Raises:
        BackboneError: weights that cannot be had, or an image size that does not fit.
    """
    build = BUNDLED[name]["build"] if name in BUNDLED else {"model_name": name}
    # a random ViT (pretrained: false) is the same one in every run
    beginning = nullcontext() if drawn and not pretrained else _Undrawn()  # type: ignore[no-untyped-call]
    with fixed_seed(0), beginning, _quiet(), _short_of_the_hub(name, pretrained):
        try:
            model = _build({**build, "pretrained": pretrained, "num_classes": 0}, image_size)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if name.startswith("hf-hub:") or (pretrained and not name.startswith("local-dir:")):
                raise BackboneError(
                    f"the weights of {name!r} cannot be had from the model hub ({type(error).__name__}: {first}). "
                    "Two ways out: run once on a machine with internet and copy its hub cache here (HF_HOME), or "
                    "download the weights and set backbone_weights=<file>.pth, .safetensors or .npz"
                ) from error
            if name.startswith("local-dir:"):
                raise BackboneError(f"backbone_type {name!r} cannot be loaded ({first})") from error
            raise BackboneError(f"{name!r} cannot be built for image_size {image_size}: {first}") from error
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and min(grid) < 1:
        raise BackboneError(f"image_size {image_size} is smaller than one patch of {name!r}")
    return model


class _Undrawn(TorchDispatchMode):
    """Zeros in place of random numbers: to draw those of a ViT-B/16 takes a second at each start."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0].zero_()
        if func is torch.ops.aten.erfinv_.default:  # of 0 it is 0; truncated normal numbers come by way of it
            return args[0]
        return func(*args, **(kwargs or {}))


def _build(options: dict[str, Any], image_size: int) -> TimmModel:
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


@contextmanager
def _short_of_the_hub(name: str, pretrained: bool) -> Iterator[None]:
    """Let the hub's client look into its cache alone where the hub does not answer: its own retries take a minute."""
    from huggingface_hub import constants

    local = name in BUNDLED or name.startswith("local-dir:") or not (pretrained or name.startswith("hf-hub:"))
    if local or constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(endpoint: str) -> bool:
    """Whether a connection to ``endpoint``, or to the proxy on the way to it, opens within ``HUB_SECONDS``."""
    target = urlsplit(endpoint)
    proxy = getproxies().get(target.scheme)
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        address = (target.hostname or "", target.port or (80 if target.scheme == "http" else 443))
        socket.create_connection(address, timeout=HUB_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def choose_pooling(model: TimmModel, pooling: str, name: str) -> str:
    """Let ``model`` read what the key ``pooling`` says; return the name of what it reads.

    Raises:
        BackboneError: the class token is asked for where there is none, or the model cannot be read in that way.
    """
    own = pooling_of(model)
    if pooling in ("auto", own):
        return own
    if pooling == "token" and getattr(model, "cls_token", None) is None:
        raise BackboneError(f"pooling 'token': {name} has no class token; pooling=auto reads {POOLINGS.get(own, own)}")
    if own not in POOLINGS or own == "token+distillation":
        raise BackboneError(f"pooling {pooling!r}: {name} can only be read as its own head does; set pooling=auto")
    try:
        model.reset_classifier(0, global_pool=pooling)
    except (AssertionError, TypeError, NotImplementedError) as error:
        raise BackboneError(f"pooling {pooling!r} does not fit {name} ({error}); set pooling=auto") from error
    return pooling


def pooling_of(model: TimmModel) -> str:
    """What timm's head reads, as timm names it; of other architectures, ``timm's head``."""
    pooling = getattr(model, "global_pool", None)
    if not isinstance(pooling, str) or not pooling:
        return "timm's head"
    return "token+distillation" if pooling == "token" and getattr(model, "dist_token", None) is not None else pooling
