"""One config key: its type and limits, how a value of it is checked, and which part of a run it touches."""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from utils.errors import ConfigError

LONGEST_RANGE = 1_000  # numbers that one "a-b" may stand for
REQUIRED: Any = dataclasses.MISSING  # the default of a key that every config must give

# What a key may touch. Everything that depends on the kind of a key follows from this one word.
AFFECTS = {
    "place": "where files lie",
    "speed": "how fast a run is, not what it computes",
    "words": "what a run says",
    "data": "the images",
    "backbone": "the frozen features",
    "views": "the augmented views of the training images",
    "stream": "which classes come in which order, and all that is drawn from the seed",
    "training": "how a task is learned",
    "module": "what the learned files are made for",
    "method": "which method learns",
}
_WITHOUT_EFFECT = ("place", "speed", "words")  # runs that differ in them alone compute the same
_BEFORE_LEARNING = ("data", "backbone", "speed")  # the loaded data and backbone depend on them
_FIXED_ONCE_SAVED = ("backbone", "module", "method")  # what is learned on top of a saved run must agree in them


@dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
        name: as it stands in the JSON file.
        kind: ``bool``, ``int``, ``float``, ``str``, one of them ``| None``, ``str | float``, or ``tuple[int, ...]``.
        default: its value where a config does not give it, or ``REQUIRED``.
        doc: its line in the documentation.
        affects: what it touches, a word of ``AFFECTS``.
        low, high: the smallest and the largest number that is allowed.
        above: numbers must be larger than this.
        choices: the texts that are allowed; none given: any text.
        recorded_as: the name under which the identity of a run records what was found behind the key, for example
            the weights' hash for a backbone's name; None: the identity records the key itself.
    """

    name: str
    kind: Any
    default: Any
    doc: str
    affects: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    recorded_as: str | None = None

    def __post_init__(self) -> None:
        if self.affects not in AFFECTS:
            raise ValueError(f"key {self.name!r}: affects must be one of {', '.join(AFFECTS)}, got {self.affects!r}")

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def changes_the_run(self) -> bool:
        """Whether runs that differ in this key compute something different: only such a key may be swept."""
        return self.affects not in _WITHOUT_EFFECT

    @property
    def shares_the_backbone(self) -> bool:
        """Whether configs that differ in this key alone can share loaded data and backbone."""
        return self.affects not in _BEFORE_LEARNING

    @property
    def must_agree(self) -> bool:
        """Whether a run that continues a saved one must agree with it in what this key led to."""
        return self.affects in _FIXED_ONCE_SAVED

    @property
    def identity_name(self) -> str:
        """The name under which the identity of a run records this key, or what was found behind it."""
        return self.recorded_as or self.name

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def is_text(self) -> bool:
        """Whether every value is text, so that nothing on the command line needs reading as JSON."""
        return self.kind is str

    def checked(self, value: Any) -> Any:
        """Return ``value`` as this key has it: 1 as 1.0, a list as a tuple, a plain value as a list of one.

        In lists of whole numbers ``"1993-1997"`` stands for all from the first to the last.

        Raises:
            ConfigError: a value of the wrong type, not among the choices, or out of range.
        """
        if not self.is_list:
            return self._checked_item(value, self.kind)
        kind = get_args(self.kind)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        if kind is int:
            items = [number for item in items for number in self._expanded(item)]
        return tuple(self._checked_item(str(v) if kind is str and _is_int(v) else v, kind) for v in items)

    def _expanded(self, item: Any) -> Sequence[Any]:
        """The numbers of a range such as ``"1993-1997"``; anything else as it is."""
        match = re.fullmatch(r"(\d{1,12})-(\d{1,12})", item) if isinstance(item, str) else None
        if match is None:
            return [item]
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + LONGEST_RANGE:
            raise ConfigError(
                f"{self.name} {item!r} is not a range: give the smaller number first, and at most {LONGEST_RANGE}"
            )
        return range(first, last + 1)

    def _checked_item(self, value: Any, kind: Any) -> Any:
        options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if isinstance(value, str) and value in self.choices:
            return value
        if value is None and NoneType in options:
            return None
        types = [option for option in options if not (option is str and self.choices)]
        if float in types and _is_int(value):
            try:
                value = float(value)
            except OverflowError:
                digits = len(str(value))
                raise ConfigError(f"{self.name} must be a finite number, got an integer of {digits} digits") from None
        if type(value) not in types:
            allowed, hint = _allowed(self.choices, types), nearest(value, self.choices)
            raise ConfigError(f"{self.name} must be {allowed}, got {shown(value)}{hint}")
        if isinstance(value, str) and not value.isprintable():
            raise ConfigError(f"{self.name} must be printable text, got {shown(value)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._check_range(value)
        return value

    def _check_range(self, value: float) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.name} must be a finite number, got {value}")
        if self.low is not None and value < self.low:
            raise ConfigError(f"{self.name} must be at least {self.low}, got {shown(value)}")
        if self.high is not None and value > self.high:
            raise ConfigError(f"{self.name} must be at most {self.high}, got {shown(value)}")
        if self.above is not None and value <= self.above:
            raise ConfigError(f"{self.name} must be above {self.above}, got {shown(value)}")
        if abs(value) >= 2**63:
            raise ConfigError(f"{self.name} is out of range, got {shown(value)}")


def shown(value: Any) -> str:
    """``repr`` of a value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(value: Any, names: Sequence[str]) -> str:
    """A hint such as ``; did you mean 'tosca'?``, or nothing where no name is close."""
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _allowed(choices: Sequence[str], types: Sequence[type]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    listed = ["one of " + ", ".join(choices)] if choices else []
    return " or ".join([*listed, *(words[kind] for kind in types)])
