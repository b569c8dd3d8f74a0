import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models import ContinualClassifier
from tests.conftest import ROOT, tiny_config
from utils.errors import BackboneError, CheckpointError, ConfigError, DataError, UserError
from utils.runs.checkpoint import CheckpointFolder


@pytest.fixture(scope="session")
def run_of_four(run_main, make_folder, tmp_path_factory):
    """Classes 0 to 3 in two tasks; returns what main.py left, with the images in ``data``."""
    folder = tmp_path_factory.mktemp("four")
    data = make_folder(folder / "data", classes=4)
    outcome = run_main(folder, data_path=str(data), shuffle=False)
    assert outcome.code == 0
    return outcome


@pytest.fixture(scope="session")
def new_images(make_folder, tmp_path_factory):
    """Folder with the training images of classes 4 and 5, which ``run_of_four`` has not seen."""
    root = make_folder(tmp_path_factory.mktemp("six"), classes=6)
    return {name: sorted((root / "train" / name).glob("*.png")) for name in ("4", "5")}


@pytest.fixture
def model(run_of_four):
    return ContinualClassifier.load(run_of_four.checkpoints)


def test_predictions_are_those_of_the_runs_own_evaluation(model, run_of_four):
    test = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    answers = model.predict(test)
    right = [name == path.parent.name for name, path in zip(answers.classes, test, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(run_of_four.json()["results"]["sample"]["last"])


def test_answers_are_consistent_with_each_other(model, run_of_four):
    test = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    answers = model.predict(test, top_k=4)
    assert len(answers) == 12
    assert answers.top.shape == answers.probabilities.shape == (12, 4)
    assert answers.features.shape == (12, 192)
    assert answers.entropies.shape == (12, 2)
    torch.testing.assert_close(answers.probabilities.sum(dim=1), torch.ones(12))
    assert (answers.probabilities.diff(dim=1) <= 0).all()
    assert answers.module.tolist() == answers.entropies.argmin(dim=1).tolist()
    torch.testing.assert_close(answers.margin, (answers.entropies[:, 0] - answers.entropies[:, 1]).abs())
    torch.testing.assert_close(answers.entropy, answers.entropies.amin(dim=1))


def test_the_precision_is_that_of_the_run_whatever_this_machine_would_choose(run_of_four, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)  # auto would be bf16 here
    saved = CheckpointFolder(shutil.copytree(run_of_four.checkpoints, tmp_path / "tosca"))
    manifest = saved.read_manifest()
    assert manifest.backbone["precision"] == "fp32"
    saved.write_manifest(replace(manifest, config={**manifest.config, "precision": "auto"}))
    assert ContinualClassifier.load(saved.folder).backbone.precision == "fp32"


def test_each_image_is_one_backbone_pass(model, run_of_four):
    test = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    model.predict(test)
    assert model.backbone_forwards == len(test)


def test_paths_images_and_tensors_give_the_same_answer(model, run_of_four):
    path = next((run_of_four.folder / "data" / "test").rglob("*.png"))
    image = Image.open(path).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    answers = model.predict([str(path), path, image, pixels, pixels / 255])
    torch.testing.assert_close(answers.features, answers.features[:1].expand(5, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.predict(pixels[None]).probabilities, answers.probabilities[:1])
    assert model.predict(path).classes == answers.classes[:1]


def test_files_and_arrays_give_the_same_answer(model, run_of_four):
    path = next((run_of_four.folder / "data" / "test").rglob("*.png"))
    array = np.array(Image.open(path).convert("RGB"))
    with open(path, "rb") as file:
        answers = model.predict([path, file, io.BytesIO(path.read_bytes()), array, (array / 255).astype(np.float32)])
    torch.testing.assert_close(answers.features, answers.features[:1].expand(5, -1), rtol=0, atol=1e-5)
    for images in (array, array[None], io.BytesIO(path.read_bytes())):
        torch.testing.assert_close(model.predict(images).probabilities, answers.probabilities[:1])
    grey = array[..., 0]
    same = model.predict([grey, np.stack([grey] * 3, axis=2)]).features
    torch.testing.assert_close(same[0], same[1])
    assert len(model.predict(np.zeros((4, 8, 8), dtype=np.uint8))) == 4


def test_no_image_gives_no_answer(model):
    assert len(model.predict([])) == 0
    assert len(model.predict(torch.empty(0, 3, 8, 8))) == 0


def closed_image() -> Image.Image:
    image = Image.new("RGB", (4, 4))
    image.close()
    return image


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (torch.zeros(1, 8, 8), r"\(3, H, W\), got \(1, 8, 8\)"),
        (torch.zeros(3, 8, 3), r"\(3, H, W\), got \(3, 8, 3\)"),
        (torch.full((3, 8, 8), 2.0), r"lies in \[0, 1\], got 2 to 2"),
        (torch.full((3, 8, 8), torch.nan), r"lies in \[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "uint8 or floating point, got torch.int32"),
        (np.zeros((8, 8, 4), dtype=np.uint8), r"\(H, W, 3\) or \(H, W\), got \(8, 8, 4\)"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"\(H, W, 3\) or \(H, W\), got \(3, 8, 8\)"),
        (np.zeros((0, 0), dtype=np.uint8), r"an image has pixels, got the shape \(0, 0\)"),
        (np.array(["a.png", "b.png"]), r"\(H, W, 3\) or \(H, W\), got \(2,\)"),
        (np.zeros((8, 8), dtype=np.int64), "array is uint8 or floating point, got int64"),
        (io.BytesIO(b"no image"), "of no format that Pillow decodes"),
        (closed_image(), "closed image"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_image_is_said_with_its_number(model, source, words):
    with pytest.raises(DataError, match=rf"^images\[1\]: .*{words}"):
        model.predict([np.zeros((8, 8), dtype=np.uint8), source])
    with pytest.raises(DataError, match=words):
        model.learn([np.zeros((8, 8), dtype=np.uint8), source], ["x", "y"])
    assert model.tasks == 2


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(2, 8, 8, 3),
        torch.zeros(2, 3, 8, 3),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.zeros((2, 3, 8, 8), dtype=np.uint8),
        np.zeros((2, 8, 8, 4), dtype=np.uint8),
        np.zeros((8, 8, 4), dtype=np.uint8),
        np.zeros((8, 8), dtype=np.uint8),
    ],
    ids=lambda batch: f"{type(batch).__name__} {tuple(batch.shape)}",
)
def test_what_is_not_surely_a_batch_or_an_image_is_refused_with_its_shape(model, batch):
    with pytest.raises(DataError, match=re.escape(f"shape {tuple(batch.shape)}")):
        model.predict(batch)


def test_paths_in_an_array_and_numbers_for_images_are_one_line(model):
    with pytest.raises(DataError, match=r"an array of type <U5 holds no pixels; give paths and images as a list"):
        model.predict(np.array(["a.png", "b.png"]))
    with pytest.raises(DataError, match="got int"):
        model.predict(7)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, None])
def test_how_many_classes_to_name_is_a_whole_number_above_nothing(model, top_k):
    with pytest.raises(DataError, match=f"top_k is how many classes .* got {top_k}"):
        model.predict(np.zeros((8, 8, 3), dtype=np.uint8), top_k=top_k)


def test_every_selection_answers_as_the_runs_own_evaluation_does(model, run_of_four):
    test = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    assert model.selections == ("sample", "lda", "ridge")
    for selection in model.selections:
        answers = model.predict(test, selection=selection)
        right = [name == path.parent.name for name, path in zip(answers.classes, test, strict=True)]
        assert 100 * np.mean(right) == pytest.approx(run_of_four.json()["results"][selection]["last"])
        assert answers.selection == selection
        assert answers.entropy.shape == answers.margin.shape == (12,)
        torch.testing.assert_close(
            model.predict(test, top_k=4, selection=selection).probabilities.sum(1), torch.ones(12)
        )
    assert answers.task_scores.argmax(dim=1).tolist() == answers.module.tolist()  # of ridge
    assert answers.entropies is None


def test_batch_selection_is_refused_with_the_reason(model):
    for answer in (model.predict, lambda images, selection: next(model.predict_files(images, selection=selection))):
        with pytest.raises(ConfigError, match="would depend on their order"):
            answer([], selection="batch")


def test_eight_threads_answer_as_one_does(model, run_of_four):
    test = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    model.batch_size = 4
    streamed = torch.cat([answers.probabilities for _, answers, _ in model.predict_files(test)])
    torch.testing.assert_close(streamed, model.predict(test).probabilities, rtol=0, atol=0)
    features = model.predict(test).features
    alone = {name: model.classify_features(features, 5, name).probabilities for name in model.selections}
    before, wrong = model.backbone_forwards, []

    def work(number: int) -> None:
        for call in range(40):
            name = model.selections[(number + call) % 3]
            found = model.predict(test, selection=name) if call < 3 else model.classify_features(features, 5, name)
            if not torch.allclose(found.probabilities, alone[name], rtol=0, atol=1e-6):  # of other batches
                wrong.append((number, call, name))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert wrong == []
    assert model.backbone_forwards - before == 8 * 3 * len(test)


def test_answers_become_plain_values(model, run_of_four):
    test = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    answers = model.predict(test, top_k=2)
    dicts = answers.to_dicts()
    assert json.loads(json.dumps(dicts)) == dicts
    assert [answer["class"] for answer in dicts] == answers.classes
    assert dicts[3]["top"][1]["probability"] == answers.probabilities[3, 1].item()
    assert repr(answers).startswith(f"Predictions(12 images, selection sample: {answers.classes[0]} ")
    assert repr(model.predict([])) == "Predictions(0 images, selection sample: )"


def test_the_model_says_what_it_is(model):
    assert repr(model) == (
        "ContinualClassifier(tosca, 2 tasks, 4 classes, vit_tiny_patch16_224, selection sample, cpu)"
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "meta:x"])
def test_a_device_that_cannot_be_used_is_one_line_and_the_model_stays(model, device):
    with pytest.raises(
        BackboneError, match=rf"device '{device}' cannot be used here \(.*\); the model stays on cpu"
    ) as e:
        model.to(device)
    assert "\n" not in str(e.value) and str(model.backbone.device) == "cpu"
    assert len(model.predict(torch.rand(1, 3, 16, 16))) == 1


