"""(c) LuCA's training steps against the plain loop and the bare products; a CIFAR-100-shaped problem on ready features.

    python -m benchmarks.learning

**Steps.** A step is what the training loop does with a batch of 48 ready features of width 768: forward, cross-entropy,
L1 penalty, backward, SGD with momentum. The plain step is the same in PyTorch's own layers, autograd and optimiser, as
this project trained before; both end at the same bits. The bare matrix products are the 5 of the forward pass (two of
the MLP, two of the squeeze-excitation, the classifier) and the 9 of the backward pass (a weight and an input gradient
each; the first layer of the MLP needs no input gradient). All on one thread, in CPU time of that thread, taking turns;
medians.

**Problem.** 20 tasks of 2,500 images and 5 classes, 20 epochs, 10,000 test features, predictions under every
selection after every task, on random features around class centres. Learning is all of it: statistics of the routers,
class means, one look at the results. Memory is the peak of this process beyond the interpreter with its libraries, so
it includes the features themselves.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.classifier import CosineClassifier, first_rows
from backbone.luca import make_luca
from benchmarks.answers import all_answers
from benchmarks.images import machine, resident_bytes
from models.tosca import TOSCA
from models.training import Epoch, build_optimizer, build_schedule, shuffled_epochs, train
from utils.config.config import Config, make_config
from utils.hardware import peak_bytes, single_thread

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

    def seen(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the features of earlier tasks are not kept")


def features_of(labels: Tensor, centres: Tensor) -> Tensor:
    return centres[labels] + torch.randn(len(labels), centres.shape[1])


def plain_train(module: nn.Module, classifier: CosineClassifier, batches: Iterable[Epoch], config: Config) -> None:
    """The loop as everybody writes it: what the project's own is measured against."""
    optimizer = build_optimizer([*module.parameters(), *classifier.parameters()], config)
    schedule = build_schedule(optimizer, config)
    for steps in batches:
        for h, rows in steps:
            penalty = torch.cat([p.flatten() for p in module.parameters()]).abs().sum()
            loss = F.cross_entropy(classifier(module(h)), rows) + config.l1 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()


def step_seconds(train: Callable[..., None], rows: int, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds of this thread's CPU time for one step with ``rows`` rows."""
    luca = make_luca(DIM, mlp_ratio=16, se_ratio=16, flow="tosca", first=False, seed=1)
    classifier = CosineClassifier(first_rows(rows, DIM, torch.Generator().manual_seed(0)), torch.tensor(1.0))
    started = time.thread_time()
    train(luca, classifier, [batches], config(epochs=1))
    return (time.thread_time() - started) / len(batches)


def product_seconds(rows: int, repeats: int) -> float:
    """Seconds of this thread's CPU time for all matrix products of one step."""
    hidden = DIM // 16
    shapes = [(DIM, hidden), (hidden, DIM), (DIM, hidden), (hidden, DIM), (DIM, rows)]
    weights = [torch.randn(shape) for shape in shapes]
    inputs = [torch.randn(BATCH, ins) for ins, _ in shapes]
    outputs = [torch.randn(BATCH, outs) for _, outs in shapes]
    started = time.thread_time()
    for _ in range(repeats):
        for number, (x, w, y) in enumerate(zip(inputs, weights, outputs, strict=True)):
            torch.mm(x, w)
            torch.mm(x.T, y)
            if number:
                torch.mm(y, w.T)
    return (time.thread_time() - started) / repeats


def measure_steps(rounds: int, steps: int, rows: int) -> tuple[float, float, float]:
    """Median seconds of a step here, of the plain one, and of the bare products; they take turns."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(BATCH, DIM, generator=generator), torch.randint(rows, (BATCH,), generator=generator))
        for _ in range(steps)
    ]
    with single_thread():
        found = [
            (step_seconds(train, rows, batches), step_seconds(plain_train, rows, batches), product_seconds(rows, steps))
            for _ in range(rounds)
        ]
    ours, plain, products = (statistics.median(column) for column in zip(*found, strict=True))
    return ours, plain, products


def problem(centres: Tensor) -> tuple[float, float, float]:
    """Seconds of learning, of the same learning by the plain loop, and of predicting."""
    torch.manual_seed(1)
    learner = TOSCA(config(), DIM, torch.device("cpu"), seed=0)
    test_labels = torch.arange(CLASSES).repeat_interleave(TEST_IMAGES // CLASSES)
    test = features_of(test_labels, centres)
    learning = plain = predicting = 0.0
    for index in range(TASKS):
        task = ReadyTask(index, centres)
        luca, classifier = learner.fresh_luca(task), learner.grown_classifier(task)
        epochs = shuffled_epochs(task, learner.config, learner.seed)
        with single_thread():
            plain += seconds_of(partial(plain_train, luca, classifier, epochs, learner.config))
        learning += seconds_of(partial(learner.learn, task))
        wanted = dict(luca.named_parameters())
        if not all(torch.equal(p[index], wanted[name]) for name, p in learner.modules.items()):
            print(f"task {index}: the two loops differ in some bits on this machine")
        seen = test[test_labels < (index + 1) * CLASSES_EACH]
        predicting += seconds_of(partial(all_answers, learner, seen, None, torch.randperm(len(seen))))
    return learning, plain, predicting


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of this thread's CPU time: what else runs on the machine does not count."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps-only", action="store_true", help="leave out the problem")
    args = parser.parse_args()
    libraries = resident_bytes()
    print(f"start: {machine()}", flush=True)
    for rows in (50, 100):
        ours, plain, products = (1e6 * seconds for seconds in measure_steps(9, 100, rows))
        print(
            f"{rows} classes: a step takes {ours:.0f} us, the plain one {plain:.0f} us (ratio {ours / plain:.2f}), "
            f"its bare matrix products {products:.0f} us",
            flush=True,
        )
    if args.steps_only:
        return
    torch.manual_seed(0)
    learning, plain, predicting = problem(torch.randn(CLASSES, DIM))
    print(
        f"{TASKS} tasks x {IMAGES} images x 20 epochs: learning {learning:.1f} s, by the plain loop {plain:.1f} s "
        f"(ratio {learning / plain:.2f}), predictions under all selections {predicting:.1f} s; "
        f"{(peak_bytes() - libraries) / 1e6:.0f} MB beyond the libraries; end: {machine()}"
    )


if __name__ == "__main__":
    main()
