"""The record of a run as a type: what makes it the run that it is, what it has learned, the results of each task.

All types are frozen. A run that goes on makes a new manifest from the old one (``with_task``, ``dataclasses.replace``)
and the checkpoint folder writes that in one step: the tasks' records to ``results.jsonl``, a line each, and the rest to
``run.manifest``. So what a task writes grows at most as the tasks before it do.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from utils.config.config import Config
from utils.data.tasks import LearnedClasses, TaskStream

FEW_TASKS = 30  # up to here a run that goes on keeps and shows what grows with the square of its tasks


@dataclass(frozen=True)
class EpochStats:
    """What one epoch of training gave.

    Attributes:
        loss: mean loss over the steps.
        accuracy: share of the training images that were answered correctly while training, in percent.
    """

    loss: float
    accuracy: float

    def to_json(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy}  # dataclasses.asdict takes ten times as long


@dataclass(frozen=True)
class TaskRecord:
    """The results after one task.

    Attributes:
        results: for each selection ``top1``, ``top5``, ``per_task``, ``groups`` and, with modules,
            ``selection_accuracy``, all in percent. Empty for a task that was learned without test images.
        confusion: for each selection of a module the counts of (true task, chosen module); empty while a run of more
            than ``FEW_TASKS`` tasks goes on.
        entropy: for each such selection the mean entropy of the chosen module in nats, by module.
        sparsity: share of the new module's parameters that are nearly zero; None without modules.
        parameters: numbers of parameters, by what holds them.
        epochs: what each epoch of training gave.
        details: of a run's last task, for each selection accuracy on each class and calibration
            (``utils.results.record``); empty for the others.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    entropy: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    sparsity: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    epochs: tuple[EpochStats, ...] = ()
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values under the names of the attributes."""
        return {**vars(self), "epochs": [epoch.to_json() for epoch in self.epochs]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TaskRecord":
        return cls(**{**values, "epochs": tuple(EpochStats(**epoch) for epoch in values["epochs"])})


@dataclass(frozen=True)
class BaseFacts:
    """The saved run that a continued run began with.

    Attributes:
        folder: where its files are.
        tasks: how many tasks it had learned.
        classes: how many classes these had.
        sha256: of all that it had learned.
        evaluation: in words, which classes the continued run tests.
        reported_from_task: the first task (from 0) that results speak of.
    """

    folder: str
    tasks: int
    classes: int
    sha256: str
    evaluation: str
    reported_from_task: int


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """All that a run is, but for tensors: the names are those of the JSON on disk.

    Attributes:
        status: ``running`` or ``finished``.
        identity: what its numbers depend on; two runs that agree in it are one run.
        config: the settings as given.
        seed: which of the config's seeds.
        backbone: name, hash of the weights, feature width and the like.
        data: counts of classes and images, and the images' hash by split.
        versions: of what computed the numbers.
        class_order: class names in the order of learning.
        task_sizes: classifier rows that each task brings, those of a continued run's base first.
        row_class: the class (a place in ``class_order``) of each classifier row.
        domains: of each task, in domain-incremental runs; else empty.
        continual: False for a method that sees earlier tasks' data again.
        backbone_forwards: images that pass the backbone for this run: those that the feature bank lacked at first.
        seconds: spent, by phase.
        files: the checkpoint's files with their SHA-256.
        results_bytes: how much of ``results.jsonl`` counts.
        tasks: the results after each task that is done; those before ``first_reported`` are of the base's test images.
        cost: what training and answering cost, by name (``models.cost``); empty before the end.
        base: the saved run that this one continues, or None.
    """

    status: str = "running"
    identity: dict[str, Any]
    config: dict[str, Any]
    seed: int
    backbone: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    class_order: tuple[str, ...]
    task_sizes: tuple[int, ...]
    row_class: tuple[int, ...]
    domains: tuple[str, ...] = ()
    continual: bool = True
    backbone_forwards: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"features": 0.0, "train": 0.0, "evaluate": 0.0})
    files: dict[str, str] = field(default_factory=dict)
    results_bytes: int = 0
    tasks: tuple[TaskRecord, ...] = ()
    cost: dict[str, float] = field(default_factory=dict)
    base: BaseFacts | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def shows_all(self) -> bool:
        """Whether the JSON holds what makes it long: matrices, confusions, epochs."""
        return self.finished or len(self.tasks) <= FEW_TASKS

    @property
    def first_reported(self) -> int:
        """The first task (from 0) that results speak of: later than 0 where earlier tasks are not tested."""
        return self.base.reported_from_task if self.base else 0

    def with_task(self, record: TaskRecord, **changes: Any) -> "RunManifest":
        """The manifest after one more task, with other attributes changed by name."""
        done = len(self.tasks) + 1 == len(self.task_sizes)
        if not done and len(self.tasks) >= FEW_TASKS:
            record = replace(record, confusion={})
        status = "finished" if done else "running"
        return replace(self, tasks=(*self.tasks, record), status=status, **changes)

    def tested(self, record: TaskRecord) -> "RunManifest":
        """The manifest with what a test after the newest task gave."""
        tested = {name: getattr(record, name) for name in ("results", "confusion", "entropy")}
        return replace(self, tasks=self.tasks[:-1], status="running").with_task(replace(self.tasks[-1], **tested))

    def with_last_results(self, details: dict[str, dict[str, Any]], cost: dict[str, float]) -> "RunManifest":
        """The manifest with what only the end of a run can tell: details of its last task, and its cost."""
        return replace(self, tasks=(*self.tasks[:-1], replace(self.tasks[-1], details=details)), cost=cost)

    def learned(self, tasks: int | None = None) -> LearnedClasses:
        """The classes of the first ``tasks`` tasks, by default of all that are done."""
        sizes = self.task_sizes[: len(self.tasks) if tasks is None else tasks]
        row_class = np.asarray(self.row_class[: sum(sizes)], dtype=np.int64)
        class_names = self.class_order[: int(row_class.max(initial=-1)) + 1]
        return LearnedClasses(class_names, row_class, sizes, self.domains[: len(sizes)])

    def with_classes(self, of: LearnedClasses | TaskStream) -> "RunManifest":
        """The manifest of a run that has these classes, in these tasks."""
        return replace(
            self,
            class_order=tuple(of.class_names),
            row_class=tuple(of.row_class.tolist()),
            task_sizes=tuple(of.task_sizes),
            domains=tuple(of.domains),
        )

    def with_images(self, learned: LearnedClasses, images: int, content: str) -> "RunManifest":
        """Return the manifest of a run of its own, which no config describes, that is to learn one more task.

        Args:
            learned: the classes after that task.
            images: how many it has.
            content: a hash of them.
        """
        by_hand = [*self.identity.get("learned_by_hand", []), content]
        counts = {"classes": len(learned.class_names), "train_images": self.data["train_images"] + images}
        return replace(
            self.with_classes(learned),
            status="running",
            identity={**self.identity, "learned_by_hand": by_hand},
            data={**self.data, **counts},
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values under the names of the attributes; ``base`` only where there is one."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        values["tasks"] = [record.to_json() for record in self.tasks]
        base = values.pop("base")
        return values if base is None else {**values, "base": vars(base)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunManifest":
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        tasks = tuple(map(TaskRecord.from_json, values["tasks"]))
        base = BaseFacts(**values["base"]) if "base" in values else None
        return cls(**{**values, **lists, "tasks": tasks, "base": base})


# -- which run it is --------------------------------------------------------------------------------------------------


def run_identity(config: Config, seed: int, backbone: Any, images_sha256: dict[str, str]) -> dict[str, Any]:
    """What makes two runs the same run: every key that changes what is computed, or what was found behind it.

    Where a key only names something (weights, images) or leaves it open (``precision: auto``), what was found stands
    here: the same weights under another name make the same run.
    """
    values = config.as_dict()
    settings = {n: values[n] for n, key in config.keys.items() if key.changes_the_run and key.recorded_as is None}
    return {
        **settings,
        "views": config.views,
        "augment_seed": config.view_seed(seed) if config.views else None,
        "precision": backbone.precision,
        "seed": seed,
        "weights_sha256": backbone.weights_sha256,
        "images_sha256": images_sha256,
        **backbone.variant,
    }


def versions() -> dict[str, str]:
    """The versions of what computes the numbers; nothing is loaded for it but PyTorch, which knows its own build."""
    from importlib.metadata import version

    import torch

    others = {name: version(name) for name in ("torchvision", "timm", "numpy", "pillow")}
    return {"python": platform.python_version(), "torch": str(torch.__version__), **others}


def first_manifest(config: Config, seed: int, backbone: Any) -> RunManifest:
    """The manifest of a run that has learned nothing, with no task laid out yet."""
    facts = ("name", "weights_sha256", "feature_dim", "precision", "parameters", "pooling")
    return RunManifest(
        status="finished",
        identity=run_identity(config, seed, backbone, {}),
        config=config.as_dict(),
        seed=seed,
        backbone={name: getattr(backbone, name) for name in facts},
        data={"classes": 0, "train_images": 0, "test_images": 0, "images_sha256": {}},
        versions=versions(),
        class_order=(),
        task_sizes=(),
        row_class=(),
        continual=config.method.continual,
    )