def test_a_moved_model_answers_the_same_and_goes_on_learning(model, new_images):
    images = torch.rand(3, 3, 16, 16)
    before = model.predict(images)
    assert model.to("cpu") is model
    torch.testing.assert_close(model.predict(images).probabilities, before.probabilities, rtol=0, atol=0)
    learner = model.learner
    model.to("cpu:0")  # another name of the only device that every machine has
    assert model.learner is not learner
    assert str(model.backbone.device) == str(model.learner.device) == "cpu:0"
    learn(model, new_images)
    assert model.tasks == 3


def test_a_pickled_model_is_the_same_in_another_process(model, run_of_four, tmp_path):
    test = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    expected = model.predict(test)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(pickle.loads(pickle.dumps(expected)).top, expected.top)
    torch.testing.assert_close(copy.predict(test).probabilities, expected.probabilities, rtol=0, atol=0)
    copy.learn(list(torch.rand(4, 3, 32, 32)), ["a", "b", "a", "b"])
    assert (copy.tasks, model.tasks) == (3, 2)


def test_labels_of_one_look_are_one_class_and_known_ones_are_found(model):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    model.learn(torch.rand(4, 3, 32, 32), (name for name in (composed, decomposed, f"{composed} ", "tea")))
    assert model.class_names[-2:] == (composed, "tea")
    with pytest.raises(DataError, match="is learned already"):
        model.learn(torch.rand(1, 3, 32, 32), [decomposed])


