"""How a run grows with its data: from listing the folders to a prediction, by simulation.

    python -m benchmarks.scale [--images 1000 4000 16000] [--tasks 20 40 80] [--dim 32] [--write docs/scale.md]

Two series, with an extractor that costs nothing and narrow features. *Images*: made folders of empty image files, 1,000
a class, through listing, hashing, task stream and bank. *Tasks*: made features of ten new classes a task, through
statistics, learning, checkpoints, evaluation and prediction. For each phase: seconds of CPU time at each size, the
growth law (the exponent p of seconds ~ size^p between the two largest sizes; 1 is linear), and where that law leads at
10 million images of 10,000 classes in 1,000 tasks.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.images import machine
from benchmarks.pages import add_write_option, exponent, publish
from models.evaluation import evaluate
from models.tosca import TOSCA
from utils.config.config import make_config
from utils.data.datasets import load_dataset
from utils.data.fingerprints import fingerprint_splits
from utils.data.tasks import make_stream
from utils.features.rows import TEST_VIEW, FolderRows
from utils.hardware import single_thread
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.manifest import RunManifest, TaskRecord

COMMAND = "benchmarks.scale"
GOAL_IMAGES, GOAL_TASKS = 10_000_000, 1_000
CLASSES, TRAIN, TEST = 10, 20, 2  # of a task: new classes; of a class: images
PREDICTED = 48  # images of a prediction


class Clock:
    """Seconds of CPU time by phase: other work on the machine hardly changes them; waiting for the disk is left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - started


# -- images: from folders to rows of the bank -------------------------------------------------------------------------


