"""Name -> learner."""

import torch

from models.base import Learner
from models.linear_joint import LinearJoint
from models.ncm_lda import NcmLda
from models.ranpac import RanPAC
from models.simplecil import SimpleCIL
from models.tosca import TOSCA
from utils.config import Config
from utils.features.arrays import View
from utils.features.batches import TEST_VIEW

LEARNERS: dict[str, type[Learner]] = {
    "tosca": TOSCA,
    "simplecil": SimpleCIL,
    "ncm_lda": NcmLda,
    "ranpac": RanPAC,
    "linear_joint": LinearJoint,
}


def training_features(config: Config) -> list[View]:
    """The (split, view) that training reads: only a learner that trains on augmented views pays for them."""
    views = config.views if LEARNERS[config.model_name].augmented else 0
    return [("train", TEST_VIEW), *(("train", view) for view in range(views))]


def make_learner(config: Config, dim: int, device: torch.device, seed: int) -> Learner:
    """The learner that ``config.model_name`` names, before its first task."""
    return LEARNERS[config.model_name](config, dim, device, seed)
