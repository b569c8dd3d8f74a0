"""Streaming linear discriminant analysis on frozen features: class means, one shared covariance, no exemplars.

Hayes & Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR Workshops 2020,
Section 3, here without its warm-up and with closed-form shrinkage (``models/lda.py``); Panos et al., "First Session
Adaptation", ICCV 2023, use it as "NA" (no adaptation). Training images pass the test transform, without augmentation.
"""

import torch
from torch import Tensor

from models.base import Learner, OnEpoch, TaskData
from models.streaming.lda import StreamingLDA
from utils.config.config import Config
from utils.config.methods import Method

METHOD = Method("ncm_lda", "streamed class means in the metric of one shared covariance")


class NcmLda(Learner):
    """Nearest class mean in the shared-covariance Mahalanobis metric."""

    state_names = ("lda",)

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.lda = StreamingLDA(dim, device)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        self.lda.update(task.test_view(), task.labels, task.first_row + task.new_rows)

    def scores(self, features: Tensor) -> Tensor:
        """Linear discriminants."""
        return self.lda.scores(features)
