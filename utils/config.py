"""One flat JSON file -> one frozen, checked ``Config``. Imports nothing heavy, so that mistakes answer at once."""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from utils.errors import ConfigError

DATASETS = ("cifar224", "cub", "imageneta", "imagenetr", "omnibenchmark", "vtab", "objectnet", "imagefolder", "digits")
LEARNERS = ("tosca", "simplecil", "ncm_lda", "ranpac", "linear_joint")
FLOWS = ("tosca", "tosca_r", "adapter", "calibrator")
BACKBONE_ALIASES = {
    "vit_base_patch16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "pretrained_vit_b16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pretrained_vit_b16_224_in21k": "vit_base_patch16_224.augreg_in21k",
}


def _key(default: Any = dataclasses.MISSING, *, doc: str, low: float | None = None, above: float | None = None) -> Any:
    """A config key: its default (none: the key is required), its line in the README, its lower bound."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "above": above})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run can be told. The release's keys keep their names and meaning; the rest have defaults.

    Raises:
        ConfigError: a value of the wrong type, not among the choices, or out of range.
    """

    # -- the release's keys -------------------------------------------------------------------------------------
    prefix: str = _key("", doc="goes in front of the log's file name")
    dataset: Literal[DATASETS] = _key(doc="which data; see [The data](#the-data)")
    shuffle: bool = _key(True, doc="draw the class order from the seed; false: sorted folder order")
    init_cls: int | None = _key(None, doc="classes of the first task; required but for `scenario: domain`", low=1)
    increment: int | None = _key(None, doc="classes of each later task; required but for `scenario: domain`", low=1)
    model_name: Literal[LEARNERS] = _key("tosca", doc="the method")
    backbone_type: str = _key(doc="any timm ViT by name, or one of PILOT's names")
    pretrained: bool = _key(True, doc="false: a random ViT (only sensible in tests)")
    device: tuple[str, ...] = _key(
        ("0",), doc='`["0"]`: the first accelerator, else the CPU; `"-1"` or `"cpu"`: the CPU'
    )
    seed: tuple[int, ...] = _key(
        (1993,), doc="one run for each seed: class order, initialisation, batches, views", low=0
    )
    mlp_ratio: int = _key(16, doc="the adapter's bottleneck is the feature width divided by this", low=1)
    se_ratio: int = _key(16, doc="the same for the calibrator", low=1)
    l1: float = _key(0.0005, doc="weight of the L1 penalty on all LuCA parameters", low=0)
    flow: Literal[FLOWS] = _key("tosca", doc="how adapter and calibrator are joined")
    epochs: int = _key(20, doc="passes over the training images of a task", low=1)
    batch_size: int = _key(48, doc="images in a training step", low=1)
    optimizer: Literal["sgd", "adam", "adamw"] = _key("sgd", doc="`sgd` has momentum 0.9")
    scheduler: Literal["cosine", "steplr", "constant"] = _key("cosine", doc="stepped once an epoch")
    lr: float = _key(0.025, doc="initial learning rate", above=0)
    weight_decay: float = _key(0.0, doc="as in torch's optimizers", low=0)
    milestones: tuple[int, ...] = _key((10, 15), doc="epochs at which `steplr` divides the rate by ten", low=1)

    # -- this project's keys ------------------------------------------------------------------------------------
    selection: Literal["batch", "sample", "lda", "ridge"] = _key(
        "sample", doc="which answer the `CNN` lines of the log give; every run computes them all"
    )
    data_path: str | None = _key(None, doc="the data's folder; else `$TOSCA_DATA/<dataset>`")
    backbone_weights: str | None = _key(None, doc="a local .pth, .safetensors or .npz in place of the model hub")
    image_size: int = _key(224, doc="side of the square that the backbone sees, in pixels", low=1)
    normalize: bool = _key(False, doc="subtract the backbone's mean and divide by its std")
    train_views: int | None = _key(
        None, doc="augmented views of each training image; by default one for each epoch; 0: the test transform", low=0
    )
    augment_seed: int | None = _key(None, doc="seed of the views; by default the run's seed", low=0)
    cache_dir: str | None = _key(
        None, doc="the feature bank; by default the user's cache folder; `none`: in memory, for this run alone"
    )
    precision: Literal["auto", "fp32", "bf16"] = _key("auto", doc="of the backbone; `auto`: bf16 where it is native")
    feature_batch_size: int | None = _key(
        None, doc="images in one forward pass; by default chosen by the device", low=1
    )
    num_workers: int | None = _key(None, doc="processes that load images; by default from the CPU count", low=0)
    check_images: bool = _key(False, doc="decode every image once before anything else")
    checkpoint_dir: str = _key("tosca", doc="where modules are saved")
    log_dir: str = _key("logs", doc="where logs, JSON files and pictures go")
    new_rows: Literal["zeros", "prototypes"] = _key("zeros", doc="how new classes' classifier rows start")
    old_rows: Literal["train", "freeze"] = _key("train", doc="whether the rows of earlier classes go on training")
    sigma: Literal["learned"] | float = _key(
        "learned", doc="scale of the cosine logits: learned, or a fixed number", above=0
    )
    scenario: Literal["class", "domain"] = _key(
        "class", doc="tasks bring new classes, or the same classes in new domains"
    )
    continue_from: str | None = _key(
        None, doc="a checkpoint folder on top of which the classes of this data are learned"
    )
    tracker: Literal["none", "tensorboard"] = _key("none", doc="also write the curves for a tracker")

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Config).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        if "/" in self.prefix or "\\" in self.prefix:
            raise ConfigError(f"prefix must not contain a path separator, got {self.prefix!r}; log_dir sets the folder")
        for name in ("data_path", "backbone_weights", "cache_dir", "checkpoint_dir", "log_dir", "continue_from"):
            _check_path(name, getattr(self, name))
        for name in ("device", "seed"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name} must not be empty")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} {list(values)} repeats a value; give each once")
        for seed in (*self.seed, *([self.augment_seed] if self.augment_seed is not None else [])):
            if seed >= 2**32:
                raise ConfigError(f"seed must be below 2**32, got {seed}")
        for device in self.device:
            if not re.fullmatch(r"-1|cpu|\d{1,4}", device):
                raise ConfigError(
                    f'device must be "-1", "cpu" or the number of an accelerator such as "0", got {device!r}'
                )
        for name in ("init_cls", "increment"):
            if self.scenario == "domain":  # a task is a domain: equal runs are to have equal configs
                object.__setattr__(self, name, None)
            elif getattr(self, name) is None:
                raise ConfigError(f"required key {name!r} is missing")
        if self.scenario == "domain" and self.dataset != "imagefolder":
            raise ConfigError(f'scenario "domain" needs dataset "imagefolder", got {self.dataset!r}')
        if not self.backbone_type:
            raise ConfigError("backbone_type must name a timm model, got ''")

    @property
    def backbone_name(self) -> str:
        """The timm name, pre-training tag included, behind ``backbone_type``."""
        return BACKBONE_ALIASES.get(self.backbone_type, self.backbone_type)

    @property
    def views(self) -> int:
        """Augmented views of each training image; 0 means the test transform."""
        return min(self.epochs, self.epochs if self.train_views is None else self.train_views)

    def view_seed(self, seed: int) -> int:
        """Where the random numbers of the views of a run under ``seed`` come from."""
        return seed if self.augment_seed is None else self.augment_seed

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, tuples as lists; ``Config(**config.as_dict())`` is the same config."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def _checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, lists as tuples and integers as floats where that is what is asked for."""
    limits = {field.name: field.metadata for field in dataclasses.fields(Config)}[name]
    item_kind = kind
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(
            _checked_item(name, str(v) if _is_plain_int(v) and item_kind is str else v, item_kind, limits)
            for v in items
        )
    return _checked_item(name, value, item_kind, limits)


