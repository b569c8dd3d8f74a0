"""Configuration, data, tasks, the feature bank, metrics, checkpoints and reports."""

import functools
import importlib
from typing import Any


@functools.cache
def module(name: str) -> Any:
    """One of our own modules that is loaded late; the first call imports it, later ones need no import system."""
    return importlib.import_module(name)
