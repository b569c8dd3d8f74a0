import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.config.config import KEYS, known_key, load_config, make_config
from utils.config.foreign import UNUSED_KEYS
from utils.config.methods import METHODS
from utils.errors import ConfigError

REQUIRED = {"dataset": "cub", "init_cls": 10, "increment": 10, "backbone_type": "vit_base_patch16_224"}
EXPERIMENTS = sorted((ROOT / "exps").glob("*.json"))
# a config of the TOSCA release, all its keys and nothing else
RELEASE = {
    "prefix": "reproduce",
    "dataset": "cifar224",
    "shuffle": True,
    "init_cls": 5,
    "increment": 5,
    "model_name": "tosca",
    "backbone_type": "pretrained_vit_b16_224_in21k",
    "pretrained": True,
    "device": ["0"],
    "seed": [1993, 1994],
    "mlp_ratio": 16,
    "se_ratio": 16,
    "l1": 0.0005,
    "flow": "tosca_r",
    "epochs": 20,
    "batch_size": 48,
    "optimizer": "sgd",
    "scheduler": "steplr",
    "lr": 0.025,
    "weight_decay": 0,
    "milestones": [10, 15],
}


def write(folder: Path, values: object) -> Path:
    path = folder / "exp.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_a_config_of_the_release_loads_unchanged(tmp_path):
    config = load_config(write(tmp_path, RELEASE))
    assert {name: config.as_dict()[name] for name in RELEASE} == RELEASE
    assert config.backbone_name == "vit_base_patch16_224.augreg_in21k"


