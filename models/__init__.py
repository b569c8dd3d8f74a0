"""Learners on frozen features, and a saved run as a classifier that goes on learning."""

from models.api.classifier import ContinualClassifier, Predictions
from models.registry import LEARNERS, load_learner, make_learner, training_features

__all__ = ["LEARNERS", "ContinualClassifier", "Predictions", "load_learner", "make_learner", "training_features"]
