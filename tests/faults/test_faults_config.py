"""Whatever stands in a config or on the command line: a valid config, or one line and exit code 2."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from utils.config.config import KEYS, Config, load_config, make_config
from utils.errors import ConfigError

VALID = {"dataset": "digits", "init_cls": 2, "increment": 2, "backbone_type": "glyphs_vit"}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**32, 2**63, 10**400, 1e308, -0.0, float("nan"), float("inf"), "", "-1", "0", "tosca"])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(error: ConfigError) -> None:
    assert len(str(error).splitlines()) == 1, str(error)


@SETTINGS
@given(st.dictionaries(st.sampled_from(sorted(KEYS)) | st.text(max_size=10), JSON, max_size=4))
def test_random_values_give_one_line_or_a_config_that_survives_a_round_trip(values):
    try:
        config = make_config({**VALID, **values})
    except ConfigError as error:
        check(error)
    else:
        assert make_config(config.as_dict()) == config
        assert json.loads(json.dumps(config.as_dict(), allow_nan=False)) == config.as_dict()


@SETTINGS
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(KEYS)) | st.text(max_size=6), st.text(max_size=12) | JSON.map(str)), max_size=3
    )
)
def test_random_overrides_give_one_line_or_a_config(tmp_path, pairs):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VALID))
    try:
        config = load_config(path, [f"{key}={value}" for key, value in pairs])
    except ConfigError as error:
        check(error)
    else:
        assert isinstance(config, Config)


@SETTINGS
@given(st.binary(max_size=30) | st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_random_bytes_as_a_file_give_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    check(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("init_cls=7", ["init_cls 7", "number of classes in the data, 6"]),
        ("mlp_ratio=129", ["mlp_ratio 129", "feature width 128"]),
        ("se_ratio=4096", ["se_ratio 4096", "feature width 128"]),
        ("device=0,1", ["device", "torchrun"]),
        ("backbone_type=vit_gigantic", ["backbone_type", "'vit_gigantic'"]),
        ("checkpoint_dir=", ["checkpoint_dir", "not empty"]),
        ("data_path=/nowhere", ["/nowhere", "train/<class>"]),
        ("log_dir=~nobody-of-this-name/logs", ["log_dir", "home folder"]),
    ],
)
def test_an_impossible_value_is_one_line_and_exit_code_2_and_nothing_is_written(run, override, words):
    error = run(override).error
    assert all(word in error for word in words), error
    assert not run.checkpoints.exists()
    assert not run.logs.exists()


def test_a_cuda_device_that_is_absent_is_one_line(run, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    error = run(device=["5"]).error
    assert "device 5 does not exist: this machine has 2 cuda device(s), 0 to 1" in error


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["--config"], ["epochs"], ["--fresh=maybe"]])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(arguments, capsys):
    assert main.main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