def test_defaults_are_those_of_the_release():
    config = make_config(REQUIRED)
    expected = {
        "shuffle": True,
        "model_name": "tosca",
        "pretrained": True,
        "seed": (1993,),
        "mlp_ratio": 16,
        "se_ratio": 16,
        "l1": 0.0005,
        "flow": "tosca",
        "epochs": 20,
        "batch_size": 48,
        "optimizer": "sgd",
        "scheduler": "cosine",
        "lr": 0.025,
        "weight_decay": 0.0,
        "milestones": (10, 15),
        "image_size": 224,
        "normalize": False,
        "precision": "auto",
        "checkpoint_dir": "tosca",
        "log_dir": "logs",
        "new_rows": "zeros",
        "old_rows": "train",
        "sigma": "learned",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert all(getattr(config, name) is None for name in ("data_path", "backbone_weights", "train_views", "cache_dir"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_experiment_serves_every_method(path, method):
    """One file for each data set: another method keeps its protocol and the features that it needs."""
    config, tosca = load_config(path, [f"model_name={method}"]), load_config(path)
    assert make_config(config.as_dict()) == config
    assert config.model_name == method
    for name, key in KEYS.items():
        assert getattr(config, name) == getattr(tosca, name) or key.affects == "method"


def test_there_is_one_experiment_for_each_data_set_of_the_paper():
    names = [path.stem for path in EXPERIMENTS]
    assert names == sorted(
        f"tosca_{data}" for data in ["cifar", "cub", "ina", "inr", "omni", "vtab", "objectnet", "demo"]
    )


@pytest.mark.parametrize("page", ["README.md", "exps/README.md", "docs/baselines.md", "docs/extending.md"])
def test_the_commands_of_the_documents_name_experiments_that_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("$data", "cub").replace("exps/my_pets.json", "")
    for name, method in re.findall(r"--config=(exps/\S+\.json)(?: model_name=(\w+))?", text):
        assert (ROOT / name).is_file(), f"{page}: {name}"
        assert method in {*METHODS, "", "pnorm"}, f"{page}: {method}"
    swept = {name for names in re.findall(r"model_name=([\w,]+)", text) for name in names.split(",")}
    assert swept <= {*METHODS, "pnorm"}, page


@pytest.mark.parametrize(
    ("name", "dataset", "step", "selection"),
    [
        ("cifar", "cifar224", 5, "batch"),
        ("cub", "cub", 10, "batch"),
        ("ina", "imageneta", 20, "batch"),
        ("inr", "imagenetr", 20, "batch"),
        ("omni", "omnibenchmark", 30, "batch"),
        ("vtab", "vtab", 10, "batch"),
        ("objectnet", "objectnet", 20, "sample"),
    ],
)
def test_the_benchmarks_run_as_published(name, dataset, step, selection):
    path = ROOT / "exps" / f"tosca_{name}.json"
    config = load_config(path)
    assert (config.dataset, config.init_cls, config.increment, config.selection) == (dataset, step, step, selection)
    assert (config.seed, config.prefix, config.model_name) == ((1993,), "reproduce", "tosca")
    assert config.backbone_name == "vit_base_patch16_224.augreg_in21k"
    assert RELEASE.keys() <= json.loads(path.read_text()).keys()
    defaults = make_config(REQUIRED)
    trained_by = ("mlp_ratio", "se_ratio", "l1", "flow", "epochs", "batch_size", "optimizer", "scheduler", "lr")
    for key in (*trained_by, "weight_decay", "milestones", "train_views", "image_size", "normalize", "shuffle"):
        assert getattr(config, key) == getattr(defaults, key), key


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
    ("override", "key", "value"),
    [
        ("epochs=5", "epochs", 5),
        ("lr=0.1", "lr", 0.1),
        ("lr=1", "lr", 1.0),
        ("l1=1e-4", "l1", 1e-4),
        ("shuffle=false", "shuffle", False),
        ("seed=7", "seed", (7,)),
        ("seed=1993,1994", "seed", (1993, 1994)),
        ("seed=[1, 2]", "seed", (1, 2)),
        ("device=-1", "device", ("-1",)),
        ("device=cpu", "device", ("cpu",)),
        ("device=0,1", "device", ("0", "1")),
        ('device=["0"]', "device", ("0",)),
        ("milestones=3,6", "milestones", (3, 6)),
        ("train_views=0", "train_views", 0),
        ("train_views=null", "train_views", None),
        ("data_path=/a b/c=d", "data_path", "/a b/c=d"),
        ("cache_dir=none", "cache_dir", "none"),
        ("prefix=12", "prefix", "12"),
        ("sigma=16", "sigma", 16.0),
        ("sigma=learned", "sigma", "learned"),
        ("flow=adapter", "flow", "adapter"),
    ],
)
def test_an_override_replaces_a_key(tmp_path, override, key, value):
    found = getattr(load_config(write(tmp_path, REQUIRED), [override]), key)
    assert found == value and type(found) is type(value)


def test_the_last_override_of_a_key_counts(tmp_path):
    assert load_config(write(tmp_path, REQUIRED), ["epochs=5", "epochs=6"]).epochs == 6


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("seed", 7, (7,)),
        ("seed", [7, 8], (7, 8)),
        ("device", "-1", ("-1",)),
        ("device", -1, ("-1",)),
        ("device", [0], ("0",)),
        ("device", ["0", 1], ("0", "1")),
        ("device", "cpu", ("cpu",)),
    ],
)
def test_lists_may_be_given_as_a_plain_value_and_devices_as_numbers(key, given, value):
    assert getattr(make_config({**REQUIRED, key: given}), key) == value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epoch": 3}, ["unknown key 'epoch'", "value 3", "nearest known key is 'epochs'"]),
        ({"optimiser": "sgd"}, ["'optimiser'", "'sgd'", "'optimizer'"]),
        ({"zzz": None}, ["unknown key 'zzz'", "nearest known key is"]),
        ({"flow": "tosca_l"}, ["flow", "'tosca_l'", "tosca, tosca_r, adapter, calibrator", "did you mean 'tosca"]),
        ({"optimizer": "adamx"}, ["optimizer", "sgd, adam, adamw", "'adamx'", "did you mean 'adam"]),
        ({"scheduler": "step"}, ["scheduler", "cosine, steplr, constant", "'step'"]),
        ({"dataset": "imagenet_r"}, ["dataset", "'imagenet_r'", "did you mean 'imagenetr'?"]),
        ({"model_name": "toska"}, ["model_name", "did you mean 'tosca'?"]),
        ({"epochs": "20"}, ["epochs must be a whole number, got '20'"]),
        ({"epochs": 2.5}, ["epochs must be a whole number, got 2.5"]),
        ({"epochs": True}, ["epochs must be a whole number, got True"]),
        ({"epochs": 0}, ["epochs must be at least 1, got 0"]),
        ({"init_cls": 0}, ["init_cls must be at least 1"]),
        ({"increment": -1}, ["increment must be at least 1"]),
        ({"batch_size": 0}, ["batch_size must be at least 1"]),
        ({"lr": 0}, ["lr must be above 0"]),
        ({"lr": float("nan")}, ["lr must be a finite number"]),
        ({"l1": -0.1}, ["l1 must be at least 0"]),
        ({"train_views": -1}, ["train_views must be at least 0"]),
        ({"shuffle": 1}, ["shuffle must be true or false, got 1"]),
        ({"shuffle": "yes"}, ["shuffle must be true or false, got 'yes'"]),
        ({"seed": []}, ["seed must not be empty"]),
        ({"seed": [1, 1]}, ["seed [1, 1] repeats a value"]),
        ({"seed": ["a"]}, ["seed must be a whole number, got 'a'"]),
        ({"seed": 2**32}, ["seed must be below 2**32"]),
        ({"seed": [-3]}, ["seed must be at least 0, got -3"]),
        ({"device": []}, ["device must not be empty"]),
        ({"device": "cuda:0"}, ["device", "'cuda:0'", '"-1", "cpu"']),
        ({"device": ["-2"]}, ["device", "'-2'"]),
        ({"milestones": [0]}, ["milestones must be at least 1"]),
        ({"data_path": 5}, ["data_path must be text or null, got 5"]),
        ({"prefix": "a/b"}, ["prefix must not contain a path separator", "'a/b'"]),
        ({"sigma": "fixed"}, ["sigma", "learned", "'fixed'"]),
        ({"sigma": 0}, ["sigma must be above 0"]),
        ({"backbone_type": ""}, ["backbone_type must name a timm model"]),
    ],
)
def test_a_mistake_is_one_line_that_names_file_key_value_and_what_is_allowed(tmp_path, values, words):
    path = write(tmp_path, {**REQUIRED, **values})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_a_required_key_that_is_missing_is_named(tmp_path, key):
    values = {name: value for name, value in REQUIRED.items() if name != key}
    with pytest.raises(ConfigError, match=f"required key '{key}' is missing"):
        load_config(write(tmp_path, values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"epochs": 3,}', r"line 1, column \d+.*not JSON"),
        ("", r"line 1, column 1"),
        ("[1, 2]", "a config is one JSON object"),
        ('{"epochs": 3, "epochs": 4}', "key 'epochs' stands twice"),
    ],
)
def test_a_file_that_is_not_a_flat_json_object_is_explained(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_file_that_does_not_exist_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json: cannot be read.*exps/"):
        load_config(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "'epochs' is not an override; write key=value"),
        ("epoch=5", "unknown key 'epoch'.*'epochs'"),
        ("epochs=many", "epochs must be a whole number, got 'many'"),
    ],
)
def test_a_wrong_override_is_explained(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, REQUIRED), [override])


