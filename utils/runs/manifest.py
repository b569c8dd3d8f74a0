"""The manifest of a run as a type: what it is, what it has learned so far, and the results of each task.

Both types are frozen. A run that goes on makes a new manifest from the old one (``with_task``, ``dataclasses.replace``)
and the checkpoint folder writes that in one step.

What grows with the tasks, for each task, stands on disk beside the manifest, in a file a task that is written once:
``to_json(whole=False)`` leaves it out, ``evaluation`` gives it, ``with_evaluation`` puts it back. What grows with their
square within one task is kept at the end alone, and on the way while there are few tasks (``FEW_TASKS``). So what a
task writes grows at most as the tasks before it do.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from utils.config.config import Config
from utils.data.tasks import LearnedClasses
from utils.errors import CheckpointError
from utils.runs.identity import run_identity, versions
from utils.runs.json_values import JsonValues
from utils.words import counted

FORMAT = 4  # 1: one file, 2: rows of all tasks in the last task's file, 3: symmetric matrices whole; all are read
FORMATS = (1, 2, 3, FORMAT)
FEW_TASKS = 30  # up to here the JSON of an unfinished run holds all that that of a finished one does


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
        """Return JSON-ready values under the names of the attributes."""
        return {"loss": self.loss, "accuracy": self.accuracy}  # dataclasses.asdict takes ten times as long


@dataclass(frozen=True)
class TaskRecord:
    """The results after one task.

    Attributes:
        results: for each selection ``top1``, ``top5``, ``per_task``, ``groups`` and, with modules,
            ``selection_accuracy``, all in percent. Empty for a task that nobody tested; ``groups`` of the last alone.
        confusion: for each selection of a module the counts of (true task, chosen module); of the last task alone, and
            empty while a run of more than ``FEW_TASKS`` tasks goes on.
        entropy: for each such selection the mean entropy of the chosen module in nats, by module; of the last alone.
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

    def of_an_earlier_task(self) -> "TaskRecord":
        """Return what is kept once there is a later task."""
        results = {name: _without(result, ("groups",)) for name, result in self.results.items()}
        return replace(self, results=results, confusion={}, entropy={}, details={})

    def to_json(self, *, whole: bool = True) -> dict[str, Any]:
        """Return JSON-ready values under the names of the attributes; unless ``whole``, without ``evaluation``'s."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if whole:
            return {**values, "epochs": [epoch.to_json() for epoch in self.epochs]}
        values["results"] = {name: _without(result, _IN_ROWS) for name, result in self.results.items()}
        return {name: value for name, value in values.items() if name not in (*_OF_THE_LAST, "epochs")}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TaskRecord":
        """Read what ``to_json`` gave; a record of an older version has no ``epochs`` and ``details``.

        Raises:
            CheckpointError: something is absent or of another kind; it is named.
        """
        get = JsonValues(values, "a task's ")
        return cls(
            results=get.results("results"),
            confusion=get.numbers("confusion", {}),
            entropy=get.numbers("entropy", {}),
            sparsity=get.read("sparsity", (float, int, type(None))),
            parameters=get.numbers("parameters"),
            details=get.read("details", dict, {}),
            epochs=_epochs_from_json(get),
        )


def _epochs_from_json(get: JsonValues) -> tuple[EpochStats, ...]:
    epochs = [JsonValues(item, "an epoch's ") for item in get.read("epochs", list, [])]
    numbers = [[float(epoch.read(name, (float, int))) for name in ("loss", "accuracy")] for epoch in epochs]
    return tuple(EpochStats(*of_epoch) for of_epoch in numbers)


_IN_ROWS = ("per_task", "groups")  # of a selection's results: one number for each task so far
_OF_THE_LAST = ("confusion", "entropy", "details")  # kept for the last task alone


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


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
    def shows_all(self) -> bool:
        """Whether the JSON holds what makes it long: matrices, confusions, epochs."""
        return self.finished or len(self.tasks) <= FEW_TASKS

    @property
    def first_reported(self) -> int:
        """The first task (from 0) that results speak of: later than 0 where earlier tasks are not tested."""
        return self.base.reported_from_task if self.base else 0

    def with_task(self, record: TaskRecord, **changes: Any) -> "RunManifest":
        """Return the manifest after one more task, with other attributes changed by name."""
        done = len(self.tasks) + 1 == len(self.task_sizes)
        if not done and len(self.tasks) >= FEW_TASKS:
            record = replace(record, confusion={})
        tasks = (*(earlier.of_an_earlier_task() for earlier in self.tasks[-1:]), record)
        status = "finished" if done else "running"
        return replace(self, tasks=(*self.tasks[:-1], *tasks), status=status, **changes)

    def tested(self, record: TaskRecord) -> "RunManifest":
        """Return the manifest with what a test after the newest task gave."""
        confusion = record.confusion if self.shows_all else {}
        newest = replace(self.tasks[-1], results=record.results, confusion=confusion, entropy=record.entropy)
        return replace(self, tasks=(*self.tasks[:-1], newest))

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
            self.with_learned(learned),
            status="running",
            identity={**self.identity, "learned_by_hand": by_hand},
            data={**self.data, **counts},
        )

    def to_json(self, *, whole: bool = True) -> dict[str, Any]:
        """Return JSON-ready values under the names of the attributes; ``base`` only where there is one.

        Args:
            whole: False leaves out what ``evaluation`` gives: what is left grows as the tasks do.
        """
        values = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}
        lists = {name: list(values[name]) for name in ("class_order", "task_sizes", "row_class", "domains")}
        values |= lists | {"tasks": [record.to_json(whole=whole) for record in self.tasks]}
        if self.base is not None:
            values["base"] = dataclasses.asdict(self.base)
        return {name: value for name, value in values.items() if name != "base" or value is not None}

    def evaluation(self, task: int) -> dict[str, Any]:
        """Return what ``to_json(whole=False)`` leaves out of the record of ``task``, counted from 0."""
        record = self.tasks[task]
        row = {name: {n: result[n] for n in _IN_ROWS if n in result} for name, result in record.results.items()}
        epochs = [epoch.to_json() for epoch in record.epochs]
        return {"row": row, "epochs": epochs, **{name: getattr(record, name) for name in _OF_THE_LAST}}

    def with_evaluation(self, task: int, values: Mapping[str, Any]) -> "RunManifest":
        """Return the manifest with what ``evaluation(task)`` gave; a task whose results do not count stays without.

        Raises:
            CheckpointError: something is absent or of another kind; it is named.
        """
        get = JsonValues(values, "")
        of_all = "rows" in values  # format 2: those of all tasks so far in one file
        rows = get.items("rows", dict) if of_all else (get.read("row", dict),)
        first = 0 if of_all else task
        if first + len(rows) != task + 1:
            raise CheckpointError(f"it has rows of {counted(len(rows), 'task')}, not of {task + 1}")
        tasks = list(self.tasks)
        for index, row in zip(range(first, len(tasks)), rows, strict=False):
            of = JsonValues(row, "a row's ")
            results = {name: {**result, **of.row(name)} for name, result in tasks[index].results.items()}
            tasks[index] = replace(tasks[index], results=results)
            if index == task and "epochs" in values:  # format 2 had them in the manifest
                tasks[index] = replace(tasks[index], epochs=_epochs_from_json(get))
            if index < len(tasks) - 1:
                tasks[index] = tasks[index].of_an_earlier_task()
        if task == len(tasks) - 1 and tasks[-1].results:
            facts = {name: get.numbers(name) for name in ("confusion", "entropy")}
            tasks[-1] = replace(tasks[-1], **facts, details=get.read("details", dict, {}))
        return replace(self, tasks=tuple(tasks))

    def without_row(self) -> int | None:
        """Return the first task, counted from 0, whose results lack what ``evaluation`` gives; None: no task."""
        lacking = (i for i, t in enumerate(self.tasks) if not all("per_task" in r for r in t.results.values()))
        return next(lacking, None)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunManifest":
        """Read what ``to_json`` gave.

        Raises:
            CheckpointError: something is absent or of another kind; it is named.
        """
        get = JsonValues(values, "")
        base = get.read("base", (dict, type(None)), None)
        manifest = cls(
            **{name: get.read(name, dict) for name in ("identity", "config", "backbone", "data")},
            **{name: get.read(name, int) for name in ("seed", "backbone_forwards")},
            status=get.one_of("status", ("running", "finished")),
            versions=get.read("versions", dict),
            class_order=get.items("class_order", str),
            task_sizes=get.items("task_sizes", int),
            row_class=get.items("row_class", int),
            domains=get.items("domains", str, []),
            continual=get.read("continual", bool, True),
            missing_at_start=get.read("missing_at_start", (int, type(None)), None),
            seconds=get.numbers("seconds", among=("features", "train", "evaluate")),
            files=get.read("files", dict),
            cost=get.numbers("cost", {}),
            tasks=tuple(TaskRecord.from_json(item) for item in get.items("tasks", dict)),
            base=_base_from_json(base),
        )
        _check_counts(manifest)
        return manifest


def first_manifest(config: Config, seed: int, backbone: Any) -> RunManifest:
    """The manifest of a run that has learned nothing, with no task laid out yet."""
    identity = run_identity(
        config, seed, weights_sha256=backbone.weights_sha256, precision=backbone.precision, images_sha256={}
    )
    return RunManifest(
        status="finished",
        identity={**identity, **backbone.variant},
        config=config.as_dict(),
        seed=seed,
        backbone=backbone_facts(backbone),
        data={"classes": 0, "train_images": 0, "test_images": 0, "images_sha256": {}},
        versions=versions(),
        class_order=(),
        task_sizes=(),
        row_class=(),
        continual=config.method.continual,
    )


def backbone_facts(backbone: Any) -> dict[str, Any]:
    """What a run records of its backbone."""
    names = ("name", "weights_sha256", "feature_dim", "precision", "parameters", "pooling")
    return {name: getattr(backbone, name) for name in names}


def _base_from_json(values: Mapping[str, Any] | None) -> BaseFacts | None:
    if values is None:
        return None
    get = JsonValues(values, "base's ")
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
    left = len(manifest.task_sizes) - len(manifest.tasks)
    if left < 0 or manifest.finished != (left == 0):
        found = f"results of {len(manifest.tasks)} of {counted(len(manifest.task_sizes), 'task')}"
        raise CheckpointError(f"its status is {manifest.status!r}, but it has {found}")
