"""What every learner offers to the trainer, and what the trainer offers to a learner."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from utils.config import Config


class TaskData(Protocol):
    """The training images of one task as frozen features, on the learner's device.

    A classifier has one *row* for each class (in domain-incremental runs: for each class and domain). The rows
    of this task are ``first_row … first_row + new_rows - 1``; ``labels`` are row numbers.
    """

    index: int  # which task, from 0
    first_row: int
    new_rows: int
    labels: Tensor  # (images,) int64, the row of each training image

    def epoch(self, epoch: int) -> Tensor:
        """Features under the augmented view of ``epoch``: ``(images, dim)``."""

    def test_view(self) -> Tensor:
        """Features under the test transform: ``(images, dim)``."""

    def seen(self) -> tuple[Tensor, Tensor]:
        """Test-transform features and rows of *all* tasks so far. Not continual: only for upper bounds."""


@dataclass(frozen=True)
class Prediction:
    """The answer to some samples under one selection.

    Attributes:
        scores: ``(samples, rows)`` logits over all rows so far; rows that cannot be chosen are ``-inf``.
        module: ``(samples,)`` the module (task) that was chosen, or None for a learner without modules.
        entropy: ``(samples,)`` the entropy of the chosen module's prediction in nats, or None.
    """

    scores: Tensor
    module: Tensor | None = None
    entropy: Tensor | None = None


class Learner(ABC):
    """A class-incremental method on frozen features.

    The learner owns all that training changes; the trainer owns data, results and files.
    """

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        self.config, self.dim, self.device, self.seed = config, dim, device, seed
        self.row_task = torch.empty(0, dtype=torch.long, device=device)  # (rows,) which task brought a row

    @property
    def tasks(self) -> int:
        """Tasks learned so far."""
        return int(self.row_task[-1]) + 1 if len(self.row_task) else 0

    def learn(self, task: TaskData) -> None:
        """Learn the next task.

        Raises:
            NumericError: a loss or parameter became NaN or infinite; task, epoch, step and quantity are named.
        """
        self._fit(task)
        self.row_task = torch.cat([self.row_task, torch.full((task.new_rows,), task.index, device=self.device)])

    @abstractmethod
    def _fit(self, task: TaskData) -> None:
        """Train on ``task``; ``row_task`` still holds the earlier rows only."""

    @abstractmethod
    def predict(
        self, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
    ) -> dict[str, Prediction]:
        """Answer ``(samples, dim)`` features in the order given, under every selection that the method has.

        A learner without modules answers each sample by itself: its one selection is ``sample``. With modules,
        ``true_task`` ``(samples,)`` adds ``oracle``, and ``shuffled``, a permutation of the samples, adds
        ``batch_shuffled``: batch selection as if the samples came in that order.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that prediction and further learning need, but for ``module_state``."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor], modules: list[dict[str, Tensor]]) -> None:
        """Restore ``state_dict`` and the ``module_state`` of every task."""

    def module_state(self, task: int) -> dict[str, Tensor] | None:
        """The tensors that belong to one task alone and never change again, or None."""
        return None

    def sparsity(self) -> list[float] | None:
        """For each task the share of its module's parameters with |θ| < 1e-3; None for a learner without modules."""
        return None

    def parameter_counts(self) -> dict[str, int]:
        """``luca_per_task``, ``classifier`` and ``trainable`` (what the last task trained)."""
        rows = len(self.row_task) * self.dim
        return {"luca_per_task": 0, "classifier": rows, "trainable": 0}
