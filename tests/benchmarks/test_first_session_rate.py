"""The choice of a first session's rate reads training images of the first task alone, classes held out."""

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import pytest

from benchmarks import first_session_rate
from benchmarks.first_session_rate import best, compare
from tests.conftest import tiny_config
from utils.config.config import make_config

KEYS = {"dataset": "digits", "data_path": None, "init_cls": 4, "increment": 2, "train_views": 0, "device": ["cpu"]}
KEYS |= {"model_name": "simplecil", "first_session_epochs": 1, "cache_dir": "none", "num_workers": 0}


class Noted:
    """Stands for a model: knows the classes that it was taught, and answers rightly where they are the later ones."""

    learned: ClassVar[list[tuple[dict[str, Any], list[set[str]], int, int]]] = []

    def __init__(self, keys: dict[str, Any]) -> None:
        self.keys, self.tasks, self.images, self.tested = keys, list[set[str]](), set[bytes](), 0

    @classmethod
    def start(cls, **keys: Any) -> "Noted":
        return cls(keys)

    def learn(self, images: Iterable[Any], labels: list[str]) -> None:
        self.tasks.append(set(labels))
        self.images |= {np.asarray(image).tobytes() for image in images}

    def evaluate(self, images: list[Any], labels: list[str]) -> dict[str, Any]:
        assert not self.images & {np.asarray(image).tobytes() for image in images}  # held out
        later = set(labels) == self.tasks[1]
        assert later or set(labels) == self.tasks[0] | self.tasks[1]
        self.learned.append((self.keys, self.tasks, len(self.images), len(images)))
        return {"sample": {"top1": 100.0 if later and self.keys.get("first_session_lr") == 0.5 else 0.0}}


def test_classes_and_images_are_held_out_and_the_best_on_later_classes_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(first_session_rate, "ContinualClassifier", Noted)
    found = compare(make_config({**tiny_config().as_dict(), **KEYS}), [0.01, 0.5])
    assert list(found) == ["none", "0.01", "0.5"] and best(found) == "0.5"
    halves = [tasks for _, tasks, _, _ in Noted.learned]
    assert all(len(task) == 2 for tasks in halves for task in tasks)
    assert halves[0] == halves[2][::-1]  # two tests of a model, then the halves change places
    (later, tested), (_, none) = found["0.5"], found["none"]
    assert later[0] == later[1] == tested[1] / 2 and none[0] == 0
    images = {learned + shown for _, _, learned, shown in Noted.learned[1::2]}
    assert len(images) == 1 and tested[1] == 2 * Noted.learned[1][3]  # the first task's images, each in one part


def test_equal_rates_fall_to_the_smallest_and_aper_is_never_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_session_rate, "ContinualClassifier", Noted)
    found = compare(make_config({**tiny_config().as_dict(), **KEYS, "model_name": "aper"}), [0.01, 0.1])
    assert list(found) == ["0.01", "0.1"] and best(found) == "0.01"
    with pytest.raises(SystemExit, match="the first task has 3 classes; four are needed"):
        compare(make_config({**tiny_config().as_dict(), **KEYS, "init_cls": 3}), [0.01])
