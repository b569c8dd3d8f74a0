"""One flat JSON file -> one frozen, checked ``Config``. Imports nothing heavy, so that mistakes answer at once."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from utils.config.consistency import check_together
from utils.config.foreign import BACKBONE_ALIASES, UNUSED_KEYS
from utils.config.keys import REQUIRED, Key, shown
from utils.config.methods import DATASETS, FLOWS, METHODS, SELECTIONS, Method
from utils.errors import ConfigError
from utils.files import read_json, unique_keys


def _key(default: Any = REQUIRED, **about: Any) -> Any:
    """A field of ``Config`` with its default and what else ``Key`` says about it."""
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run can be told. The release's keys keep their names and meaning; the rest have defaults.

    Raises:
        ConfigError: a value of the wrong type, not among the choices, or out of range.
    """

    # -- the release's keys
    prefix: str = _key("", doc="goes in front of the log's file name", affects="place")
    dataset: str = _key(doc="which data set", affects="data", choices=DATASETS)
    shuffle: bool = _key(True, doc="draw the class order from the seed; false: sorted folder order", affects="stream")
    init_cls: int | None = _key(
        None, doc="classes of the first task; required but for `scenario: domain`", low=1, affects="stream"
    )
    increment: int | None = _key(
        None, doc="classes of each later task; required but for `scenario: domain`", low=1, affects="stream"
    )
    model_name: str = _key("tosca", doc="the method", affects="method", choices=tuple(METHODS))
    backbone_type: str = _key(
        doc="any timm ViT by name, or one of PILOT's names", affects="backbone", recorded_as="weights_sha256"
    )
    pretrained: bool = _key(
        True, doc="false: a random ViT (only sensible in tests)", affects="backbone", recorded_as="weights_sha256"
    )
    device: tuple[str, ...] = _key(
        ("0",), doc='`["0"]`: the first accelerator, else the CPU; `"-1"` or `"cpu"`: the CPU', affects="speed"
    )
    seed: tuple[int, ...] = _key(
        (1993,),
        doc="one run for each seed: class order, initialisation, batches, views",
        low=0,
        affects="stream",
        recorded_as="seed",
    )
    mlp_ratio: int = _key(
        16, doc="the adapter's bottleneck is the feature width divided by this", low=1, affects="module"
    )
    se_ratio: int = _key(16, doc="the same for the calibrator", low=1, affects="module")
    l1: float = _key(0.0005, doc="weight of the L1 penalty on all LuCA parameters", low=0, affects="training")
    flow: str = _key("tosca", doc="how adapter and calibrator are joined", affects="module", choices=FLOWS)
    epochs: int = _key(20, doc="passes over the training images of a task", low=1, high=100_000, affects="training")
    batch_size: int = _key(48, doc="images in a training step", low=1, high=1_000_000, affects="training")
    optimizer: str = _key("sgd", doc="`sgd` has momentum 0.9", affects="training", choices=("sgd", "adam", "adamw"))
    scheduler: str = _key(
        "cosine", doc="stepped once an epoch", affects="training", choices=("cosine", "steplr", "constant")
    )
    lr: float = _key(0.025, doc="initial learning rate", above=0, affects="training")
    weight_decay: float = _key(0.0, doc="as in torch's optimizers", low=0, affects="training")
    milestones: tuple[int, ...] = _key(
        (10, 15), doc="epochs at which `steplr` divides the rate by ten", low=1, high=100_000, affects="training"
    )

    # -- this project's keys ------------------------------------------------------------------------------------
    selection: str = _key(
        "sample",
        doc="which answer the `CNN` lines of the log give; every run computes them all",
        affects="words",
        choices=tuple(SELECTIONS),
    )
    data_path: str | None = _key(
        None, doc="the data's folder; else `$TOSCA_DATA/<dataset>`", affects="data", recorded_as="images_sha256"
    )
    backbone_weights: str | None = _key(
        None,
        doc="a local .pth, .safetensors or .npz in place of the model hub",
        affects="backbone",
        recorded_as="weights_sha256",
    )
    image_size: int = _key(
        224, doc="side of the square that the backbone sees, in pixels", low=1, high=10_000, affects="backbone"
    )
    normalize: bool = _key(False, doc="subtract the backbone's mean and divide by its std", affects="backbone")
    pooling: str = _key(
        "auto",
        doc="what a feature is: `auto`: what timm's head reads; the class token; the mean of the patch tokens",
        affects="backbone",
        recorded_as="pooling",
        choices=("auto", "token", "avg"),
    )
    train_views: int | None = _key(
        None,
        doc="augmented views of each training image; by default one for each epoch; 0: the test transform",
        low=0,
        high=100_000,
        affects="views",
        recorded_as="views",
    )
    augment_seed: int | None = _key(
        None, doc="seed of the views; by default the run's seed", low=0, affects="views", recorded_as="augment_seed"
    )
    cache_dir: str | None = _key(
        None,
        doc="the feature bank; by default the user's cache folder; `none`: in memory, for this run alone",
        affects="place",
    )
    precision: str = _key(
        "auto",
        doc="of the backbone; `auto`: bf16 where it is native",
        affects="backbone",
        recorded_as="precision",
        choices=("auto", "fp32", "bf16"),
    )
    feature_batch_size: int | None = _key(
        None, doc="images in one forward pass; by default chosen by the device", low=1, high=100_000, affects="speed"
    )
    num_workers: int | None = _key(
        None, doc="processes that load images; by default from the CPU count", low=0, high=10_000, affects="speed"
    )
    max_pixels: int | None = _key(
        None,
        doc="larger images are refused; by default 178956970, as Pillow does: they may be decompression bombs",
        low=1,
        high=10**15,
        affects="speed",
    )
    checkpoint_dir: str = _key("tosca", doc="where modules are saved", affects="place")
    log_dir: str = _key("logs", doc="where logs, JSON files and pictures go", affects="place")
    new_rows: str = _key(
        "zeros", doc="how new classes' classifier rows start", affects="training", choices=("zeros", "prototypes")
    )
    old_rows: str = _key(
        "train",
        doc="whether the rows of earlier classes go on training",
        affects="training",
        choices=("train", "freeze"),
    )
    sigma: str | float = _key(
        "learned",
        doc="scale of the cosine logits: learned, or a fixed number",
        above=0,
        affects="training",
        choices=("learned",),
    )
    scenario: str = _key(
        "class",
        doc="tasks bring new classes, or the same classes in new domains",
        affects="data",
        choices=("class", "domain"),
    )
    continue_from: str | None = _key(
        None,
        doc="a checkpoint folder on top of which the classes of this data are learned",
        affects="stream",
        recorded_as="base",
    )
    tracker: str = _key(
        "none",
        doc="also write the curves for a tracker",
        affects="words",
        choices=("none", "tensorboard", "wandb"),
    )

    # -- what the method declares (methods.py); flat in the JSON -----------------------------------------------------
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    unused: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # names in UNUSED_KEYS that were given

    def __post_init__(self) -> None:
        for name, key in KEYS.items():
            object.__setattr__(self, name, key.checked(getattr(self, name)))
        object.__setattr__(self, "own", self.method.checked_keys(self.own))
        for name, value in self.method.fixed:
            if (given := getattr(self, name)) not in (value, KEYS[name].default):
                raise ConfigError(f"{name} is always {value!r} under {self.model_name}, got {given!r}; remove the key")
        for name in ("init_cls", "increment"):
            if self.scenario == "domain":  # a task is a domain: equal runs are to have equal configs
                object.__setattr__(self, name, None)
            elif getattr(self, name) is None:
                raise ConfigError(f"required key {name!r} is missing")
        check_together(self)

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

    def shares_backbone_with(self, other: "Config") -> bool:
        """Whether data and backbone that were loaded for ``other`` serve this config."""
        return all(getattr(self, n) == getattr(other, n) for n, key in KEYS.items() if not key.shares_the_backbone)

    def view_seed(self, seed: int) -> int:
        """Where the random numbers of the views of a run under ``seed`` come from."""
        return seed if self.augment_seed is None else self.augment_seed

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, flat, tuples as lists; ``make_config(config.as_dict())`` is the same config."""
        values = {**{name: getattr(self, name) for name in KEYS}, **self.own}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _shared_keys() -> dict[str, Key]:
    """The fields of ``Config`` as keys."""
    kinds = get_type_hints(Config)
    fields = [field for field in dataclasses.fields(Config) if field.name not in ("own", "unused")]
    keys = {field.name: Key(field.name, kinds[field.name], field.default, **field.metadata) for field in fields}
    if clash := [key.name for method in METHODS.values() for key in method.keys if key.name in {*keys, *UNUSED_KEYS}]:
        raise ValueError(f"a method declares the key {clash[0]!r}, which every config has or accepts; rename it")
    return keys


KEYS: Mapping[str, Key] = _shared_keys()  # what every config has


def known_key(name: str) -> Key | None:
    """The key of that name, be it shared or a method's own."""
    own = (key for method in METHODS.values() for key in method.keys)
    return KEYS.get(name) or next((key for key in own if key.name == name), None)


