"""The paper's training of one task (section 3): the loss and the loop.

This file is the definition. A step by hand-written gradients (``models.fast_step``) takes the place of ``Step`` only
where its first step of the task gives the same loss, parameters and hits: whoever edits the loss gets what they wrote.
"""

import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.classifier import CosineClassifier
from backbone.luca import LuCA
from models.base import OnEpoch, TaskData
from models.fast_step import FastStep
from models.tensors import all_finite, host_values, same_bits
from utils.config.config import Config
from utils.errors import NumericError
from utils.runs.manifest import EpochStats
from utils.seeds import derive_seed

log = logging.getLogger(__name__)

HINT_LOWER_LR = "lower lr or try another optimizer; earlier tasks are saved"
Epoch = Iterable[tuple[Tensor, Tensor]]  # batches of features (images, dim) and rows (images,)


def loss_of(module: nn.Module, logits: Tensor, rows: Tensor, config: Config) -> Tensor:
    """Cross-entropy over all rows + l1 · Σ|θ| over all parameters of the module, unused branches included."""
    penalty = torch.linalg.vector_norm(torch.cat([p.flatten() for p in module.parameters()]), 1)
    loss: Tensor = F.cross_entropy(logits, rows) + config.l1 * penalty
    return loss


class Step:
    """One training step by automatic differentiation.

    The optimiser holds the module, all classifier rows, and σ if it requires a gradient.
    """

    def __init__(self, module: nn.Module, classifier: CosineClassifier, config: Config) -> None:
        self.module, self.classifier, self.config = module, classifier, config
        self.optimizer = build_optimizer([*module.parameters(), *classifier.parameters()], config)

    def __call__(self, h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Learn features ``(images, dim)`` of ``rows`` ``(images,)``.

        Returns:
            The loss before the step, a scalar, and whether each image's own row had the largest logit, ``(images,)``.
        """
        logits = self.classifier(self.module(h))
        loss = loss_of(self.module, logits, rows, self.config)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), logits.detach().argmax(dim=1) == rows

    def finish(self) -> None:
        """Nothing is left to do: the parameters are where they were."""


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

    Args:
        batches: the batches of each epoch.
        frozen_rows: so many of the first rows stay as they are.
        on_epoch: is called after each epoch with its mean loss and its accuracy in training.

    Raises:
        NumericError: a loss is NaN or infinite; epoch and step are named.
    """
    step: Step | FastStep | None = None
    frozen = classifier.weight.detach()[:frozen_rows].clone()
    for epoch, steps in enumerate(batches):
        losses, hits = [], []
        for h, rows in steps:
            if step is None:
                step = make_step(module, classifier, config, h, rows)
                schedule = build_schedule(step.optimizer, config)
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
    if step is not None:
        step.finish()


def shuffled_epochs(task: TaskData, config: Config, seed: int) -> Iterator[Epoch]:
    """The batches of each epoch: the task's images under the epoch's view in a fresh order, the last batch kept."""
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(derive_seed("batches", seed, task.index, epoch))
        order = torch.randperm(len(task.labels), generator=generator).to(task.labels.device)
        features, rows = task.epoch(epoch)[order], task.labels[order]
        yield zip(features.split(config.batch_size), rows.split(config.batch_size), strict=True)


def build_optimizer(parameters: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The optimiser that the config names, over those that require a gradient; SGD has momentum 0.9."""
    trained, rate, decay = [p for p in parameters if p.requires_grad], config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=decay)
    kinds: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[config.optimizer](trained, lr=rate, weight_decay=decay)


def build_schedule(optimizer: torch.optim.Optimizer, config: Config) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule of the learning rate, stepped once an epoch; None: constant."""
    if config.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs, eta_min=1e-8)
    if config.scheduler == "steplr":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones), gamma=0.1)
    return None


def make_step(
    module: nn.Module, classifier: CosineClassifier, config: Config, h: Tensor, rows: Tensor
) -> Step | FastStep:
    """``FastStep`` where it does with the first batch what ``Step`` does to the bit; else ``Step``."""
    if not isinstance(module, LuCA) or not FastStep.knows(module, classifier):
        return Step(module, classifier, config)
    parameters = [*module.parameters(), *classifier.parameters()]
    start = [p.detach().clone() for p in parameters]

    def tried(step: Step | FastStep) -> list[Tensor]:
        """What one step gives; the parameters are put back."""
        found = [*step(h, rows), *(p.detach().clone() for p in parameters)]
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data, parameter.grad = value.clone(), None
        return found

    wanted = tried(Step(module, classifier, config))
    found = tried(FastStep(module, classifier, config, build_optimizer))
    if all(same_bits(a, b) for a, b in zip(found, wanted, strict=True)):
        return FastStep(module, classifier, config, build_optimizer)
    log.info("The fast training step differs from that of models/training.py: automatic differentiation trains")
    return Step(module, classifier, config)


def checked_mean(losses: Tensor, epoch: int, hint: str = HINT_LOWER_LR) -> float:
    """Mean loss of an epoch; one look at the device for all its steps."""
    values = host_values(losses)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        step = bad[0] + 1
        raise NumericError(f"epoch {epoch + 1}, step {step}: the loss is {values[bad[0]]}; {hint}")
    return float(host_values(losses.cpu().double().mean()))


def check_finite(tensors: dict[str, Tensor], hint: str = HINT_LOWER_LR) -> None:
    """What the last step made is in no loss: look at it before it is saved.

    Raises:
        NumericError: a tensor holds a NaN or an infinite number.
    """
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise NumericError(f"after its last step: {name} is not finite; {hint}")
