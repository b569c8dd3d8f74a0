"""Class order and splits: a data set as a stream of tasks."""

from dataclasses import dataclass

import numpy as np

from utils.config import Config
from utils.data import Dataset
from utils.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One task of the stream.

    Attributes:
        index: from 0.
        rows: the classifier rows that it brings.
        train: image numbers of its training images, by row, then in file order.
        train_rows: the row of each of them.
        test: image numbers of its test images, by class as the stream counts them, then in file order.
        test_classes: the class of each of them.
    """

    index: int
    rows: range
    train: np.ndarray
    train_rows: np.ndarray
    test: np.ndarray
    test_classes: np.ndarray


@dataclass(frozen=True)
class TaskStream:
    """The tasks in the order in which they are learned.

    Attributes:
        tasks: the tasks.
        class_names: in learned order: name of class 0, 1, …
        row_class: ``(rows,)`` the class that each classifier row stands for. In class-incremental runs row and
            class are the same; in domain-incremental runs every domain brings a row of its own for each class.
    """

    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    row_class: np.ndarray

    @property
    def task_sizes(self) -> list[int]:
        return [len(task.rows) for task in self.tasks]


def class_order(n_classes: int, *, shuffle: bool, seed: int) -> np.ndarray:
    """Which class is learned first, second, …: NumPy's legacy permutation, as in PILOT, or sorted order."""
    if not shuffle:
        return np.arange(n_classes)
    return np.random.RandomState(seed).permutation(n_classes)


def task_sizes(n_classes: int, init_cls: int, increment: int) -> list[int]:
    """Classes of each task: ``init_cls``, then ``increment`` at a time, the rest in the last.

    Raises:
        ConfigError: more classes in the first task than there are.
    """
    if init_cls > n_classes:
        raise ConfigError(f"init_cls {init_cls} is above the number of classes in the data, {n_classes}")
    sizes = [init_cls]
    while (rest := n_classes - sum(sizes)) > 0:
        sizes.append(min(increment, rest))
    return sizes


def make_stream(data: Dataset, config: Config, seed: int) -> TaskStream:
    """Cut ``data`` into tasks: by class, or with ``scenario: domain`` by domain."""
    return _domain_stream(data, config, seed) if config.scenario == "domain" else _class_stream(data, config, seed)


def _class_stream(data: Dataset, config: Config, seed: int) -> TaskStream:
    order = class_order(len(data.class_names), shuffle=config.shuffle, seed=seed)
    rank = np.argsort(order)  # old label -> place in the learned order
    train, test = rank[data.train.labels], rank[data.test.labels]
    tasks, first = [], 0
    for index, size in enumerate(task_sizes(len(order), config.init_cls, config.increment)):
        rows = range(first, first + size)
        first += size
        train_images, test_images = _images_of(train, rows), _images_of(test, rows)
        tasks.append(Task(index, rows, train_images, train[train_images], test_images, test[test_images]))
    return TaskStream(tuple(tasks), tuple(data.class_names[c] for c in order), np.arange(len(order)))


def _domain_stream(data: Dataset, config: Config, seed: int) -> TaskStream:
    """One task a domain; classes keep their sorted order, domains are shuffled by the seed."""
    tasks, row_class = [], []
    for index, domain in enumerate(class_order(len(data.domain_names), shuffle=config.shuffle, seed=seed)):
        in_train, in_test = data.train_domains == domain, data.test_domains == domain
        classes = np.unique(data.train.labels[in_train])
        rows = range(len(row_class), len(row_class) + len(classes))
        row_class += classes.tolist()
        train_labels = np.where(in_train, data.train.labels, -1)
        test_labels = np.where(in_test, data.test.labels, -1)
        train_images, test_images = _images_of(train_labels, classes), _images_of(test_labels, classes)
        train_rows = rows.start + np.searchsorted(classes, train_labels[train_images])
        tasks.append(Task(index, rows, train_images, train_rows, test_images, test_labels[test_images]))
    return TaskStream(tuple(tasks), data.class_names, np.asarray(row_class))


def _images_of(labels: np.ndarray, wanted: range | np.ndarray) -> np.ndarray:
    """Image numbers whose label is in ``wanted``, by label, then in file order."""
    return np.concatenate([np.flatnonzero(labels == label) for label in wanted])
