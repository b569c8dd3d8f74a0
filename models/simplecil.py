"""SimpleCIL: cosine similarity to the class means of frozen features. Nothing is trained.

Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All
You Need", IJCV 2024 (arXiv 2303.07338, 2023), Section 4. As there, the means are taken under the test transform.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Learner, Prediction, TaskData
from models.streaming.lda import finite_float64, float64_device
from utils.config import Config
from utils.methods import Method

METHOD = Method("simplecil", "cosine similarity to the class means; nothing is trained")


class SimpleCIL(Learner):
    """Class means as a cosine classifier.

    Attributes:
        prototypes: ``(rows, dim)`` mean feature of each row, zero for a row without images.
        images: ``(rows,)`` how many training images each row has.
    """

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.prototypes = torch.zeros(0, dim, device=device)
        self.images = torch.zeros(0, dtype=torch.long, device=device)

    def _fit(self, task: TaskData) -> None:
        features = finite_float64(task.test_view(), float64_device(self.device))
        member = F.one_hot((task.labels - task.first_row).to(features.device), task.new_rows)  # (images, new rows)
        images = member.sum(dim=0)
        means = member.double().T @ features / images.clamp(min=1)[:, None]
        self.prototypes = torch.cat([self.prototypes, means.float().to(self.device)])
        self.images = torch.cat([self.images, images.to(self.device)])

    def predict(
        self, features: Tensor, true_task: Tensor | None = None, shuffled: Tensor | None = None
    ) -> dict[str, Prediction]:
        """Cosines ``(samples, rows)`` under ``sample``; 0 where the feature or the prototype is zero."""
        cosines = F.normalize(features.float(), dim=1) @ F.normalize(self.prototypes, dim=1).T
        return {"sample": Prediction(cosines.masked_fill(self.images == 0, -torch.inf))}

    def state_dict(self) -> dict[str, Tensor]:
        """``row_task``, ``prototypes`` and ``images``."""
        return {"row_task": self.row_task, "prototypes": self.prototypes, "images": self.images}

    def load_state_dict(self, state: dict[str, Tensor], modules: list[dict[str, Tensor]]) -> None:
        """Restore ``state_dict``; there are no modules."""
        for name in self.state_dict():
            setattr(self, name, state[name].to(self.device))
