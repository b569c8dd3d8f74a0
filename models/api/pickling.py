"""Objects that travel to other processes, also where our modules have no names: loaded through ``torch.hub``."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def maker(by_name: Callable[..., Any], entry: str) -> Callable[..., Any]:
    """What unpickling calls: ``by_name``, or ``entry`` of hubconf.py, which calls it, if pickle cannot import that."""
    if (here := sys.modules.get(__name__)) is not None and vars(here) is globals():
        return by_name
    return functools.partial(torch.hub.load, str(Path(__file__).resolve().parents[2]), entry, source="local")
