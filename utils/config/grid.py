"""``--sweep key=v1,v2 ...`` -> the configs of a grid, all checked before anything starts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.config.config import Config, known_key, load_config
from utils.errors import ConfigError


@dataclass(frozen=True)
class Cell:
    """One combination of the swept values: its name, such as ``flow=tosca_r,l1=0.0005``, and its config."""

    name: str
    config: Config


def make_grid(path: Path, overrides: Sequence[str], sweep: Sequence[str]) -> list[Cell]:
    """Every combination of the swept values on top of a config file and overrides, the last key fastest.

    A cell's files go to a folder of its name below ``log_dir`` and ``checkpoint_dir``.

    Raises:
        ConfigError: one line that names the key, the value and what is allowed.
    """
    load_config(path, overrides)  # a fault that is not the sweep's is told as always
    swept = [_values(text) for text in sweep]
    keys = [key for key, _ in swept]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--sweep names {twice[0]!r} twice; give all its values in one key=v1,v2")
    if both := [key for key in keys if key in {override.partition("=")[0] for override in overrides}]:
        raise ConfigError(f"{both[0]!r} is both swept and overridden; keep one")
    cells: dict[str, Cell] = {}
    for values in itertools.product(*(values for _, values in swept)):
        config = load_config(path, [*overrides, *(f"{k}={v}" for k, v in zip(keys, values, strict=True))])
        name = ",".join(f"{key}={_shown(config.as_dict()[key])}" for key in keys)
        if name in cells:
            raise ConfigError(f"--sweep gives {name} twice")
        log_dir, checkpoint_dir = (str(Path(folder) / name) for folder in (config.log_dir, config.checkpoint_dir))
        cells[name] = Cell(name, replace(config, log_dir=log_dir, checkpoint_dir=checkpoint_dir))
    return list(cells.values())


def _values(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise ConfigError(f"--sweep {text!r} is not key=v1,v2, for example flow=tosca,tosca_r")
    known = known_key(key)
    if known is not None and known.is_list:
        raise ConfigError(f"--sweep {key!r}: {key} is a list, whose commas part its items; give {text} as an override")
    if known is not None and not known.changes_the_run:
        raise ConfigError(f"--sweep {key!r}: {key} does not change what a run computes; set it with {key}=<value>")
    return key, values.split(",")


def _shown(value: Any) -> str:
    """One spelling for equal values (0, 0.0), fit for a folder's name."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return "".join("_" if c in '/\\:*?"<>|' else c for c in str(value))
