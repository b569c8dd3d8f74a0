"""The first session in a run: what it saves, who reads that, and when it is trained again."""

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone.adapters import adapter_state, load_adapters
from backbone.create import load_model
from backbone.flops import whole_forward_flops
from backbone.forward import make_features
from models import ContinualClassifier, first_session
from models.api.export import as_module
from tests.conftest import Outcome, fork, tiny_config
from trainer import dry_run
from utils.config.grid import SweepCell, make_grid
from utils.data.datasets import load_dataset
from utils.data.transforms import Transforms
from utils.errors import ConfigError, NumericError
from utils.results.metrics import BY_RELEASE, INFERENCE
from utils.runs.checkpoint import CheckpointFolder, load_tensors

SESSION = {"first_session": "adapter", "first_session_epochs": 2, "first_session_lr": 0.5}
Run = Callable[..., Outcome]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever adapters are trained."""
    calls, adapt = list[int](), first_session.adapt

    def noted(*arguments: Any) -> Any:
        calls.append(1)
        return adapt(*arguments)

    monkeypatch.setattr(first_session, "adapt", noted)
    return calls


@pytest.fixture(scope="module")
def shared(digit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keys of all runs here: one data set, one cache."""
    return {**SESSION, "data_path": str(digit_folder), "cache_dir": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module", params=["ranpac", "aper", "tosca"])
def adapted(
    request: pytest.FixtureRequest, run_main: Run, shared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcome]:
    """A finished run with a first session."""
    outcome = run_main(tmp_path_factory.mktemp(request.param), model_name=request.param, **shared)
    assert outcome.code == 0
    yield outcome


def state_of(outcome: Outcome) -> dict[str, Tensor]:
    return load_tensors(outcome.checkpoints / "first_session.pth")


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_adapters_are_saved_and_named_and_the_identity_keeps_the_plain_weights(adapted: Outcome, shared) -> None:
    manifest = CheckpointFolder(adapted.checkpoints).read_manifest()
    assert manifest is not None and "first_session.pth" in manifest.files
    plain = ContinualClassifier.start(**{k: adapted.config[k] for k in ("backbone_type", "pretrained", "image_size")})
    assert manifest.identity["weights_sha256"] == plain.backbone.weights_sha256
    assert {name: manifest.identity[name] for name in SESSION} == SESSION
    assert adapted.json()["seconds"]["train"] > 0 and adapted.json()["cost"]["Peak Train Mem. (MB)"] > 0


def test_the_features_are_those_of_the_backbone_with_the_saved_adapters(adapted: Outcome) -> None:
    config = tiny_config(**{k: v for k, v in adapted.config.items() if k not in ("checkpoint_dir", "log_dir")})
    test = load_dataset(config).test
    pixels = torch.stack([Transforms(32, 0).test(test.load(index)) for index in range(len(test))])
    plain, model = (load_model(config)[1] for _ in range(2))
    load_adapters(model, state_of(adapted))
    parts = [make_features(model, precision="fp32", normalize=False)]
    if config.model_name == "aper":
        parts.insert(0, make_features(plain, precision="fp32", normalize=False))
    with torch.no_grad():
        wanted = torch.cat([features(pixels) for features in parts], dim=1)
    loaded = ContinualClassifier.load(adapted.checkpoints)
    torch.testing.assert_close(loaded.extract_features(pixels), wanted, rtol=0, atol=1e-6)
    found = loaded.predict([test.load(index) for index in range(len(test))])
    with np.load(adapted.log_file().with_suffix(".npz")) as answers:
        order = [list(answers["files"]).index(key) for key in test.keys]
        assert found.top[:, 0].tolist() == answers["sample.class"][order].tolist()


def test_the_release_procedure_counts_every_network_that_is_read(adapted: Outcome) -> None:
    loaded = ContinualClassifier.load(adapted.checkpoints).backbone
    parts = loaded.parts or (loaded,)
    assert len(parts) == (2 if adapted.config["model_name"] == "aper" else 1)
    wanted = sum(whole_forward_flops(part.model, 32) for part in parts)
    assert loaded.whole_flops == wanted
    assert adapted.json()["cost"][INFERENCE + BY_RELEASE] > 0.99 * wanted / 1e9


def test_another_method_and_a_second_run_train_no_more(
    adapted: Outcome, shared: dict[str, Any], run_main: Run, tmp_path: Path, trained: list[int]
) -> None:
    again = run_main(tmp_path, model_name="simplecil", **shared)
    assert equal(state_of(again), state_of(adapted)) and not trained
    assert again.json()["backbone_forwards"] == 0  # ranpac, aper and tosca have read the same bank
    other = run_main(tmp_path / "seed", model_name="simplecil", **{**shared, "seed": [1]})
    assert not equal(state_of(other), state_of(adapted))


def test_all_that_is_made_of_the_run_answers_the_same(adapted: Outcome, tmp_path: Path) -> None:
    model, pixels = ContinualClassifier.load(adapted.checkpoints), torch.randint(0, 256, (3, 3, 32, 32)).byte()
    wanted = model.classify_features(model.extract_features(pixels))
    (saved := tmp_path / "saved").mkdir()
    model.save(saved)
    copies = [pickle.loads(pickle.dumps(model)), ContinualClassifier.load(saved)]
    copies.append(ContinualClassifier.from_pretrained(model.save_pretrained(tmp_path / "hub")))
    for copied in copies:
        found = copied.classify_features(copied.extract_features(pixels))
        assert torch.equal(found.probabilities, wanted.probabilities)
    exported = as_module(model)
    with torch.no_grad():
        scores = exported(pixels)[0].softmax(dim=1)
        program = torch.export.export(exported, (pixels,), strict=False).module()
        torch.testing.assert_close(program(pixels)[0], exported(pixels)[0])
    torch.testing.assert_close(scores.topk(5, dim=1).values, wanted.probabilities, rtol=0, atol=1e-5)


def test_killed_in_the_middle_it_ends_with_the_same_bits(
    run_main: Run, shared: dict[str, Any], adapted: Outcome, tmp_path: Path, trained: list[int]
) -> None:
    keys = {**shared, "cache_dir": str(tmp_path / "cache"), "model_name": adapted.config["model_name"]}
    child = fork()
    if child == 0:
        steps, step = [], torch.optim.SGD.step

        def killed(self: Any, *arguments: Any) -> Any:
            steps.append(1)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *arguments)

        torch.optim.SGD.step = killed
        run_main(tmp_path, **keys)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list(tmp_path.rglob("first_session.pth"))
    assert run_main(tmp_path, **keys).code == 0
    assert trained and equal(load_tensors(tmp_path / "tosca" / "first_session.pth"), state_of(adapted))


