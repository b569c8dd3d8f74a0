"""What makes two runs the same run, and the versions of what computes them."""

import platform
from typing import Any

import numpy as np

from utils.config.config import Config


def run_identity(
    config: Config, seed: int, *, weights_sha256: str, precision: str, images_sha256: dict[str, str]
) -> dict[str, Any]:
    """What makes two runs the same run: every key that changes what is computed, or what was found behind it.

    Where a key only names something (weights, images) or leaves it open (``precision: auto``), what was found stands
    here: the same weights under another name make the same run.
    """
    values = config.as_dict()
    settings = {n: values[n] for n, key in config.keys.items() if key.changes_the_run and key.recorded_as is None}
    return {
        **settings,
        "views": config.views,
        "augment_seed": config.view_seed(seed) if config.views else None,
        "precision": precision,
        "seed": seed,
        "weights_sha256": weights_sha256,
        "images_sha256": images_sha256,
    }


def fixed_once_saved(config: Config) -> list[str]:
    """The entries of a run's identity in which a run that continues a saved one must agree with it.

    Modules and classifier were made for them; the rest (epochs, rate, views …) a new task may choose for itself.
    """
    return list(dict.fromkeys(key.identity_name for key in config.keys.values() if key.must_agree))


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers."""
    import PIL
    import timm
    import torch
    import torchvision

    return {
        "python": platform.python_version(),
        **{m.__name__.lower(): m.__version__ for m in (torch, torchvision, timm, np)},
        "pillow": PIL.__version__,
    }
