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
Point = tuple[str, int, dict[str, float]]  # "task" or "epoch", its number from 1, and values by curve


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
    _to: Any = None  # the package's own object for a run, once it has begun

    def __init__(self, folder: Path, config: Config, name: str) -> None:
        self.folder, self.config, self.name = folder, config, name
        self._written = 0

    def update(self, records: Sequence[TaskRecord]) -> None:
        """Take the records of all tasks so far, the newest last."""
        if not self.package:
            return
        with self._faults_named():
            if self._to is None:
                if self.folder.is_dir():
                    shutil.rmtree(self.folder)
                self.folder.mkdir(parents=True)
                self._to = self.begin(importlib.import_module(self.package))
            self.add(points(records, self._written))
            self._written = len(records)

    def finish(self, run: Mapping[str, Any], pictures: Sequence[Path]) -> None:
        """Take the JSON of the finished run and the pictures that there are."""
        if self._to is not None:
            with self._faults_named():
                self.end(summary_numbers(run), [path for path in pictures if path.is_file()])

    def begin(self, package: Any) -> Any:
        """Begin with the config; return the package's object for the run."""

    def add(self, found: Sequence[Point]) -> None:
        """Add points to the curves."""

    def end(self, summary: Mapping[str, float], pictures: Sequence[Path]) -> None:
        """Add the numbers and pictures of the end."""

    def close(self) -> None:
        """End; nothing follows."""

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        """A fault of the disk or of the tracker's package becomes one line."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] != self.package:
                raise
            reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
            raise UserError(f"{self.folder} cannot be written ({reason}); tracker=none does without") from error


def points(records: Sequence[TaskRecord], written: int) -> list[Point]:
    """Return the points of the tasks from ``written`` on: accuracies by task, loss and training accuracy by epoch."""
    found: list[Point] = []
    epoch = sum(len(record.epochs) for record in records[:written])
    for task, record in enumerate(records[written:], start=written + 1):
        for stats in record.epochs:
            epoch += 1
            found.append(("epoch", epoch, {"train/loss": stats.loss, "train/accuracy": stats.accuracy}))
        values = {f"{m}/{name}": result.get(m) for name, result in record.results.items() for m in MEASURES}
        found.append(("task", task, {name: value for name, value in values.items() if value is not None}))
    return found


def summary_numbers(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a finished run's JSON that a table of runs needs, by name."""
    kinds = {name: of | run["details"].get(name, {}) for name, of in run["results"].items()}
    numbers = {f"{what}/{name}": value for name, of in kinds.items() for what, value in of.items()}
    numbers |= {f"cost/{name}": value for name, value in run["cost"].items()}
    return {name: value for name, value in numbers.items() if isinstance(value, float)}


class TensorBoard(Tracker):
    """Event files in ``<run>.tensorboard``."""

    package, install = "torch.utils.tensorboard", "tensorboard"

    def begin(self, package: Any) -> Any:
        writer = package.SummaryWriter(str(self.folder))
        rows = "".join(f"| {name} | {value} |\n" for name, value in self.config.as_dict().items())
        writer.add_text("config", f"| key | value |\n|---|---|\n{rows}")
        return writer

    def add(self, found: Sequence[Point]) -> None:
        for _, step, values in found:
            for name, value in values.items():
                self._to.add_scalar(name, value, step)
        self._to.flush()

    def end(self, summary: Mapping[str, float], pictures: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for name, value in summary.items():
            self._to.add_scalar(f"summary/{name}", value, 0)
        for path in pictures:
            with Image.open(path) as image:
                self._to.add_image(path.name, np.asarray(image.convert("RGB")), dataformats="HWC")
        self._to.flush()

    def close(self) -> None:
        if self._to is not None:
            self._to.close()


class WeightsAndBiases(Tracker):
    """A run in ``<run>.wandb``: offline unless the environment's WANDB_MODE says otherwise."""

    package = install = "wandb"

    def begin(self, package: Any) -> Any:
        key = hashlib.sha256(str(self.folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        run = package.init(
            project=os.environ.get("WANDB_PROJECT", "tosca"),
            name=self.name,
            id=key,  # the same at each start
            resume="allow",
            dir=str(self.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=self.config.as_dict(),
            settings=package.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        for axis, curves in (("task", [f"{measure}/*" for measure in MEASURES]), ("epoch", ["train/*"])):
            run.define_metric(axis)
            for name in curves:
                run.define_metric(name, step_metric=axis)
        return run

    def add(self, found: Sequence[Point]) -> None:
        for axis, step, values in found:
            self._to.log({axis: step, **values})

    def end(self, summary: Mapping[str, float], pictures: Sequence[Path]) -> None:
        self._to.summary.update(dict(summary))
        for path in pictures:
            self._to.save(str(path), base_path=str(path.parent))

    def close(self) -> None:
        if self._to is not None:
            self._to.finish()


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_tracker(config: Config) -> None:
    """Find out before any work whether the tracker's package is installed."""
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
