"""The paper's inference (section 3): the module whose prediction has the lowest entropy answers.

Every module predicts over all classes seen so far. Two ways to take the minimum make two different claims:

* by sample: for each image by itself, which is what "no task identity at inference" means;
* by batch: once for 48 consecutive test images, by their mean entropy, which is the release's evaluation. In class
  order such a batch nearly always holds one task, so that the order itself tells the task.

Whatever is changed here changes what a run computes: ``models.modular`` calls these functions for every answer.
"""

import torch
from torch import Tensor

SELECTION_BATCH = 48  # consecutive test samples that share a module under ``batch``: the release's test batch


def entropy(logits: Tensor) -> Tensor:
    """−Σ p·log(p + 1e-9) over the last dimension, in nats: ``(..., rows) -> (...)``."""
    p = logits.softmax(dim=-1)
    return (p + 1e-9).log_().mul_(p).sum(dim=-1).neg_()


def choose_by_sample(entropies: Tensor) -> Tensor:
    """The module of lowest entropy for each sample, of equal ones the first: ``(samples, modules) -> (samples,)``."""
    return entropies.argmin(dim=1)


def choose_by_batch(entropies: Tensor) -> Tensor:
    """One module for every 48 consecutive samples, by their mean entropy: ``(samples, modules) -> (batches,)``."""
    parts = [part.mean(dim=0).argmin() for part in entropies.split(SELECTION_BATCH) if len(part)]
    return torch.stack(parts) if parts else torch.empty(0, dtype=torch.long, device=entropies.device)
