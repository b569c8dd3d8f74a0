"""k-nearest neighbours on the frozen features of all training images: a reference that keeps every image's feature.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, Section 3.4: the k
training images of highest cosine vote for their classes with weight exp(cosine / temperature). It is continual, but not
free of exemplars: tables say so. Training images pass the test transform, without augmentation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Learner, OnEpoch, TaskData
from models.streaming.lda import appended, finite_float64, float64_device
from utils.config.config import Config
from utils.config.keys import Key
from utils.config.methods import Method

METHOD = Method(
    "knn",
    "weighted vote of the nearest training images; keeps the features of all images",
    keys=(
        Key("neighbours", int, 20, "how many training images vote", "training", low=1, high=100_000),
        Key("temperature", float, 0.07, "a vote weighs exp(cosine / this)", "training", low=0.01),
    ),
    exemplars=True,
)
CHUNK_BYTES = 64 << 20  # of cosines between samples and training images at a time


class KNN(Learner):
    """The features of all training images, by which the nearest ones vote.

    Attributes:
        features: ``(images, dim)`` of unit length, or zero.
        rows: ``(images,)`` the row of each.
    """

    state_names = ("features", "rows")

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.features = torch.zeros(0, dim, device=device)
        self.rows = torch.zeros(0, dtype=torch.long, device=device)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        features = finite_float64(task.test_view(), float64_device(self.device))
        self.features = appended(self.features, F.normalize(features, dim=1))
        self.rows = appended(self.rows, task.labels)

    def scores(self, features: Tensor) -> Tensor:
        """The votes for each row; a row without a vote has its best cosine − 2, below every vote."""
        if torch.compiler.is_compiling():  # the number of samples is a symbol then: no batches of them
            return self._votes(F.normalize(features.float(), dim=1))
        step = max(1, CHUNK_BYTES // (4 * max(1, len(self.features))))
        return torch.cat([self._votes(F.normalize(part.float(), dim=1)) for part in features.split(step)])

    def _votes(self, directions: Tensor) -> Tensor:
        rows = len(self.row_task)
        cosines = directions @ self.features.T  # (samples, images)
        best = cosines.new_full((cosines.shape[0], rows), -torch.inf)
        best.scatter_reduce_(1, self.rows.expand_as(cosines), cosines, "amax")
        nearest, index = cosines.topk(min(self.config.own["neighbours"], len(self.features)), dim=1)
        weights = torch.exp((nearest - 1) / self.config.own["temperature"])  # of the nearest of all: 1 at most
        votes = torch.zeros_like(best).scatter_add_(1, self.rows[index], weights)
        return torch.where(votes > 0, votes, best - 2)