# -- learning ---------------------------------------------------------------------------------------------------------


def learn(model, new_images):
    paths = [path for paths in new_images.values() for path in paths]
    model.learn(paths, [name for name, paths in new_images.items() for _ in paths])


def test_learning_leaves_earlier_modules_bit_identical_and_costs_only_the_new_images(model, new_images):
    before = [model.learner.module_state(task) for task in range(2)]
    learn(model, new_images)
    for task, state in enumerate(before):
        torch.testing.assert_close(model.learner.module_state(task), state, rtol=0, atol=0)
    assert (model.tasks, model.class_names) == (3, ("0", "1", "2", "3", "4", "5"))
    assert model.backbone_forwards == 8 * 2  # eight new images, test transform and one view


def test_learning_equals_what_main_does(run_main, run_of_four, model, new_images, tmp_path, make_folder):
    """The API, and one run over all six classes from the start: the same module and classifier, bit for bit."""
    data = make_folder(tmp_path / "data", classes=6)
    whole = run_main(tmp_path, data_path=str(data), shuffle=False)
    learn(model, new_images)
    expected = ContinualClassifier.load(whole.checkpoints)
    for name in ("weight", "sigma"):
        found, wanted = model.learner.state_dict()[name], expected.learner.state_dict()[name]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(model.learner.module_state(2), expected.learner.module_state(2), rtol=0, atol=0)


