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
    assert metrics.task_accuracies(hits, task, 2) == [pytest.approx(100 / 3), 100.0]


def test_average_is_the_mean_of_the_curve():
    assert metrics.average_accuracy([100.0, 80.0, 60.0]) == 80.0


def test_forgetting_on_a_matrix_worked_by_hand():
    matrix = [
        [90, NONE, NONE, NONE],
        [95, 80, NONE, NONE],
        [70, 60, 50, NONE],
        [60, 85, 45, 99],
    ]
    # task 0: best before the end 95, now 60; task 1: best before the end 80, now 85 (it gained); task 2: 50, now 45
    assert metrics.forgetting(matrix) == pytest.approx((35 - 5 + 5) / 3)


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


def test_one_task_alone_cannot_forget():
    assert metrics.forgetting([[73.0]]) == 0.0


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


def test_a_probability_lies_in_the_bin_that_ends_at_or_above_it():
    bins = metrics.reliability(np.array([0.01, 1 / 15, 0.1, 0.5, 1.0]), np.array([True, False, True, False, True]))
    assert {place: b.count for place, b in enumerate(bins) if b.count} == {0: 2, 1: 1, 7: 1, 14: 1}
    assert bins[0].accuracy == 50.0 and bins[14].probability == 100.0
