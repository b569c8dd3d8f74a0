"""One flat JSON file -> one frozen, checked ``Config``. Imports nothing heavy, so that mistakes answer at once."""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from utils.config.keys import BACKBONE_ALIASES, REQUIRED, UNUSED_KEYS, Key
from utils.config.methods import DATASETS, FLOWS, METHODS, SELECTIONS, WRONG_METHODS, Method
from utils.errors import ConfigError, UserError
from utils.files import expanded, read_json, unique_keys


def _key(default: Any, affects: str, doc: str, **about: Any) -> Any:
    """A field of ``Config`` with its default and what else ``Key`` says about it."""
    return dataclasses.field(default=default, metadata={"affects": affects, "doc": doc, **about})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run can be told. The release's keys keep their names and meaning; the rest have defaults."""

    # -- the release's keys
    prefix: str = _key("", "place", "goes in front of the log's file name")
    dataset: str = _key(REQUIRED, "data", "which data set", choices=DATASETS)
    shuffle: bool = _key(True, "stream", "draw the class order from the seed; false: sorted folder order")
    init_cls: int | None = _key(None, "stream", "classes of the first task; required but for `scenario: domain`", low=1)
    increment: int | None = _key(
        None, "stream", "classes of each later task; required but for `scenario: domain`", low=1
    )
    model_name: str = _key("tosca", "method", "the method", choices=tuple(METHODS))
    backbone_type: str = _key(
        REQUIRED, "backbone", "any timm ViT by name, or one of PILOT's names", recorded_as="weights_sha256"
    )
    pretrained: bool = _key(
        True, "backbone", "false: a random ViT (only sensible in tests)", recorded_as="weights_sha256"
    )
    device: tuple[str, ...] = _key(
        ("0",), "speed", '`["0"]`: the first accelerator, else the CPU; `"-1"` or `"cpu"`: the CPU'
    )
    seed: tuple[int, ...] = _key(
        (1993,),
        "stream",
        "one run for each seed: class order, initialisation, batches, views",
        high=2**32 - 1,
        recorded_as="seed",
    )
    mlp_ratio: int = _key(16, "module", "the adapter's bottleneck is the feature width divided by this", low=1)
    se_ratio: int = _key(16, "module", "the same for the calibrator", low=1)
    l1: float = _key(0.0005, "training", "weight of the L1 penalty on all LuCA parameters")
    flow: str = _key("tosca", "module", "how adapter and calibrator are joined", choices=FLOWS)
    epochs: int = _key(20, "training", "passes over the training images of a task", low=1, high=100_000)
    batch_size: int = _key(48, "training", "images in a training step", low=1, high=1_000_000)
    optimizer: str = _key("sgd", "training", "`sgd` has momentum 0.9", choices=("sgd", "adam", "adamw"))
    scheduler: str = _key("cosine", "training", "stepped once an epoch", choices=("cosine", "steplr", "constant"))
    lr: float = _key(0.025, "training", "initial learning rate", above=0)
    weight_decay: float = _key(0.0, "training", "as in torch's optimizers")
    milestones: tuple[int, ...] = _key(
        (10, 15), "training", "epochs at which `steplr` divides the rate by ten", low=1, high=100_000
    )

    # -- this project's keys ------------------------------------------------------------------------------------
    selection: str = _key(
        "sample",
        "report",
        "which answer the `CNN` lines of the log give; every run computes them all",
        choices=tuple(SELECTIONS),
    )
    data_path: str | None = _key(
        None, "data", "the data's folder; else `$TOSCA_DATA/<dataset>`", recorded_as="images_sha256"
    )
    backbone_weights: str | None = _key(
        None, "backbone", "a local .pth, .safetensors or .npz in place of the model hub", recorded_as="weights_sha256"
    )
    image_size: int = _key(224, "backbone", "side of the square that the backbone sees, in pixels", low=1, high=10_000)
    normalize: bool = _key(False, "backbone", "subtract the backbone's mean and divide by its std")
    pooling: str = _key(
        "auto",
        "backbone",
        "what a feature is: `auto`: what timm's head reads; the class token; the mean of the patch tokens",
        recorded_as="pooling",
        choices=("auto", "token", "avg"),
    )
    train_views: int | None = _key(
        None,
        "views",
        "augmented views of each training image; by default one for each epoch; 0: the test transform",
        high=100_000,
        recorded_as="views",
    )
    augment_seed: int | None = _key(
        None, "views", "seed of the views; by default the run's seed", high=2**32 - 1, recorded_as="augment_seed"
    )
    cache_dir: str | None = _key(
        None, "place", "the feature bank; by default the user's cache folder; `none`: in memory, for this run alone"
    )
    precision: str = _key(
        "auto",
        "backbone",
        "of the backbone; `auto`: bf16 where it is native",
        recorded_as="precision",
        choices=("auto", "fp32", "bf16"),
    )
    feature_batch_size: int | None = _key(
        None,
        "speed",
        "images in one forward pass, by default chosen by the device; another number may change the last bits",
        low=1,
        high=100_000,
    )
    num_workers: int | None = _key(
        None, "speed", "processes that load images; by default from the CPU count", high=10_000
    )
    max_pixels: int | None = _key(
        None,
        "speed",
        "larger images are refused; by default 178956970, as Pillow does: they may be decompression bombs",
        low=1,
        high=10**15,
    )
    checkpoint_dir: str = _key("tosca", "place", "where modules are saved")
    log_dir: str = _key("logs", "place", "where logs, JSON files and pictures go")
    new_rows: str = _key("zeros", "training", "how new classes' classifier rows start", choices=("zeros", "prototypes"))
    old_rows: str = _key(
        "train", "training", "whether the rows of earlier classes go on training", choices=("train", "freeze")
    )
    sigma: str | float = _key(
        "learned", "training", "scale of the cosine logits: learned, or a fixed number", above=0, choices=("learned",)
    )
    scenario: str = _key(
        "class", "data", "tasks bring new classes, or the same classes in new domains", choices=("class", "domain")
    )
    continue_from: str | None = _key(
        None, "stream", "a checkpoint folder on top of which the classes of this data are learned", recorded_as="base"
    )
    tracker: str = _key(
        "none", "report", "also write the curves for a tracker", choices=("none", "tensorboard", "wandb")
    )

    # -- what the method declares (methods.py); flat in the JSON -----------------------------------------------------
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    unused: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # names in UNUSED_KEYS that were given

    def __post_init__(self) -> None:
        for name, key in KEYS.items():
            object.__setattr__(self, name, key.checked(getattr(self, name)))
        own = {key.name: key.checked(self.own.get(key.name, key.default)) for key in self.method.keys}
        object.__setattr__(self, "own", own)
        for name, value in self.method.fixed:
            if (given := getattr(self, name)) not in (value, KEYS[name].default):
                raise ConfigError(f"{name} is always {value!r} under {self.model_name}, got {given!r}; remove the key")
        for name in ("init_cls", "increment"):
            if self.scenario == "domain":  # a task is a domain: equal runs are to have equal configs
                object.__setattr__(self, name, None)
            elif getattr(self, name) is None:
                raise ConfigError(f"required key {name!r} is missing")
        self._check_together()

    def _check_together(self) -> None:
        """Check what the values must fulfil beyond the type and the range of each."""
        if "/" in self.prefix or "\\" in self.prefix:
            raise ConfigError(f"prefix must not contain a path separator, got {self.prefix!r}; log_dir sets the folder")
        for name in ("device", "seed"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must name at least one, and each once, got {list(values)}")
        for device in self.device:
            if not re.fullmatch(r"-1|cpu|\d{1,4}", device):
                raise ConfigError(
                    f'device must be "-1", "cpu" or the number of an accelerator such as "0", got {device!r}'
                )
        if self.scenario == "domain" and self.dataset != "imagefolder":
            raise ConfigError(f'scenario "domain" needs dataset "imagefolder", got {self.dataset!r}')
        for name in ("data_path", "backbone_weights", "cache_dir", "checkpoint_dir", "log_dir", "continue_from"):
            try:
                expanded(getattr(self, name) or "")
            except UserError as error:
                raise ConfigError(f"{name}: {error}") from None

    @property
    def remarks(self) -> list[str]:
        """A line for each key that was given and has no effect here."""
        return [f"{name} has no effect here: {UNUSED_KEYS[name].format(**self.as_dict())}" for name in self.unused]

    @property
    def method(self) -> Method:
        """What the learner's file declares about the method."""
        return METHODS[self.model_name]

    @property
    def keys(self) -> dict[str, Key]:
        """All keys that this config has: the shared ones, then those of its method."""
        return {**KEYS, **{key.name: key for key in self.method.keys}}

    @property
    def backbone_name(self) -> str:
        """The timm name, pre-training tag included, behind ``backbone_type``."""
        return BACKBONE_ALIASES.get(self.backbone_type, self.backbone_type)

    @property
    def views(self) -> int:
        """Augmented views of each training image; 0 means the test transform."""
        return min(self.epochs, self.epochs if self.train_views is None else self.train_views)

    def shares_backbone_with(self, other: "Config", but_for: str = "") -> bool:
        """Whether data and backbone (``but_for="data"``: the backbone) loaded for ``other`` serve this config."""
        keys = [n for n, key in KEYS.items() if not (key.shares_the_backbone or key.affects == but_for)]
        return all(getattr(self, name) == getattr(other, name) for name in keys)

    def view_seed(self, seed: int) -> int:
        """Where the random numbers of the views of a run under ``seed`` come from."""
        return seed if self.augment_seed is None else self.augment_seed

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, flat, tuples as lists; ``make_config(config.as_dict())`` is the same config."""
        values = {**{name: getattr(self, name) for name in KEYS}, **self.own}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


_KINDS = get_type_hints(Config)
KEYS: Mapping[str, Key] = {  # what every config has
    field.name: Key(field.name, _KINDS[field.name], field.default, **field.metadata)
    for field in dataclasses.fields(Config)
    if field.metadata
}
_OWN_KEYS = [(method, key) for method in METHODS.values() for key in method.keys]


def known_key(name: str) -> Key | None:
    """The key of that name, be it shared or a method's own."""
    return KEYS.get(name) or next((key for _, key in _OWN_KEYS if key.name == name), None)


def _parse_value(key: Key | None, text: str) -> Any:
    """The value of ``key=text`` on the command line: JSON where the key is not plain text, ``a,b`` for lists."""
    if key is not None and key.kind is str:
        return text
    if key is not None and key.is_list and text[:1] != "[" and "," in text:
        return [_parse_value(None, part) for part in text.split(",") if part]
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, RecursionError):
        return text


