"""RanPAC: ridge regression on 10,000 random ReLU features of the frozen feature.

McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023, Section 4.
The paper first tunes the backbone on the first task (its Phase 1): that is ``first_session=adapter``
(``models/first_session.py``), and without it the features are the plain ones. Training images pass the test transform,
without augmentation. The statistics, and how λ is chosen, are in ``models/streaming/ridge.py``.

A class's score is wᵀh, as in the paper's own code. LAMDA-PILOT scores through its cosine layer, which divides w by its
norm (and h by its own, the same for all classes): ``ranpac_normalized`` does that.

With ``ranpac_whitened`` (an extension of this project) half of the random features are of the whitened feature, in a
regression of their own: ``models/streaming/ridge_pair.py``. It is what ``tosca_white`` has without its modules.
"""

from typing import cast

import torch
from torch import Tensor

from models.base import Learner, OnEpoch, TaskData
from models.streaming.ridge import RandomRidge
from models.streaming.ridge_pair import RidgePair
from utils.config.config import Config
from utils.config.methods import Key, Method
from utils.errors import ConfigError
from utils.seeds import derive_seed

METHOD = Method(
    "ranpac",
    "ridge regression on 10,000 random features; as in its paper with first_session=adapter",
    keys=(
        Key(
            "ranpac_whitened",
            bool,
            False,
            "two regressions of 5,000 random features, one of them on the whitened feature, in place of one of 10,000",
            affects="module",
        ),
        Key(
            "ranpac_normalized",
            bool,
            False,
            "divide each class's weights by their norm, as LAMDA-PILOT's cosine layer does; false: as the paper's code",
            affects="module",
        ),
    ),
)
RANDOM_FEATURES = 10_000  # the paper's M
EPSILON = 1e-12  # the shortest length by which a class's weights are divided


class RanPAC(Learner):
    """Random projection, ReLU, and a ridge classifier from streamed statistics."""

    state_names = ("ridge",)

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.ridge: RandomRidge | RidgePair
        if config.own["ranpac_whitened"] and config.own["ranpac_normalized"]:
            raise ConfigError("ranpac_normalized is for one regression; leave out ranpac_whitened, or this key")
        if config.own["ranpac_whitened"]:
            self.ridge = RidgePair(dim, RANDOM_FEATURES // 2, derive_seed("ridges", seed), device)
        else:
            self.ridge = RandomRidge(dim, RANDOM_FEATURES, seed, device)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        self.ridge.update(task.test_view(), task.labels, task.first_row + task.new_rows)

    def scores(self, features: Tensor) -> Tensor:
        """Regressed one-hot targets; of two regressions the mean of their log-probabilities."""
        scores = self.ridge.scores(features)
        if self.config.own["ranpac_normalized"]:
            scores = scores / cast(RandomRidge, self.ridge).weight.norm(dim=0).clamp_min(EPSILON).to(scores)
        return scores
