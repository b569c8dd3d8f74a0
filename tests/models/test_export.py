"""The model as one module and as a file: the answers of ``predict``, for any number of images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
from backbone.vit import load_backbone
from models import ContinualClassifier
from models.export import ImageClassifier, as_module, export
from models.registry import make_learner
from tests.conftest import tiny_config
from utils.errors import CheckpointError, ConfigError, UserError
from utils.runs.checkpoint import MANIFEST

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def saved(finished_run) -> ContinualClassifier:
    return ContinualClassifier.load(finished_run.checkpoints)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def check(model: ContinualClassifier, answer, selection: str) -> None:
    """``answer`` (uint8 images to scores, module, entropy) gives what ``predict`` does."""
    for count in (1, 2, 7):
        features = model.extract_features(images(count))  # predict's path for pixels that passed the test transform
        expected = model.classify_features(features, len(model.class_names), selection)
        scores, module, _entropy = (torch.as_tensor(np.asarray(value)) for value in answer(images(count)))
        probabilities = scores.softmax(dim=1)
        torch.testing.assert_close(probabilities.gather(1, expected.top), expected.probabilities, **CLOSE)
        assert torch.equal(module, expected.module)
        if selection == "sample":
            torch.testing.assert_close(_entropy, expected.entropy, **CLOSE)


@pytest.mark.parametrize("selection", ["sample", "lda", "ridge"])
def test_the_module_answers_as_predict_does(saved, selection):
    check(saved, as_module(saved, selection), selection)


def test_a_selection_that_looks_at_several_images_is_refused(saved):
    with pytest.raises(ConfigError, match="selection 'batch' cannot answer single images"):
        as_module(saved, "batch")


def test_a_class_scores_its_best_row(saved):
    rows = len(saved.row_class)
    row_class = torch.arange(rows) // 2  # as if every class had come in two domains
    plain, joined = (
        ImageClassifier(saved.backbone.features, saved.learner, of)(images(3))[0]
        for of in (torch.arange(rows), row_class)
    )
    torch.testing.assert_close(joined, plain.unflatten(1, (-1, 2)).amax(dim=2))


def test_pt2_by_the_command(saved, finished_run, tmp_path, capsys):
    path = tmp_path / "model.pt2"
    assert predict.main(["--checkpoint", str(finished_run.checkpoints), "--export", str(path)]) == 0
    about = {"classes.json": ""}
    program = torch.export.load(path, extra_files=about)
    check(saved, program.module(), "sample")
    assert json.loads(about["classes.json"])["classes"] == list(saved.class_names)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_onnx(saved, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(export(saved, tmp_path / "model.onnx", "sample")))
    check(saved, lambda batch: session.run(None, {"images": batch.numpy()}), "sample")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(saved.class_names)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_hundred_modules(tmp_path, suffix):
    config = tiny_config()
    backbone = load_backbone(config, CPU)
    learner = make_learner(config, backbone.feature_dim, CPU, 0)
    generator = torch.Generator().manual_seed(0)
    for task in range(100):
        features = torch.randn(6, backbone.feature_dim, generator=generator)
        learner.learn(_Features(task, features))

    class Model:
        pass

    model = Model()
    model.backbone, model.learner, model.config = backbone, learner, config
    model.row_class, model.class_names, model.selection = np.arange(200), [str(i) for i in range(200)], "sample"
    path = export(model, tmp_path / f"model{suffix}")
    if suffix == ".pt2":
        answer = torch.export.load(path).module()
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))

        def answer(batch):
            return session.run(None, {"images": batch.numpy()})

    for count in (1, 5):
        expected = learner.answer(backbone(images(count)))
        scores, module, entropy = (torch.as_tensor(np.asarray(value)) for value in answer(images(count)))
        torch.testing.assert_close(scores, expected.scores, **CLOSE)
        torch.testing.assert_close(entropy, expected.entropy, **CLOSE)
        assert torch.equal(module, expected.module)


class _Features:
    """A task of two classes with three images each."""

    new_rows = 2

    def __init__(self, index: int, features: torch.Tensor) -> None:
        self.index, self.first_row, self.features = index, 2 * index, features
        self.labels = torch.tensor([0, 0, 0, 1, 1, 1]) + self.first_row

    def epoch(self, epoch: int) -> torch.Tensor:
        return self.features

    def test_view(self) -> torch.Tensor:
        return self.features


def test_the_suffix_says_the_format(saved, tmp_path):
    with pytest.raises(UserError, match=r"model\.bin.*\.pt2 or \.onnx"):
        export(saved, tmp_path / "model.bin")


def test_a_missing_package_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("models.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx and onnxscript: pip install onnx onnxscript"):
        export(saved, tmp_path / "model.onnx")


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_and_answers_as_before(saved, tmp_path):
    folder = saved.save_pretrained(tmp_path / "model")
    loaded = ContinualClassifier.from_pretrained(folder)
    assert torch.equal(loaded.predict(images(4)).probabilities, saved.predict(images(4)).probabilities)


def test_the_backbones_file_goes_with_the_model(finished_run, tmp_path, saved):
    weights = tmp_path / "vit.pth"
    torch.save(saved.backbone.model.state_dict(), weights)
    model = ContinualClassifier.load(finished_run.checkpoints, backbone_weights=weights)
    folder = model.save_pretrained(tmp_path / "model")
    weights.unlink()
    loaded = ContinualClassifier.from_pretrained(folder)
    assert torch.equal(loaded.predict(images(4)).probabilities, saved.predict(images(4)).probabilities)


def test_the_card_holds_data_protocol_every_selection_and_the_command(saved, finished_run, tmp_path):
    card = (saved.save_pretrained(tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: tosca\n")
    assert "3 tasks of 2, 2, 2 classes, seed 1993" in card and "24 training" in card
    for name, result in finished_run.json()["results"].items():
        assert f"| {result['average']:.2f} | {result['last']:.2f} |" in card, name
    assert "python main.py --config=config.json" in card
    assert str(finished_run.folder) not in card  # no place of the machine that it ran on


def test_the_upload_hands_the_folder_to_the_hubs_client(saved, monkeypatch):
    uploaded = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("someone/owls", True, True)
            return "https://huggingface.co/someone/owls"

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert saved.push_to_hub("someone/owls", private=True) == "https://huggingface.co/someone/owls"
    assert {"README.md", MANIFEST, "task0.pth", "task1.pth", "task2.pth"} <= set(uploaded["someone/owls"])


@pytest.mark.parametrize("name", ["someone/there-is-none", "no such folder"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_one_line(name):
    with pytest.raises(CheckpointError, match="is no folder, and") as caught:
        ContinualClassifier.from_pretrained(name)
    assert "\n" not in str(caught.value)
    shutil.rmtree(name, ignore_errors=True)
