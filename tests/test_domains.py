import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main
import predict
from benchmarks.answers import top_classes
from models import ContinualClassifier
from models.api.hub import model_card
from models.evaluation import class_scores
from tests.conftest import TINY
from utils.config.config import make_config
from utils.data.datasets import load_dataset
from utils.data.tasks import make_stream
from utils.errors import DataError
from utils.results.read import Run
from utils.results.tables import make_sections

DOMAINS = {"plain": lambda pixels: pixels, "dark": lambda pixels: 255 - pixels, "turned": lambda pixels: pixels.T}


@pytest.fixture(scope="session")
def domains_folder(digit_images, tmp_path_factory):
    """Digits 0 to 2 in three domains; ``turned`` has no 1 but a 3."""
    root = tmp_path_factory.mktemp("domains")
    for domain, draw in DOMAINS.items():
        for name in ("0", "2", "3") if domain == "turned" else ("0", "1", "2"):
            for index, pixels in enumerate(digit_images[name][:7]):
                path = root / ("train" if index < 4 else "test") / domain / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw(pixels)).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    return root


KEYS = {k: v for k, v in TINY.items() if k not in ("init_cls", "increment")} | {"scenario": "domain", "shuffle": False}


def run(folder, data, *arguments, **keys):
    """Starts main.py on domains; returns its exit code and the run's JSON (None if there is none)."""
    own = {"checkpoint_dir": str(folder / "tosca"), "log_dir": str(folder / "logs"), "data_path": str(data)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**KEYS, **own, **keys}))
    code = main.main([f"--config={folder / 'config.json'}", *arguments])
    found = list((folder / "logs").rglob("1993_*.json"))
    return code, json.loads(max(found, key=lambda path: path.stat().st_mtime_ns).read_text()) if found else None


@pytest.fixture(scope="session")
def finished(domains_folder, tmp_path_factory):
    """A run over the three domains: its folder and its JSON."""
    folder = tmp_path_factory.mktemp("run")
    code, found = run(folder, domains_folder)
    assert code == 0
    return folder, found


def stream_of(data, **keys):
    config = make_config({**KEYS, "data_path": str(data), **keys})
    return make_stream(load_dataset(config), config, seed=0)


# -- the stream -------------------------------------------------------------------------------------------------------


def test_each_domain_is_a_task_with_a_row_for_each_of_its_classes(domains_folder):
    stream = stream_of(domains_folder)
    assert stream.domains == ("dark", "plain", "turned")
    assert stream.class_names == ("0", "1", "2", "3")
    assert stream.row_class.tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 3]
    assert [task.rows for task in stream.tasks] == [range(0, 3), range(3, 6), range(6, 9)]


def test_training_images_teach_the_row_of_their_own_domain(domains_folder):
    data = load_dataset(make_config({**KEYS, "data_path": str(domains_folder)}))
    stream = stream_of(domains_folder)
    for task, domain in zip(stream.tasks, stream.domains, strict=True):
        assert {data.train.keys[i].split("/")[0] for i in task.train} == {domain}
        for image, row in zip(task.train, task.train_rows, strict=True):
            assert data.train.keys[image].split("/")[1] == stream.class_names[stream.row_class[row]]
        for image, label in zip(task.test, task.test_classes, strict=True):
            assert data.test.keys[image].split("/")[:2] == [domain, stream.class_names[label]]


def test_every_image_is_in_one_task(domains_folder):
    stream = stream_of(domains_folder)
    assert sorted(np.concatenate([task.train for task in stream.tasks]).tolist()) == list(range(36))
    assert sorted(np.concatenate([task.test for task in stream.tasks]).tolist()) == list(range(27))


def test_the_seed_shuffles_domains_and_leaves_classes_sorted(domains_folder):
    config = make_config({**KEYS, "data_path": str(domains_folder), "shuffle": True})
    orders = {make_stream(load_dataset(config), config, seed).domains for seed in range(10)}
    assert len(orders) > 1
    assert {make_stream(load_dataset(config), config, seed).class_names for seed in range(10)} == {("0", "1", "2", "3")}


def test_a_class_scores_its_best_row():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.3, 0.2, -1.0, 0.4]])
    row_class = np.array([0, 1, 0, 3])  # class 2 has no row yet
    inf = float("inf")
    assert class_scores(scores, row_class).tolist() == [
        pytest.approx([0.5, 0.9, -inf, 0.2]),
        pytest.approx([0.3, 0.2, -inf, 0.4]),
    ]
    assert top_classes(scores, row_class, k=2).tolist() == [[1, 0], [3, 0]]


