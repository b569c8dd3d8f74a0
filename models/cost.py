"""What a run costs: the columns of the paper's second table.

Two accounts are kept where they differ. *As spent here*: an image passes the backbone once, through the feature bank,
whose last block computes the class token alone where that is exact. *As the release spends it*: the whole backbone runs
for each training image in each epoch and once more for the prototypes, and for each module at inference.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from backbone.flops import FlopCounter, count_flops, quickest_ms
from backbone.vit import Backbone
from models.base import Learner, kept_numbers
from utils.config.config import Config
from utils.data.tasks import TaskStream
from utils.hardware import forget_peak, peak_bytes
from utils.results.metrics import (
    BY_RELEASE,
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


class CostMeter:
    """Counts while a run learns, and measures the finished model.

    Args:
        so_far: what earlier starts of the run counted.
    """

    def __init__(self, so_far: Mapping[str, float]) -> None:
        self.counted = {LEARNER: so_far.get(LEARNER, 0.0), PEAK_MB: so_far.get(PEAK_MB, 0.0)}

    @contextmanager
    def learning(self, device: torch.device) -> Iterator[None]:
        """Within, a learner learns a task: memory is watched and FLOPs are counted, those of every solve too."""
        forget_peak(device)
        with FlopCounter() as counter:
            yield
        self.counted[LEARNER] += counter.total / 1e9
        self.counted[PEAK_MB] = max(self.counted[PEAK_MB], peak_bytes(device) / 2**20)

    def summary(
        self, config: Config, learner: Learner, stream: TaskStream, manifest: RunManifest, backbone: Backbone
    ) -> dict[str, float]:
        """Return the columns of the table, after the last task; answering is that of ``sample``, then of the others."""
        forward, whole = backbone.flops / 1e9, backbone.whole_flops / 1e9
        modules = learner.tasks if config.method.modular else 1
        feature = torch.zeros(1, learner.dim, device=learner.device)
        answers = {name: partial(learner.answer, feature, name) for name in learner.selections}
        answering = {name: count_flops(answer) / 1e9 for name, answer in answers.items()}
        answer_ms = {name: quickest_ms(answer, learner.device) for name, answer in answers.items()}
        images = sum(len(task.train) for task in stream.tasks)  # none for the tasks of a run that is continued
        passes = images * (config.epochs + 1 if config.method.augmented else 1)
        first = learner.selections[0]
        return {
            TRAIN_MINUTES: sum(manifest.seconds.values()) / 60,
            EVAL_MS: backbone.forward_ms + answer_ms[first],
            INFERENCE: forward + answering[first],
            TRAIN: self.counted[LEARNER] + forward * manifest.backbone_forwards,
            PEAK_MB: self.counted[PEAK_MB],
            PARAMS: (backbone.parameters + kept_numbers(learner)) / 1e6,
            TRAINABLE: manifest.tasks[-1].parameters["trainable"] / 1e6,
            EVAL_MS + BY_RELEASE: modules * backbone.forward_ms + answer_ms[first],
            INFERENCE + BY_RELEASE: modules * whole + answering[first],
            TRAIN + BY_RELEASE: self.counted[LEARNER] + whole * passes,
            LEARNER: self.counted[LEARNER],
            **{f"{INFERENCE}, {name}": forward + answering[name] for name in learner.selections[1:]},
            **{f"{EVAL_MS}, {name}": backbone.forward_ms + answer_ms[name] for name in learner.selections[1:]},
        }
