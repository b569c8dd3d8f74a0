"""What a config key affects decides what it does to a run: held for every key, and for the runs that exist."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT, TINY
from utils.config.config import KEYS, Config, make_config
from utils.config.grid import make_grid
from utils.config.keys import Key
from utils.config.methods import METHODS, read_method
from utils.errors import ConfigError
from utils.results.read import Run
from utils.runs.continuing import fixed_once_saved
from utils.runs.manifest import run_identity

MEASURED: dict[str, Any] = {"weights_sha256": "w", "precision": "fp32", "images_sha256": {"train": "a", "test": "b"}}
BACKBONE = SimpleNamespace(**MEASURED, variant={})
VALID = {**TINY, "dataset": "imagefolder"}
# values that pass where the next number or another text would not
OTHER = {"device": ["cpu"], "seed": [7], "milestones": [3], "backbone_type": "vit_small_patch16_224", "init_cls": 3}
OTHER["sigma"] = 16.0


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


def identity(config: Config) -> dict[str, Any]:
    return run_identity(config, config.seed[0], BACKBONE, MEASURED["images_sha256"])


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_does_what_its_declaration_says(key, tmp_path):
    values = {**VALID, "first_session": "adapter"} if key.name.startswith("first_session_") else VALID
    config, changed = make_config(values), make_config({**values, key.name: other_value(key)})
    assert config.shares_backbone_with(changed) == key.shares_the_backbone
    assert (key.identity_name in fixed_once_saved(config)) == key.must_agree
    before, after = identity(config), identity(changed)
    if not key.changes_the_run:
        assert before == after
    elif key.recorded_as in (*MEASURED, "base", "pooling"):  # what was found decides, not its name
        assert key.name not in {*before} - {*MEASURED}
    else:
        assert before[key.identity_name] != after[key.identity_name]


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_may_be_swept_as_its_declaration_says(key, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VALID))
    value = other_value(key)
    text = json.dumps(value) if isinstance(value, (list, bool)) else value
    cells = make_grid([path], [], [f"{key.name}={text}"])
    named = cells[0].name.partition("=")[0]
    assert cells[0].config.as_dict()[key.name] == value or named == key.name
    assert named == (key.name if key.changes_the_run and not key.is_list else "")
    if not key.changes_the_run and not key.is_list:
        with pytest.raises(ConfigError, match="does not change what a run computes"):
            make_grid([path], [], [f"{key.name}={text},{text}"])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_report_leaves_out_what_a_method_does_not_read(method):
    """A learner that read a key outside its declaration would be averaged with runs that differ in that key."""
    run = Run({"identity": identity(make_config({**VALID, "model_name": method.name}))})
    text = (ROOT / method.module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    assert read_method(ROOT / f"{method.module.replace('.', '/')}.py") == method
    for key in KEYS.values():
        if key.changes_the_run and key.identity_name not in ("base", "pooling"):
            assert (key.identity_name not in run.identity) == method.ignores(key), key.name
        assert not (method.ignores(key) and re.search(rf"\b(c|config)\.{key.name}\b", text)), key.name


# what the keys of the first runs did when they were sorted by hand
NOT_SWEPT = {"prefix", "selection", "cache_dir", "num_workers", "feature_batch_size", "max_pixels", "tracker"}
NOT_SWEPT |= {"checkpoint_dir", "log_dir"}
NOT_IN_IDENTITY = NOT_SWEPT | {"device", "seed", "data_path", "backbone_weights", "pretrained", "precision"}
NOT_IN_IDENTITY |= {"augment_seed", "train_views", "continue_from", "backbone_type"}
TRAINING = {"l1", "new_rows", "old_rows", "sigma", "epochs", "batch_size", "optimizer", "scheduler", "lr"}
TRAINING |= {"weight_decay", "milestones"}
MODULE = {"flow", "mlp_ratio", "se_ratio"}
STREAM = {"init_cls", "increment", "shuffle", "model_name"}
FORMAT_1 = NOT_IN_IDENTITY | TRAINING | MODULE | STREAM | {"dataset", "image_size", "normalize", "scenario"}


def test_keys_do_what_they_did_when_they_were_sorted_by_hand():
    """The runs that people have are found again, shared, swept and continued as before."""
    older = {name: key for name, key in KEYS.items() if name in FORMAT_1}
    assert older.keys() == FORMAT_1
    assert {n for n, key in older.items() if not key.changes_the_run or key.recorded_as} == NOT_IN_IDENTITY
    assert {n for n, key in older.items() if not key.changes_the_run and not key.is_list} == NOT_SWEPT
    shared = {n for n, key in older.items() if key.changes_the_run and key.shares_the_backbone}
    assert shared == TRAINING | MODULE | STREAM | {"seed", "train_views", "augment_seed", "continue_from"}
    ignored = {key.identity_name for key in older.values() if METHODS["simplecil"].ignores(key)}
    assert ignored == TRAINING | MODULE | {"views", "augment_seed"}
    assert not any(METHODS["tosca"].ignores(key) for key in KEYS.values())
    must_agree = {key.identity_name for key in older.values() if key.must_agree}
    assert must_agree == MODULE | {"model_name", "image_size", "normalize", "precision", "weights_sha256"}


def test_an_earlier_run_is_still_the_same_run():
    """The identity that this config had before keys said what they affect, word for word."""
    plain = {"dataset": "imagefolder", "shuffle": True, "init_cls": 2, "increment": 2, "model_name": "tosca"}
    plain |= {"mlp_ratio": 16, "se_ratio": 16, "l1": 0.0005, "flow": "tosca", "epochs": 2, "batch_size": 4}
    plain |= {"optimizer": "sgd", "scheduler": "cosine", "lr": 0.1, "weight_decay": 0.0, "milestones": [10, 15]}
    plain |= {"image_size": 32, "normalize": False, "new_rows": "zeros", "old_rows": "train", "sigma": "learned"}
    plain |= {"scenario": "class", "views": 1, "augment_seed": 1993, "seed": 1993, "first_session": "none"}
    plain |= {"first_session_lr": 0.01, "first_session_epochs": 20, "first_session_weight_decay": 0.0005}
    assert identity(make_config({**VALID, "data_path": "pets", "lr": 0.1})) == {**plain, **MEASURED}
