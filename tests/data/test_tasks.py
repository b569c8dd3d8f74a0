from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import tiny_config
from utils.data.splits import Dataset, ImageArray
from utils.data.tasks import LearnedClasses, class_order, make_stream, next_task, task_sizes
from utils.errors import ConfigError, DataError


def dataset(labels: list[int], test_labels: list[int], classes: int) -> Dataset:
    return named_dataset(labels, test_labels, tuple("abcdefghij"[:classes]))


def named_dataset(labels: list[int], test_labels: list[int], names: tuple[str, ...]) -> Dataset:
    def split(of_image):
        return ImageArray(np.zeros((len(of_image), 2, 2), dtype=np.uint8), of_image)

    return Dataset("imagefolder", split(labels), split(test_labels), names)


def test_the_order_of_100_classes_for_seed_1993_is_numpys_legacy_permutation():
    np.random.seed(1993)
    expected = np.random.permutation(100)
    order = class_order(100, shuffle=True, seed=1993)
    after = np.random.rand()
    assert order.tolist() == expected.tolist()
    np.random.seed(1993)
    np.random.permutation(100)
    assert np.random.rand() == after  # NumPy's global generator was left alone
    assert class_order(4, shuffle=False, seed=1993).tolist() == [0, 1, 2, 3]
    assert order[:10].tolist() == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]


@pytest.mark.parametrize(
    ("classes", "init_cls", "increment", "sizes"),
    [
        (100, 5, 5, [5] * 20),
        (10, 4, 3, [4, 3, 3]),
        (58, 10, 10, [10, 10, 10, 10, 10, 8]),
        (7, 2, 2, [2, 2, 2, 1]),
        (3, 3, 2, [3]),
        (3, 1, 50, [1, 2]),
        (1, 1, 1, [1]),
    ],
)
def test_tasks_are_the_first_classes_then_increments_then_the_rest(classes, init_cls, increment, sizes):
    assert task_sizes(classes, init_cls, increment) == sizes


def test_more_first_classes_than_there_are_is_an_error_with_both_numbers():
    with pytest.raises(ConfigError, match="init_cls 11 is above the number of classes in the data, 10"):
        task_sizes(10, 11, 2)


def test_labels_are_renumbered_by_the_order_and_images_keep_file_order():
    data = dataset([0, 0, 1, 1, 2, 2, 3, 4], [4, 3, 2, 1, 0, 0], 5)
    stream = make_stream(data, tiny_config(init_cls=2, increment=2), seed=1993)
    order = class_order(5, shuffle=True, seed=1993).tolist()
    assert order != [0, 1, 2, 3, 4]
    assert stream.class_names == tuple("abcde"[c] for c in order)
    assert stream.task_sizes == [2, 2, 1]
    assert [(t.index, t.rows) for t in stream.tasks] == [(0, range(0, 2)), (1, range(2, 4)), (2, range(4, 5))]
    assert stream.row_class.tolist() == [0, 1, 2, 3, 4]
    for task in stream.tasks:
        old_labels = [order[row] for row in task.rows]
        expected = [i for old in old_labels for i in np.flatnonzero(data.train.labels == old)]
        assert task.train.tolist() == expected
        assert task.train_rows.tolist() == [order.index(data.train.labels[i]) for i in expected]
        expected = [i for old in old_labels for i in np.flatnonzero(data.test.labels == old)]
        assert task.test.tolist() == expected
        assert task.test_classes.tolist() == [order.index(data.test.labels[i]) for i in expected]


# -- on top of a saved run --------------------------------------------------------------------------------------------

LEARNED = LearnedClasses().with_task(["cat", "dog"])


def test_a_new_class_that_differs_in_letter_case_alone_is_learned_with_a_warning(caplog):
    data = named_dataset([1, 1], [0, 1], ("cat", "Dog"))  # images of cats to test alone, of dogs to learn
    stream = make_stream(data, tiny_config(init_cls=1, increment=1), seed=1, learned=LEARNED)
    assert stream.class_names == ("cat", "dog", "Dog")
    assert [task.test.tolist() for task in stream.tasks] == [[0], [1]]
    assert [task.train.tolist() for task in stream.tasks] == [[], [0, 1]]
    assert "Class 'Dog' is learned as a new one, though 'dog' is learned" in caplog.text
    with pytest.raises(DataError, match="class 'Cat' has test images, but there are no images to learn it from"):
        make_stream(named_dataset([1], [0, 1], ("Cat", "cow")), tiny_config(init_cls=1), seed=1, learned=LEARNED)


def test_the_next_task_of_images_that_nobody_tests_is_sorted_by_row():
    task = next_task(LEARNED, np.array([1, 0, 1]), 2)
    assert (task.index, task.rows, task.train.tolist(), task.train_rows.tolist()) == (
        1,
        range(2, 4),
        [1, 0, 2],
        [2, 3, 3],
    )
    assert task.test.tolist() == task.test_classes.tolist() == []


def test_in_domain_runs_known_classes_come_again_and_new_ones_get_rows(caplog):
    learned = LearnedClasses().with_task(["cat", "dog"], "photo")
    data = replace(
        named_dataset([0, 1], [0, 1, 0, 1], ("Cat", "dog")),
        train_domains=np.array([1, 1]),
        test_domains=np.array([0, 1, 1, 1]),
        domain_names=("photo", "sketch"),
    )
    data = replace(data, test=named_dataset([], [1, 1, 0, 1], ("Cat", "dog")).test)
    stream = make_stream(data, tiny_config(scenario="domain", init_cls=None, increment=None), seed=1, learned=learned)
    assert stream.class_names == ("cat", "dog", "Cat") and stream.domains == ("photo", "sketch")
    assert stream.row_class.tolist() == [0, 1, 1, 2] and stream.task_sizes == [2, 2]
    assert [task.test.tolist() for task in stream.tasks] == [[0], [1, 3, 2]]
    assert "Class 'Cat' is learned as a new one, though 'cat' is learned" in caplog.text


def test_a_task_of_new_classes_brings_none_that_is_learned():
    learned = LearnedClasses().with_task(["cat", "dog"])
    with pytest.raises(DataError, match="class 'dog' is learned already"):
        learned.with_task(["cow", "dog"])
    assert learned.with_task(["cow"]).class_names == ("cat", "dog", "cow")
