"""Tables of keys and methods for the documentation and ``--help``, made from the declarations."""

import json
from collections.abc import Iterable

from utils.config.config import KEYS
from utils.config.foreign import UNUSED_KEYS
from utils.config.keys import AFFECTS, Key
from utils.config.methods import METHODS


def key_tables() -> str:
    """Return the tables of keys in Markdown: the shared ones, then those of each method that has some."""
    parts = [_key_table(KEYS.values())]
    for method in METHODS.values():
        if method.keys:
            parts.append(f"Keys of `{method.name}` alone:\n\n{_key_table(method.keys)}")
    return "\n".join(parts)


def _key_table(keys: Iterable[Key]) -> str:
    rows = ["| key | default | touches | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = "required" if key.required else f"`{_as_json(key)}`"
        allowed = f" ({', '.join(f'`{choice}`' for choice in key.choices)})" if key.choices else ""
        rows.append(f"| `{key.name}` | {default} | {key.affects} | {key.doc}{allowed} |")
    return "\n".join(rows) + "\n"


def affects_table() -> str:
    """Return what follows from the part of a run that a key touches, in Markdown."""
    rows = [
        "| touches | what that is | makes another run | may be swept | a sweep keeps data and backbone loaded "
        "| must agree with a continued run |",
        "|---|---|---|---|---|---|",
    ]
    for word, meaning in AFFECTS.items():
        key = Key(word, int, 0, "", affects=word)
        facts = (key.changes_the_run, key.changes_the_run, key.shares_the_backbone, key.must_agree)
        rows.append(f"| {word} | {meaning} | {' | '.join('yes' if fact else 'no' for fact in facts)} |")
    return "\n".join(rows) + "\n"


def unused_keys_table() -> str:
    """Return the foreign keys that are accepted without effect, in Markdown."""
    rows = ["| key | what counts here |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {line} |" for name, line in UNUSED_KEYS.items())]) + "\n"


def _as_json(key: Key) -> str:
    return json.dumps(key.default, ensure_ascii=False)


def methods_help() -> str:
    """Return the methods and their own keys, a line each, for ``--help``."""
    width = max(len(name) for name in METHODS)
    lines = ["methods (model_name=...):"]
    for method in METHODS.values():
        lines.append(f"  {method.name:{width}}  {method.doc}")
        lines += [f"  {'':{width}}  {key.name}={_as_json(key)}: {key.doc}" for key in method.keys]
    return "\n".join(lines)