# -- a run ------------------------------------------------------------------------------------------------------------


def test_the_report_has_a_matrix_by_domain_under_every_selection(finished):
    _, found = finished
    assert found["domains"] == ["dark", "plain", "turned"]
    assert found["task_sizes"] == [3, 3, 3]
    assert {"batch", "sample", "oracle"} <= found["results"].keys()
    for result in found["results"].values():
        assert [[value is not None for value in row] for row in result["matrix"]] == np.tri(3, dtype=bool).tolist()
        after_all = [value for value in result["matrix"][2] if value is not None]
        assert result["last"] == pytest.approx(np.mean(after_all))  # nine test images each
    assert len(found["selection_accuracy"]["sample"]) == len(found["selection_accuracy"]["batch"]) == 3


def test_a_module_and_rows_for_each_domain_are_saved(finished):
    folder, _ = finished
    model = ContinualClassifier.load(folder / "tosca")
    assert model.tasks == 3
    assert len(model.learner.row_task) == 9
    assert model.learner.row_task.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_predictions_name_classes_whatever_the_domain(finished, domains_folder, capsys):
    folder, found = finished
    images = sorted((domains_folder / "test").rglob("*.png"))
    model = ContinualClassifier.load(folder / "tosca")
    answers = model.predict(images, top_k=9)
    right = [name == path.parent.name for name, path in zip(answers.classes, images, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(found["results"]["sample"]["last"])
    assert answers.probabilities.shape == (27, 4)
    torch.testing.assert_close(answers.probabilities.sum(dim=1), torch.ones(27))
    assert predict.main(["--checkpoint", str(folder / "tosca"), str(domains_folder / "test" / "dark"), "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_answers_name_the_domain_whose_module_answered(finished, domains_folder, capsys):
    folder, found = finished
    image = domains_folder / "test" / "dark" / "0" / "4.png"
    capsys.readouterr()
    for form in ([], ["--explain"], ["--json"]):
        assert predict.main([f"--checkpoint={folder / 'tosca'}", str(image), *form]) == 0
    said = capsys.readouterr().out.splitlines()
    model = ContinualClassifier.load(folder / "tosca")
    answer = model.predict([image])
    module = answer.to_dicts()[0]["module"]
    name = found["domains"][module]
    assert f" {module + 1} of 3 (domain {name})  " in said[2]
    assert re.search(r"entropy by task  dark: \S+  plain: \S+  turned: ", said[6])
    assert json.loads(said[-1])["domain"] == name
    assert "3 domains" in repr(model)
    assert "3 domains, in this order: dark, plain, turned; seed 1993. No earlier image is kept." in model_card(model)
    assert pickle.loads(pickle.dumps(answer)).domains == tuple(found["domains"])


def test_pictures_name_the_domains_where_all_runs_have_the_same_order(finished, tmp_path):
    figures = pytest.importorskip("utils.results.figures", reason="it needs matplotlib")
    _, found = finished
    order = found["domains"]

    def panes(*runs):
        (section,), _ = make_sections([Run(values) for values in runs])
        (group,) = section.groups
        curves = figures.methods_curves(section).axes[0]
        drawn = (figures.matrices(group, kind, "") for kind in ("matrix", "confusion"))
        return curves, *(next(axes for axes in figure.axes if axes.get_xlabel()) for figure in drawn)

    def names(axis):
        return [label.get_text() for label in axis.get_ticklabels()]

    curves, matrix, chosen = panes(found)
    assert (curves.get_xlabel(), matrix.get_xlabel()) == ("domains seen", "on domain")
    for axis in (curves.xaxis, matrix.xaxis, matrix.yaxis, chosen.xaxis, chosen.yaxis):
        assert names(axis) == order
    assert list(matrix.get_xticks()) == [0, 1, 2] and list(curves.get_xticks()) == [1, 2, 3]
    assert names(figures.run_curves(found).axes[0].xaxis) == order
    other = {**found, "seed": 7, "identity": {**found["identity"], "seed": 7, "augment_seed": 7}}
    curves, matrix, *_ = panes(found, {**other, "domains": order[::-1]})
    assert curves.get_xlabel() == "domains seen" and set(names(matrix.xaxis)).isdisjoint(order)


def test_entropy_is_over_rows(finished, domains_folder):
    folder, _ = finished
    model = ContinualClassifier.load(folder / "tosca")
    answers = model.predict(sorted((domains_folder / "test").rglob("*.png")))
    chosen = model.learner.answer(answers.features).scores.softmax(dim=1)  # (images, 9 rows)
    torch.testing.assert_close(answers.entropy, torch.special.entr(chosen).sum(dim=1), atol=1e-4, rtol=1e-4)


def test_reports_lie_in_a_folder_of_their_own(finished):
    folder, _ = finished
    (path,) = (folder / "logs").rglob("1993_*.json")
    assert path.parent == folder / "logs" / "tosca" / "imagefolder" / "domain" / "1"


# -- going on ---------------------------------------------------------------------------------------------------------


def only(source, folder, train, test):
    for split, domains in (("train", train), ("test", test)):
        for domain in domains:
            shutil.copytree(source / split / domain, folder / split / domain)
    return folder


def test_a_new_domain_on_top_equals_all_domains_from_the_start(finished, domains_folder, tmp_path):
    whole, expected = finished
    first = only(domains_folder, tmp_path / "first", ("dark", "plain"), ("dark", "plain"))
    more = only(domains_folder, tmp_path / "more", ("turned",), ("dark", "plain", "turned"))
    assert run(tmp_path / "a", first)[0] == 0
    code, found = run(tmp_path / "b", more, continue_from=str(tmp_path / "a" / "tosca"))
    assert code == 0
    a, b = (ContinualClassifier.load(folder / "tosca").learner for folder in (tmp_path / "b", whole))
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(a.modules, b.modules, rtol=0, atol=0)
    assert found["results"] == expected["results"]
    assert found["domains"] == expected["domains"]


def test_a_domain_that_is_known_is_an_error(finished, domains_folder, tmp_path, capsys):
    folder, _ = finished
    code, _ = run(tmp_path, domains_folder, continue_from=str(folder / "tosca"))
    assert code == 2
    assert "domain 'dark' is learned already" in capsys.readouterr().err


def test_known_classes_go_on_as_a_domain_of_a_class_run(domains_folder, make_folder, run_main, tmp_path):
    data = make_folder(tmp_path / "classes", classes=4)
    base = run_main(tmp_path / "base", data_path=str(data), shuffle=False)
    new = only(domains_folder, tmp_path / "new", ("turned",), ("turned",))
    code, found = run(tmp_path / "grown", new, continue_from=str(base.checkpoints))
    assert code == 0
    assert found["base"]["evaluation"] == "new classes alone"
    model = ContinualClassifier.load(tmp_path / "grown" / "tosca")
    assert (model.tasks, model.class_names) == (3, ("0", "1", "2", "3"))
    assert model.row_class.tolist() == [0, 1, 2, 3, 0, 2, 3]


def test_a_class_run_does_not_go_on_from_a_domain_run(finished, make_folder, run_main, tmp_path, capsys):
    folder, _ = finished
    data = make_folder(tmp_path / "classes", classes=2)
    assert run_main(tmp_path, data_path=str(data), continue_from=str(folder / "tosca")).code == 2
    assert "continue it with scenario=domain" in capsys.readouterr().err


def test_the_api_learns_a_domain_by_name(finished):
    folder, _ = finished
    model = ContinualClassifier.load(folder / "tosca")
    images = torch.rand(4, 3, 32, 32)
    with pytest.raises(DataError, match="name the new images' domain"):
        model.learn(images, ["0", "1", "0", "1"])
    model.learn(images, ["0", "1", "0", "1"], domain="noise")
    assert (model.tasks, len(model.class_names), len(model.learner.row_task)) == (4, 4, 11)
    assert model.predict(images).top.shape == (4, 4)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_steps_of_classes_mean_nothing_for_domains():
    assert make_config({**KEYS, "init_cls": 5, "increment": 5}) == make_config(KEYS)


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        ("test/dark", "domain 'dark' is in .*train but not in .*test"),
        ("train/dark", "domain 'dark' is in .*test but not in .*train"),
        ("test/plain/1", "class '1' of domain 'plain' is in .*train but not in .*test"),
    ],
)
def test_folders_that_do_not_match_are_said(domains_folder, tmp_path, remove, words):
    data = shutil.copytree(domains_folder, tmp_path / "data")
    shutil.rmtree(data / remove)
    with pytest.raises(DataError, match=words):
        load_dataset(make_config({**KEYS, "data_path": str(data)}))
