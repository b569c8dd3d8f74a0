"""Name -> learner."""

import torch

from models.base import Learner
from models.tosca import TOSCA
from utils.config import Config

LEARNERS: dict[str, type[Learner]] = {"tosca": TOSCA}


def make_learner(config: Config, dim: int, device: torch.device, seed: int) -> Learner:
    """The learner that ``config.model_name`` names, before its first task."""
    return LEARNERS[config.model_name](config, dim, device, seed)
