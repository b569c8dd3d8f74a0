"""torch.compile: used where it pays and gives the same rows; what fails leaves the plain forward pass."""

import logging

import pytest
import torch
from torch import Tensor

from backbone import compiling
from backbone.vit import Backbone, load_backbone
from tests.conftest import tiny_config
from utils.errors import ConfigError

CPU = torch.device("cpu")


def load(**keys: object) -> Backbone:
    return load_backbone(tiny_config(**keys), CPU)


@pytest.fixture
def compile_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was handed to torch.compile, which gives it back as it is."""
    calls: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda features, dynamic: calls.append(features) or features)
    return calls


@pytest.mark.parametrize(
    ("mode", "forwards", "tried"), [(False, 10**9, 0), (True, 1, 1), (True, 0, 0), ("auto", 10, 0), ("auto", 10**9, 1)]
)
def test_auto_compiles_only_where_the_plain_passes_would_take_minutes(
    mode, forwards, tried, compile_calls, monkeypatch
):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/usr/bin/{name}")
    state = torch.get_rng_state()
    load(compile=mode).prepare(forwards, 2, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(compile_calls) == tried


def test_auto_needs_a_compiler_on_a_cpu(compile_calls, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    load(compile="auto").prepare(10**9, 2, 32)
    assert not compile_calls


def test_a_failure_is_one_warning_and_the_plain_path(monkeypatch, caplog):
    def fails(features, dynamic):
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", fails)
    backbone, images = load(compile=True), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    expected = backbone(images)
    backbone.prepare(100, 2, 32)
    assert torch.equal(backbone(images), expected)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "no C++ compiler" in message and "plain forward pass is used" in message and "\n" not in message


@pytest.mark.parametrize(("change", "word"), [(1.01, "changes features by"), (float("nan"), "changes features by")])
def test_rows_beyond_the_tolerance_are_refused(change, word, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda features, dynamic: lambda images: features(images) * change)
    backbone, images = load(compile=True), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    expected = backbone(images)
    backbone.prepare(100, 2, 32)
    assert torch.equal(backbone(images), expected) and word in caplog.text


def test_a_compiled_pass_that_is_faster_is_used_and_its_time_is_said(monkeypatch, caplog):
    used = []

    def compile_(features, dynamic):
        def faster(images: Tensor) -> Tensor:
            used.append(len(images))
            return features(images)

        return faster

    monkeypatch.setattr(torch, "compile", compile_)
    timed = compiling._timed
    monkeypatch.setattr(
        compiling, "_timed", lambda f, b: (timed(f, b)[0], 0.5 if isinstance(f, torch.nn.Module) else 0.1)
    )
    backbone = load(compile=True)
    with caplog.at_level(logging.INFO):
        backbone.prepare(100, 2, 32)
    assert (
        "torch.compile took" in caplog.text and "a batch takes 100 ms, by the plain forward pass 500 ms" in caplog.text
    )
    before = len(used)
    backbone(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert len(used) == before + 1


def test_the_key_takes_auto_true_and_false():
    assert [tiny_config(compile=value).compile for value in ("auto", True, False)] == ["auto", True, False]
    with pytest.raises(ConfigError, match="compile must be one of auto or true or false, got 'yes'"):
        tiny_config(compile="yes")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_compiled_rows_are_within_the_tolerance(precision):
    backbone = load(precision=precision)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        rows = torch.compile(backbone.features, dynamic=False)(images)
    plain = backbone(images)
    assert ((rows - plain).norm(dim=1) <= compiling.TOLERANCE[precision] * plain.norm(dim=1)).all()