def test_saved_and_loaded_it_answers_the_same(model, new_images, run_of_four, tmp_path):
    learn(model, new_images)
    assert model.save(tmp_path / "grown") is None
    loaded = ContinualClassifier.load(tmp_path / "grown")
    paths = sorted((run_of_four.folder / "data" / "test").rglob("*.png"))
    assert loaded.class_names == model.class_names
    torch.testing.assert_close(loaded.predict(paths).probabilities, model.predict(paths).probabilities)
    loaded.learn(list(torch.rand(4, 3, 32, 32)), ["a", "b", "a", "b"])
    assert (loaded.tasks, loaded.class_names[-2:]) == (4, ("a", "b"))


def test_saving_moves_another_run_aside(model, tmp_path):
    model.save(tmp_path / "run")
    aside = model.save(tmp_path / "run")
    assert ContinualClassifier.load(aside).tasks == ContinualClassifier.load(tmp_path / "run").tasks == 2


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["0", "x"], "class '0' is learned already"),
        (["x"], "2 images but 1 label"),
        (["x", ""], "labels are class names, got ''"),
        (["x", 3], "labels are class names, got 3"),
        ("ox", "labels are a sequence with the class name of each image, got 'ox'"),
        (None, "labels are a sequence .* got None"),
        (7, "labels are a sequence .* got 7"),
        ({"x", "y"}, "labels are a sequence"),
    ],
)
def test_what_cannot_be_learned_is_said_and_changes_nothing(model, labels, words):
    with pytest.raises(DataError, match=words):
        model.learn(torch.rand(2, 3, 32, 32), labels)
    assert (model.tasks, len(model.class_names), model.backbone_forwards) == (2, 4, 0)


def test_learning_from_nothing_is_an_error(model):
    with pytest.raises(DataError, match="no image"):
        model.learn([], [])


def test_baselines_predict_and_learn_without_modules(run_main, run_of_four, new_images, tmp_path):
    outcome = run_main(tmp_path, data_path=str(run_of_four.folder / "data"), shuffle=False, model_name="simplecil")
    model = ContinualClassifier.load(outcome.checkpoints)
    learn(model, new_images)
    assert model.backbone_forwards == sum(map(len, new_images.values()))  # it reads no augmented view: none is made
    answers = model.predict(new_images["4"])
    assert answers.module is answers.entropies is answers.entropy is answers.margin is None
    assert answers.classes == ["4"] * 4  # training images, nearest class mean of one's own
    model.save(tmp_path / "grown")
    assert ContinualClassifier.load(tmp_path / "grown").predict(new_images["4"]).classes == ["4"] * 4


