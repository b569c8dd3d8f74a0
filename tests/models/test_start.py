"""A classifier started from nothing: what it learns is what ``main.py`` learns, and nothing half-learned stays."""

import random
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from models import ContinualClassifier
from tests.conftest import ROOT, TINY, FinishedRun
from utils.errors import CheckpointError, ConfigError, DataError, NumericError
from utils.runs.checkpoint import CheckpointFolder

KEYS = {k: v for k, v in TINY.items() if k not in ("dataset", "init_cls", "increment", "num_workers", "cache_dir")}


def start(**keys: Any) -> ContinualClassifier:
    return ContinualClassifier.start(**{**KEYS, **keys})


def pixels(*names: str, each: int = 4, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(each * len(names), 3, 32, 32, generator=generator), [n for n in names for _ in range(each)]


def images_of(run: FinishedRun, split: str, names: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    folder = Path(run.config["data_path"]) / split
    found = [(path, name) for name in names for path in sorted((folder / name).glob("*.png"))]
    return [path for path, _ in found], [name for _, name in found]


def everything(model: ContinualClassifier) -> dict[str, torch.Tensor]:
    modules = {f"{i}.{name}": t for i, state in enumerate(model.module_states()) for name, t in state.items()}
    return {**model.learner.state_dict(), **modules}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_the_same_images_give_the_modules_of_main_bit_for_bit(finished_run):
    order = CheckpointFolder(finished_run.checkpoints).read_manifest().class_order
    assert list(order) != sorted(order)  # the config shuffles
    model = start()
    for first in range(0, 6, 2):
        model.learn(*images_of(finished_run, "train", order[first : first + 2]))
    wanted = ContinualClassifier.load(finished_run.checkpoints)
    assert_same(everything(model), everything(wanted))
    assert model.class_names == wanted.class_names == order
    found, run = model.evaluate(*images_of(finished_run, "test", order)), finished_run.json()["results"]
    assert found.keys() | {"batch_shuffled"} == run.keys() | {"batch_shuffled"}
    for name, result in found.items():
        assert result["top1"] == run[name]["last"] and result["per_task"] == run[name]["matrix"][-1], name
    assert found["sample"]["selection_accuracy"] == finished_run.json()["selection_accuracy"]["sample"][-1]


def test_learn_evaluate_predict_save_load_and_go_on(tmp_path):
    model = start(epochs=1, train_views=0)
    with pytest.raises(CheckpointError, match="nothing is learned yet"):
        model.predict(pixels("a")[0])
    with pytest.raises(CheckpointError, match="nothing is learned yet"):
        model.save(tmp_path / "nothing")
    model.learn(*pixels("owl", "fox"))
    model.learn(*pixels("bee", seed=1))
    assert (model.tasks, model.class_names) == (2, ("owl", "fox", "bee"))
    images, labels = pixels("owl", "fox")
    result = model.evaluate(images, iter(labels))  # of the first task alone
    assert result["oracle"]["per_task"][1] is None and 0 <= result["sample"]["top1"] <= 100
    model.save(tmp_path / "tosca")
    loaded = ContinualClassifier.load(tmp_path / "tosca")
    assert_same(everything(loaded), everything(model))
    for one in (model, loaded):
        one.learn(*pixels("cat", "dog", seed=2))
    assert_same(everything(loaded), everything(model))
    assert loaded.predict(images).classes == model.predict(images).classes
    model.save_pretrained(tmp_path / "hub")
    assert ContinualClassifier.from_pretrained(tmp_path / "hub").tasks == 3


def test_a_domain_brings_known_classes_again():
    model = start(model_name="ncm_lda")
    model.learn(*pixels("owl", "fox"), domain="photo")
    model.learn(*pixels("fox", "owl", seed=3), domain="sketch")
    assert (model.class_names, model.domains) == (("owl", "fox"), ("photo", "sketch"))
    assert model.row_class.tolist() == [0, 1, 1, 0]
    images, labels = pixels("owl", "fox", seed=3)
    assert model.evaluate(images, labels, domain="sketch")["sample"]["per_task"][0] is None
    with pytest.raises(DataError, match="give one of photo, sketch"):
        model.evaluate(images, labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [("okapi", "'okapi'"), (None, "None"), (["a", 3, "b", "c"], "got 3"), (["a", "b"], "4 images but 2 labels")],
)
def test_labels_are_a_name_for_each_image(labels, words):
    model = start(model_name="simplecil")
    for call in (model.learn, model.evaluate):
        if call == model.evaluate:
            model.learn(*pixels("x"))
        with pytest.raises(DataError, match=words):
            call(pixels("a")[0], labels)


def test_what_is_not_learned_cannot_be_tested():
    model = start(model_name="simplecil")
    model.learn(*pixels("owl"))
    with pytest.raises(DataError, match="class 'fox' is not learned"):
        model.evaluate(*pixels("fox"))


def test_a_wrong_key_is_said():
    with pytest.raises(ConfigError, match="start: unknown key 'epoch'"):
        start(epoch=3)
    with pytest.raises(ConfigError, match="a model has one seed"):
        start(seed=[1, 2])


@pytest.mark.parametrize("method", ["tosca", "tosca_white", "ranpac"])
def test_a_learn_that_fails_leaves_the_model_as_it_was(method, monkeypatch):
    monkeypatch.setattr("models.ranpac.RANDOM_FEATURES", 64)
    keys = {"white_features": 16} if method == "tosca_white" else {}
    model = start(model_name=method, **keys)
    model.learn(*pixels("owl", "fox"))
    before, manifest = everything(model), model.manifest
    real = type(model.learner).fit

    def failing(learner, task, on_epoch):
        real(learner, task, on_epoch)
        raise NumericError("the end")

    with monkeypatch.context() as patch:
        patch.setattr(type(model.learner), "fit", failing)
        with pytest.raises(NumericError):
            model.learn(*pixels("bee", "cat", seed=1))
    assert_same(everything(model), before)
    assert model.manifest is manifest
    twin = start(model_name=method, **keys)
    twin.learn(*pixels("owl", "fox"))
    for one in (model, twin):
        one.learn(*pixels("bee", "cat", seed=1))
    assert_same(everything(model), everything(twin))


def test_a_learn_interrupted_at_any_line_leaves_the_model_as_it_was():
    model = start(epochs=1, train_views=0)
    model.learn(*pixels("owl", "fox"))
    before, images = everything(model), pixels("bee", "cat", seed=1)
    answers = model.predict(images[0]).probabilities
    own, random_numbers = str(ROOT / "models"), random.Random(0)

    def interrupted_after(lines: int) -> int:
        """Learn, with Ctrl-C at that line of our models; return how many lines were left (0: it came)."""
        left = lines

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.startswith(own):
                return None
            left -= event == "line"
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            model.learn(*images)
        except KeyboardInterrupt:
            return 0
        finally:
            sys.settrace(None)
        return left

    whole = start(epochs=1, train_views=0)
    whole.learn(*pixels("owl", "fox"))
    model, kept = whole, model
    total = 10**9 - interrupted_after(10**9)
    model = kept
    assert total > 300
    for lines in [*sorted(random_numbers.sample(range(1, total - 1), 60)), total - 2, total - 1]:
        assert interrupted_after(lines) == 0
        assert (model.tasks, model.class_names) == (1, ("owl", "fox")), lines
        assert_same(everything(model), before)
    assert torch.equal(model.predict(images[0]).probabilities, answers)
    model.learn(*images)
    assert_same(everything(model), everything(whole))
    assert np.isfinite(model.evaluate(*images)["sample"]["top1"])


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_a_model_computes_as_a_run_whatever_mode_the_caller_is_in(mode):
    images, labels = pixels("owl", "fox")
    wanted = start(epochs=1, train_views=0)
    wanted.learn(images, labels)
    with mode():
        model = start(epochs=1, train_views=0)
        model.learn(images, labels)
        found = model.evaluate(images, labels)
        answers = model.predict(images)
    assert_same(everything(model), everything(wanted))
    assert found == wanted.evaluate(images, labels)
    assert torch.equal(answers.probabilities, wanted.predict(images).probabilities)
    model.learn(*pixels("bee", seed=1))