def test_a_config_cannot_be_changed():
    config = make_config(REQUIRED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3


@pytest.mark.parametrize(("train_views", "epochs", "views"), [(None, 7, 7), (0, 7, 0), (3, 7, 3), (9, 7, 7)])
def test_views_are_one_an_epoch_unless_fewer_are_asked_for(train_views, epochs, views):
    assert make_config({**REQUIRED, "train_views": train_views, "epochs": epochs}).views == views


def test_every_key_has_a_line_of_documentation():
    assert [key.name for key in KEYS.values() if not key.doc] == []


def test_reading_a_config_imports_nothing_heavy():
    code = (
        "import sys; import utils.config.config; print(sorted({'torch', 'numpy', 'timm', 'PIL'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_wrong_key_is_answered_before_anything_heavy_is_imported(tmp_path):
    path = write(tmp_path, {**REQUIRED, "epoch": 1})
    code = f"import sys, main; code = main.main(['--config={path}']); print(code, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "2 False"
    assert len(found.stderr.strip().splitlines()) == 1 and "'epochs'" in found.stderr


# -- ranges, foreign keys, bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "seeds"),
    [
        ("seed=1993-1997", (1993, 1994, 1995, 1996, 1997)),
        ("seed=7-7", (7,)),
        ("seed=1-3,9", (1, 2, 3, 9)),
        ('seed=["1-2", 5]', (1, 2, 5)),
    ],
)
def test_a_range_stands_for_its_numbers(tmp_path, override, seeds):
    assert load_config(write(tmp_path, REQUIRED), [override]).seed == seeds
    value = override.partition("=")[2]
    if "," not in value:
        assert make_config({**REQUIRED, "seed": value}).seed == seeds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1997-1993", "'1997-1993' is not a range: give the smaller number first"),
        ("0-99999", "at most 1000"),
        ("1-3-5", "must be a whole number, got '1-3-5'"),
        (["1-3", 2], r"repeats a value"),
        ("4294967290-4294967299", r"below 2\*\*32"),
    ],
)
def test_a_range_that_is_none_is_explained(value, message):
    with pytest.raises(ConfigError, match=message):
        make_config({**REQUIRED, "seed": value})


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


