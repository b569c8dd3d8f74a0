"""A run's curves for a tracker, while the run goes on. TensorBoard is an optional extra (requirements-extra.txt)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.config import Config
from utils.errors import ConfigError, UserError
from utils.runs.manifest import TaskRecord

MEASURES = ("top1", "top5", "selection_accuracy")


def check_tracker(config: Config) -> None:
    """Find out before any work whether the tracker can be used.

    Raises:
        ConfigError: its package is not installed.
    """
    if config.tracker == "tensorboard":
        _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            'tracker "tensorboard" needs a package that is not installed: pip install tensorboard, or set tracker=none'
        ) from None
    return SummaryWriter


class Tracker:
    """Takes the records of the tasks so far, as often as there is a new one. This one does nothing with them."""

    def update(self, records: Sequence[TaskRecord]) -> None:
        """``records`` are those of all tasks so far, the newest last."""

    def close(self) -> None:
        """Nothing follows."""


class TensorBoard(Tracker):
    """Writes ``top1/<selection>``, ``top5/<selection>`` and ``selection_accuracy/<selection>`` by task, from 1.

    A resumed run writes its curves anew, so that a point that an interrupted start did not reach is not missing.

    Args:
        folder: for the event files; made with the first record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._writer, self._written = folder, None, 0

    def update(self, records: Sequence[TaskRecord]) -> None:
        try:
            if self._writer is None:
                for old in self.folder.glob("events.out.tfevents.*"):
                    old.unlink()
                self._writer = _summary_writer()(str(self.folder))
            for task, record in enumerate(records[self._written :], start=self._written + 1):
                for selection, result in record.results.items():
                    for measure in MEASURES:
                        if result.get(measure) is not None:
                            self._writer.add_scalar(f"{measure}/{selection}", result[measure], task)
            self._written = len(records)
            self._writer.flush()
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror or error}); tracker=none does without"
            ) from error

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[Tracker]:
    """The tracker that ``config`` names, closed at the end."""
    tracker = TensorBoard(folder) if config.tracker == "tensorboard" else Tracker()
    try:
        yield tracker
    finally:
        tracker.close()
