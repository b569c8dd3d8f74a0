"""Which timm model a name means, and building it: from its name, the model hub or this repository's own small ViT."""

import logging
import warnings
from pathlib import Path
from typing import Any

from backbone.forward import TimmModel
from backbone.weights import Remarks, load_weights
from utils.config.config import Config
from utils.errors import BackboneError
from utils.files import expanded
from utils.seeds import fixed_seed, modes_of_a_run

# The small ViT that ships with the repository, for a first run without a model hub (assets/README.md).
_BUNDLED = {"glyphs_vit": Path(__file__).resolve().parent.parent / "assets" / "glyphs_vit.safetensors"}
_BUILDS = {
    "glyphs_vit": {
        "model_name": "vit_tiny_patch16_224",
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
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
HEADS_OWN = "timm's head"  # of architectures that pool in their own way


def load_model(config: Config) -> tuple[str, TimmModel, Remarks]:
    """Build the ViT that ``config`` names, load its weights, freeze it; return its resolved name with it."""
    name, remarks = resolve_name(config.backbone_name), Remarks()
    path = weights_file(config)
    if path is not None:
        model = create_model(name, config.image_size)
        load_weights(model, path, remarks)
    elif config.pretrained:
        name = with_tag(name)
        model = create_model(name, config.image_size, pretrained=True)
        _remark_training(model, name, config, remarks)
    else:
        model = create_model(name, config.image_size)
    if not hasattr(model, "forward_head"):
        raise BackboneError(f"backbone_type {config.backbone_type!r} has no forward_head(); choose a timm ViT")
    return name, model.eval().requires_grad_(False), remarks


# -- names ------------------------------------------------------------------------------------------------------------


def _without_timm(name: str) -> str:
    """``timm/NAME`` and ``hf-hub:timm/NAME`` are timm's own ``NAME``."""
    return name.replace("hf_hub:", "hf-hub:", 1).removeprefix("hf-hub:").removeprefix("timm/")


def weights_file(config: Config) -> Path | None:
    """The local file that the weights come from, if any: that of the config, or the one that ships with the project."""
    if config.backbone_weights:
        return expanded(config.backbone_weights)
    return _BUNDLED.get(_without_timm(config.backbone_name)) if config.pretrained else None


def resolve_name(given: str) -> str:
    """The name to build: timm's own where there is one; names of other users of the hub stay."""
    import timm

    name, own = given.replace("hf_hub:", "hf-hub:", 1), _without_timm(given)
    if own in _BUNDLED or (own != name and timm.is_model(own.partition(".")[0])):
        return own
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name.partition(".")[0]):
        return name
    near = timm.list_models(f"*{own.partition('.')[0][:8]}*")[:5] if own else []
    raise BackboneError(
        f"backbone_type {given!r} is not a timm model"
        + (f"; timm has for example {', '.join(near)}" if near else "; timm.list_models('vit*') lists the names")
        + ("; a model of another user of the hub is hf-hub:<user>/<name>" if "/" in given else "")
    )


def with_tag(name: str) -> str:
    """``name`` with the pre-training tag that timm takes where none is given: which weights those are, in words."""
    import timm

    cfg = None if "." in name else timm.models.get_pretrained_cfg(name)
    return f"{name}.{cfg.tag}" if cfg is not None and cfg.tag else name


def source_files(model: TimmModel, config: Config) -> list[Path]:
    """The files whose change would mean other weights: a local file, a local folder's, or the hub cache's commit."""
    if (path := weights_file(config)) is not None:
        return [path.resolve()]
    if config.backbone_name.startswith("local-dir:"):
        return sorted(path.resolve() for path in Path(config.backbone_name[10:]).iterdir() if path.is_file())
    commit = _hub_cache(str(model.pretrained_cfg.get("hf_hub_id") or "")) / "refs" / "main"
    return [commit] if config.pretrained and commit.is_file() else []


def _hub_cache(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.partition('@')[0].replace('/', '--')}"


# -- building ---------------------------------------------------------------------------------------------------------


def create_model(name: str, image_size: int, pretrained: bool = False) -> TimmModel:
    """Build the timm model ``name``, resolved, without its classification head, for images of ``image_size`` pixels.

    Args:
        pretrained: fetch the weights that timm names; else they are random, the same in every run.
    """
    build = {**_BUILDS.get(name, {"model_name": name}), "pretrained": pretrained, "num_classes": 0}
    try:
        with modes_of_a_run(), fixed_seed(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _build(build, image_size)
    except Exception as error:
        raise _cannot_build(name, image_size, pretrained, error) from error
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and min(grid) < 1:
        raise BackboneError(f"image_size {image_size} is smaller than one patch of {name!r}")
    return model


def _build(options: dict[str, Any], image_size: int) -> TimmModel:
    import timm

    try:
        return timm.create_model(**options, img_size=image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(**options)  # takes any size


def _cannot_build(name: str, image_size: int, pretrained: bool, error: Exception) -> BackboneError:
    """What a user is told: the reason that the hub's client or timm gave, and what helps against that."""
    reason, kinds = _reason_of(error), {kind.__name__ for kind in type(error).__mro__}
    repository = name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else f"timm/{name}"
    if name.startswith("local-dir:"):
        return BackboneError(f"backbone_type {name!r} cannot be loaded ({reason})")
    if kinds & {"GatedRepoError", "RepositoryNotFoundError"}:
        return BackboneError(
            f"the model hub does not give {repository} to this account: see that the name is right, ask for access on "
            f"https://huggingface.co/{repository} where it is gated or private, and log in with: hf auth login"
        )
    if kinds & {"SafetensorError", "UnpicklingError", "EOFError"} or "PytorchStreamReader" in reason:
        return BackboneError(
            f"the file of {name!r} in the hub's cache is damaged or was not downloaded to its end ({reason}): delete "
            f"{_hub_cache(repository)} and start again, which fetches it anew"
        )
    of_hub = "OSError" in kinds or type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2")
    if of_hub and (pretrained or name.startswith("hf-hub:")):
        return BackboneError(
            f"the weights of {name!r} cannot be had from the model hub ({type(error).__name__}: {reason}). "
            "Two ways out: run once on a machine with internet and copy its hub cache here (HF_HOME), or "
            "download the weights and set backbone_weights=<file>.pth, .safetensors or .npz"
        )
    return BackboneError(f"{name!r} cannot be built for image_size {image_size}: {reason}")


def _reason_of(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _remark_training(model: TimmModel, name: str, config: Config, remarks: Remarks) -> None:
    """Say where the weights' own configuration names other pixels or another size than this run has."""
    cfg = model.pretrained_cfg
    mean, std = tuple(cfg.get("mean") or (0.0,)), tuple(cfg.get("std") or (1.0,))
    if not config.normalize and (any(mean) or any(value != 1 for value in std)):
        trained = f"{name} was trained on pixels with mean {mean} and std {std}"
        remarks.append((logging.INFO, f"{trained}; normalize=true gives it those"))
    size = tuple(cfg.get("input_size") or ())[-1:]
    if getattr(model, "pos_embed", None) is not None and size not in ((), (config.image_size,)):
        text = f"{name} was trained at {size[0]} px: timm resampled its positions to image_size {config.image_size}"
        remarks.append((logging.INFO, text))


# -- what is read -----------------------------------------------------------------------------------------------------


def choose_pooling(model: TimmModel, pooling: str, name: str) -> str:
    """Let ``model`` read what the key ``pooling`` says; return the name of what it reads."""
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
    """What timm's head reads, as timm names it; of other architectures, ``HEADS_OWN``."""
    pooling = getattr(model, "global_pool", None)
    if not isinstance(pooling, str) or not pooling:
        return HEADS_OWN
    return "token+distillation" if pooling == "token" and getattr(model, "dist_token", None) is not None else pooling
