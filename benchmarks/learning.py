"""(c) LuCA's training steps against their bare matrix products; a CIFAR-100-shaped problem on ready features.

    python -m benchmarks.learning

**Steps.** A step is what the training loop does with a batch of 48 ready features of width 768 and 100 classes:
forward, cross-entropy, L1 penalty, backward, SGD with momentum. Its bare matrix products are the 5 of the forward pass
(two of the MLP, two of the squeeze-excitation, the classifier) and the 9 of the backward pass (a weight and an input
gradient each; the first layer of the MLP needs no input gradient, those of the other branch sum), on ready tensors of
the same shapes, on one thread as in training. Rounds of steps and products alternate; the best of each counts.

**Problem.** 20 tasks of 2,500 images and 5 classes, 20 epochs, 10,000 test features, predictions under every
selection after every task, on random features around class centres. Memory is the peak of this process beyond the
interpreter with its libraries, so it includes the features themselves.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.images import machine, peak_bytes, resident_bytes
from models.tosca import TOSCA
from models.training import shuffled_epochs, train
from utils.config import Config, make_config
from utils.hardware import single_thread

TASKS, CLASSES_EACH, IMAGES, TEST_IMAGES, DIM, BATCH = 20, 5, 2500, 10_000, 768, 48
CLASSES = TASKS * CLASSES_EACH


def config(**keys: object) -> Config:
    values = {"dataset": "imagefolder", "init_cls": 5, "increment": 5, "backbone_type": "vit_base_patch16_224"}
    return make_config({**values, **keys})


class ReadyTask:
    """Features of one task; all views are the same ones."""

    def __init__(self, index: int, centres: Tensor, images: int = IMAGES) -> None:
        self.index, self.first_row, self.new_rows = index, index * CLASSES_EACH, CLASSES_EACH
        self.labels = torch.arange(images) % CLASSES_EACH + self.first_row
        self._features = features_of(self.labels, centres)

    def epoch(self, epoch: int) -> Tensor:
        return self._features

    def test_view(self) -> Tensor:
        return self._features


def features_of(labels: Tensor, centres: Tensor) -> Tensor:
    return centres[labels] + torch.randn(len(labels), centres.shape[1])


def steps_per_second(centres: Tensor) -> float:
    """Of the training loop, in the second task of a problem where the first has 95 classes."""
    learner = TOSCA(config(epochs=1), DIM, torch.device("cpu"), seed=0)
    first, images = ReadyTask(0, centres, CLASSES - CLASSES_EACH), 200 * BATCH
    first.new_rows, first.labels = CLASSES - CLASSES_EACH, torch.arange(CLASSES - CLASSES_EACH)
    learner.learn(first)
    task = ReadyTask(1, centres, images)
    task.first_row, task.labels = CLASSES - CLASSES_EACH, task.labels % CLASSES_EACH + CLASSES - CLASSES_EACH
    return 200 / seconds_of(lambda: _train(learner, task))


def _train(learner: TOSCA, task: ReadyTask) -> None:
    luca = learner.fresh_luca(task)
    with single_thread():
        train(luca, learner.grown_classifier(task), shuffled_epochs(task, learner.config, learner.seed), learner.config)


def products_per_second() -> float:
    """All matrix products of one step, that many times a second."""
    hidden = DIM // 16
    shapes = [(DIM, hidden), (hidden, DIM), (DIM, hidden), (hidden, DIM), (DIM, CLASSES)]
    weights = [torch.randn(shape) for shape in shapes]
    inputs = [torch.randn(BATCH, rows) for rows, _ in shapes]
    outputs = [torch.randn(BATCH, columns) for _, columns in shapes]

    def step() -> None:
        for number, (x, w, y) in enumerate(zip(inputs, weights, outputs, strict=True)):
            torch.mm(x, w)
            torch.mm(x.T, y)
            if number:
                torch.mm(y, w.T)

    def steps() -> None:
        for _ in range(200):
            step()

    with single_thread():
        return 200 / seconds_of(steps)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def problem(centres: Tensor) -> tuple[float, float]:
    """Seconds of learning and of predicting."""
    learner = TOSCA(config(), DIM, torch.device("cpu"), seed=0)
    test_labels = torch.arange(CLASSES).repeat_interleave(TEST_IMAGES // CLASSES)
    test = features_of(test_labels, centres)
    learning = predicting = 0.0
    for index in range(TASKS):
        task = ReadyTask(index, centres)
        learning += seconds_of(lambda task=task: learner.learn(task))
        seen = test[test_labels < (index + 1) * CLASSES_EACH]
        predicting += seconds_of(lambda seen=seen: learner.predict(seen, None, torch.randperm(len(seen))))
    return learning, predicting


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    libraries = resident_bytes()
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, DIM)
    print(f"start: {machine()}", flush=True)
    rounds = [(steps_per_second(centres), products_per_second()) for _ in range(5)]
    steps, products = (max(column) for column in zip(*rounds, strict=True))
    print(
        f"{steps:.0f} steps/s; bare matrix products of a step: {products:.0f}/s; a step takes {products / steps:.1f} x"
    )
    learning, predicting = problem(centres)
    print(
        f"{TASKS} tasks x {IMAGES} images x 20 epochs: {learning + predicting:.1f} s (learning {learning:.1f}, "
        f"predictions under all selections {predicting:.1f}), {(peak_bytes() - libraries) / 1e6:.0f} MB beyond the "
        f"libraries; end: {machine()}"
    )


if __name__ == "__main__":
    main()
