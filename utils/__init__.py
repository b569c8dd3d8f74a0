"""Configuration, data, tasks, the feature bank, metrics, checkpoints and reports."""

import functools
import importlib
from typing import Any


@functools.cache
def module(name: str) -> Any:
    """One of our own modules that only some need, imported when it is first asked for.

    Where this project is loaded beside another one (hubconf.py), names lead to our modules for a while only: what is
    asked for within is what is answered later.
    """
    return importlib.import_module(name)
