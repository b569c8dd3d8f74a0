"""The answers to each test image, and the numbers from them, against scikit-learn's."""

import json

import numpy as np
import pytest

from utils.errors import UserError
from utils.results import metrics
from utils.results.predictions import Predictions, SelectionPredictions, read_predictions, write_predictions


def made_predictions(images: int = 500, classes: int = 7, *, seed: int = 0) -> Predictions:
    """Answers that are right as often as their probability says, but 10 points less."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, images)
    probability = rng.uniform(0.3, 1.0, images).astype(np.float32)
    right = rng.uniform(size=images) < probability - 0.1
    wrong = (true + rng.integers(1, classes, images)) % classes
    answers = SelectionPredictions(np.where(right, true, wrong), probability, rng.integers(0, 3, images))
    plain = SelectionPredictions(true, np.ones(images, dtype=np.float32))
    names = tuple(f"class {i}" for i in range(classes))
    return Predictions(np.array([f"{i}.png" for i in range(images)]), true, names, {"sample": answers, "batch": plain})


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_per_class_accuracy_and_confusion_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    p = made_predictions()
    answers = p.selections["sample"]
    ours = metrics.class_accuracies(answers.predicted == p.true_class, p.true_class, 7)
    np.testing.assert_allclose(ours, 100 * sklearn.recall_score(p.true_class, answers.predicted, average=None))
    confusion = metrics.class_confusion(p.true_class, answers.predicted, 7)
    np.testing.assert_array_equal(confusion, sklearn.confusion_matrix(p.true_class, answers.predicted))
    accuracy = 100 * sklearn.accuracy_score(p.true_class, answers.predicted)
    assert metrics.percent(answers.predicted == p.true_class) == pytest.approx(accuracy)


def test_reliability_is_the_calibration_curve_of_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    p = made_predictions()
    answers = p.selections["sample"]
    hits = answers.predicted == p.true_class
    bins = [b for b in metrics.reliability(answers.probability, hits) if b.count]
    accuracy, probability = calibration.calibration_curve(hits, answers.probability, n_bins=metrics.BINS)
    np.testing.assert_allclose([b.accuracy for b in bins], 100 * accuracy)
    np.testing.assert_allclose([b.probability for b in bins], 100 * probability, rtol=1e-5)


def test_ece_worked_by_hand():
    probability = np.array([0.99, 0.97, 0.5, 0.5], dtype=np.float32)
    hits = np.array([True, True, False, True])
    bins = metrics.reliability(probability, hits)
    # two answers of 98 % that are always right, two of 50 % of which one is: (2 · 2 + 2 · 0) / 4
    assert metrics.expected_calibration_error(bins) == pytest.approx(1.0, abs=1e-4)
    assert sum(b.count for b in bins) == 4
    assert metrics.expected_calibration_error(metrics.reliability(probability[:0], hits[:0])) is None


def test_a_probability_on_the_edge_belongs_to_the_bin_below_it():
    bins = metrics.reliability(np.array([0.0, 1 / 15, 1.0]), np.array([True] * 3))
    assert [i for i, b in enumerate(bins) if b.count] == [0, 14] and bins[0].count == 2


def test_a_probability_that_rounding_lifted_above_one_is_in_the_last_bin():
    bins = metrics.reliability(np.array([1.0000001], dtype=np.float32), np.array([True]))
    assert [b.count for b in bins] == [0] * (metrics.BINS - 1) + [1]


def test_answers_that_are_too_sure_have_the_error_that_was_built_in():
    details = made_predictions(20_000).details()["sample"]
    assert details["ece"] == pytest.approx(10.0, abs=0.7)


def test_backward_transfer_worked_by_hand():
    matrix = [[90.0, None, None], [80.0, 70.0, None], [60.0, 75.0, 95.0]]
    assert metrics.backward_transfer(matrix) == ((60 - 90) + (75 - 70)) / 2
    assert metrics.backward_transfer([[90.0]]) == 0.0
    assert "forward transfer" in metrics.GLOSSARY["backward transfer"]


def test_a_class_without_test_images_has_no_accuracy():
    assert metrics.class_accuracies(np.array([True, False]), np.array([0, 0]), 2) == [50.0, None]


# -- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_gives_the_same_bytes(tmp_path):
    p = made_predictions(20)
    for name in ("a.npz", "b.npz"):
        write_predictions(tmp_path / name, p)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    back = read_predictions(tmp_path / "a.npz")
    np.testing.assert_array_equal(back.files, p.files)
    np.testing.assert_array_equal(back.true_class, p.true_class)
    assert back.class_names == p.class_names and set(back.selections) == {"sample", "batch"}
    for name, answers in p.selections.items():
        np.testing.assert_array_equal(back.selections[name].predicted, answers.predicted)
        np.testing.assert_array_equal(back.selections[name].probability, answers.probability)
    assert back.selections["batch"].module is None and back.selections["sample"].module is not None


@pytest.mark.parametrize("damage", ["empty", "text", "pickled", "class out of range", "lengths", "names"])
def test_a_file_of_another_form_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "x.npz"
    arrays = {
        "files": np.array(["a", "b"]),
        "true_class": np.array([0, 1]),
        "class_names": np.array(["x", "y"]),
        "sample.class": np.array([0, 1]),
        "sample.probability": np.array([0.5, 0.5]),
    }
    if damage == "pickled":
        arrays["files"] = np.array([{}, {}], dtype=object)
    elif damage == "class out of range":
        arrays["sample.class"] = np.array([0, 2])
    elif damage == "lengths":
        arrays["sample.probability"] = np.array([0.5])
    elif damage == "names":
        del arrays["class_names"]
    np.savez(path, **arrays)
    if damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"no zip")
    with pytest.raises(UserError, match=r"x\.npz is not the \.npz") as fault:
        read_predictions(path)
    assert "\n" not in str(fault.value)


def test_a_run_writes_the_answers_of_its_last_task(finished_run):
    values = finished_run.json()
    p = read_predictions(finished_run.log_file().with_suffix(".npz"))
    assert p.class_names == tuple(values["class_order"])
    for file, label in zip(p.files, p.true_class, strict=True):
        assert str(file).startswith(f"{p.class_names[label]}/")
    for name, result in values["results"].items():
        answers = p.selections[name]
        hits = answers.predicted == p.true_class
        assert metrics.percent(hits) == result["last"]
        assert 0 < answers.probability.min() <= answers.probability.max() <= 1
        if name in values["confusion"]:
            true_task = p.true_class // 2
            assert metrics.confusion(true_task, answers.module, 3) == values["confusion"][name]
        assert result["backward_transfer"] == metrics.backward_transfer(result["matrix"])
    assert values["details"] == json.loads(json.dumps(p.details()))


def test_only_the_last_task_carries_details(finished_run):
    from utils.runs.checkpoint import CheckpointFolder

    manifest = CheckpointFolder(finished_run.checkpoints).read_manifest()
    assert [bool(task.details) for task in manifest.tasks] == [False, False, True]
