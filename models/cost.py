"""What a run costs: the columns of the paper's second table.

FLOPs are counted by ``torch.utils.flop_counter``: two for each multiply-add of matrix products, convolutions and
attention, nothing for element-wise work. Two accounts are kept where they differ. *As spent here*: an image passes the
backbone once, through the feature bank, whose last block computes the class token alone where that is exact. *As
published*: the whole backbone runs for each training image in each epoch and once more for the prototypes, and for each
module at inference.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from backbone.classifier import CosineClassifier
from backbone.flops import FlopCounter, count_flops, quickest_ms
from backbone.luca import LuCA, make_luca
from backbone.vit import Backbone
from models.base import Learner
from models.training import train
from utils.config.config import Config
from utils.data.tasks import Task, TaskStream
from utils.hardware import forget_peak, peak_bytes
from utils.results.cost import (
    AS_PUBLISHED,
    EVAL_MS,
    INFERENCE,
    LEARNER,
    PARAMS,
    PEAK_MB,
    TRAIN,
    TRAIN_MINUTES,
    TRAINABLE,
)
from utils.runs.manifest import RunManifest

# -- learning ---------------------------------------------------------------------------------------------------------


def step_flops(config: Config, dim: int, rows: int) -> int:
    """Return the FLOPs of one image in one epoch of training a LuCA and a classifier of ``rows`` rows.

    They are linear in images and epochs, so one step of one image gives them.
    """
    luca = _any_luca(config, dim)
    classifier = CosineClassifier(torch.zeros(rows, dim), torch.tensor(1.0))
    batch = (torch.ones(1, dim), torch.zeros(1, dtype=torch.long))
    return count_flops(lambda: train(luca, classifier, [[batch]], config))


def luca_flops(config: Config, dim: int) -> int:
    """Return the FLOPs of one feature through one LuCA."""
    luca = _any_luca(config, dim)
    with torch.no_grad():
        return count_flops(lambda: luca(torch.ones(1, dim)))


def _any_luca(config: Config, dim: int) -> LuCA:
    """A LuCA of the run's shape; its numbers do not matter."""
    return make_luca(dim, mlp_ratio=config.mlp_ratio, se_ratio=config.se_ratio, flow=config.flow, first=True, seed=0)


def training_flops(config: Config, dim: int, tasks: Sequence[Task]) -> int:
    """Return the FLOPs of training the modules of ``tasks`` and the classifier, without the backbone.

    Each image of a task is learned once in each epoch, and passes the finished module once more for the prototypes.
    """
    prototype, one_row = luca_flops(config, dim), step_flops(config, dim, 1)
    of_row = step_flops(config, dim, 2) - one_row  # each further row of the classifier costs the same
    return sum(
        len(task.train) * (config.epochs * (one_row + of_row * (task.rows.stop - 1)) + prototype) for task in tasks
    )


# -- a run ------------------------------------------------------------------------------------------------------------


class CostMeter:
    """Counts while a run learns, and measures the finished model.

    Args:
        config: of the run.
        learner: the run's.
        stream: the run's tasks.
        so_far: what earlier starts of the run counted.
    """

    def __init__(self, config: Config, learner: Learner, stream: TaskStream, so_far: Mapping[str, float]) -> None:
        self.config, self.learner, self.stream = config, learner, stream
        self.counted = {LEARNER: so_far.get(LEARNER, 0.0), PEAK_MB: so_far.get(PEAK_MB, 0.0)}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within, the learner learns a task: memory is watched and, where that costs nothing, FLOPs are counted."""
        device = self.learner.device
        forget_peak(device)
        if self.config.method.augmented:  # thousands of small steps: counting would slow each of them
            yield
        else:
            with FlopCounter() as counter:
                yield
            self.counted[LEARNER] += counter.total / 1e9
        self.counted[PEAK_MB] = max(self.counted[PEAK_MB], peak_bytes(device) / 2**20)

    def summary(self, manifest: RunManifest, backbone: Backbone) -> dict[str, float]:
        """Return the columns of the table, after the last task."""
        learner = self.learner
        parameters = manifest.tasks[-1].parameters
        modules = learner.tasks if learner.module_state(0) is not None else 1
        feature = torch.zeros(1, learner.dim, device=learner.device)
        forward, whole, forward_ms = backbone.flops / 1e9, backbone.whole_flops / 1e9, backbone.forward_ms
        answering = count_flops(lambda: learner.answer(feature)) / 1e9
        answer_ms = quickest_ms(lambda: learner.answer(feature), backbone.device)
        own_tasks = [task for task in self.stream.tasks if len(task.train)]  # not those of a run that is continued
        counted, epochs, augmented = dict(self.counted), self.config.epochs, self.config.method.augmented
        if augmented:
            counted[LEARNER] = training_flops(self.config, learner.dim, own_tasks) / 1e9
        passes = sum(len(task.train) for task in own_tasks) * (epochs + 1 if augmented else 1)
        return {
            TRAIN_MINUTES: sum(manifest.seconds.values()) / 60,
            EVAL_MS: forward_ms + answer_ms,
            INFERENCE: forward + answering,
            TRAIN: counted[LEARNER] + forward * manifest.backbone_forwards,
            PEAK_MB: counted[PEAK_MB],
            PARAMS: (parameters["backbone"] + parameters["luca_per_task"] * modules + parameters["classifier"]) / 1e6,
            TRAINABLE: parameters["trainable"] / 1e6,
            EVAL_MS + AS_PUBLISHED: modules * forward_ms + answer_ms,
            INFERENCE + AS_PUBLISHED: modules * whole + answering,
            TRAIN + AS_PUBLISHED: counted[LEARNER] + whole * passes,
            LEARNER: counted[LEARNER],
        }
