import numpy as np
import pytest

from utils.results import metrics

NONE = None


def test_groups_have_pilots_labels_and_count_what_they_say():
    true = np.array([0, 0, 1, 9, 10, 10, 19, 19, 19, 19])
    predicted = np.array([0, 1, 1, 0, 10, 10, 19, 19, 19, 0])
    assert metrics.accuracy_groups(predicted, true, [range(0, 10), range(10, 20)], known=10) == {
        "total": 70.0,
        "00-09": 50.0,
        "10-19": 83.33,
        "old": 50.0,
        "new": 83.33,
    }


def test_a_last_group_of_one_class_is_kept():
    true = np.array([0, 1, 2, 2])
    groups = metrics.accuracy_groups(np.array([0, 0, 2, 0]), true, [range(0, 2), range(2, 3)], known=2)
    assert groups == {"total": 50.0, "00-01": 50.0, "02-02": 50.0, "old": 50.0, "new": 50.0}


def test_labels_grow_to_three_digits():
    true = np.array([99, 100])
    groups = metrics.accuracy_groups(true, true, [range(0, 100), range(100, 200)], known=100)
    assert list(groups) == ["total", "00-99", "100-199", "old", "new"]


def test_in_the_first_task_nothing_is_old():
    true = np.array([0, 1])
    groups = metrics.accuracy_groups(true, true, [range(0, 2)], known=0)
    assert groups == {"total": 100.0, "00-01": 100.0, "old": 0.0, "new": 100.0}
    assert all(type(value) is float for value in groups.values())  # np.float64(…) would spoil the log line


def test_top_k_hits_worked_by_hand():
    top = np.array([[3, 1, 2], [0, 1, 2], [2, 0, 1]])
    true = np.array([3, 2, 3])
    assert metrics.top_k_hits(top, true, 1).tolist() == [True, False, False]
    assert metrics.top_k_hits(top, true, 2).tolist() == [True, False, False]
    assert metrics.top_k_hits(top, true, 5).tolist() == [True, True, False]


def test_percent_of_nothing_is_none():
    assert metrics.percent(np.array([True, False, False, False])) == 25.0
    assert metrics.percent(np.array([], dtype=bool)) is None


def test_a_row_of_the_matrix_is_the_accuracy_on_each_task():
    hits, task = np.array([1, 0, 1, 1, 0], dtype=bool), np.array([0, 0, 1, 1, 0])
    assert metrics.group_accuracies(hits, task, 3) == [pytest.approx(100 / 3), 100.0, None]


def test_average_is_the_mean_of_the_curve():
    assert metrics.average_accuracy([100.0, 80.0, 60.0]) == 80.0


def test_forgetting_is_the_releases_on_a_matrix_worked_by_hand():
    """Whose highest accuracy on a task may be the last one: a task that gained at the very end has lost nothing."""
    matrix = [
        [90, NONE, NONE, NONE],
        [95, 80, NONE, NONE],
        [70, 60, 50, NONE],
        [60, 85, 45, 99],
    ]
    assert metrics.forgetting(matrix) == pytest.approx((35 + 0 + 5) / 3)
    table = np.array([[value or 0 for value in row] for row in matrix], dtype=float).T  # as the release has it
    assert metrics.forgetting(matrix) == np.mean((np.max(table, axis=1) - table[:, 3])[:3])
    assert metrics.backward_transfer(matrix) == pytest.approx((60 - 90 + 85 - 80 + 45 - 50) / 3)  # its sign stays


def test_forgetting_reads_nothing_above_the_diagonal():
    above = 1000.0
    assert metrics.forgetting([[90, above, above], [80, 70, above], [60, 65, 50]]) == pytest.approx((30 + 5) / 2)


@pytest.mark.parametrize(
    "matrix",
    [
        [[NONE, NONE, NONE], [80, 70, NONE], [60, 65, 50]],  # not measured when it was learned
        [[90, NONE, NONE], [80, 70, NONE], [NONE, 65, 50]],  # nor at the end
    ],
)
def test_a_task_that_was_not_measured_throughout_is_left_out(matrix):
    assert metrics.forgetting(matrix) == 5
    assert metrics.backward_transfer(matrix) == -5


def test_the_selections_that_read_the_order_have_a_name_for_a_shuffled_test_set_too():
    assert [name for name in metrics.SELECTION_NAMES if name.endswith("_shuffled")] == ["batch_shuffled"]
    assert metrics.SELECTION_NAMES["batch_shuffled"] == "batch (shuffled test set)"


def test_one_task_alone_has_no_forgetting():
    assert metrics.forgetting([[73.0]]) is None and metrics.backward_transfer([[73.0]]) is None


def test_mean_and_sample_standard_deviation():
    assert metrics.mean_std([2.0, 4.0, 6.0]) == (4.0, 2.0)
    assert metrics.mean_std([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert metrics.mean_std([5.0]) == (5.0, 0.0)


def test_confusion_counts_true_task_by_chosen_module():
    true_task, module = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 2, 1, 0])
    assert metrics.confusion(true_task, module, 3) == [[2, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_entropy_by_module_where_it_was_right_and_where_it_was_not():
    entropy = np.array([0.25, 0.75, 2.0, 1.0])
    module, true_task = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])
    assert metrics.entropy_by_module(entropy, module, true_task, 3) == {
        "right": [0.5, None, None],
        "wrong": [2.0, 1.0, None],
    }


# -- calibration ------------------------------------------------------------------------------------------------------


def test_ece_worked_by_hand():
    probability = np.array([0.99, 0.97, 0.5, 0.5], dtype=np.float32)
    hits = np.array([True, True, False, True])
    # two answers of 98 % that are always right, two of 50 % of which one is: (2 · 2 + 2 · 0) / 4
    assert metrics.expected_calibration_error(probability, hits) == pytest.approx(1.0, abs=1e-4)
    assert metrics.expected_calibration_error(probability[:0], hits[:0]) is None


@pytest.mark.parametrize(
    ("probability", "ece"),
    [
        ([1 / 15, 0.0], 100 * (1 + 1 - 1 / 15) / 2),  # on an edge: the bin below, with the other
        ([2 / 15, 1 / 15 + 0.001], 100 * (2 - 3 / 15 - 0.001) / 2),
        ([1.0000001], 1e-5),  # lifted above one by rounding: the last bin
    ],
)
def test_a_probability_belongs_to_the_bin_that_ends_at_or_above_it(probability, ece):
    hits = np.ones(len(probability), dtype=bool)
    assert metrics.expected_calibration_error(np.array(probability), hits) == pytest.approx(ece, abs=1e-4)


def test_reliability_is_that_of_the_calibration_curve_of_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.3, 1.0, 20_000)
    hits = rng.uniform(size=20_000) < probability - 0.1  # 10 points too sure
    accuracy, mean = calibration.calibration_curve(hits, probability, n_bins=metrics.BINS)
    counts = np.histogram(probability, np.linspace(0, 1, metrics.BINS + 1))[0]
    expected = 100 * np.average(np.abs(accuracy - mean), weights=counts[counts > 0])
    assert metrics.expected_calibration_error(probability, hits) == pytest.approx(expected, abs=0.05)
    assert expected == pytest.approx(10.0, abs=0.7)
