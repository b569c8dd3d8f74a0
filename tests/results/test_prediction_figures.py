"""Pictures of the answers: what is drawn, at 200 classes too, and over seeds with other class orders."""

import json

import numpy as np
import pytest

from utils.results.predictions import Predictions, SelectionPredictions, read_predictions, write_predictions
from utils.results.read import read_runs
from utils.results.tables import make_sections

pytest.importorskip("matplotlib")

from utils.results import drawing, prediction_figures


def predictions(true, predicted, names) -> Predictions:
    answers = SelectionPredictions(np.array(predicted), np.full(len(true), 0.5, dtype=np.float32))
    return Predictions(np.array([str(i) for i in range(len(true))]), np.array(true), tuple(names), {"sample": answers})


def test_seeds_with_other_class_orders_are_added_by_name():
    one = predictions([0, 0, 1, 1], [0, 1, 1, 1], ["cat", "dog"])  # one cat taken for a dog
    other = predictions([1, 1, 0, 0], [1, 0, 0, 0], ["dog", "cat"])  # the same
    matrix, mistakes, _ = prediction_figures.class_confusion([one, other], "sample").axes
    np.testing.assert_allclose(matrix.images[0].get_array(), [[50, 50], [0, 100]])
    assert [label.get_text() for label in mistakes.get_yticklabels()] == ["cat (1) → dog (2)"]


def test_two_hundred_classes_have_numbers_beside_the_matrix_and_names_beside_the_mistakes():
    rng = np.random.default_rng(0)
    true = np.repeat(np.arange(200), 10)
    predicted = np.where(rng.uniform(size=2000) < 0.8, true, rng.integers(0, 200, 2000))
    names = [f"a rather long class name {i}" for i in range(200)]
    figure = prediction_figures.class_confusion([predictions(true, predicted, names)], "sample")
    matrix, mistakes, _ = figure.axes
    assert matrix.images[0].get_array().shape == (200, 200) and len(matrix.get_xticks()) < 15
    assert len(mistakes.patches) == 15 and all("→" in label.get_text() for label in mistakes.get_yticklabels())


@pytest.fixture
def group(finished_run, tmp_path):
    values = finished_run.json()
    values["epochs"] = [[{"loss": 2.0, "accuracy": 50.0}, {"loss": 1.0, "accuracy": 80.0}]] * 3
    (tmp_path / "run.json").write_text(json.dumps(values))
    write_predictions(tmp_path / "run.npz", read_predictions(finished_run.log_file().with_suffix(".npz")))
    (section,), _ = make_sections(read_runs([tmp_path])[0])
    return section.groups[0]


def test_a_group_has_all_pictures_and_its_name_no_status(group, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda *_: None)
    drawn = prediction_figures.draw_predictions(group, tmp_path / "x")
    assert [path.name for _, path in drawn] == [
        "x-classes.png",
        "x-reliability.png",
        "x-per-class.png",
        "x-learning.png",
    ]
    assert "finished" not in group.name


def test_learning_curves_have_a_point_for_each_epoch(group):
    loss, accuracy = prediction_figures.learning_curves(group).axes
    assert [list(line.get_ydata()) for line in loss.lines[:3]] == [[2.0, 1.0]] * 3
    assert list(accuracy.lines[2].get_xdata()) == [5, 6]


def test_reliability_pools_the_images_of_all_seeds():
    one = [{"count": 1, "probability": 40.0, "accuracy": 0.0}]
    other = [{"count": 3, "probability": 60.0, "accuracy": 100.0}]
    (pooled,) = prediction_figures.pooled([one, other])
    assert (pooled.count, pooled.probability, pooled.accuracy) == (4, 55.0, 75.0)
