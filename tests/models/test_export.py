"""The model as one module and as a file: the answers of ``predict``, for any number of images."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import predict
from backbone.vit import load_backbone
from models import ContinualClassifier
from models.api.export import ImageClassifier, as_module, export
from models.api.hub import model_card
from models.base import make_learner
from tests.conftest import tiny_config
from utils.config.methods import METHODS, SELECTIONS
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


@pytest.mark.slow
def test_onnx_of_a_vit(saved, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(export(saved, tmp_path / "model.onnx", "sample")))
    check(saved, lambda batch: session.run(None, {"images": batch.numpy()}), "sample")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(saved.class_names)


# -- every method and selection, on a frozen projection in place of a ViT ----------------------------------------------


class Projection(nn.Module):
    """A frozen random projection of the pixels."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("weight", torch.randn(3 * 32 * 32, dim, generator=generator) / 32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - 0.5).flatten(1) @ self.weight


@dataclass
class LearnedTask:
    """A task of two classes with three images each."""

    index: int
    all_features: list[torch.Tensor]
    new_rows: int = 2

    @property
    def first_row(self) -> int:
        return 2 * self.index

    @property
    def labels(self) -> torch.Tensor:
        return torch.tensor([0, 0, 0, 1, 1, 1]) + self.first_row

    def epoch(self, epoch: int) -> torch.Tensor:
        return self.all_features[self.index]

    def test_view(self) -> torch.Tensor:
        return self.all_features[self.index]

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(2 * (self.index + 1)).repeat_interleave(3)
        return torch.cat(self.all_features[: self.index + 1]), rows


def learned(method: str, tasks: int, features: nn.Module, dim: int) -> SimpleNamespace:
    """What ``export`` reads of a model whose learner has learned ``tasks`` tasks of two classes."""
    config = tiny_config(model_name=method, **({"white_features": 200} if method == "tosca_white" else {}))
    learner = make_learner(config, dim, CPU, 0)
    generator = torch.Generator().manual_seed(0)
    of_tasks = [torch.randn(6, dim, generator=generator) for _ in range(tasks)]
    for task in range(tasks):
        learner.learn(LearnedTask(task, of_tasks))
    return SimpleNamespace(
        backbone=SimpleNamespace(features=features, precision="fp32"),
        learner=learner,
        config=config,
        row_class=np.arange(2 * tasks),
        class_names=[str(number) for number in range(2 * tasks)],
        selection="sample",
    )


