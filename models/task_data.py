"""A task's training images as a learner sees them, read from the feature bank."""

import numpy as np
import torch
from torch import Tensor

from utils.data.tasks import Task, TaskStream
from utils.features.bank import FeatureBank
from utils.features.rows import TEST_VIEW


class BankTask:
    """A task's training images as features of the bank, on the learner's device (``models.base.TaskData``)."""

    def __init__(self, bank: FeatureBank, stream: TaskStream, task: Task, views: int, device: torch.device) -> None:
        self._bank, self._stream, self._task, self._views, self._device = bank, stream, task, views, device
        self.index, self.first_row, self.new_rows = task.index, task.rows.start, len(task.rows)
        self.labels = torch.from_numpy(task.train_rows).to(device)
        self._test_view: Tensor | None = None

    def epoch(self, epoch: int) -> Tensor:
        return self._read("train", epoch % self._views, self._task.train) if self._views else self.test_view()

    def test_view(self) -> Tensor:
        if self._test_view is None:
            self._test_view = self._read("train", TEST_VIEW, self._task.train)
        return self._test_view

    def seen(self) -> tuple[Tensor, Tensor]:
        tasks = self._stream.tasks[: self.index + 1]
        features = self._read("train", TEST_VIEW, np.concatenate([t.train for t in tasks]))
        return features, torch.from_numpy(np.concatenate([t.train_rows for t in tasks])).to(self._device)

    def _read(self, split: str, view: int, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self._bank.read(split, view, rows)).to(self._device)
