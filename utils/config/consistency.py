"""What the values of a config must fulfil beyond the type and the range of each."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.keys import shown
from utils.errors import ConfigError

if TYPE_CHECKING:
    from utils.config.config import Config


def check_together(config: "Config") -> None:
    """Check names, paths and lists.

    Raises:
        ConfigError: one line that names the key, what was found and what is allowed.
    """
    if "/" in config.prefix or "\\" in config.prefix:
        raise ConfigError(f"prefix must not contain a path separator, got {config.prefix!r}; log_dir sets the folder")
    for name in ("data_path", "backbone_weights", "cache_dir", "checkpoint_dir", "log_dir", "continue_from"):
        _check_path(name, getattr(config, name))
    for name in ("device", "seed"):
        values = getattr(config, name)
        if not values:
            raise ConfigError(f"{name} must not be empty")
        if len(set(values)) < len(values):
            raise ConfigError(f"{name} {list(values)} repeats a value; give each once")
    for seed in (*config.seed, *([config.augment_seed] if config.augment_seed is not None else [])):
        if seed >= 2**32:
            raise ConfigError(f"seed must be below 2**32, got {seed}")
    for device in config.device:
        if not re.fullmatch(r"-1|cpu|\d{1,4}", device):
            raise ConfigError(f'device must be "-1", "cpu" or the number of an accelerator such as "0", got {device!r}')
    if config.scenario == "domain" and config.dataset != "imagefolder":
        raise ConfigError(f'scenario "domain" needs dataset "imagefolder", got {config.dataset!r}')
    if not config.backbone_type:
        raise ConfigError("backbone_type must name a timm model, got ''")


def _check_path(name: str, value: str | None) -> None:
    if value == "":
        raise ConfigError(f"{name} must name a {'file' if name == 'backbone_weights' else 'folder'}, got ''")
    try:
        Path(value or "").expanduser()
    except RuntimeError:
        raise ConfigError(f"{name}: the home folder at the start of {shown(value)} is not known") from None
