"""Weights from a local file, in whatever form people keep them: the content decides, never the suffix."""

import argparse
import logging
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.forward import TimmModel
from utils.errors import BackboneError
from utils.words import counted

State = dict[str, Tensor]
Remarks = list[tuple[int, str]]  # a level of logging and a line: what a user should know of weights that are loaded

# Where training scripts put the weights in what they save. Of two that fit equally well one that is named here is
# taken, the first: an average over training steps before the last step, and a teacher before its student.
CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema", "teacher", "target_encoder"),
    *("state_dict", "model", "model_state", "model_state_dict", "module", "network", "net", "encoder", "backbone"),
    *("weights", "params"),
)
HEADS = ("head.", "head_dist.", "fc.", "pre_logits.", "classifier.")  # parts that a feature extractor does not have
_OF_CLIP = {"visual.conv1.weight": "patch_embed.proj.weight", "visual.positional_embedding": "pos_embed"}
_NO_WEIGHTS = {  # how files begin that are no weights, in lower case
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run git lfs pull where it comes from",
    b"<!doctype": "a web page, not the file that it shows: download that",
    b"<html": "a web page, not the file that it shows: download that",
}
DEPTH = 3  # dictionaries within dictionaries that are looked through
SHOWN = 8  # keys that a message names


def load_weights(model: TimmModel, path: Path, remarks: Remarks) -> None:
    """Load a file into ``model``; the position grid is resized where the image size differs.

    A PyTorch file, a safetensors file or an archive of NumPy arrays as Google publishes ViTs. Weights in a nested
    dictionary, and under a common prefix such as ``backbone.`` or ``module.``, are found; where, is one of ``remarks``.
    """
    if not os.path.isfile(path):
        raise BackboneError(f"backbone_weights {str(path)!r} is not a file, or not one that may be read")
    try:
        if _is_numpy(path):
            _remark_shapes(model, _shapes_of_numpy(path), path, remarks)
            model.load_pretrained(str(path))  # raises where something is missing
            return
        content = _read(path)
    except BackboneError:
        raise
    except KeyError as error:  # an .npz without an array that the model needs
        raise BackboneError(f"backbone_weights {str(path)!r}: key {error} is missing") from error
    except Exception as error:
        raise _unreadable(path, error) from error
    prefix, state = find_state(content, set(model.state_dict()))
    if prefix:
        remarks.append((logging.INFO, f"backbone_weights {path}: the weights lie under {prefix!r}"))
    _remark_shapes(model, {key: tuple(value.shape) for key, value in state.items()}, path, remarks)
    _load(model, state, path, remarks)


