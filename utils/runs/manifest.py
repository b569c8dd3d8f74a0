"""The manifest of a run as a type: what it is, what it has learned so far, and the results of each task.

Both types are frozen. A run that goes on makes a new manifest from the old one (``with_task``, ``dataclasses.replace``)
and the checkpoint folder writes that in one step.
"""

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from utils.data.tasks import LearnedClasses
from utils.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class EpochStats:
    """What one epoch of training gave.

    Attributes:
        loss: mean loss over the steps.
        accuracy: share of the training images that were answered correctly while training, in percent.
    """

    loss: float
    accuracy: float


@dataclass(frozen=True)
class TaskRecord:
    """The results after one task.

    Attributes:
        results: for each selection ``top1``, ``top5``, ``per_task``, ``groups`` and, with modules,
            ``selection_accuracy``, all in percent. Empty for a task that nobody tested.
        confusion: for each selection of a module the counts of (true task, chosen module).
        entropy: for each such selection the mean entropy of the chosen module in nats, by module.
        sparsity: share of the new module's parameters that are nearly zero; None without modules.
        parameters: numbers of parameters, by what holds them.
        epochs: what each epoch of training gave; empty where that was not kept.
        details: of the last task alone, for each selection accuracy on each class and calibration
            (``utils.results.predictions``); empty for the others.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    entropy: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    sparsity: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    epochs: tuple[EpochStats, ...] = ()
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values under the names of the attributes."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TaskRecord":
        """Read what ``to_json`` gave; a record of an older version has no ``epochs`` and ``details``.

        Raises:
            CheckpointError: something is absent or of another kind; it is named.
        """
        get = _Values(values, "a task's ")
        epochs = [_Values(item, "an epoch's ") for item in get.read("epochs", list, [])]
        return cls(
            results=get.read("results", dict),
            confusion=get.read("confusion", dict),
            entropy=get.read("entropy", dict),
            sparsity=get.read("sparsity", (float, int, type(None))),
            parameters=get.read("parameters", dict),
            details=get.read("details", dict, {}),
            epochs=tuple(
                EpochStats(float(e.read("loss", (float, int))), float(e.read("accuracy", (float, int)))) for e in epochs
            ),
        )


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
        format: of the JSON on disk.
        status: ``running`` or ``finished``.
        identity: what its numbers depend on; two runs that agree in it are one run.
        config: the settings as given.
        seed: which of the config's seeds.
        backbone: name, hash of the weights, feature width and the like.
        data: counts of classes and images, and the images' hash by split.
        versions: of what computed the numbers.
        class_order: class names in the order of learning.
        task_sizes: classifier rows that each task brings.
        row_class: the class (a place in ``class_order``) of each classifier row.
        domains: of each task, in domain-incremental runs; else empty.
        continual: False for a method that sees earlier tasks' data again.
        missing_at_start: forward passes that the feature bank lacked when the run first began; None before that.
        backbone_forwards: images that passed the backbone for this run.
        seconds: spent, by phase.
        files: the checkpoint's files with their SHA-256.
        tasks: the results after each task that is done.
        cost: what training and answering cost, by name (``models.cost``); empty before the end.
        base: the saved run that this one continues, or None.
    """

    format: int = FORMAT
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
    missing_at_start: int | None = None
    backbone_forwards: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"features": 0.0, "train": 0.0, "evaluate": 0.0})
    files: dict[str, str] = field(default_factory=dict)
    tasks: tuple[TaskRecord, ...] = ()
    cost: dict[str, float] = field(default_factory=dict)
    base: BaseFacts | None = None

    @property
    def finished(self) -> bool:
        """Whether every task is done."""
        return self.status == "finished"

    @property
    def first_reported(self) -> int:
        """The first task (from 0) that results speak of: later than 0 where earlier tasks are not tested."""
        return self.base.reported_from_task if self.base else 0

    def with_task(self, record: TaskRecord, **changes: Any) -> "RunManifest":
        """Return the manifest after one more task, with other attributes changed by name."""
        done = len(self.tasks) + 1 == len(self.task_sizes)
        earlier = (replace(task, details={}) for task in self.tasks)
        return replace(self, tasks=(*earlier, record), status="finished" if done else "running", **changes)

    def with_last_results(self, details: dict[str, dict[str, Any]], cost: dict[str, float]) -> "RunManifest":
        """Return the manifest with what only the end of a run can tell: details of its last task, and its cost."""
        return replace(self, tasks=(*self.tasks[:-1], replace(self.tasks[-1], details=details)), cost=cost)

    def learned(self, tasks: int | None = None) -> LearnedClasses:
        """Return the classes of the first ``tasks`` tasks, by default of all that are done."""
        sizes = self.task_sizes[: len(self.tasks) if tasks is None else tasks]
        row_class = np.asarray(self.row_class[: sum(sizes)], dtype=np.int64)
        class_names = self.class_order[: int(row_class.max(initial=-1)) + 1]
        return LearnedClasses(class_names, row_class, sizes, self.domains[: len(sizes)])

    def with_learned(self, learned: LearnedClasses) -> "RunManifest":
        """Return the manifest of a run whose classes are those of ``learned``."""
        return replace(
            self,
            class_order=learned.class_names,
            row_class=tuple(learned.row_class.tolist()),
            task_sizes=learned.task_sizes,
            domains=learned.domains,
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values under the names of the attributes; ``base`` only where there is one."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        lists = {name: list(values[name]) for name in ("class_order", "task_sizes", "row_class", "domains")}
        values |= lists | {"tasks": [record.to_json() for record in self.tasks]}
        base = values.pop("base")
        return values if base is None else {**values, "base": dataclasses.asdict(base)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunManifest":
        """Read what ``to_json`` gave.

        Raises:
            CheckpointError: something is absent or of another kind; it is named.
        """
        get = _Values(values, "")
        base = get.read("base", (dict, type(None)), None)
        manifest = cls(
            **{name: get.read(name, dict) for name in ("identity", "config", "backbone", "data")},
            **{name: get.read(name, int) for name in ("format", "seed", "backbone_forwards")},
            status=get.read("status", str),
            versions=get.read("versions", dict),
            class_order=get.items("class_order", str),
            task_sizes=get.items("task_sizes", int),
            row_class=get.items("row_class", int),
            domains=get.items("domains", str, []),
            continual=get.read("continual", bool, True),
            missing_at_start=get.read("missing_at_start", (int, type(None)), None),
            seconds=get.read("seconds", dict),
            files=get.read("files", dict),
            cost=get.read("cost", dict, {}),
            tasks=tuple(TaskRecord.from_json(item) for item in get.items("tasks", dict)),
            base=_base_from_json(base),
        )
        _check_counts(manifest)
        return manifest


def _base_from_json(values: Mapping[str, Any] | None) -> BaseFacts | None:
    if values is None:
        return None
    get = _Values(values, "base's ")
    return BaseFacts(
        **{name: get.read(name, str) for name in ("folder", "sha256", "evaluation")},
        **{name: get.read(name, int) for name in ("tasks", "classes", "reported_from_task")},
    )


def _check_counts(manifest: RunManifest) -> None:
    """Check that tasks, rows and classes fit each other."""
    rows, classes = len(manifest.row_class), len(manifest.class_order)
    if sum(manifest.task_sizes) != rows or min(manifest.task_sizes, default=1) < 1:
        raise CheckpointError(f"its task_sizes {list(manifest.task_sizes)} do not fit its {rows} rows of row_class")
    if not all(0 <= number < classes for number in manifest.row_class):
        raise CheckpointError(f"its row_class names classes that are not among the {classes} of class_order")
    if len(manifest.tasks) > len(manifest.task_sizes):
        raise CheckpointError(f"it has results of {len(manifest.tasks)} tasks, but {len(manifest.task_sizes)} tasks")


@dataclass(frozen=True)
class _Values:
    """The values of a JSON object, each read with its kind; ``of`` says whose they are."""

    values: Mapping[str, Any]
    of: str

    def read(self, name: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """Return the value of ``name``, or ``default`` where it is absent and one is given.

        Raises:
            CheckpointError: it is absent, or not of ``kind``.
        """
        if not isinstance(self.values, Mapping):
            raise CheckpointError(f"{self.of}values are not a JSON object")
        if name not in self.values:
            if default:
                return default[0]
            raise CheckpointError(f"{self.of}{name!r} is absent")
        value = self.values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.of}{name!r} is of another kind: {type(value).__name__}")
        return value

    def items(self, name: str, kind: type, *default: Any) -> tuple[Any, ...]:
        """Return the list ``name``, each of whose items is of ``kind``, as a tuple.

        Raises:
            CheckpointError: it is absent, no list, or an item is of another kind.
        """
        found = self.read(name, list, *default)
        if not all(isinstance(item, kind) and (kind is bool or not isinstance(item, bool)) for item in found):
            raise CheckpointError(f"{self.of}{name!r} holds an item of another kind")
        return tuple(found)


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers."""
    import PIL
    import timm
    import torch
    import torchvision

    return {
        "python": platform.python_version(),
        **{m.__name__.lower(): m.__version__ for m in (torch, torchvision, timm, np)},
        "pillow": PIL.__version__,
    }
