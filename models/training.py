"""Training one LuCA and the classifier on a task: the loss and the loop of the paper's algorithm (section 3)."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from backbone.classifier import CosineClassifier
from models.base import OnEpoch, TaskData
from models.fast_step import make_step
from models.host_values import all_finite, host_values
from utils.config.config import Config
from utils.errors import NumericError
from utils.runs.manifest import EpochStats
from utils.seeds import derive_seed

HINT_LOWER_LR = "lower lr or try another optimizer; earlier tasks are saved"
Epoch = Iterable[tuple[Tensor, Tensor]]  # batches of features (images, dim) and rows (images,)


def train(
    module: nn.Module,
    classifier: CosineClassifier,
    batches: Iterable[Epoch],
    config: Config,
    *,
    frozen_rows: int = 0,
    on_epoch: OnEpoch | None = None,
) -> None:
    """Train both in place.

    Loss: cross-entropy over all rows + l1 · Σ|θ| over all parameters of ``module``, biases and unused branches
    included. The optimiser holds them, all classifier rows, and σ if it requires a gradient.

    Args:
        batches: the batches of each epoch.
        frozen_rows: so many of the first rows stay as they are.
        on_epoch: is called after each epoch with its mean loss and its accuracy in training.

    Raises:
        NumericError: a loss is NaN or infinite; epoch and step are named.
    """
    step = make_step(module, classifier, config)
    schedule = build_schedule(step.optimizer, config)
    frozen = classifier.weight.detach()[:frozen_rows].clone()
    for epoch, steps in enumerate(batches):
        losses, hits = [], []
        for h, rows in steps:
            loss, hit = step(h, rows)
            if frozen_rows:  # a zero gradient would not do: weight decay moves a row without one
                classifier.weight.data[:frozen_rows] = frozen
            losses.append(loss)
            hits.append(hit)
        if schedule is not None:
            schedule.step()
        accuracy = 100 * float(host_values(torch.cat(hits).cpu().double().mean()))
        stats = EpochStats(checked_mean(torch.stack(losses), epoch), accuracy)
        if on_epoch is not None:
            on_epoch(epoch, stats)
    step.finish()


def shuffled_epochs(task: TaskData, config: Config, seed: int) -> Iterator[Epoch]:
    """The batches of each epoch: the task's images under the epoch's view in a fresh order, the last batch kept."""
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(derive_seed("batches", seed, task.index, epoch))
        order = torch.randperm(len(task.labels), generator=generator).to(task.labels.device)
        features, rows = task.epoch(epoch)[order], task.labels[order]
        yield zip(features.split(config.batch_size), rows.split(config.batch_size), strict=True)


def build_schedule(optimizer: torch.optim.Optimizer, config: Config) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule of the learning rate, stepped once an epoch; None: constant."""
    if config.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs, eta_min=1e-8)
    if config.scheduler == "steplr":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones), gamma=0.1)
    return None


def checked_mean(losses: Tensor, epoch: int) -> float:
    """Mean loss of an epoch; one look at the device for all its steps."""
    values = host_values(losses)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        step = bad[0] + 1
        raise NumericError(f"epoch {epoch + 1}, step {step}: the loss is {values[bad[0]]}; {HINT_LOWER_LR}")
    return float(host_values(losses.cpu().double().mean()))


def check_finite(tensors: dict[str, Tensor]) -> None:
    """What the last step made is in no loss: look at it before it is saved.

    Raises:
        NumericError: a tensor holds a NaN or an infinite number.
    """
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise NumericError(f"after its last step: {name} is not finite; {HINT_LOWER_LR}")
