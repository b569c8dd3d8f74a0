"""Config files and ``--sweep key=v1,v2 ...`` -> the configs of a grid, all checked before anything starts."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils.config.config import Config, known_key, load_config
from utils.errors import ConfigError


@dataclass(frozen=True)
class SweepCell:
    """A file under one combination of the swept values: its name, such as ``tosca_cub/flow=tosca``, and its config."""

    name: str
    config: Config


def make_grid(paths: Sequence[Path], overrides: Sequence[str], sweep: Sequence[str]) -> list[SweepCell]:
    """Every combination of the swept values on top of each config file and the overrides, the last key fastest.

    A cell's files go to a folder of its name below ``log_dir`` and ``checkpoint_dir``; of equal cells there is one.
    What stands behind ``--sweep`` and cannot be swept, such as ``seed=1,2``, is an override; if there is one file and
    nothing is swept, the one cell has no name.
    """
    overrides, swept = list(overrides), dict[str, list[str]]()
    for text in sweep:
        key, equals, values = text.partition("=")
        known = known_key(key)
        if not equals or not all(values.split(",")):
            raise ConfigError(f"--sweep {text!r} is not key=v1,v2, for example flow=tosca,tosca_r")
        if known and (known.is_list or not (known.changes_the_run or "," in values)):
            overrides.append(text)
        elif known and not known.changes_the_run:
            raise ConfigError(f"--sweep {key!r}: {key} does not change what a run computes; set it with {key}=<value>")
        else:
            swept.setdefault(key, []).extend(values.split(","))
    files = list(dict.fromkeys(paths))
    if len({path.stem for path in files}) < len(files):
        raise ConfigError("--config: files of the same name would write to one folder; rename one of them")
    cells: dict[str, SweepCell] = {}
    combinations = itertools.product(*([f"{key}={value}" for value in values] for key, values in swept.items()))
    for path, chosen in itertools.product(files, combinations):
        config = load_config(path, [*overrides, *chosen])
        shown = (f"{key}={str(config.as_dict()[key]).removesuffix('.0')}" for key in swept)  # 0 and 0.0 are one cell
        parts = [path.stem] if len(files) > 1 else []
        parts += [re.sub(r'[/\\:*?"<>|]', "_", ",".join(shown))] if swept else []
        log_dir, checkpoint_dir = (str(Path(folder, *parts)) for folder in (config.log_dir, config.checkpoint_dir))
        name = "/".join(parts)
        cells[name] = SweepCell(name, replace(config, log_dir=log_dir, checkpoint_dir=checkpoint_dir))
    return list(cells.values())