def answering(path: Path) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """The exported model as a function of uint8 images."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return lambda batch: [torch.from_numpy(value) for value in session.run(None, {"images": batch.numpy()})]


def assert_same_answers(model: SimpleNamespace, path: Path, selection: str) -> None:
    answer = answering(path)
    for count in (1, 5, 50):
        expected = model.learner.answer(model.backbone.features(images(count)), selection)
        scores, *about_module = answer(images(count))
        torch.testing.assert_close(scores, expected.scores, **CLOSE)
        if expected.module is not None:
            module, found = about_module
            assert torch.equal(module, expected.module)
            torch.testing.assert_close(found, expected.entropy, **CLOSE)


def single_image_selections() -> list[tuple[str, str]]:
    names = {name: [s if isinstance(s, str) else s.name for s in method.selections] for name, method in METHODS.items()}
    return [(method, s) for method, found in names.items() for s in found if not SELECTIONS[s].ordered]


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "selection"), single_image_selections())
def test_every_selection_of_every_method(tmp_path, method, selection, suffix):
    model = learned(method, 3, Projection(), 24)
    assert_same_answers(model, export(model, tmp_path / f"model{suffix}", selection), selection)


def test_onnx_with_its_metadata(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = learned("tosca", 3, Projection(), 24)
    path = export(model, tmp_path / "model.onnx", "ridge")
    assert_same_answers(model, path, "ridge")
    about = runtime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == model.class_names
    assert (about["selection"], json.loads(about["image_size"])) == ("ridge", 32)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("selection", ["sample", "lda", "ridge"])
def test_a_hundred_modules_on_a_vit(tmp_path, selection, suffix):
    backbone = load_backbone(tiny_config(), CPU)
    model = learned("tosca", 100, backbone.features, backbone.feature_dim)
    assert_same_answers(model, export(model, tmp_path / f"model{suffix}", selection), selection)


def test_the_file_holds_what_its_selection_reads_alone(tmp_path):
    """Not what further learning needs: with a real backbone the statistics of ``ridge`` are hundreds of megabytes."""
    model = learned("tosca", 3, Projection(), 24)
    sizes = {s: export(model, tmp_path / "model.pt2", s).stat().st_size for s in ("sample", "ridge")}
    weight = model.learner.routers["ridge"].weight
    assert sizes["ridge"] - sizes["sample"] >= weight.numel() * 8
    program = torch.export.load(export(model, tmp_path / "model.pt2", "sample"))
    assert all(node.users for node in program.graph.nodes if node.op == "placeholder")
    assert not any(tensor.shape == weight.shape for tensor in program.state_dict.values())


def test_the_suffix_says_the_format(saved, tmp_path):
    with pytest.raises(UserError, match=r"model\.bin.*\.pt2 or \.onnx"):
        export(saved, tmp_path / "model.bin")


def test_a_missing_package_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("models.api.export.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx and onnxscript: pip install onnx onnxscript"):
        export(saved, tmp_path / "model.onnx")


def test_what_onnx_cannot_hold_is_one_line_before_the_work(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("models.api.export.find_spec", lambda name: True)
    monkeypatch.setattr("models.api.export.ONNX_BYTES", 10_000_000)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("it worked"))
    with pytest.raises(UserError, match=r"the model has 22\.0 MB, ONNX holds 10\.0 MB; give a name in \.pt2"):
        export(saved, tmp_path / "model.onnx")


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_and_answers_as_before(saved, tmp_path):
    folder = saved.save_pretrained(tmp_path / "model")
    loaded = ContinualClassifier.from_pretrained(folder)
    assert torch.equal(loaded.predict(images(4)).probabilities, saved.predict(images(4)).probabilities)


def with_weights(saved: ContinualClassifier, checkpoints: Path, weights: Path) -> ContinualClassifier:
    torch.save(saved.backbone.model.state_dict(), weights)
    return ContinualClassifier.load(checkpoints, backbone_weights=weights)


def test_the_backbones_file_goes_with_the_model(finished_run, tmp_path, saved):
    weights = tmp_path / "vit.pth"
    folder = with_weights(saved, finished_run.checkpoints, weights).save_pretrained(tmp_path / "model")
    assert (folder / "backbone.pth").read_bytes() == weights.read_bytes()
    weights.unlink()
    loaded = ContinualClassifier.from_pretrained(folder)
    assert loaded.config.backbone_weights == str(folder / "backbone.pth")
    assert torch.equal(loaded.predict(images(4)).probabilities, saved.predict(images(4)).probabilities)
    before = (folder / "backbone.pth").read_bytes()
    assert loaded.save_pretrained(folder) == folder  # over itself
    assert [path.name for path in folder.glob("*backbone*")] == ["backbone.pth"]
    assert (folder / "backbone.pth").read_bytes() == before


def test_a_model_saved_over_itself_or_another_loses_nothing(finished_run, tmp_path, saved):
    weights, folder = tmp_path / "vit.pth", tmp_path / "model"
    with_weights(saved, finished_run.checkpoints, weights).save_pretrained(folder)
    expected = saved.predict(images(4)).probabilities
    for again in range(2):  # from the folder into itself
        ContinualClassifier.from_pretrained(folder).save_pretrained(folder)
        found = [path for path in tmp_path.glob("model*") if path.is_dir()]
        assert len(found) == again + 2
        for copy in found:
            loaded = ContinualClassifier.from_pretrained(copy)
            assert torch.equal(loaded.predict(images(4)).probabilities, expected)
            assert (copy / "README.md").is_file() and loaded.config.backbone_weights == str(copy / "backbone.pth")
    saved.save_pretrained(folder)  # without a file of weights: the other's goes with the other
    assert not (folder / "backbone.pth").exists() and len(list(tmp_path.glob("model*/backbone.pth"))) == 3
    (tmp_path / "mine").mkdir()
    for name in ("backbone.pth", "README.md"):
        (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(UserError, match=r"backbone\.pth would be taken for the backbone of this model"):
        saved.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "backbone.pth").unlink()
    assert (saved.save_pretrained(tmp_path / "mine") / "README.md").read_text() == "mine"


@pytest.mark.parametrize("option", ["--export", "--features"])
def test_no_output_replaces_what_is_read(finished_run, digit_folder, tmp_path, capsys, option):
    image, link = tmp_path / "image.png", tmp_path / "link.npy"
    shutil.copy(next(digit_folder.rglob("*.png")), image)
    manifest = finished_run.checkpoints / MANIFEST
    link.symlink_to(manifest)
    for output in (manifest, link, image):
        before = output.read_bytes()
        images = [str(tmp_path)] if option == "--features" else []
        assert predict.main([f"--checkpoint={finished_run.checkpoints}", f"{option}={output}", *images]) == 2
        assert "give a name that ends in ." in capsys.readouterr().err and output.read_bytes() == before


def test_the_card_holds_data_protocol_every_selection_and_the_command(saved, finished_run, tmp_path):
    card = (saved.save_pretrained(tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: tosca\n")
    data = finished_run.json()["data"]
    assert f"`imagefolder`: {data['train_images']} training images and {data['test_images']} test images, 6" in card
    assert "3 tasks of 2 classes each, seed 1993. No earlier image is kept." in card
    for name, result in finished_run.json()["results"].items():
        assert f"| {result['average']:.2f} | {result['last']:.2f} |" in card, name
    assert "python main.py --config=config.json" in card
    assert str(finished_run.folder) not in card  # no place of the machine that it ran on


def test_the_card_counts_tasks_and_says_what_a_method_keeps(digit_folder, run_main, tmp_path):
    one = run_main(tmp_path / "one", data_path=str(digit_folder), init_cls=6, model_name="knn")
    card = model_card(ContinualClassifier.load(one.checkpoints))
    assert "1 task of 6 classes, seed 1993. The features of all earlier images are kept." in card
    joint = run_main(tmp_path / "joint", data_path=str(digit_folder), init_cls=4, model_name="linear_joint")
    card = model_card(ContinualClassifier.load(joint.checkpoints))
    assert "2 tasks of 4, 2 classes, seed 1993. Not continual: it saw the images of all tasks at once" in card


class Hub:
    """The hub's client, as ``ModelHubMixin`` calls it."""

    uploaded: ClassVar[dict[str, list[str]]] = {}
    fault: ClassVar[Exception | None] = None

    def __init__(self, **_):
        pass

    def create_repo(self, repo_id, private, exist_ok):
        if self.fault:
            raise self.fault
        assert private and exist_ok
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, ignore_patterns, **_):
        assert ignore_patterns == ".lock"
        self.uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_the_upload_hands_the_folder_to_the_hubs_client(saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    assert saved.push_to_hub("someone/owls", private=True) == "https://huggingface.co/someone/owls/commit/1"
    assert {"README.md", MANIFEST, "task0.pth", "task1.pth", "task2.pth"} <= set(Hub.uploaded["someone/owls"])


@pytest.mark.parametrize("module", ["httpx2.errors", "builtins"])
def test_an_upload_without_a_network_is_one_line_and_our_own_fault_is_none(saved, monkeypatch, module):
    kind = type("ConnectError", (Exception,), {"__module__": module})  # no OSError, nor the hub's own
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr(Hub, "fault", kind("Name or service not known\nsecond line"))
    expected = kind if module == "builtins" else UserError
    with pytest.raises(expected, match="Name or service not known") as caught:
        saved.push_to_hub("someone/owls", private=True)
    if expected is UserError:
        assert str(caught.value) == "someone/owls cannot be uploaded to the hub (Name or service not known)"


@pytest.mark.parametrize("name", ["someone/there-is-none", "no such folder"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_one_line(name):
    with pytest.raises(CheckpointError, match="is no folder, and") as caught:
        ContinualClassifier.from_pretrained(name)
    assert "\n" not in str(caught.value)
    shutil.rmtree(name, ignore_errors=True)