def test_a_run_that_goes_on_reads_the_adapters_of_its_folder(
    run_main: Run, shared: dict[str, Any], tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**shared, "cache_dir": "none", "model_name": "simplecil"}
    whole = run_main(tmp_path / "whole", **keys)
    learn, tasks = ContinualClassifier.learn_task, []

    def stopped(self: Any, *arguments: Any) -> None:
        tasks.append(1)
        if len(tasks) == 2:
            raise KeyboardInterrupt
        learn(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualClassifier, "learn_task", stopped)
        run_main(tmp_path / "run", **keys)
    trained.clear()
    outcome = run_main(tmp_path / "run", **keys)
    assert outcome.code == 0 and not trained and equal(state_of(outcome), state_of(whole))
    assert outcome.json()["results"] == whole.json()["results"]


def test_what_is_learned_on_top_keeps_the_adapters_and_others_are_refused(
    adapted: Outcome, shared: dict[str, Any], run_main: Run, make_folder: Any, tmp_path: Path, trained, capsys
) -> None:
    more = make_folder(tmp_path / "images", classes=9)
    for name in map(str, range(6)):
        for split in ("train", "test"):
            for path in (more / split / name).iterdir():
                path.unlink()
            (more / split / name).rmdir()
    keys = {**shared, "data_path": str(more), "model_name": adapted.config["model_name"], "init_cls": 3}
    keys |= {"increment": 3, "continue_from": str(adapted.checkpoints)}
    assert run_main(tmp_path / "wrong", **{**keys, "first_session_lr": 0.1}).code == 2
    assert "first_session_lr 0.1 is not that of the run" in capsys.readouterr().err
    outcome = run_main(tmp_path / "right", **keys)
    assert outcome.code == 0 and not trained and equal(state_of(outcome), state_of(adapted))
    assert len(ContinualClassifier.load(outcome.checkpoints).class_names) == 9


