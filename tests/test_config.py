"""Configs: the release's run unchanged, every key is checked, and a mistake is one line that blames the right place."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.config.config import KEYS, known_key, load_config, make_config
from utils.config.keys import UNUSED_KEYS
from utils.config.methods import METHODS
from utils.errors import ConfigError

REQUIRED = {"dataset": "cub", "init_cls": 10, "increment": 10, "backbone_type": "vit_base_patch16_224"}
EXPERIMENTS = sorted((ROOT / "exps").glob("tosca_*.json"))
# a config of the TOSCA release, all its keys and nothing else
RELEASE = {
    **{"prefix": "reproduce", "dataset": "cifar224", "shuffle": True, "init_cls": 5, "increment": 5},
    **{"model_name": "tosca", "backbone_type": "pretrained_vit_b16_224_in21k", "pretrained": True, "device": ["0"]},
    **{"seed": [1993, 1994], "mlp_ratio": 16, "se_ratio": 16, "l1": 0.0005, "flow": "tosca_r", "epochs": 20},
    **{"batch_size": 48, "optimizer": "sgd", "scheduler": "steplr", "lr": 0.025, "weight_decay": 0},
    "milestones": [10, 15],
}
TRAINED_BY = ("mlp_ratio", "se_ratio", "l1", "flow", "epochs", "batch_size", "optimizer", "scheduler", "lr")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the required keys."""
    return write(tmp_path, REQUIRED)


def write(folder: Path, values: object) -> Path:
    path = folder / "exp.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_a_config_of_the_release_loads_unchanged(tmp_path):
    config = load_config(write(tmp_path, RELEASE))
    assert {name: config.as_dict()[name] for name in RELEASE} == RELEASE
    assert config.backbone_name == "vit_base_patch16_224.augreg_in21k"


def test_defaults_are_those_of_the_release():
    release = {**RELEASE, **REQUIRED, "flow": "tosca", "scheduler": "cosine", "prefix": "", "seed": [1993]}
    ours = {"image_size": 224, "normalize": False, "precision": "auto", "checkpoint_dir": "tosca", "log_dir": "logs"}
    ours |= {"new_rows": "zeros", "old_rows": "train", "sigma": "learned", "data_path": None, "train_views": None}
    ours |= {"backbone_weights": None, "cache_dir": None}
    found = make_config(REQUIRED).as_dict()
    assert {name: found[name] for name in {**release, **ours}} == {**release, **ours}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_experiment_serves_every_method(path, method):
    """One file for each data set: another method keeps its protocol and the features that it needs."""
    config, tosca = load_config(path, [f"model_name={method}"]), load_config(path)
    assert make_config(config.as_dict()) == config
    assert config.model_name == method
    fixed = dict(METHODS[method].fixed)
    for name, key in KEYS.items():
        if key.affects != "session" or "first_session" not in fixed:  # whose settings tosca reads under "none" alone
            assert getattr(config, name) == fixed.get(name, getattr(tosca, name)) or key.affects == "method"


@pytest.mark.parametrize("page", ["README.md", "exps/README.md", "docs/baselines.md", "docs/extending.md"])
def test_the_commands_of_the_documents_name_experiments_that_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("$data", "cub").replace("exps/my_pets.json", "")
    for name, method in re.findall(r"--config=(exps/\S+\.json)(?: model_name=(\w+))?", text):
        assert (ROOT / name).is_file(), f"{page}: {name}"
        assert method in {*METHODS, "", "pnorm"}, f"{page}: {method}"
    swept = {name for names in re.findall(r"model_name=([\w,]+)", text) for name in names.split(",")}
    assert swept <= {*METHODS, "pnorm"}, page


BENCHMARKS = [
    ("cifar", "cifar224", 5, "batch"),
    ("cub", "cub", 10, "batch"),
    ("ina", "imageneta", 20, "batch"),
    ("inr", "imagenetr", 20, "batch"),
    ("omni", "omnibenchmark", 30, "batch"),
    ("vtab", "vtab", 10, "batch"),
    ("objectnet", "objectnet", 20, "sample"),
]


