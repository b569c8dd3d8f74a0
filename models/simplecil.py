"""SimpleCIL: cosine similarity to the class means of frozen features. Nothing is trained.

Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All
You Need", IJCV 2024 (arXiv 2303.07338, 2023), Section 4. As there, the means are taken under the test transform.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Learner, OnEpoch, TaskData
from models.streaming.lda import appended, row_means
from utils.config.config import Config
from utils.config.methods import Method

METHOD = Method("simplecil", "cosine similarity to the class means; nothing is trained")


class SimpleCIL(Learner):
    """Class means as a cosine classifier.

    Attributes:
        prototypes: ``(rows, dim)`` mean feature of each row, zero for a row without images.
        images: ``(rows,)`` how many training images each row has.
    """

    state_names = ("prototypes", "images")

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.prototypes = torch.zeros(0, dim, device=device)
        self.images = torch.zeros(0, dtype=torch.long, device=device)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        means, images = row_means(task.test_view(), task.labels - task.first_row, task.new_rows)
        self.prototypes, self.images = appended(self.prototypes, means), appended(self.images, images)

    def scores(self, features: Tensor) -> Tensor:
        """Cosines; 0 where the feature or the prototype is zero."""
        cosines = F.normalize(features.float(), dim=1) @ F.normalize(self.prototypes, dim=1).T
        return cosines.masked_fill(self.images == 0, -torch.inf)
