"""FeCAM on frozen features: nearest class mean in the Mahalanobis metric of each class's own covariance.

Goswami et al., "FeCAM: Exploiting the Heterogeneity of Class Distributions in Exemplar-Free Continual Learning",
NeurIPS 2023, Section 4, as LAMDA-PILOT sets it for ViTs: the covariance of each class plus 100 · I,
normalised to correlations; the distance is taken between the L2-normalised feature and the L2-normalised class mean.
Deviations: no Tukey transform, which is a power of the feature and these features have signs; no adaptation of the
backbone in the first session, since every learner of this project sees the same frozen features. Training images pass
the test transform, without augmentation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Learner, OnEpoch, TaskData
from models.streaming.lda import appended, finite_float64, float64_device, row_means
from models.tensors import places
from utils.config.config import Config
from utils.config.keys import Key
from utils.config.methods import Method

METHOD = Method(
    "fecam",
    "nearest class mean in the Mahalanobis metric of each class's own covariance",
    keys=(Key("shrinkage", float, 100.0, "what is added to the variance of every feature", "training", above=0),),
)


class FeCAM(Learner):
    """Class means, each with the metric of its class.

    Attributes:
        means: ``(rows, dim)`` mean feature of each row, zero for a row without images.
        images: ``(rows,)`` how many training images each row has.
        factors: ``(rows, dim · (dim + 1) / 2)`` the lower triangle of W, where WᵀW is the inverse of the class's
            correlation matrix: the squared distance is ‖W (h/‖h‖ − μ/‖μ‖)‖².
    """

    state_names = ("means", "images", "factors")

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.means = torch.zeros(0, dim, device=device)
        self.images = torch.zeros(0, dtype=torch.long, device=device)
        self.factors = torch.zeros(0, dim * (dim + 1) // 2, device=device)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        features = finite_float64(task.test_view(), float64_device(self.device))
        labels = (task.labels - task.first_row).to(features.device)
        means, images = row_means(features, labels, task.new_rows)
        lower = torch.tril_indices(self.dim, self.dim, device=features.device)
        factors = [
            whitening(features[places(labels == row)] - means[row], self.config.own["shrinkage"])[lower[0], lower[1]]
            for row in range(task.new_rows)
        ]
        self.means, self.images = appended(self.means, means), appended(self.images, images)
        self.factors = appended(self.factors, torch.stack(factors))

    def scores(self, features: Tensor) -> Tensor:
        """The negative squared distance to each row's mean in its own metric."""
        directions, centres = F.normalize(features.float(), dim=1), F.normalize(self.means, dim=1)
        lower = torch.tril_indices(self.dim, self.dim, device=self.device)
        factor = torch.zeros(self.dim, self.dim, device=self.device)
        found = []
        for row in range(len(self.means)):
            factor[lower[0], lower[1]] = self.factors[row]
            found.append(-((directions - centres[row]) @ factor.T).square().sum(dim=1))
        return torch.stack(found, dim=1).masked_fill(self.images == 0, -torch.inf)


def whitening(centred: Tensor, shrinkage: float) -> Tensor:
    """Return the lower-triangular W with WᵀW = R⁻¹, where R is the correlation matrix of covariance + shrinkage · I.

    Shape: ``(images, dim) -> (dim, dim)``. One image has no spread: its covariance is zero.
    """
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    covariance.diagonal().add_(shrinkage)
    spread = covariance.diagonal().sqrt()
    correlation = covariance / spread[:, None] / spread
    identity = torch.eye(len(spread), dtype=centred.dtype, device=centred.device)
    factor: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(correlation), identity, upper=False)
    return factor
