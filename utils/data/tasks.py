"""Class order and splits: a data set as a stream of tasks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from utils.config.config import Config
from utils.data.splits import Dataset, normal_name
from utils.errors import ConfigError, DataError

log = logging.getLogger(__name__)


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
        domains: the domain of each task; empty in class-incremental runs.
    """

    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    row_class: np.ndarray
    domains: tuple[str, ...] = ()

    @property
    def task_sizes(self) -> list[int]:
        return [len(task.rows) for task in self.tasks]


@dataclass(frozen=True)
class LearnedClasses:
    """What a saved run has learned: where a stream that continues it begins.

    Attributes:
        class_names, row_class, domains: as in ``TaskStream``.
        task_sizes: rows of each task.
    """

    class_names: tuple[str, ...] = ()
    row_class: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    task_sizes: tuple[int, ...] = ()
    domains: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.row_class)

    @property
    def task_rows(self) -> list[range]:
        """The rows of each task."""
        ends = np.cumsum(self.task_sizes).tolist()
        return [range(end - size, end) for size, end in zip(self.task_sizes, ends, strict=True)]

    def with_task(self, names: Sequence[str], domain: str | None = None) -> "LearnedClasses":
        """After one more task with the classes ``names``; with ``domain``, they may be known ones."""
        domain = domain and normal_name(domain)
        if domain is None:
            check_new_names(names, self)
        elif domain in self.domains:
            raise DataError(f"domain {domain!r} is learned already; give the new one another name")
        class_names = self.class_names + tuple(name for name in names if name not in self.class_names)
        row_class = [*self.row_class.tolist(), *(class_names.index(name) for name in names)]
        domains = () if domain is None else (*(self.domains or [""] * len(self.task_sizes)), domain)
        return LearnedClasses(class_names, np.asarray(row_class), (*self.task_sizes, len(names)), domains)

    def as_json(self) -> dict[str, Any]:
        """Return these facts as JSON-ready values."""
        return {
            "class_order": list(self.class_names),
            "row_class": self.row_class.tolist(),
            "task_sizes": list(self.task_sizes),
            "domains": list(self.domains),
        }


def check_new_names(names: Sequence[str], learned: LearnedClasses) -> None:
    """Classes of a class-incremental task must be new."""
    if known := [name for name in names if name in set(learned.class_names)]:
        raise DataError(
            f"class {known[0]!r} is learned already ({len(known)} of the new classes are); a task brings new classes: "
            "leave it out, rename it if it is another thing, or, if it is the same thing in other pictures, learn it "
            "as a new domain: scenario=domain with train/<domain>/<class>/"
        )
    _mind_letter_case(names, learned)


def _mind_letter_case(new_names: Sequence[str], learned: LearnedClasses) -> None:
    known = {name.casefold(): name for name in learned.class_names}
    for name in new_names:
        if other := known.get(name.casefold()):
            log.warning("Class %r is learned as a new one, though %r is learned: mind the letter case", name, other)


def class_order(n_classes: int, *, shuffle: bool, seed: int) -> np.ndarray:
    """Which class is learned first, second, …: NumPy's legacy permutation, as in PILOT, or sorted order."""
    if not shuffle:
        return np.arange(n_classes)
    return np.random.RandomState(seed).permutation(n_classes)


def task_sizes(n_classes: int, init_cls: int, increment: int) -> list[int]:
    """Classes of each task: ``init_cls``, then ``increment`` at a time, the rest in the last."""
    if init_cls > n_classes:
        raise ConfigError(f"init_cls {init_cls} is above the number of classes in the data, {n_classes}")
    sizes = [init_cls]
    while (rest := n_classes - sum(sizes)) > 0:
        sizes.append(min(increment, rest))
    return sizes


