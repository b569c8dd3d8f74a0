"""A run's config, curves, summary and pictures for a tracker, while the run goes on.

TensorBoard and Weights & Biases are optional extras (requirements-extra.txt), each behind the same interface.
All of them write to a folder beside the run's JSON; nothing leaves the machine unless the user says so.
"""

import hashlib
import importlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.config.config import Config
from utils.errors import ConfigError, UserError
from utils.runs.manifest import TaskRecord

MEASURES = ("top1", "top5", "selection_accuracy")
PROJECT = "tosca"
Point = tuple[str, float, int]  # name of the curve, value, task or epoch from 1


class Tracker:
    """Takes what a run tells. This one does nothing with it; the others do so by ``begin``, ``add`` and ``end``.

    A resumed run writes its curves anew, so that a point that an interrupted start did not reach is not missing.

    Args:
        folder: for what is written; made with the first record.
        config: of the run.
        name: of the run, for people.
    """

    package = ""  # what to import, so that its absence is known before any work
    install = ""

    def __init__(self, folder: Path, config: Config, name: str) -> None:
        self.folder, self.config, self.name = folder, config, name
        self._begun, self._written = False, 0

    def update(self, records: Sequence[TaskRecord]) -> None:
        """Take the records of all tasks so far, the newest last.

        Raises:
            UserError: the tracker cannot write.
        """
        if not self.package:
            return
        with self._faults_named():
            if not self._begun:
                self.begin()
                self._begun = True
            self.add(curve_points(records, self._written))
            self._written = len(records)

    def finish(self, run: Mapping[str, Any], pictures: Sequence[Path]) -> None:
        """Take the JSON of the finished run and the pictures that there are.

        Raises:
            UserError: the tracker cannot write.
        """
        if self._begun:
            with self._faults_named():
                self.end(summary_numbers(run), [path for path in pictures if path.is_file()])

    def close(self) -> None:
        """End; nothing follows."""

    def begin(self) -> None:
        """Remove what an earlier start of this run wrote, and begin with the config."""

    def add(self, points: Sequence[Point]) -> None:
        """Add points to the curves."""

    def end(self, summary: Mapping[str, float], pictures: Sequence[Path]) -> None:
        """Add the numbers and pictures of the end."""

    def config_values(self) -> dict[str, Any]:
        """Return the run's config as flat values."""
        return self.config.as_dict()

    @property
    def key(self) -> str:
        """An identifier that the same run has at each start."""
        return hashlib.sha256(str(self.folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        """A fault of the disk or of the tracker's package becomes one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] != self.package:
                raise
            reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
            raise UserError(f"{self.folder} cannot be written ({reason}); tracker=none does without") from error


def curve_points(records: Sequence[TaskRecord], written: int) -> list[Point]:
    """Return the points of the tasks from ``written`` on: accuracies by task, loss and training accuracy by epoch."""
    points: list[Point] = []
    epoch = sum(len(record.epochs) for record in records[:written])
    for task, record in enumerate(records[written:], start=written + 1):
        for stats in record.epochs:
            epoch += 1
            points += [("train/loss", stats.loss, epoch), ("train/accuracy", stats.accuracy, epoch)]
        for selection, result in record.results.items():
            points += [(f"{m}/{selection}", result[m], task) for m in MEASURES if result.get(m) is not None]
    return points


def summary_numbers(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a finished run's JSON that a table of runs needs, by name."""
    names = ("average", "last", "forgetting", "backward_transfer")
    numbers = {f"{name}/{selection}": of[name] for selection, of in run["results"].items() for name in names}
    numbers |= {f"ece/{name}": of["ece"] for name, of in run["details"].items() if of["ece"] is not None}
    return numbers | {f"cost/{plain(name)}": value for name, value in run["cost"].items()}


def plain(name: str) -> str:
    """Return a name that every tracker takes: letters, digits, spaces and ``_ - . /``."""
    return " ".join("".join(c if c.isalnum() or c in "_-./" else " " for c in name).split())


# -- the trackers -----------------------------------------------------------------------------------------------------


class TensorBoard(Tracker):
    """Event files in ``<run>.tensorboard``."""

    package, install = "torch.utils.tensorboard", "tensorboard"
    _writer: Any = None

    def begin(self) -> None:
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = importlib.import_module(self.package).SummaryWriter(str(self.folder))
        rows = "".join(f"| {name} | {value} |\n" for name, value in self.config_values().items())
        self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}")

    def add(self, points: Sequence[Point]) -> None:
        for name, value, step in points:
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, summary: Mapping[str, float], pictures: Sequence[Path]) -> None:
        for name, value in summary.items():
            self._writer.add_scalar(f"summary/{name}", value, 0)
        for path in pictures:
            self._writer.add_image(path.name, _pixels(path), dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class WeightsAndBiases(Tracker):
    """A run in ``<run>.wandb``: offline unless the environment's WANDB_MODE says otherwise."""

    package = install = "wandb"
    _run: Any = None

    def begin(self) -> None:
        wandb = importlib.import_module(self.package)
        for old in self.folder.glob("wandb/offline-run-*"):
            shutil.rmtree(old)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.name,
            id=self.key,
            resume="allow",
            dir=str(self.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=self.config_values(),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        for axis, curves in (("task", [f"{measure}/*" for measure in MEASURES]), ("epoch", ["train/*"])):
            self._run.define_metric(axis)
            for name in curves:
                self._run.define_metric(name, step_metric=axis)

    def add(self, points: Sequence[Point]) -> None:
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for name, value, step in points:
            axis = "epoch" if name.startswith("train/") else "task"
            rows.setdefault((axis, step), {})[name] = value
        for (axis, step), values in rows.items():
            self._run.log({axis: step, **values})

    def end(self, summary: Mapping[str, float], pictures: Sequence[Path]) -> None:
        self._run.summary.update(dict(summary))
        wandb = importlib.import_module(self.package)
        artifact = wandb.Artifact(f"pictures-{self.key}", "pictures")
        for path in pictures:
            artifact.add_file(str(path))
        if pictures:
            self._run.log_artifact(artifact)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "none": Tracker,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_tracker(config: Config) -> None:
    """Find out before any work whether the tracker can be used.

    Raises:
        ConfigError: its package is not installed.
    """
    kind = TRACKERS[config.tracker]
    if kind.package:
        try:
            importlib.import_module(kind.package)
        except ImportError:
            raise ConfigError(
                f'tracker "{config.tracker}" needs a package that is not installed: pip install {kind.install}, or set '
                "tracker=none"
            ) from None


@contextmanager
def tracking(config: Config, folder: Path, stem: str) -> Iterator[Tracker]:
    """The tracker that ``config`` names, closed at the end; it writes to ``<folder>/<stem>.<tracker>``."""
    name = f"{config.model_name} {config.dataset} {stem}"
    tracker = TRACKERS[config.tracker](folder / f"{stem}.{config.tracker}", config, name)
    try:
        yield tracker
    finally:
        tracker.close()