def parse_value(key: str, text: str) -> Any:
    """The value of ``key=text`` on the command line: JSON where the key is not plain text, ``a,b`` for lists."""
    known = known_key(key)
    if known is not None and known.is_text:
        return text
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, RecursionError):
        if known is not None and known.is_list and "," in text:
            return [parse_value(key, part) for part in text.split(",") if part]
        return text


def make_config(values: dict[str, Any], source: str = "config") -> Config:
    """Check ``values`` into a ``Config``; ``source`` stands in front of every error."""
    for name, value in values.items():
        if known_key(name) is None and name not in UNUSED_KEYS:
            near = _nearest_key(name)
            raise ConfigError(
                f"{source}: unknown key {name!r} (value {shown(value)}); the nearest known key is {near!r}"
            )
    if absent := [name for name, key in KEYS.items() if key.required and name not in values]:
        raise ConfigError(f"{source}: required key {absent[0]!r} is missing")
    shared = {name: value for name, value in values.items() if name in KEYS}
    unused = tuple(name for name in values if name in UNUSED_KEYS)
    own = {name: value for name, value in values.items() if name not in (*KEYS, *unused)}
    try:
        return Config(**shared, own=own, unused=unused)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _nearest_key(name: str) -> str:
    own = [key.name for method in METHODS.values() for key in method.keys]
    return difflib.get_close_matches(name, [*KEYS, *own], n=1, cutoff=0.0)[0]


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
