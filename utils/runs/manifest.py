"""The manifest of a run as a type: what it is, what it has learned so far, and the results of each task."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochStats:
    """What one epoch of training gave.

    Attributes:
        loss: mean loss over the steps.
        accuracy: share of the training images that were answered correctly while training, in percent.
    """

    loss: float
    accuracy: float