@pytest.mark.parametrize("name", ["ranpac", "aper"])
def test_a_model_that_learns_in_python_trains_them_in_its_first_task(name: str, tmp_path: Path, monkeypatch) -> None:
    keys = {k: v for k, v in {**tiny_config().as_dict(), **SESSION}.items() if k not in ("dataset", "data_path")}
    model = ContinualClassifier.start(**{**keys, "model_name": name})
    plain, images = model.backbone, list(torch.randint(0, 256, (8, 3, 32, 32)).byte())
    labels = ["a", "b"] * 4
    with monkeypatch.context() as patch:
        patch.setattr(ContinualClassifier, "learn_task", lambda *_: (_ for _ in ()).throw(NumericError("no")))
        with pytest.raises(NumericError):
            model.learn(images, labels)
    assert model.backbone is plain
    model.learn(images, labels)
    adapters = model.backbone.adapters
    assert adapters and any(bool(value.any()) for key, value in adapters.items() if "up" in key)
    model.learn(images, ["c", "d"] * 4)
    assert model.backbone.adapters is adapters
    model.save(tmp_path / "saved")
    assert ContinualClassifier.load(tmp_path / "saved").predict(images).classes == model.predict(images).classes


def test_bf16_answers_with_the_adapters_and_is_exported_in_fp32(
    shared: dict[str, Any], run_main: Run, tmp_path: Path
) -> None:
    outcome = run_main(tmp_path, model_name="aper", precision="bf16", **shared)
    model, pixels = ContinualClassifier.load(outcome.checkpoints), torch.randint(0, 256, (4, 3, 32, 32)).byte()
    with torch.no_grad():
        exact = as_module(model).features(pixels)
    assert torch.cosine_similarity(model.extract_features(pixels), exact).min() >= 0.9999
    assert equal(adapter_state(as_module(model).features.model), state_of(outcome))


def test_a_dry_run_counts_the_images_of_the_session_and_the_features_that_are_missing(
    shared: dict[str, Any], run_main: Run, tmp_path: Path, trained, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {**shared, "cache_dir": str(tmp_path / "cache"), "model_name": "aper"}
    places = {"checkpoint_dir": str(tmp_path / "tosca"), "log_dir": str(tmp_path / "logs")}

    def planned() -> dict[str, Any]:
        (plan,) = dry_run([SweepCell("", tiny_config(**keys, **places))])
        return plan

    caplog.set_level("INFO")
    plan = planned()
    assert plan["forwards"] == 2 * (24 + 15) and not trained
    assert "First session, all seeds: takes about as long as 48 forward passes" in caplog.text
    outcome = run_main(tmp_path, **keys)
    assert outcome.json()["backbone_forwards"] == plan["forwards"]
    assert str(outcome.checkpoints / "first_session.pth") in plan["files"]
    caplog.clear()
    assert planned()["forwards"] == 0 and "First session" not in caplog.text


def test_a_backbone_that_takes_no_adapters_is_refused_before_anything_is_written(
    shared: dict[str, Any], run_main: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**shared, "cache_dir": "none", "backbone_type": "eva02_tiny_patch14_224", "image_size": 28}
    assert run_main(tmp_path, **keys).code == 2
    assert "first_session: adapters go into the plain blocks of a ViT" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists() and not (tmp_path / "tosca").exists()


def test_equal_runs_have_equal_configs_and_aper_is_never_without(tmp_path: Path) -> None:
    assert tiny_config(first_session_lr=0.5) == tiny_config()
    assert tiny_config(model_name="aper") == tiny_config(model_name="aper", first_session="adapter")
    (path := tmp_path / "config.json").write_text('{"dataset": "digits", "init_cls": 2, "increment": 2}')
    sweep = ["model_name=ranpac,aper", "first_session=none,adapter"]
    cells = make_grid([path], ["backbone_type=glyphs_vit"], sweep)
    assert [cell.name for cell in cells] == [
        "model_name=ranpac,first_session=none",
        "model_name=ranpac,first_session=adapter",
        "model_name=aper,first_session=adapter",
    ]
    with pytest.raises(ConfigError, match="first_session must be one of none, adapter"):
        tiny_config(first_session="prompt")
