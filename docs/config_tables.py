"""What docs/config.md and docs/outputs.md take from the code: ``python -m docs.config_tables`` writes it anew."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from utils.config.config import KEYS
from utils.config.keys import AFFECTS, REQUIRED, UNUSED_KEYS, Key
from utils.config.methods import METHODS
from utils.results.tables import glossary_markdown

PAGE, GLOSSARY_PAGE = (Path(__file__).with_name(name) for name in ("config.md", "outputs.md"))


def updated(page: str) -> str:
    """The page in Markdown with its parts as the declarations have them: each begins behind a comment of its name."""
    methods = [f"Keys of `{m.name}` alone:\n\n{_key_table(m.keys)}" for m in METHODS.values() if m.keys]
    tables = {
        "keys": "\n".join([_key_table(KEYS.values()), *methods]),
        "affects": _affects_table(),
        "glossary": glossary_markdown(),
        "other toolboxes": _table(["key", "what counts here"], ([f"`{k}`", line] for k, line in UNUSED_KEYS.items())),
    }
    for name, table in tables.items():
        page = re.sub(rf"(?s)(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, table=table: f"{m[1]}{table}{m[2]}", page)
    return page


def _key_table(keys: Iterable[Key]) -> str:
    rows = []
    for key in keys:
        default = "required" if key.default is REQUIRED else f"`{json.dumps(key.default)}`"
        allowed = f" ({', '.join(f'`{choice}`' for choice in key.choices)})" if key.choices else ""
        rows.append([f"`{key.name}`", default, key.affects, key.doc + allowed])
    return _table(["key", "default", "affects", "meaning"], rows)


def _affects_table() -> str:
    """What follows from the part of a run that a key affects."""
    rows = []
    for word, meaning in AFFECTS.items():
        key = Key(word, int, 0, "", affects=word)
        facts = (key.changes_the_run, key.changes_the_run, key.shares_the_backbone, key.must_agree)
        rows.append([word, meaning, *("yes" if fact else "no" for fact in facts)])
    head = ["affects", "what that is", "makes another run", "may be swept", "a sweep keeps data and backbone loaded"]
    return _table([*head, "must agree with a continued run"], rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, *rows]).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


if __name__ == "__main__":
    for path in (PAGE, GLOSSARY_PAGE):
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