def measure_images(folder: Path, images: int, dim: int) -> dict[str, float]:
    """Seconds of each phase up to the bank."""
    clock = Clock()
    classes = max(2, images // 1000)
    for split in ("train", "test"):
        for label in range(classes):
            (folder / split / f"{label:05d}").mkdir(parents=True)
            for index in range(images // classes if split == "train" else 1):
                (folder / split / f"{label:05d}" / f"{index:06d}.jpg").touch()
    keys = {"dataset": "imagefolder", "init_cls": min(10, classes), "increment": 10, "backbone_type": "any"}
    config = make_config({**keys, "data_path": str(folder)})
    with clock("list the folders"):
        data = load_dataset(config)
    with clock("hash all files, a first start"):
        fingerprint_splits(data, folder / "cache")
    with clock("look at the files, a later start"):
        fingerprint_splits(data, folder / "cache")
    with clock("make the task stream"):
        stream = make_stream(data, config, 1993)
    rows = FolderRows(folder / "cache" / "bank", (len(data.train), dim), {}, 0)
    rows.folder.mkdir()
    with clock("lay out an array"):
        rows.prepare(TEST_VIEW)
    features = np.ones((256, dim), dtype=np.float32)  # a batch
    with clock("write every row"):
        for start in range(0, len(data.train), 256):
            batch = range(start, min(start + 256, len(data.train)))
            rows.write(TEST_VIEW, list(batch), features[: len(batch)])
    with clock("see which rows are missing"):
        rows.missing(TEST_VIEW)
    rows.finish(TEST_VIEW)
    with clock("read every row, task by task"):
        for task in stream.tasks:
            rows.read(TEST_VIEW, task.train)
    return clock.seconds


# -- tasks: from rows to answers --------------------------------------------------------------------------------------


class MadeTask:
    """The training images of a task: noise around a centre of each class (``models.base.TaskData``)."""

    new_rows = CLASSES

    def __init__(self, index: int, dim: int) -> None:
        self.index, self.first_row = index, index * CLASSES
        self.labels = torch.arange(CLASSES * TRAIN) % CLASSES + self.first_row
        self._features = made_features(self.labels, dim, index)

    def epoch(self, epoch: int) -> Tensor:
        return self._features

    def test_view(self) -> Tensor:
        return self._features

    def seen(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("only for upper bounds")


class MadeTest:
    """The test images of all tasks, in place of a bank and of a stream of tasks."""

    domains: tuple[str, ...] = ()

    def __init__(self, tasks: int, dim: int) -> None:
        self._labels = np.arange(tasks * CLASSES * TEST) // TEST
        self._features = made_features(torch.from_numpy(self._labels), dim, tasks).numpy()
        self.row_class = np.arange(tasks * CLASSES)
        self.tasks = [self._of_task(task) for task in range(tasks)]

    def _of_task(self, task: int) -> argparse.Namespace:
        test = np.arange(task * CLASSES * TEST, (task + 1) * CLASSES * TEST)
        rows = range(task * CLASSES, (task + 1) * CLASSES)
        return argparse.Namespace(test=test, test_classes=self._labels[test], rows=rows)

    def read(self, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        features: np.ndarray = self._features[rows]
        return features


def made_features(labels: Tensor, dim: int, seed: int) -> Tensor:
    """``(images, dim)``: noise around a direction of each class."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=torch.Generator().manual_seed(0))
    return 3 * centres[labels] + torch.randn(len(labels), dim, generator=draw)


def measure_tasks(folder: Path, tasks: int, dim: int) -> dict[str, float]:
    """Seconds of each phase after the bank: those of a whole stream, then what follows its last task once."""
    clock, test = Clock(), MadeTest(tasks, dim)
    keys = {"dataset": "imagefolder", "init_cls": CLASSES, "increment": CLASSES, "epochs": 1, "train_views": 1}
    config = make_config({**keys, "backbone_type": "any"})
    learner = TOSCA(config, dim, torch.device("cpu"), 1993)
    routers, learner.routers = learner.routers, {}  # their statistics have lines of their own
    checkpoint = CheckpointFolder(folder)
    manifest = RunManifest(
        identity={},
        config={},
        seed=1993,
        backbone={},
        data={},
        versions={},
        class_order=tuple(map(str, test.row_class)),
        task_sizes=(CLASSES,) * tasks,
        row_class=tuple(test.row_class.tolist()),
    )
    for index in range(tasks):
        task = MadeTask(index, dim)
        with clock("learning"):
            learner.learn(task)
        for name, router in routers.items():
            with clock(f"statistics, {name}"):
                router.update(task.test_view(), task.labels, len(learner.row_task))
        manifest = manifest.with_task(made_record(index))
        state = {
            **learner.state_dict(),
            **{f"{n}.{k}": t for n, r in routers.items() for k, t in r.state_dict().items()},
        }
        with clock("checkpoints"):
            manifest = checkpoint.commit(manifest, state, {index: learner.module_state(index)})
    learner.routers = routers
    with clock("load the last checkpoint"):
        checkpoint.load(manifest)
    with clock("evaluation after the last task"):
        evaluate(learner, cast(Any, test), cast(Any, test), tasks - 1, 1993)
    images = torch.from_numpy(test.read("test", TEST_VIEW, np.arange(PREDICTED) % len(test.row_class)))
    with clock(f"prediction of {PREDICTED} images"):
        learner.answer(images)
    return clock.seconds


def made_record(task: int) -> TaskRecord:
    """As large as the results of a task are."""
    numbers = {"top1": 50.0, "top5": 90.0, "per_task": [50.0] * (task + 1), "groups": {}, "selection_accuracy": 50.0}
    return TaskRecord(dict.fromkeys(("batch", "batch_shuffled", "sample", "lda", "ridge", "oracle"), numbers))


# -- the page ---------------------------------------------------------------------------------------------------------


def table(name: str, sizes: Sequence[int], found: Sequence[dict[str, float]], goal: int) -> list[str]:
    """Seconds of each phase at each size, its exponent, and where that leads."""
    lines = [
        f"| {name} | " + " | ".join(f"{size:,}" for size in sizes) + f" | exponent | at {goal:,} |",
        "|---|" + "---|" * (len(sizes) + 2),
    ]
    for phase in found[0]:
        taken = [seconds[phase] for seconds in found]
        power = exponent(sizes, taken)
        there = taken[-1] * (goal / sizes[-1]) ** max(power, 1.0)
        lines.append(f"| {phase} | " + " | ".join(f"{s:.3f} s" for s in taken) + f" | {power:.2f} | {there:,.0f} s |")
    return lines


def in_a_folder(measure: Callable[[Path, int, int], dict[str, float]], size: int, dim: int) -> dict[str, float]:
    """Measure in a folder that is removed, on one thread, without progress bars."""
    with tempfile.TemporaryDirectory() as folder, single_thread(), contextlib.redirect_stderr(io.StringIO()):
        return measure(Path(folder), size, dim)


def section(images: Sequence[int], tasks: Sequence[int], dim: int) -> list[str]:
    """Measure; return the part of the page, in lines of Markdown."""
    start = machine()
    of_images = [in_a_folder(measure_images, size, dim) for size in images]
    of_tasks = [in_a_folder(measure_tasks, size, dim) for size in tasks]
    load = f"{start} at the start and {machine().split('average ')[1]} at the end"
    return [
        f"Seconds of CPU time of one thread; features of width {dim}. {load}.",
        "*Exponent* is the p of seconds ~ size^p between the two largest sizes: 1 is linear, less shows fixed costs or",
        "noise. The last column carries the largest size on by it, at least linearly: a rough guess, no measurement.",
        "",
        *table("images", images, of_images, GOAL_IMAGES),
        "",
        f"A task brings {CLASSES} classes with {TRAIN} training and {TEST} test images each, one epoch; the seconds of",
        "statistics, learning and checkpoints are those of the whole stream.",
        "",
        *table("tasks", tasks, of_tasks, GOAL_TASKS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000, 16_000])
    parser.add_argument("--tasks", type=int, nargs="+", default=[20, 40, 80])
    parser.add_argument("--dim", type=int, default=32)
    add_write_option(parser)
    args = parser.parse_args()
    publish(args.write, COMMAND, section(sorted(args.images), sorted(args.tasks), args.dim))


if __name__ == "__main__":
    main()
