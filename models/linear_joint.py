"""Joint linear probe: multinomial logistic regression on the frozen features of all classes so far.

Not continual: at every task it is fitted afresh to the data of all tasks, under the test transform. It is the usual
upper bound for what a linear classifier can do on these features ("joint training" in the continual-learning
literature, e.g. De Lange et al., "A Continual Learning Survey", TPAMI 2021, Section 6).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Learner, OnEpoch, TaskData
from models.streaming.lda import finite_float64, float64_device
from models.tensors import all_finite
from utils.config.config import Config
from utils.config.methods import Method
from utils.errors import NumericError

METHOD = Method(
    "linear_joint", "logistic regression on the images of all tasks at once: an upper bound", continual=False
)
L2 = 1e-3  # weight of ½‖W‖² beside the mean cross-entropy; makes the optimum finite
MAX_STEPS = 200  # of L-BFGS
FLAT = 1e-5  # largest entry of the gradient at which it stops


class LinearJoint(Learner):
    """Softmax regression on standardised features, fitted to all data so far. An upper bound, not continual.

    Attributes:
        weight: ``(dim, rows)``, for features as they come: the standardisation is folded in.
        bias: ``(rows,)``.
    """

    state_names = ("weight", "bias")

    def __init__(self, config: Config, dim: int, device: torch.device, seed: int) -> None:
        super().__init__(config, dim, device, seed)
        self.weight, self.bias = torch.zeros(dim, 0, device=device), torch.zeros(0, device=device)

    def fit(self, task: TaskData, on_epoch: OnEpoch | None) -> None:
        features, rows = task.seen()
        features = finite_float64(features, float64_device(self.device))
        weight, bias = fit_softmax(features, rows.to(features.device), task.first_row + task.new_rows)
        if not (all_finite(weight) and all_finite(bias)):
            raise NumericError(f"task {task.index + 1}: the weights of the joint linear classifier are not finite")
        self.weight, self.bias = weight.float().to(self.device), bias.float().to(self.device)

    def scores(self, features: Tensor) -> Tensor:
        """Logits."""
        return features.float() @ self.weight + self.bias

    def parameter_counts(self) -> dict[str, int]:
        """Weights and bias are trained anew at every task."""
        counts = super().parameter_counts()
        return {**counts, "trainable": counts["classifier"]}


def fit_softmax(features: Tensor, rows: Tensor, total_rows: int) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + ``L2``/2 · ‖W‖² on standardised features; convex and deterministic.

    Shape: ``(images, dim), (images,) -> (dim, rows), (rows,)``, for features that are not standardised.
    The data are standardised in the precision they come in; the steps are made in float32, three times as fast.
    """
    mean = features.mean(dim=0)
    spread = features.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    inputs = ((features - mean) / spread).float()
    weight = inputs.new_zeros(inputs.shape[1], total_rows, requires_grad=True)
    bias = inputs.new_zeros(total_rows, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight + bias, rows) + L2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight = weight.detach() / spread[:, None]
    return weight, bias.detach() - mean @ weight