@pytest.mark.parametrize(("name", "dataset", "step", "selection"), BENCHMARKS)
def test_the_benchmarks_run_as_published(name, dataset, step, selection):
    path = ROOT / "exps" / f"tosca_{name}.json"
    config = load_config(path)
    assert (config.dataset, config.init_cls, config.increment, config.selection) == (dataset, step, step, selection)
    assert (config.seed, config.prefix, config.model_name) == ((1993,), "reproduce", "tosca")
    assert config.backbone_name == "vit_base_patch16_224.augreg_in21k"
    assert RELEASE.keys() <= json.loads(path.read_text()).keys()
    defaults = make_config(REQUIRED)
    for key in (*TRAINED_BY, "weight_decay", "milestones", "train_views", "image_size", "normalize", "shuffle"):
        assert getattr(config, key) == getattr(defaults, key), key
    assert [path.stem for path in EXPERIMENTS] == sorted([*(f"tosca_{row[0]}" for row in BENCHMARKS), "tosca_demo"])


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("vit_base_patch16_224", "vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("vit_base_patch16_224_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("pretrained_vit_b16_224", "vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("pretrained_vit_b16_224_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("vit_small_patch14_dinov2", "vit_small_patch14_dinov2"),
    ],
)
def test_pilots_backbone_names_resolve_to_explicit_tags(given, resolved):
    assert make_config({**REQUIRED, "backbone_type": given}).backbone_name == resolved


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("epochs=5", 5),
        ("lr=1", 1.0),
        ("l1=1e-4", 1e-4),
        ("shuffle=false", False),
        ("seed=7", (7,)),
        ("seed=1993,1994", (1993, 1994)),
        ("seed=1993-1997", (1993, 1994, 1995, 1996, 1997)),
        ("seed=1-3,9", (1, 2, 3, 9)),
        ('seed=["1-2", 5]', (1, 2, 5)),
        ("device=-1", ("-1",)),
        ('device=["0"]', ("0",)),
        ("train_views=null", None),
        ("data_path=/a b/c=d", "/a b/c=d"),
        ("prefix=12", "12"),
        ("sigma=16", 16.0),
        ("sigma=learned", "learned"),
    ],
)
def test_an_override_replaces_a_key_and_the_last_one_counts(path, override, value):
    key = override.partition("=")[0]
    found = getattr(load_config(path, [f"{key}=1", override]), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("seed", 7, (7,)),
        ("seed", "7-8", (7, 8)),
        ("device", -1, ("-1",)),
        ("device", ["0", 1], ("0", "1")),
    ],
)
def test_lists_may_be_given_as_a_plain_value_and_devices_as_numbers(key, given, value):
    assert getattr(make_config({**REQUIRED, key: given}), key) == value


MISTAKES = [
    ({"epoch": 3}, ["unknown key 'epoch'", "value 3", "nearest known key is 'epochs'"]),
    ({"optimiser": "sgd"}, ["'optimiser'", "'sgd'", "'optimizer'"]),
    ({"own": {}}, ["unknown key 'own'"]),
    ({"flow": "tosca_l"}, ["flow", "'tosca_l'", "tosca, tosca_r, adapter, calibrator", "did you mean 'tosca"]),
    ({"dataset": "imagenet_r"}, ["dataset", "'imagenet_r'", "did you mean 'imagenetr'?"]),
    ({"model_name": ["tosca"]}, ["model_name must be one of tosca, "]),
    ({"epochs": "20"}, ["epochs must be a whole number, got '20'"]),
    ({"epochs": True}, ["epochs must be a whole number, got True"]),
    ({"epochs": 0}, ["epochs must be at least 1, got 0"]),
    ({"lr": 0}, ["lr must be above 0, got 0"]),
    ({"lr": float("nan")}, ["lr must be above 0, got nan"]),
    ({"lr": float("inf")}, ["lr must be at most 1.7", "got inf"]),
    ({"l1": -0.1}, ["l1 must be at least 0"]),
    ({"epochs": 10**30}, ["epochs must be at most 100000, got 1000"]),
    ({"shuffle": 1}, ["shuffle must be true or false, got 1"]),
    ({"seed": []}, ["seed must name at least one"]),
    ({"seed": [1, 1]}, ["seed must name", "each once, got [1, 1]"]),
    ({"seed": ["1-3", 2]}, ["seed must name", "each once, got [1, 2, 3, 2]"]),
    ({"seed": 2**32}, ["seed must be at most 4294967295"]),
    ({"seed": [-3]}, ["seed must be at least 0, got -3"]),
    ({"seed": "1997-1993"}, ["'1997-1993': give the smaller number first"]),
    ({"seed": "0-99999"}, ["at most 1000 numbers"]),
    ({"device": "cuda:0"}, ["device", "'cuda:0'", '"-1", "cpu"']),
    ({"data_path": 5}, ["data_path must be text or null, got 5"]),
    ({"prefix": "a/b"}, ["prefix must not contain a path separator", "'a/b'"]),
    ({"prefix": "\x1b[31m"}, ["prefix must be printable text"]),
    ({"sigma": "fixed"}, ["sigma", "learned", "'fixed'"]),
    ({"sigma": 0}, ["sigma must be above 0"]),
    ({"backbone_type": ""}, ["backbone_type must be printable text and not empty"]),
    ({"model_name": "knn", "neighbours": 0}, ["neighbours must be at least 1, got 0"]),
    ({"neighbours": 3}, ["key 'neighbours' belongs to knn, but model_name is 'tosca'", "set model_name=knn"]),
    ({"init_cls": None}, ["required key 'init_cls' is missing"]),
    ({"dataset": None}, ["dataset must be one of"]),
]


