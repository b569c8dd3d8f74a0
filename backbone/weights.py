"""Weights from a local file, in whatever form people keep them."""

import logging
import sys
from pathlib import Path

import timm
from torch import nn

from utils.errors import BackboneError

log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path) -> None:
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