def _checked_item(name: str, value: Any, kind: Any, limits: Any) -> Any:
    options = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) not in (None, Literal) else (kind,)
    choices = [c for option in options if get_origin(option) is Literal for c in get_args(option)]
    types = [option for option in options if get_origin(option) is None]
    if isinstance(value, str) and value in choices:
        return value
    if value is None and NoneType in types:
        return None
    if float in types and _is_plain_int(value):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{name} must be a finite number, got an integer of {len(str(value))} digits") from None
    if type(value) not in types:
        raise ConfigError(f"{name} must be {_allowed(choices, types)}, got {_shown(value)}{_nearest(value, choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError(f"{name} must be printable text, got {_shown(value)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if limits["low"] is not None and value < limits["low"]:
            raise ConfigError(f"{name} must be at least {limits['low']}, got {_shown(value)}")
        if limits["above"] is not None and value <= limits["above"]:
            raise ConfigError(f"{name} must be above {limits['above']}, got {_shown(value)}")
        if abs(value) >= 2**63:
            raise ConfigError(f"{name} is out of range, got {_shown(value)}")
    return value


def _check_path(name: str, value: str | None) -> None:
    if value == "":
        raise ConfigError(f"{name} must name a {'file' if name == 'backbone_weights' else 'folder'}, got ''")
    try:
        Path(value or "").expanduser()
    except RuntimeError:
        raise ConfigError(f"{name}: the home folder at the start of {_shown(value)} is not known") from None


def _is_plain_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _allowed(choices: Sequence[str], types: Sequence[type]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return " or ".join([*(["one of " + ", ".join(choices)] if choices else []), *(words[t] for t in types)])


def _nearest(value: Any, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_value(key: str, text: str) -> Any:
    """The value of ``key=text`` on the command line: JSON where the key is not plain text, ``a,b`` for lists."""
    kind = get_type_hints(Config).get(key)
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, RecursionError):
        if get_origin(kind) is tuple and "," in text:
            return [parse_value(key, part) for part in text.split(",") if part]
        return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in {name for name, _ in pairs[:i]})
        raise ConfigError(f"key {twice!r} stands twice")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: not readable, not JSON (line and column are named), not an object, or a key given twice.
    """
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; this is not JSON") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; a config is a JSON text file") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; a config is one flat JSON object") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give --config=<file>.json, see exps/") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; keep one") from None
    except ValueError as error:  # a number with more digits than Python converts
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is one flat JSON object {{...}}, got {type(values).__name__}")
    return values


def make_config(values: dict[str, Any], source: str = "config") -> Config:
    """Check ``values`` into a ``Config``; ``source`` stands in front of every error."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{source}: unknown key {key!r} (value {_shown(value)}); the nearest known key is {near!r}"
            )
    if absent := [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]:
        raise ConfigError(f"{source}: required key {absent[0]!r} is missing")
    try:
        return Config(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read one experiment file and replace the keys given as ``key=value``.

    Raises:
        ConfigError: one line that names the file or key, what was found and what is allowed.
    """
    values = read_json(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an override; write key=value, for example epochs=5")
        try:
            values[key] = parse_value(key, text)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{override!r}: {error}") from None
    return make_config(values, str(path))


def key_table() -> list[str]:
    """The README's table of keys: Markdown rows, the header's two first."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Config):
        required = field.default is dataclasses.MISSING
        default = "required" if required else f"`{json.dumps(field.default, ensure_ascii=False)}`"
        choices = [c for option in _options(get_type_hints(Config)[field.name]) for c in get_args(option)]
        allowed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
        rows.append(f"| `{field.name}` | {default} | {field.metadata['doc']}{allowed} |")
    return rows


def _options(kind: Any) -> list[Any]:
    """The ``Literal`` types among the types that a key may have."""
    parts = [kind] if get_origin(kind) is Literal else get_args(kind)
    return [part for part in parts if get_origin(part) is Literal]
