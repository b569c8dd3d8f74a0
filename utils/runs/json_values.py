"""Values of a JSON object that was read from a file, each checked for its kind as it is taken."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import CheckpointError


@dataclass(frozen=True)
class JsonValues:
    """The values of a JSON object, each read with its kind; ``of`` says whose they are."""

    values: Mapping[str, Any]
    of: str

    def read(self, name: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """Return the value of ``name``, or ``default`` where it is absent and one is given.

        Raises:
            CheckpointError: it is absent, or not of ``kind``.
        """
        if not isinstance(self.values, Mapping):
            raise CheckpointError(f"{self.of}values are not a JSON object")
        if name not in self.values:
            if default:
                return default[0]
            raise CheckpointError(f"{self.of}{name!r} is absent")
        value = self.values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.of}{name!r} is of another kind: {type(value).__name__}")
        return value

    def objects(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the object ``name``, each of whose values is an object.

        Raises:
            CheckpointError: it is absent, no object, or a value is of another kind.
        """
        found: dict[str, dict[str, Any]] = self.read(name, dict)
        if not all(isinstance(value, dict) for value in found.values()):
            raise CheckpointError(f"{self.of}{name!r} holds a value of another kind")
        return found

    def items(self, name: str, kind: type | tuple[type, ...], *default: Any) -> tuple[Any, ...]:
        """Return the list ``name``, each of whose items is of ``kind``, as a tuple.

        Raises:
            CheckpointError: it is absent, no list, or an item is of another kind.
        """
        found = self.read(name, list, *default)
        if not all(isinstance(item, kind) and (kind is bool or not isinstance(item, bool)) for item in found):
            raise CheckpointError(f"{self.of}{name!r} holds an item of another kind")
        return tuple(found)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        """Return the text ``name``, which is one of ``allowed``.

        Raises:
            CheckpointError: it is absent or another one.
        """
        value: str = self.read(name, str)
        if value not in allowed:
            raise CheckpointError(f"{self.of}{name!r} is {value!r}, not one of {', '.join(allowed)}")
        return value

    def numbers(self, name: str, *default: Any, among: Sequence[str] = ()) -> Any:
        """Return the object ``name``, which holds finite numbers, or None for what is undefined, at any depth.

        Args:
            name: which value.
            default: for a value that is absent.
            among: names that it holds in any case, each with a number.

        Raises:
            CheckpointError: it is absent, no object, or holds something else.
        """
        found = self.read(name, dict, *default)
        if not all(map(_is_number, _leaves(found))):
            raise CheckpointError(f"{self.of}{name!r} holds something that is no number")
        for needed in among:
            JsonValues(found, f"{self.of}{name!r}: ").read(needed, (float, int))
        return found

    def row(self, name: str) -> dict[str, Any]:
        """Return the object ``name``: what a selection gave on each task so far.

        Raises:
            CheckpointError: it is absent or of another kind.
        """
        found: dict[str, Any] = self.numbers(name)
        of = JsonValues(found, f"{self.of}{name!r}: ")
        of.items("per_task", (float, int, type(None)))
        of.read("groups", dict, {})
        return found

    def results(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the object ``name``: for each selection its results, of which two are never undefined.

        Raises:
            CheckpointError: it is absent or of another kind; what is, is named.
        """
        found = self.objects(name)
        of_all = JsonValues(found, f"{self.of}{name} of ")
        for selection in found:
            result = of_all.numbers(selection, among=("top1", "top5"))
            JsonValues(result, f"{name} of {selection!r}: ").read("selection_accuracy", (float, int, type(None)), None)
        return found


def _leaves(nested: Any) -> Iterator[Any]:
    if isinstance(nested, (dict, list)):
        for item in nested.values() if isinstance(nested, dict) else nested:
            yield from _leaves(item)
    else:
        yield nested


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