def test_a_method_that_needs_old_data_says_so(run_main, run_of_four, tmp_path):
    outcome = run_main(tmp_path, data_path=str(run_of_four.folder / "data"), model_name="linear_joint")
    with pytest.raises(ConfigError, match="linear_joint needs the data of all tasks"):
        ContinualClassifier.load(outcome.checkpoints).learn(torch.rand(1, 3, 8, 8), ["x"])


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run"):
        ContinualClassifier.load(tmp_path / "nowhere")
    torch.save({}, tmp_path / "task0.pth")
    with pytest.raises(CheckpointError, match="without a classifier"):
        ContinualClassifier.load(tmp_path)


def test_several_seeds_ask_for_one(run_of_four, tmp_path):
    for seed in (1, 2):  # as a run with two seeds lays them out
        shutil.copytree(run_of_four.checkpoints, tmp_path / "tosca" / f"seed{seed}")
    with pytest.raises(CheckpointError, match=r"several seeds; choose one: .*seed1"):
        ContinualClassifier.load(tmp_path / "tosca")
    assert ContinualClassifier.load(tmp_path / "tosca" / "seed2").tasks == 2


def test_other_weights_are_refused(run_of_four, tmp_path):
    from backbone.vit import load_backbone

    model = load_backbone(tiny_config(), torch.device("cpu")).model
    with torch.no_grad():
        model.norm.bias.add_(1)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(BackboneError, match="are not those of the run"):
        ContinualClassifier.load(run_of_four.checkpoints, backbone_weights=tmp_path / "other.pth")


def test_weights_that_moved_are_asked_for(run_main, run_of_four, tmp_path):
    from backbone.vit import load_backbone

    weights = tmp_path / "weights.pth"
    torch.save(load_backbone(tiny_config(), torch.device("cpu")).model.state_dict(), weights)
    data = str(run_of_four.folder / "data")
    outcome = run_main(tmp_path, data_path=data, backbone_weights=str(weights), epochs=1)
    moved = weights.rename(tmp_path / "moved.pth")
    with pytest.raises(BackboneError, match="--backbone-weights=<file>"):
        ContinualClassifier.load(outcome.checkpoints)
    assert ContinualClassifier.load(outcome.checkpoints, backbone_weights=moved).tasks == 2


def test_a_mistake_is_no_value_error_that_a_handler_for_bad_values_could_swallow():
    assert not issubclass(UserError, ValueError)


# -- torch.hub --------------------------------------------------------------------------------------------------------

FOREIGN = """
import sys
import torch, utils                                   # the caller's own utils, loaded before
model = torch.hub.load({root!r}, "tosca", source="local", checkpoint={checkpoint!r}, verbose=False)
answers = model.predict(torch.rand(2, 3, 32, 32))
model.learn(torch.rand(2, 3, 32, 32), ["x", "y"])     # after the load, when our folder is on no path
model.save_pretrained("there")                        # by a module that is needed late
import models                                         # the caller's own models, loaded later
assert utils.WHO == models.WHO == "foreign", (utils, models)
assert {root!r} not in sys.path
assert type(torch.hub.load({root!r}, "tosca", source="local", checkpoint={checkpoint!r})) is type(model)
print(len(answers), *model.class_names)
"""


def test_torch_hub_works_from_a_project_with_the_same_names(run_of_four, tmp_path):
    (tmp_path / "utils.py").write_text("WHO = 'foreign'")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("WHO = 'foreign'")
    script = FOREIGN.format(root=str(ROOT), checkpoint=str(run_of_four.checkpoints))
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["2", "0", "1", "2", "3", "x", "y"]
