"""One config key: its type and limits, how a value of it is checked, and which part of a run it affects."""

import difflib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from utils.errors import ConfigError

LONGEST_RANGE = 1_000  # numbers that one "a-b" may stand for
REQUIRED: Any = object()  # the default of a key that every config must give

# What a key may affect. Everything that depends on the kind of a key follows from this one word.
AFFECTS = {
    "place": "where files lie",
    "speed": "how fast a run is, not what it computes",
    "report": "what a run says",
    "data": "the images",
    "backbone": "the frozen features",
    "session": "the adapters that the first session puts into the backbone",
    "views": "the augmented views of the training images",
    "stream": "which classes come in which order, and all that is drawn from the seed",
    "training": "how a task is learned",
    "module": "what the learned files are made for",
    "method": "which method learns",
}
_WITHOUT_EFFECT = ("place", "speed", "report")  # runs that differ in them alone compute the same
_BEFORE_LEARNING = ("data", "backbone", "speed")  # the loaded data and backbone depend on them
_FIXED_ONCE_SAVED = (
    "backbone",
    "session",
    "module",
    "method",
)  # what is learned on top of a saved run must agree in them


@dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
        name: as it stands in the JSON file.
        kind: ``bool``, ``int``, ``float``, ``str``, one of them ``| None``, ``str | float``, or ``tuple[int, ...]``.
        default: its value where a config does not give it, or ``REQUIRED``.
        doc: its line in the documentation.
        affects: a word of ``AFFECTS``.
        low, high: the smallest and the largest number that is allowed.
        above: numbers must be larger than this, too.
        choices: the texts that are allowed.
        recorded_as: the name under which the identity of a run records what was found behind the key, for example
            the weights' hash for a backbone's name; None: the identity records the key itself.
    """

    name: str
    kind: Any
    default: Any
    doc: str
    affects: str
    low: float = 0
    high: float = sys.float_info.max
    above: float = -1
    choices: tuple[str, ...] = ()
    recorded_as: str | None = None

    def __post_init__(self) -> None:
        if self.affects not in AFFECTS:
            raise ValueError(f"key {self.name!r}: affects must be one of {', '.join(AFFECTS)}, got {self.affects!r}")

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

    def checked(self, value: Any) -> Any:
        """Return ``value`` as this key has it: 1 as 1.0, a list as a tuple, a plain value as a list of one.

        In lists of whole numbers ``"1993-1997"`` stands for all from the first to the last.
        """
        if value is REQUIRED:
            raise ConfigError(f"required key {self.name!r} is missing")
        if not self.is_list:
            return self._checked_item(value, self.kind)
        kind = get_args(self.kind)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        if kind is int:
            items = [number for item in items for number in self._numbers(item)]
        return tuple(self._checked_item(str(i) if kind is str and type(i) is int else i, kind) for i in items)

    def _numbers(self, item: Any) -> Sequence[Any]:
        """The numbers of a range such as ``"1993-1997"``; anything else as it is."""
        match = re.fullmatch(r"(\d{1,12})-(\d{1,12})", item) if isinstance(item, str) else None
        if match is None:
            return [item]
        first, last = map(int, match.groups())
        if first <= last < first + LONGEST_RANGE:
            return range(first, last + 1)
        raise ConfigError(f"{self.name} {item!r}: give the smaller number first, and at most {LONGEST_RANGE} numbers")

    def _checked_item(self, value: Any, kind: Any) -> Any:
        types = [option for option in get_args(kind) or (kind,) if not (option is str and self.choices)]
        if float in types and type(value) is int:
            value = float(value) if abs(value) < 2**1023 else math.inf
        listed = ["one of " + ", ".join(self.choices)] if self.choices else []
        must_be = ""
        if type(value) not in types:
            must_be = " or ".join([*listed, *map(_TYPE_WORDS.__getitem__, types)])
        elif isinstance(value, str) and not (value.isprintable() and (value or self.default == "")):
            must_be = "printable text and not empty"
        elif type(value) in (int, float):
            floor = f"above {self.above}" if self.above >= 0 else f"at least {self.low}"
            enough = value >= self.low and value > self.above  # NaN is not
            must_be = floor if not enough else f"at most {self.high}" if value > self.high else ""
        if must_be and not (isinstance(value, str) and value in self.choices):
            close = difflib.get_close_matches(value, self.choices, n=1) if isinstance(value, str) else []
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{self.name} must be {must_be}, got {value!r:.80}{hint}")
        return value


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


# -- names that configs of the release, LAMDA-PILOT and PyCIL use, and what they mean here ----------------------------

BACKBONE_ALIASES = {
    "vit_base_patch16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "pretrained_vit_b16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pretrained_vit_b16_224_in21k": "vit_base_patch16_224.augreg_in21k",
}

# keys of LAMDA-PILOT and PyCIL that configs of theirs carry: accepted, and a line in the log says what counts here
_NO_EXEMPLARS = "no old images are kept"
_FROZEN = "there are no prompts; first_session=adapter trains adapters of width 64"
UNUSED_KEYS = {
    "memory_size": _NO_EXEMPLARS,
    "memory_per_class": _NO_EXEMPLARS,
    "fixed_memory": _NO_EXEMPLARS,
    "print_forget": "forgetting is always reported",
    "init_epoch": "the first task trains as the others do, epochs={epochs}",
    "init_lr": "the first task trains as the others do, lr={lr}",
    "init_milestones": "the first task trains as the others do, milestones={milestones}",
    "init_lr_decay": "scheduler=steplr divides the rate by ten in every task",
    "init_weight_decay": "the first task trains as the others do, weight_decay={weight_decay}",
    "tuned_epoch": "the number of epochs is epochs={epochs}",
    "lrate": "the learning rate is lr={lr}",
    "lrate_decay": "scheduler=steplr divides the rate by ten",
    "min_lr": "scheduler=cosine ends at 1e-8, as in the release",
    "reinit_optimizer": "every task starts with a new optimizer",
    "vpt_type": _FROZEN,
    "prompt_token_num": _FROZEN,
    "ffn_num": _FROZEN,
    "use_RP": "model_name=ranpac always projects on random features",
    "M": "model_name=ranpac has 10,000 random features",
}
