"""What the methods, flows and data sets of this project declare about themselves, read without importing them.

A learner's file in ``models/`` says ``METHOD = Method(...)`` below its imports. Its declaration is read from the source
text, so that a mistake in a config is answered, and ``--help`` printed, before PyTorch loads.
"""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.keys import Key
from utils.errors import ConfigError

__all__ = ["DATASETS", "FLOWS", "METHODS", "SELECTIONS", "Key", "Method", "Selection", "read_methods", "read_names"]

_ROOT = Path(__file__).resolve().parents[2]


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
        reads: which of the shared keys it reads, by what they touch: ``training``, ``module``.
        module: how its file is imported, such as ``models.tosca``.
        fixed: shared keys that it does not leave open, with their value; a config gives this value or none.
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
    module: str = ""

    def __post_init__(self) -> None:
        if self.views not in ("test", "augmented"):
            raise ValueError(f"method {self.name!r}: views must be test or augmented, got {self.views!r}")
        if unknown := set(self.reads) - {"training", "module"}:
            raise ValueError(f"method {self.name!r}: reads must be of training and module, got {sorted(unknown)}")

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

    def checked_keys(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return this method's own keys with their values, as given or by default.

        Raises:
            ConfigError: a key of another method, a required one that is missing, or an impossible value.
        """
        keys = {key.name: key for key in self.keys}
        if foreign := [name for name in given if name not in keys]:
            owners = [m.name for m in METHODS.values() if foreign[0] in {key.name for key in m.keys}]
            raise ConfigError(
                f"key {foreign[0]!r} belongs to {' and '.join(owners)}, but model_name is {self.name!r}: remove it "
                f"or set model_name={owners[0]}"
            )
        if absent := [key.name for key in self.keys if key.required and key.name not in given]:
            raise ConfigError(f"required key {absent[0]!r} of {self.name} is missing")
        return {name: key.checked(given.get(name, key.default)) for name, key in keys.items()}


# -- reading declarations ---------------------------------------------------------------------------------------------


def read_methods(folder: Path) -> dict[str, Method]:
    """The methods that the files of a folder declare: first those with modules, then the continual ones, by name.

    Raises:
        ValueError: a declaration that is not made of literals, or two that contradict each other.
    """
    found = [read_method(path) for path in sorted(folder.glob("*.py"))]
    methods = sorted((m for m in found if m), key=lambda m: (not m.modular, not m.continual, m.name))
    _check_methods(methods)
    return {method.name: method for method in methods}


def read_method(path: Path) -> Method | None:
    """The ``METHOD`` that a file declares, or None.

    Raises:
        ValueError: it is not made of literals.
    """
    node = _assigned(path, "METHOD")
    if node is None:
        return None
    # The names that a declaration may use. Evaluating it runs no more than importing the file would.
    names = {kind.__name__: kind for kind in (Method, Key, Selection, bool, int, float, str, tuple)}
    try:
        method = eval(compile(ast.Expression(node), f"<METHOD of {path.name}>", "eval"), {"__builtins__": {}, **names})
    except NameError as error:
        raise ValueError(
            f"{path}: METHOD is read without importing the file, so it is made of literals: {error}"
        ) from None
    if not isinstance(method, Method):
        raise ValueError(f"{path}: METHOD must be a Method, got {method!r}")
    return dataclasses.replace(method, module=f"models.{path.stem}")


def read_names(path: Path, variable: str) -> tuple[str, ...]:
    """The keys of a dictionary that a file defines at its top level, without importing the file.

    Raises:
        ValueError: there is no such dictionary, or its keys are no plain texts.
    """
    node = _assigned(path, variable)
    if not isinstance(node, ast.Dict):
        raise ValueError(f"{path}: no dictionary {variable} = {{...}} at the top level")
    names = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    if len(names) != len(node.keys):
        raise ValueError(f"{path}: the keys of {variable} must be plain texts: they are read without importing it")
    return tuple(names)


def _assigned(path: Path, variable: str) -> ast.expr | None:
    """The expression that a file assigns to ``variable`` at its top level."""
    text = path.read_text(encoding="utf-8")
    if variable not in text:  # parsing takes most of the time
        return None
    for node in ast.parse(text, str(path)).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            return value
    return None


def _check_methods(methods: Sequence[Method]) -> None:
    """Names must be unique, and one name must mean one thing wherever it stands."""
    names = [method.name for method in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two files of models/ declare the method {twice[0]!r}")
    kinds: dict[str, Any] = {}
    for key in (key for method in methods for key in method.keys):
        if kinds.setdefault(key.name, key.kind) != key.kind:
            raise ValueError(f"two methods declare the key {key.name!r} with different types; rename one")
    declared = _declared_selections(methods)
    for method in methods:
        for selection in method.selections:
            if isinstance(selection, str) and selection not in declared:
                raise ValueError(f"method {method.name!r}: no method declares the selection {selection!r}")


def _declared_selections(methods: Sequence[Method]) -> dict[str, Selection]:
    declared: dict[str, Selection] = {}
    for selection in (s for method in methods for s in method.selections if isinstance(s, Selection)):
        if declared.setdefault(selection.name, selection) != selection:
            raise ValueError(f"two methods declare the selection {selection.name!r} differently; refer to it by name")
    return declared


METHODS: Mapping[str, Method] = read_methods(_ROOT / "models")
SELECTIONS: Mapping[str, Selection] = _declared_selections(list(METHODS.values()))
FLOWS = read_names(_ROOT / "backbone" / "luca.py", "FLOWS")
DATASETS = read_names(_ROOT / "utils" / "data" / "datasets.py", "DATASETS")
