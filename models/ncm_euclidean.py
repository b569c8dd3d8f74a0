"""Nearest class mean in the Euclidean metric of the frozen features. Nothing is trained, no exemplars are kept.

Mensink et al., "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost", TPAMI 2013,
Section 3.1, with the identity as the metric. The same rule in the Mahalanobis metric of one shared covariance is
``ncm_lda``, and with the cosine ``simplecil``. Training images pass the test transform, without augmentation.
"""

import torch
from torch import Tensor

from models.base import Learner, OnEpoch, TaskData
from models.streaming.lda import appended, float64_device, row_means
from utils.config.config import Config
from utils.config.methods import Method

METHOD = Method("ncm_euclidean", "nearest class mean in the Euclidean metric; nothing is trained")


class NcmEuclidean(Learner):
    """Class means; the nearest one answers.

    Attributes:
        means: ``(rows, dim)`` mean feature of each row, zero for a row without images.
        images: ``(rows,)`` how many training images each row has.
    """

    state_names = ("means", "images")

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.means = torch.zeros(0, dim, device=device)
        self.images = torch.zeros(0, dtype=torch.long, device=device)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        means, images = row_means(task.test_view(), task.labels - task.first_row, task.new_rows)
        self.means, self.images = appended(self.means, means), appended(self.images, images)

    def scores(self, features: Tensor) -> Tensor:
        """The negative squared distance to each mean, in float64 until the squares have been subtracted."""
        device = float64_device(self.device)
        h, means = features.to(device).double(), self.means.to(device).double()
        distances = h.square().sum(dim=1)[:, None] - 2 * h @ means.T + means.square().sum(dim=1)
        return (-distances).float().to(features.device).masked_fill(self.images == 0, -torch.inf)