def make_stream(data: Dataset, config: Config, seed: int, learned: LearnedClasses | None = None) -> TaskStream:
    """Cut ``data`` into tasks: by class, or with ``scenario: domain`` by domain.

    With ``learned`` the tasks of a saved run come first. They have no training images; their test images are those
    that ``data`` has of their classes (or domains).
    """
    by_domain = config.scenario == "domain"
    learned = learned or LearnedClasses()
    learned = (_with_domains if by_domain else _with_classes)(data, config, seed, learned)
    rank = _places(data.class_names, learned.class_names, "class")  # label -> place in the learned order
    train, test = rank[data.train.labels], rank[data.test.labels]
    of_train, of_test, first = train, test, np.zeros(len(learned.task_sizes), dtype=np.int64)
    if by_domain:  # classes recur: a class of a domain has the label domain · count + class
        assert data.train_domains is not None and data.test_domains is not None  # so the loader lists domain data
        first = np.arange(len(learned.domains)) * len(learned.class_names)
        label = first[_places(data.domain_names, learned.domains, "domain")]
        of_train, of_test = label[data.train_domains] + train, label[data.test_domains] + test
    train_images, test_images, tasks = _Images(of_train), _Images(of_test), []
    for index, rows in enumerate(learned.task_rows):
        classes = learned.row_class[rows]
        learn, ask = (images.labelled(first[index] + classes) for images in (train_images, test_images))
        train_rows = rows.start + np.searchsorted(classes, train[learn])
        tasks.append(Task(index, rows, learn, train_rows, ask, test[ask]))
    return TaskStream(tuple(tasks), learned.class_names, learned.row_class, learned.domains)


def _numbers_in(labels: np.ndarray) -> np.ndarray:
    """Which numbers occur, sorted: as ``np.unique``, which imports masked arrays, a fifth of a second."""
    return np.flatnonzero(np.bincount(labels))


def _with_classes(data: Dataset, config: Config, seed: int, learned: LearnedClasses) -> LearnedClasses:
    """What the run will have learned in the end: a few new classes a task."""
    if learned.domains:
        raise ConfigError("the saved run is domain-incremental: continue it with scenario=domain")
    new_names = _in_order(data.class_names, data.train.labels, config, seed, learned)
    check_new_names(new_names, learned)
    assert config.init_cls is not None and config.increment is not None  # the config has checked it
    sizes = (*learned.task_sizes, *task_sizes(len(new_names), config.init_cls, config.increment))
    return LearnedClasses((*learned.class_names, *new_names), np.arange(sum(sizes)), sizes)


def _with_domains(data: Dataset, config: Config, seed: int, learned: LearnedClasses) -> LearnedClasses:
    """What the run will have learned in the end: one domain a task; new classes are numbered in sorted order."""
    assert data.train_domains is not None
    known = set(learned.class_names)
    new = [name for name in data.class_names if name not in known]
    _mind_letter_case(new, learned)
    learned = replace(learned, class_names=(*learned.class_names, *new))
    for domain in _in_order(data.domain_names, data.train_domains, config, seed, learned):
        labels = data.train.labels[data.train_domains == data.domain_names.index(domain)]
        places = _places(data.class_names, learned.class_names, "class")[_numbers_in(labels)]
        learned = learned.with_task([learned.class_names[place] for place in sorted(places.tolist())], domain)
    return learned


def _in_order(
    names: Sequence[str], of_train: np.ndarray, config: Config, seed: int, learned: LearnedClasses
) -> list[str]:
    """The classes or domains to be learned, shuffled by the seed: all; on top of a saved run, those with images."""
    new = _numbers_in(of_train) if learned.rows else np.arange(len(names))
    return [names[number] for number in new[class_order(len(new), shuffle=config.shuffle, seed=seed)].tolist()]


def next_task(learned: LearnedClasses, new_row: np.ndarray, new_rows: int) -> Task:
    """The task after ``learned``, of images that nobody tests; ``new_row`` counts each image's row from 0."""
    rows = range(learned.rows, learned.rows + new_rows)
    train, nothing = np.argsort(new_row, kind="stable"), np.empty(0, dtype=np.int64)
    return Task(len(learned.task_sizes), rows, train, rows.start + new_row[train], nothing, nothing)


def _places(names: Sequence[str], order: Sequence[str], what: str) -> np.ndarray:
    """Of each name its place in ``order``."""
    places = {name: place for place, name in enumerate(order)}
    if unknown := [name for name in names if name not in places]:
        raise DataError(
            f"{what} {unknown[0]!r} has test images, but there are no images to learn it from, nor did the saved run "
            "learn it; add its training images or remove its test folder"
        )
    return np.array([places[name] for name in names], dtype=np.int64)


class _Images:
    """The images of each label, found by sorting the images' labels once."""

    def __init__(self, labels: np.ndarray) -> None:
        self._images = np.argsort(labels, kind="stable")
        self._labels = labels[self._images]

    def labelled(self, wanted: range | np.ndarray) -> np.ndarray:
        """Image numbers whose label is in ``wanted``, by label, then in file order."""
        begin, end = (np.searchsorted(self._labels, wanted, side=side) for side in ("left", "right"))
        return np.concatenate([self._images[first:last] for first, last in zip(begin, end, strict=True)])
