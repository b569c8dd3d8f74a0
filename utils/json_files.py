"""JSON files of people: read strictly, with errors that say where the fault is."""

import json
from pathlib import Path
from typing import Any

from utils.errors import ConfigError
from utils.files import open_regular


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary; for ``object_pairs_hook``.

    Raises:
        ConfigError: a key stands twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in {name for name, _ in pairs[:i]})
        raise ConfigError(f"key {twice!r} stands twice")
    return values


def read_json(path: Path, kind: str = "a config", hint: str = "give --config=<file>.json, see exps/") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file, or a pipe such as a shell's ``<(command)``.
        kind: what the file should be, for messages.
        hint: what to do if it cannot be read.

    Raises:
        ConfigError: not readable, not JSON (line and column are named), not an object, or a key given twice.
    """
    try:
        with open_regular(path, pipes=True) as file:
            values = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; this is not JSON") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; {kind} is a JSON text file") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for {kind}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {hint}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; keep one") from None
    except ValueError as error:  # a number with more digits than Python converts
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {kind} is one JSON object {{...}}, got {type(values).__name__}")
    return values
