"""TOSCA: one LuCA a task on the frozen [CLS] feature; the module of lowest entropy answers (paper, section 3).

Beside the paper's selections there are two routers, ``lda`` and ``ridge``: statistics of the *frozen* feature,
streamed without exemplars, name the task of the best class; that task's module answers among its own classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from backbone.classifier import CosineClassifier, first_rows
from backbone.luca import LuCA, luca_stacked
from models.base import OnEpoch, TaskData
from models.modular import ModularLearner
from models.streaming.lda import StreamingLDA, row_means
from models.streaming.ridge import RandomRidge
from models.tensors import all_finite
from models.training import HINT_LOWER_LR, check_finite, shuffled_epochs
from utils.config.config import Config
from utils.config.methods import Method, Selection
from utils.errors import DataError, NumericError
from utils.seeds import derive_seed

METHOD = Method(
    "tosca",
    "a LuCA module for each task; one is chosen for each image (the paper)",
    selections=(
        Selection(
            "batch",
            "batch (class order)",
            "one module for 48 consecutive test images, by their mean entropy: the release's evaluation; in class "
            "order the order itself tells the task",
            ordered=True,
        ),
        Selection(
            "sample",
            "sample",
            "the module of lowest entropy for each image by itself: no task identity at inference",
        ),
        Selection(
            "lda",
            "lda",
            "for each image by itself, the task of the best class under a linear discriminant analysis of the frozen "
            "feature; its module answers among the task's own classes",
        ),
        Selection(
            "ridge",
            "ridge",
            "for each image by itself, the task of the best class under ridge regression on 1,000 random features of "
            "the frozen feature; its module answers among the task's own classes",
        ),
    ),
    views="augmented",
    modular=True,
    reads=("training", "module"),
)
ROUTER_WIDTH = 1_000  # random features of the ``ridge`` router: RanPAC's 10,000 would cost more than all the rest


class TOSCA(ModularLearner):
    """The learner of the paper, with the release's quirks (README, "How this differs from the release")."""

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.routers = {
            "lda": StreamingLDA(dim, device),
            "ridge": RandomRidge(dim, ROUTER_WIDTH, derive_seed("ridge", seed), device),
        }

    def forward_modules(self, parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
        return luca_stacked(parameters, features, self.config.flow)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        luca, classifier = self.fresh_luca(task), self.grown_classifier(task)
        if self.config.new_rows == "prototypes":
            set_rows(classifier, luca, task)  # of the module as it starts
        frozen_rows = task.first_row if self.config.old_rows == "freeze" else 0
        epochs = shuffled_epochs(task, self.config, self.seed)
        try:
            self.train_module(luca, classifier, task, epochs, on_epoch, frozen_rows=frozen_rows)
            check_finite({**dict(luca.named_parameters(prefix="LuCA")), **dict(classifier.named_parameters())})
            set_rows(classifier, luca, task)
        except NumericError as error:
            raise NumericError(f"task {task.index + 1}, {error}") from None
        self.weight, self.sigma = classifier.weight.detach(), classifier.sigma.detach()
        self.add_module(dict(luca.named_parameters()))
        for router in self.routers.values():
            router.update(task.test_view(), task.labels, task.first_row + task.new_rows)

    def grown_classifier(self, task: TaskData) -> CosineClassifier:
        """The classifier with rows for the new task: random in the first task, zero in later ones."""
        learned = self.config.sigma == "learned"
        if task.first_row == 0:
            generator = torch.Generator().manual_seed(derive_seed("classifier", self.seed))
            rows = first_rows(task.new_rows, self.dim, generator)
            sigma = torch.tensor(1.0 if learned else float(self.config.sigma))
            classifier = CosineClassifier(rows, sigma).to(self.device)
        else:
            zeros = torch.zeros(task.new_rows, self.dim, device=self.device)
            classifier = CosineClassifier(self.weight, self.sigma).grown(zeros)
        classifier.sigma.requires_grad_(learned)
        return classifier


@torch.no_grad()
def set_rows(classifier: CosineClassifier, luca: LuCA, task: TaskData) -> None:
    """Set the task's rows to its class means of ``luca`` under the test view, not normalised."""
    means = class_means(luca(task.test_view()), task.labels - task.first_row, task.new_rows)
    classifier.weight[task.first_row : task.first_row + task.new_rows] = means


def class_means(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean feature of each of ``count`` classes: ``(images, dim), (images,) -> (count, dim)``."""
    if not all_finite(features):
        raise NumericError(f"after its last step: what LuCA makes of a training image is not finite; {HINT_LOWER_LR}")
    means, images = row_means(features, labels, count)
    if not all_finite(1 / images):
        raise DataError(f"{count} classes are to be learned, but one has no training image: its mean is undefined")
    return means.to(features)