def test_a_run_logs_what_a_foreign_key_means_here(digit_folder, run_main, tmp_path):
    outcome = run_main(tmp_path, data_path=str(digit_folder), epochs=1, memory_size=0, init_lr=0.1)
    assert outcome.code == 0
    (log,) = (tmp_path / "logs").rglob("*.log")
    text = log.read_text(encoding="utf-8")
    assert "memory_size has no effect here: no old images are kept" in text
    assert "init_lr has no effect here: the first task trains as the others do, lr=0.025" in text


@pytest.mark.parametrize(
    "names",
    [
        ("memory_size", "memory_per_class", "fixed_memory", "print_forget", "init_lr", "tuned_epoch", "min_lr"),
        ("reinit_optimizer", "init_milestones", "init_lr_decay", "init_epoch", "init_weight_decay"),  # LAMDA-PILOT
        ("lrate", "lrate_decay"),  # PyCIL
        ("ffn_num", "vpt_type", "prompt_token_num", "use_RP", "M"),  # LAMDA-PILOT's RanPAC and adapters
    ],
)
def test_keys_of_other_toolboxes_are_accepted_with_a_line_each(names):
    remarks = make_config({**REQUIRED, **dict.fromkeys(names, 0)}).remarks
    assert [remark.split()[0] for remark in remarks] == list(names)


@pytest.mark.parametrize("name", UNUSED_KEYS)
def test_every_foreign_key_has_a_line_and_is_no_key_of_ours(name):
    (line,) = make_config({**REQUIRED, name: None}).remarks
    assert line.startswith(f"{name} has no effect here: ") and "{" not in line
    assert known_key(name) is None


@pytest.mark.parametrize(
    "key", [k for k in KEYS.values() if k.kind in (int, int | None, tuple[int, ...])], ids=lambda key: key.name
)
def test_a_huge_number_is_one_line_or_bounded_by_the_data(key):
    """``init_cls``, ``increment`` and the ratios are bounded by what they divide, once the data are known."""
    if key.name in ("init_cls", "increment", "mlp_ratio", "se_ratio"):
        assert make_config({**REQUIRED, key.name: 10**15})
        return
    for huge in (9 * 10**18, 10**30):
        with pytest.raises(ConfigError, match=rf"{key.name}|seed must be") as caught:
            make_config({**REQUIRED, key.name: huge})
        assert "\n" not in str(caught.value)


# -- keys that one method alone has -----------------------------------------------------------------------------------


def test_a_methods_own_key_is_checked_and_stands_flat_in_the_json():
    config = make_config({**REQUIRED, "model_name": "knn", "neighbours": 3})
    assert config.own == {"neighbours": 3, "temperature": 0.07}
    assert config.as_dict()["neighbours"] == 3 and "own" not in config.as_dict()
    assert make_config(config.as_dict()) == config
    assert config != make_config({**REQUIRED, "model_name": "knn"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_name": "knn", "neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"model_name": "knn", "neighbours": 1.5}, "neighbours must be a whole number, got 1.5"),
        ({"neighbours": 3}, "key 'neighbours' belongs to knn, but model_name is 'tosca'.*set model_name=knn"),
        ({"model_name": "knn", "neighbour": 3}, "unknown key 'neighbour'.*nearest known key is 'neighbours'"),
        ({"own": {}}, "unknown key 'own'"),
    ],
)
def test_a_mistake_in_a_methods_own_key_is_explained(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_config({**REQUIRED, **values})
    assert "\n" not in str(caught.value)


def test_a_methods_own_key_is_read_from_the_command_line_by_its_type(tmp_path):
    path = write(tmp_path, REQUIRED)
    assert load_config(path, ["model_name=fecam", "shrinkage=1e2"]).own == {"shrinkage": 100.0}
    with pytest.raises(ConfigError, match="shrinkage must be a number, got 'much'"):
        load_config(path, ["model_name=fecam", "shrinkage=much"])
