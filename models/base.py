"""What every learner offers to the trainer, and what the trainer offers to a learner."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from models.tensors import host_values, state_below
from utils import module
from utils.config.config import Config
from utils.config.methods import METHODS, SELECTIONS
from utils.errors import ConfigError
from utils.features.rows import TEST_VIEW, View
from utils.runs.manifest import EpochStats

SAMPLES = 240  # that are answered at a time
OnEpoch = Callable[[int, EpochStats], None]  # is called after an epoch of training, with its number from 0


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
        entropies: ``(samples, modules)`` those of all modules; None where the selection does not look at them.
        task_scores: ``(samples, tasks)`` the best score of each task under the statistics that chose the module, the
            highest being the choice; None for other selections.
    """

    scores: Tensor
    module: Tensor | None = None
    entropy: Tensor | None = None
    entropies: Tensor | None = None
    task_scores: Tensor | None = None


class Learner(ABC):
    """A class-incremental method on frozen features.

    The learner owns all that training changes; the trainer owns data, results and files. A method defines ``fit`` and
    ``scores`` and names its state.
    """

    # Attributes that prediction and further learning need: a tensor, saved under the attribute's name; an object with
    # state_dict and load_state_dict, saved under its own names; or a dictionary of such objects, ``<key>.<its name>``.
    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        self.config, self.dim, self.device, self.seed = config, dim, device, seed
        self.row_task = torch.empty(0, dtype=torch.long, device=device)  # (rows,) which task brought a row
        self.tasks = 0  # learned so far

    @property
    def selections(self) -> tuple[str, ...]:
        """How ``answer`` can choose: the method's selections that look at one image at a time."""
        names = (
            selection if isinstance(selection, str) else selection.name for selection in self.config.method.selections
        )
        return tuple(name for name in names if not SELECTIONS[name].ordered)

    def learn(self, task: TaskData, on_epoch: OnEpoch | None = None) -> None:
        """Learn the next task.

        Args:
            on_epoch: is called after each epoch of training, of a method that trains in epochs.

        Raises:
            NumericError: a loss or parameter became NaN or infinite; task, epoch, step and quantity are named.
        """
        self.fit(task, on_epoch)
        self.row_task = torch.cat([self.row_task, torch.full((task.new_rows,), task.index, device=self.device)])
        self.tasks = task.index + 1

    @abstractmethod
    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        """Train on ``task``; ``row_task`` still holds the earlier rows only."""

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """Score every row: ``(samples, dim) -> (samples, rows)``; a row that cannot be chosen has ``-inf``."""

    def answer(self, features: Tensor, selection: str = "sample") -> Prediction:
        """Answer each of ``(samples, dim)`` features by itself.

        Raises:
            ConfigError: a selection that this method does not have, or one that looks at several images.
        """
        self.check_selection(selection)
        return Prediction(self.scores(features))

    def check_selection(self, selection: str) -> None:
        """Raise ConfigError for a selection that ``answer`` cannot use."""
        if selection not in self.selections:
            reason = f"{self.config.model_name} has none of that name"
            if selection in SELECTIONS and SELECTIONS[selection].ordered:
                reason = "one module answers for many consecutive images, so the answer would depend on their order"
            known = ", ".join(self.selections)
            raise ConfigError(f"selection {selection!r} cannot answer single images ({reason}); choose one of: {known}")

    @torch.no_grad()
    def predict_pieces(
        self, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Prediction]]]:
        """Answer ``(samples, dim)`` features in the order given, under every selection that the method has.

        A learner without modules answers each sample by itself: its one selection is ``sample``. With modules,
        ``true_task`` ``(samples,)`` adds ``oracle``, and ``shuffled``, a permutation of the samples, adds
        ``batch_shuffled``: batch selection as if the samples came in that order.

        Yields:
            The numbers of some samples, and their answers under some selections. In the end each sample had one answer
            under each. A piece's size does not grow with the samples, so whoever keeps only what is needed of each
            never holds samples × rows.
        """
        for samples in torch.arange(len(features), device=features.device).split(SAMPLES):
            yield samples, {"sample": Prediction(self.scores(features[samples]))}

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that prediction and further learning need, but for the modules."""
        state = {"row_task": self.row_task}
        for name in self.state_names:
            state |= _state_of(name, getattr(self, name))
        return state

    def module_state(self, task: int) -> dict[str, Tensor] | None:
        """Return the tensors that belong to one task alone and never change again; None without modules."""
        return None

    def load_state_dict(self, state: Mapping[str, Tensor], modules: Sequence[Mapping[str, Tensor]] = ()) -> None:
        """Restore ``state_dict`` and, for a learner with modules, the ``module_state`` of every task."""
        self.row_task = state["row_task"].to(self.device)
        self.tasks = int(host_values(self.row_task[-1])) + 1 if len(self.row_task) else 0
        for name in self.state_names:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, state[name].to(self.device))
            elif isinstance(value, dict):
                for key, part in value.items():
                    part.load_state_dict(state_below(state, key))
            else:
                value.load_state_dict(state)

    def parameter_counts(self) -> dict[str, int]:
        """Return ``luca_per_task``, ``classifier`` and ``trainable`` (what the last task trained by gradient)."""
        return {"luca_per_task": 0, "classifier": kept_numbers(self), "trainable": 0}


def _state_of(name: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {f"{key}.{k}": tensor for key, part in value.items() for k, tensor in part.state_dict().items()}
    return dict(value.state_dict())


def twin(value: Any) -> Any:
    """A copy that shares all tensors: what a learner replaces in the one is not replaced in the other.

    Learners and the statistics they hold replace their tensors, they never write into them; so a task that is learned
    on a twin, and fails or is interrupted, leaves the learner as it was.
    """
    if isinstance(value, dict):
        return {name: twin(part) for name, part in value.items()}
    if isinstance(value, (Tensor, tuple)) or not type(value).__module__.startswith("models."):
        return value
    other = copy.copy(value)
    other.__dict__.update({name: twin(part) for name, part in vars(value).items()})
    return other


def kept_numbers(value: Any, seen: set[int] | None = None) -> int:
    """How many floating-point numbers a learner holds: classifier, modules, statistics, projections, solutions."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        known = id(value) in seen
        seen.add(id(value))
        return 0 if known or not value.is_floating_point() else value.numel()
    if isinstance(value, dict):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    else:
        parts = vars(value).values() if type(value).__module__.startswith("models.") else ()
    return sum(kept_numbers(part, seen) for part in parts)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Several predictions as one, the samples one after the other."""
    columns: dict[str, Any] = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    whole: dict[str, Any] = {name: None if of[0] is None else torch.cat(of) for name, of in columns.items()}
    return Prediction(**whole)


# -- by name ---------------------------------------------------------------------------------------------------------


def learner_class(name: str) -> type[Learner]:
    """The one learner that the file of the method ``name`` defines.

    Raises:
        ValueError: it defines none, or more than one.
    """
    file = module(METHODS[name].module)
    found = [
        kind
        for kind in vars(file).values()
        if inspect.isclass(kind)
        and issubclass(kind, Learner)
        and kind.__module__ == file.__name__
        and not inspect.isabstract(kind)
    ]
    if len(found) != 1:
        raise ValueError(f"{file.__file__} declares a METHOD, so it must define one learner; it defines {len(found)}")
    return found[0]


def make_learner(config: Config, dim: int, device: torch.device, seed: int) -> Learner:
    """The learner that ``config.model_name`` names, before its first task."""
    return learner_class(config.model_name)(config, dim, device, seed)


def training_features(config: Config) -> list[View]:
    """The (split, view) that training reads: only a learner that trains on augmented views pays for them."""
    views = config.views if config.method.augmented else 0
    return [("train", TEST_VIEW), *(("train", view) for view in range(views))]