def _remark_shapes(model: TimmModel, shapes: Mapping[str, tuple[int, ...]], path: Path, remarks: Remarks) -> None:
    """Say what timm adapts to ``model``; refuse patches of another size, which it would resample too."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    adapted = []
    for key, shape in shapes.items():
        name = _OF_CLIP.get(key, key)
        if name not in own:
            if name.startswith(HEADS) and len(shape) == 2:
                adapted.append(f"the classifier of {shape[0]} outputs is left out")
            continue
        if name == "patch_embed.proj.weight" and len(shape) == 4 and shape[2:] != own[name][2:]:
            theirs, ours = (" x ".join(map(str, sides[2:])) for sides in (shape, own[name]))
            raise BackboneError(
                f"backbone_weights {str(path)!r} has patches of {theirs} pixels, backbone_type has patches of {ours}: "
                "name the model that the weights belong to"
            )
        if [n for n in shape if n > 1] != [n for n in own[name] if n > 1]:
            adapted.append(f"{key} from {shape} to {own[name]}")
    if adapted:
        remarks.append((logging.INFO, f"backbone_weights {path}: adapted to the model: {'; '.join(adapted[:SHOWN])}"))


def _shapes_of_numpy(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of kernel and positions in an archive, under timm's names and as PyTorch has them."""
    import numpy as np

    shapes: dict[str, tuple[int, ...]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive:
            if name.endswith("embedding/kernel") and len(shape := archive[name].shape) == 4:
                shapes["patch_embed.proj.weight"] = (*shape[:1:-1], *shape[:2])
            elif name.endswith("pos_embedding"):
                shapes["pos_embed"] = archive[name].shape
    return shapes


def _load(model: TimmModel, state: State, path: Path, remarks: Remarks) -> None:
    # each architecture of timm keeps the filter that its own downloads pass in its module, under this name
    filter_fn: Callable[..., Any] | None = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = set(model.state_dict())
    try:
        fitted = filter_fn(dict(state), model) if filter_fn else state
        result = model.load_state_dict(fitted, strict=False)
    except Exception as error:
        raise _unreadable(path, error) from error
    name = type(model).__name__
    if len(result.missing_keys) == len(own):
        raise BackboneError(
            f"backbone_weights {str(path)!r} holds nothing for {name}: looked for {len(own)} keys such as "
            f"{_some(own, 3)}, also under prefixes and in dictionaries; there are {len(state)}, such as "
            f"{_some(state, 3)}"
        )
    if result.missing_keys:
        raise BackboneError(
            f"backbone_weights {str(path)!r} lacks {counted(len(result.missing_keys), 'key')} of {name}: "
            f"{', '.join(result.missing_keys[:SHOWN])}; it belongs to another architecture: it has {len(state)} keys "
            f"such as {_some(state, 3)}"
        )
    if extra := [key for key in result.unexpected_keys if not key.startswith(HEADS)]:
        text = f"backbone_weights {path}: {counted(len(extra), 'key')} not used: {', '.join(extra[:SHOWN])}"
        remarks.append((logging.WARNING, text))


def find_state(content: Mapping[str, Any], wanted: set[str]) -> tuple[str, State]:
    """The prefix in ``content`` under which most of the ``wanted`` keys lie, and the tensors there without it.

    A dictionary within a dictionary counts as a prefix: weights may lie under ``teacher.module.backbone.``.
    """
    tensors = dict(_flattened(content))
    fits = Counter({"": 0})
    for key in tensors:
        ends = [0, *(match.end() for match in re.finditer(r"\.", key))]
        fits.update(key[:end] for end in ends if key[end:] in wanted)
    rank = {"": -1, **{name: place for place, name in enumerate(CONTAINERS)}}

    def order(prefix: str) -> tuple[int, int, int]:
        return -fits[prefix], rank.get(prefix.partition(".")[0], len(rank)), len(prefix)

    best = min(fits, key=order)
    return best, {key[len(best) :]: value for key, value in tensors.items() if key.startswith(best)}


def _flattened(content: Mapping[Any, Any], above: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{above}{key}", value
        elif isinstance(value, Mapping) and depth:
            yield from _flattened(value, f"{above}{key}.", depth - 1)


def _is_numpy(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".npy") for name in archive.namelist())


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a safetensors or PyTorch file. Nothing in it is executed."""
    with open(path, "rb") as file:
        start = file.read(64)
    for beginning, what in _NO_WEIGHTS.items():
        if start.lstrip().lower().startswith(beginning):
            raise BackboneError(f"backbone_weights {str(path)!r} is {what}")
    # of a safetensors file: the length of its header, and the header's first character
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        import safetensors.torch

        return dict(safetensors.torch.load_file(path))
    # torch.load would go by the suffix of a path; and many scripts save their arguments beside the weights
    with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise BackboneError(
            f"backbone_weights {str(path)!r} does not fit: looked for a dictionary of tensors, found "
            f"{type(content).__name__}; save model.state_dict()"
        )
    return {str(key): value for key, value in content.items()}


def _unreadable(path: Path, error: Exception) -> BackboneError:
    """The cause in one line, without the advice that PyTorch gives to whoever calls it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = (text.partition("WeightsUnpickler error:")[2] or text).partition("Check the documentation")[0]
    if foreign := re.search(r"GLOBAL (\S+)", text):
        return BackboneError(
            f"backbone_weights {str(path)!r} holds objects of {foreign[1]}, which would run code: in the program that "
            "made it, save model.state_dict() alone"
        )
    reason = " ".join(text.split())[:600] or type(error).__name__
    return BackboneError(
        f"backbone_weights {str(path)!r} does not fit or cannot be read: {reason}; "
        "give a .pth, .safetensors or .npz file that timm's model of this name can load"
    )


def _some(keys: Any, count: int) -> str:
    return ", ".join(sorted(keys)[:count]) or "none"
