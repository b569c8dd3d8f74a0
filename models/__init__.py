"""Learners on frozen features, and a classifier that goes on learning: ``from models import ContinualClassifier``."""

from typing import TYPE_CHECKING, Any

from utils import module

if TYPE_CHECKING:
    from models.api.classifier import ContinualClassifier
    from models.api.predictions import Predictions

__all__ = ["ContinualClassifier", "Predictions"]

_HOMES = {"ContinualClassifier": "models.api.classifier", "Predictions": "models.api.predictions"}


def __getattr__(name: str) -> Any:
    """Import what is asked for by name when it is asked for: a learner's file needs none of it."""
    if name in _HOMES:
        return getattr(module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
