"""What a config key touches decides what it does to a run: held for every key, and for the runs that exist."""

import json
import re
from typing import Any

import pytest

from tests.conftest import ROOT, TINY
from utils.config.config import KEYS, Config, make_config
from utils.config.grid import make_grid
from utils.config.keys import Key
from utils.config.methods import METHODS, read_method
from utils.errors import ConfigError
from utils.results.read import Run
from utils.runs.manifest import fixed_once_saved, run_identity

MEASURED: dict[str, Any] = {"weights_sha256": "w", "precision": "fp32", "images_sha256": {"train": "a", "test": "b"}}
VALID = {**TINY, "dataset": "imagefolder"}
# values that pass where the next number or another text would not
OTHER = {
    "device": ["cpu"],
    "seed": [7],
    "milestones": [3],
    "backbone_type": "vit_small_patch16_224",
    "init_cls": 3,
    "sigma": 16.0,
    "compile": True,
}


def other_value(key: Key) -> Any:
    """A valid value that is not the one in ``VALID``."""
    now = VALID.get(key.name, key.default)
    if key.name in OTHER:
        return OTHER[key.name]
    if key.choices:
        return next(choice for choice in reversed(key.choices) if choice != now)
    if isinstance(now, bool):
        return not now
    if isinstance(now, (int, float)):
        return now + 1
    return 5 if key.kind == int | None else "elsewhere"


def changed(key: Key) -> Config:
    return make_config({**VALID, key.name: other_value(key)})


def identity(config: Config) -> dict[str, Any]:
    return run_identity(config, config.seed[0], **MEASURED)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_makes_another_run_as_its_declaration_says(key):
    before, after = identity(make_config(VALID)), identity(changed(key))
    if not key.changes_the_run:
        assert before == after
    elif key.recorded_as is None:
        assert before[key.name] != after[key.name]
    elif key.recorded_as in MEASURED or key.recorded_as in ("base", "pooling"):  # what was found decides, not its name
        assert key.name not in {*before} - {*MEASURED}
    else:
        assert before[key.recorded_as] != after[key.recorded_as]


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_shares_data_and_backbone_as_its_declaration_says(key):
    assert make_config(VALID).shares_backbone_with(changed(key)) == key.shares_the_backbone


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_may_be_swept_as_its_declaration_says(key, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VALID))
    text = f"{key.name}={other_value(key)}"
    if key.is_list:
        with pytest.raises(ConfigError, match="is a list"):
            make_grid(path, [], [text])
    elif key.changes_the_run:
        text = text.replace("True", "true").replace("False", "false")
        assert [getattr(cell.config, key.name) for cell in make_grid(path, [], [text])] == [other_value(key)]
    else:
        with pytest.raises(ConfigError, match="does not change what a run computes"):
            make_grid(path, [], [text])


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_continued_run_must_agree_in_a_key_as_its_declaration_says(key):
    assert (key.identity_name in fixed_once_saved(make_config(VALID))) == key.must_agree


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_report_leaves_out_what_a_method_does_not_read(method, key):
    run = Run({"identity": identity(make_config({**VALID, "model_name": method.name}))})
    if key.changes_the_run and key.identity_name not in ("base", "pooling"):
        assert (key.identity_name not in run.identity) == method.ignores(key)


def test_keys_do_what_they_did_when_they_were_sorted_by_hand():
    """The runs that people have are found again, shared, swept and continued as before."""
    older = {name: key for name, key in KEYS.items() if name in FORMAT_1}
    assert older.keys() == FORMAT_1
    assert {n for n, key in older.items() if not key.changes_the_run or key.recorded_as} == NOT_IN_IDENTITY
    assert {n for n, key in older.items() if not key.changes_the_run and not key.is_list} == NOT_SWEPT
    assert {n for n, key in older.items() if key.changes_the_run and key.shares_the_backbone} == SHARES_THE_BACKBONE
    assert {key.identity_name for key in older.values() if METHODS["simplecil"].ignores(key)} == ONLY_TOSCA
    assert not any(METHODS["tosca"].ignores(key) for key in KEYS.values())
    assert {key.identity_name for key in older.values() if key.must_agree} == MUST_AGREE


def test_an_earlier_run_is_still_the_same_run():
    """The identity that this config had before keys said what they touch, word for word."""
    assert identity(make_config({**VALID, "data_path": "pets", "lr": 0.1})) == {
        "dataset": "imagefolder",
        "shuffle": True,
        "init_cls": 2,
        "increment": 2,
        "model_name": "tosca",
        "mlp_ratio": 16,
        "se_ratio": 16,
        "l1": 0.0005,
        "flow": "tosca",
        "epochs": 2,
        "batch_size": 4,
        "optimizer": "sgd",
        "scheduler": "cosine",
        "lr": 0.1,
        "weight_decay": 0.0,
        "milestones": [10, 15],
        "image_size": 32,
        "normalize": False,
        "new_rows": "zeros",
        "old_rows": "train",
        "sigma": "learned",
        "scenario": "class",
        "views": 1,
        "augment_seed": 1993,
        "precision": "fp32",
        "seed": 1993,
        "weights_sha256": "w",
        "images_sha256": {"train": "a", "test": "b"},
    }


def test_every_method_declares_what_its_file_reads():
    """A learner that read a key outside its declaration would be averaged with runs that differ in that key."""
    for path in sorted((ROOT / "models").glob("*.py")):
        method, text = read_method(path), path.read_text(encoding="utf-8")
        ignored = [name for name, key in KEYS.items() if method and method.ignores(key)]
        read = [name for name in ignored if re.search(rf"\b(c|config)\.{name}\b", text)]
        assert read == [], f"{path} reads {read}, but METHOD does not say so (reads=…)"


NOT_SWEPT = {
    "prefix",
    "selection",
    "cache_dir",
    "num_workers",
    "feature_batch_size",
    "check_images",
    "max_pixels",
    "tracker",
    "checkpoint_dir",
    "log_dir",
}
NOT_IN_IDENTITY = NOT_SWEPT | {
    "device",
    "seed",
    "data_path",
    "backbone_weights",
    "pretrained",
    "precision",
    "augment_seed",
    "train_views",
    "continue_from",
    "backbone_type",
}
TRAINING = {
    "l1",
    "new_rows",
    "old_rows",
    "sigma",
    "epochs",
    "batch_size",
    "optimizer",
    "scheduler",
    "lr",
    "weight_decay",
    "milestones",
}
MODULE = {"flow", "mlp_ratio", "se_ratio"}
ONLY_TOSCA = TRAINING | MODULE | {"views", "augment_seed"}
SHARES_THE_BACKBONE = (
    TRAINING
    | MODULE
    | {"init_cls", "increment", "shuffle", "seed", "model_name", "train_views", "augment_seed", "continue_from"}
)
MUST_AGREE = MODULE | {"model_name", "image_size", "normalize", "precision", "weights_sha256"}
FORMAT_1 = (
    NOT_IN_IDENTITY
    | TRAINING
    | MODULE
    | {"dataset", "shuffle", "init_cls", "increment", "model_name", "image_size", "normalize", "scenario"}
)