def make_config(
    values: Mapping[str, Any], source: object = "config", overrides: Mapping[str, str] | None = None
) -> Config:
    """Check ``values`` into a ``Config``. What stands in front of an error: the override of the key, or ``source``."""
    given = {name: value for name, value in values.items() if name not in UNUSED_KEYS}
    name = given.get("model_name", KEYS["model_name"].default)
    try:
        if str(name) in WRONG_METHODS:
            raise ConfigError(WRONG_METHODS[name])
        method = METHODS[KEYS["model_name"].checked(name)]
        own = [key.name for key in method.keys]
        for name, value in given.items():
            if name not in KEYS and name not in own:
                raise ConfigError(_why_unknown(name, value, method.name))
        shared = {name: value for name, value in given.items() if name in KEYS}
        return Config(**shared, own=given, unused=tuple(name for name in values if name in UNUSED_KEYS))
    except ConfigError as error:
        about = next((word for word in re.findall(r"\w+", str(error)) if word in values), "")
        raise ConfigError(f"{(overrides or {}).get(about, source)}: {error}") from None


def _why_unknown(name: str, value: Any, model_name: str) -> str:
    if owner := next((method.name for method, key in _OWN_KEYS if key.name == name), ""):
        return f"key {name!r} belongs to {owner}, but model_name is {model_name!r}: remove it or set model_name={owner}"
    known = [*KEYS, *(key.name for _, key in _OWN_KEYS)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown key {name!r} (value {value!r:.80}); the nearest known key is {near!r}"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read one experiment file and replace the keys given as ``key=value``; an error blames the one that said it."""
    values, given = read_json(path), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an override; write key=value, for example epochs=5")
        given[key] = f"{override!r:.80}"
        try:
            values[key] = _parse_value(known_key(key), text)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{given[key]}: {error}") from None
    return make_config(values, path, given)
