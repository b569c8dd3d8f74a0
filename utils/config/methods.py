"""What the methods, flows and data sets of this project declare about themselves, read without importing them.

A learner's file in ``models/`` says ``METHOD = Method(...)`` below its imports. Its declaration is read from the source
text, so that a mistake in a config is answered, and ``--help`` printed, before PyTorch loads.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.config.keys import Key

__all__ = ["Key"]  # for the files of models/, beside what is defined here

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Selection:
    """A way to choose the module that answers.

    Attributes:
        name: in configs, JSON and tables.
        title: as log lines, tables and pictures show it.
        definition: one sentence without a full stop, for the glossary.
        ordered: whether the answers depend on the order of the test set; they are then also given for a shuffled one.
    """

    name: str
    title: str
    definition: str
    ordered: bool = False


@dataclass(frozen=True)
class Method:
    """What a learner's file declares.

    Attributes:
        name: the ``model_name`` of configs.
        doc: one line for ``--help`` and the documentation.
        keys: config keys of its own, which the learner reads as ``config.own["key"]``.
        selections: how it may choose the module that answers; a name refers to what another method declares.
        continual: False: it sees the images of earlier tasks again, so its numbers are an upper bound.
        exemplars: whether it keeps training images or their features; tables say so.
        views: ``test``: it trains on the test transform; ``augmented``: on the augmented views.
        modular: whether it saves a module for each task.
        reads: which of the shared keys it reads, by what they affect: ``training``, ``module``.
        fixed: shared keys that it does not leave open, with their value; a config gives this value or none.
        plain_too: whether it reads the plain feature beside that of the backbone with adapters.
        module: the import path of its file; no declaration says it.
    """

    name: str
    doc: str
    keys: tuple[Key, ...] = ()
    selections: tuple[Selection | str, ...] = ("sample",)
    continual: bool = True
    exemplars: bool = False
    views: str = "test"
    modular: bool = False
    reads: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    plain_too: bool = False
    module: str = ""

    @property
    def augmented(self) -> bool:
        return self.views == "augmented"

    def ignores(self, key: Key) -> bool:
        """Whether a shared key means nothing to this method: runs that differ in it alone are equal."""
        if key.affects == "views":
            return not self.augmented
        if key.name in dict(self.fixed):
            return True
        return key.affects in ("training", "module") and key.affects not in self.reads


# -- reading declarations ---------------------------------------------------------------------------------------------


def read_methods(folder: Path) -> tuple[dict[str, Method], dict[str, str]]:
    """Read what the files of a folder declare.

    Returns:
        The methods by name: first those with modules, then the continual ones. And what is wrong with the declarations
        of other files, by the name of the file: one that cannot be read takes no other with it.
    """
    found: dict[str, Method] = {}
    wrong: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        try:
            if (method := read_method(path)) and found.setdefault(method.name, method) is not method:
                raise ValueError(f"{found[method.name].module} declares the method {method.name!r}, too")
        except Exception as error:  # whatever may stand in a file
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            wrong[path.stem] = (
                f"{path}: its METHOD, which is read without importing the file, is not made of literals ({reason})"
            )
    return dict(sorted(found.items(), key=lambda item: (not item[1].modular, not item[1].continual, item[0]))), wrong


def read_method(path: Path) -> Method | None:
    """The ``METHOD`` that a file declares, or None. Evaluating it runs no more than importing the file would."""
    node = _assigned(path, "METHOD")
    if node is None:
        return None
    names = {kind.__name__: kind for kind in (Method, Key, Selection, bool, int, float, str, tuple)}
    method: Method = eval(
        compile(ast.Expression(node), f"<METHOD of {path.name}>", "eval"), {"__builtins__": {}, **names}
    )
    return replace(method, module=f"{path.parent.name}.{path.stem}")


def read_names(path: Path, variable: str) -> tuple[str, ...]:
    """The keys of a dictionary of plain texts that a file defines at its top level, without importing the file."""
    node = _assigned(path, variable)
    assert isinstance(node, ast.Dict), f"{path}: no dictionary {variable} = {{...}} at the top level"
    return tuple(ast.literal_eval(key) for key in node.keys if key)


def _assigned(path: Path, variable: str) -> ast.expr | None:
    """The expression that a file assigns to ``variable`` at its top level."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text, str(path)).body if variable in text else ():  # parsing takes most of the time
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if variable in [getattr(target, "id", None) for target in targets]:
            return getattr(node, "value", None)
    return None


METHODS: Mapping[str, Method]
WRONG_METHODS: Mapping[str, str]  # what is wrong with a file of models/ whose METHOD cannot be read, by its name
METHODS, WRONG_METHODS = read_methods(ROOT / "models")
SELECTIONS = {s.name: s for method in METHODS.values() for s in method.selections if isinstance(s, Selection)}
FLOWS = read_names(ROOT / "backbone" / "luca.py", "FLOWS")
DATASETS = read_names(ROOT / "utils" / "data" / "datasets.py", "DATASETS")


def methods_help() -> str:
    """Return the methods and their own keys, a line each, for ``--help``."""
    width = max(map(len, METHODS), default=0)
    lines = ["methods (model_name=...):"]
    for method in METHODS.values():
        lines.append(f"  {method.name:{width}}  {method.doc}")
        lines += [f"  {'':{width}}  {key.name}={json.dumps(key.default)}: {key.doc}" for key in method.keys]
    return "\n".join([*lines, *(f"  {wrong}" for wrong in WRONG_METHODS.values())])