@pytest.mark.parametrize(("values", "words"), MISTAKES)
def test_a_mistake_is_one_line_that_names_file_key_value_and_what_is_allowed(tmp_path, values, words):
    path = write(tmp_path, {**REQUIRED, **values})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "'epochs' is not an override; write key=value"),
        ("epoch=5", "'epoch=5': unknown key 'epoch' (value 5); the nearest known key is 'epochs'"),
        ("epochs=many", "'epochs=many': epochs must be a whole number, got 'many'"),
        ("lr=-1", "'lr=-1': lr must be above 0, got -1.0"),
        ('epochs={"a": 1, "a": 2}', """'epochs={"a": 1, "a": 2}': key 'a' stands twice"""),
    ],
)
def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(tmp_path, override, message):
    path = write(tmp_path, {**REQUIRED, "lr": 0.1})
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["batch_size=2", override])
    assert str(caught.value).startswith(message) and str(path) not in str(caught.value)
    with pytest.raises(ConfigError, match=rf"^{path}: epochs must be"):
        load_config(write(tmp_path, {**REQUIRED, "epochs": 0}), ["batch_size=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epochs": 3,}', r"this is not JSON .*line 1 column \d+"),
        ('{\n  "dataset": "digits"\n  "init_cls": 2}', r"this is not JSON .*line 3 column 3"),
        ("", r"line 1 column 1"),
        ("[" * 100_000, "this is not JSON"),
        ("[1, 2]", "a config is one JSON object"),
        ('{"epochs": 3, "epochs": 4}', "key 'epochs' stands twice"),
    ],
)
def test_a_file_that_is_not_a_flat_json_object_is_explained(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config(REQUIRED).epochs = 3


def test_a_wrong_key_is_answered_before_anything_heavy_is_imported(tmp_path):
    path = write(tmp_path, {**REQUIRED, "epoch": 1})
    heavy = "{'torch', 'numpy', 'timm', 'PIL'} & sys.modules.keys()"
    code = f"import sys, main; code = main.main(['--config={path}']); print(code, sorted({heavy}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "2 []"
    assert len(found.stderr.strip().splitlines()) == 1 and "'epochs'" in found.stderr


# -- keys of others, keys of one method -------------------------------------------------------------------------------


def test_keys_of_pilot_that_mean_nothing_here_are_accepted_with_a_line_each():
    config = make_config({**REQUIRED, "memory_size": 0, "fixed_memory": False, "init_lr": 0.1, "tuned_epoch": 5})
    assert config == make_config(REQUIRED)
    assert not {"memory_size", "init_lr"} & config.as_dict().keys()
    assert config.remarks == [
        "memory_size has no effect here: no old images are kept",
        "fixed_memory has no effect here: no old images are kept",
        "init_lr has no effect here: the first task trains as the others do, lr=0.025",
        "tuned_epoch has no effect here: the number of epochs is epochs=20",
    ]


@pytest.mark.parametrize("name", UNUSED_KEYS)
def test_every_foreign_key_has_a_line_and_is_no_key_of_ours(name):
    (line,) = make_config({**REQUIRED, name: None}).remarks
    assert line.startswith(f"{name} has no effect here: ") and "{" not in line
    assert known_key(name) is None


def test_a_run_logs_what_a_foreign_key_means_here(digit_folder, run_main, tmp_path):
    outcome = run_main(tmp_path, data_path=str(digit_folder), epochs=1, memory_size=0, init_lr=0.1)
    assert outcome.code == 0
    assert "memory_size has no effect here: no old images are kept" in outcome.log()
    assert "init_lr has no effect here: the first task trains as the others do, lr=0.025" in outcome.log()


def test_a_methods_own_key_is_checked_and_stands_flat_in_the_json(path):
    config = make_config({**REQUIRED, "model_name": "knn", "neighbours": 3})
    assert config.own == {"neighbours": 3, "temperature": 0.07}
    assert config.as_dict()["neighbours"] == 3 and "own" not in config.as_dict()
    assert make_config(config.as_dict()) == config != make_config({**REQUIRED, "model_name": "knn"})
    assert load_config(path, ["model_name=fecam", "shrinkage=1e2"]).own == {"shrinkage": 100.0}
    with pytest.raises(ConfigError, match="shrinkage must be a number, got 'much'"):
        load_config(path, ["model_name=fecam", "shrinkage=much"])
