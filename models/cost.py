"""What a run costs: the columns of the paper's second table.

FLOPs are counted by ``torch.utils.flop_counter``: two for each multiply-add of matrix products, convolutions and
attention, nothing for element-wise work. Two accounts are kept where they differ. *As spent here*: an image passes the
backbone once, through the feature bank, whose last block computes the class token alone where that is exact. *As
published*: the whole backbone runs for each training image in each epoch and once more for the prototypes, and for each
module at inference.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from backbone.classifier import CosineClassifier
from backbone.create import create_model
from backbone.luca import LuCA, make_luca
from models.base import Learner
from models.training import train
from utils.config.config import Config
from utils.data.tasks import Task, TaskStream
from utils.errors import BackboneError
from utils.features.extraction import FeatureExtractor
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

_REPEATS = 3  # one image is answered so often; the median counts


class FlopCounter(TorchDispatchMode):
    """Adds up ``torch.utils.flop_counter``'s formulas for every operation within, backward passes included.

    It differs from torch's ``FlopCounterMode`` in that it keeps one total alone, which costs a tenth of the time.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._composite: dict[Any, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and self._is_composite(func):  # such as linear, in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result

    def _is_composite(self, func: Any) -> bool:
        if func not in self._composite:
            self._composite[func] = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        return self._composite[func]


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of ``work``."""
    # the fused attention of some devices is an operation without a formula: it would count nothing
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        work()
    return int(counter.total)


@cache
def whole_forward_flops(name: str, image_size: int) -> int:
    """Return the FLOPs of one image through the whole timm model of that name; shapes alone are computed, no numbers.

    Raises:
        BackboneError: the model cannot be built.
    """
    try:
        with torch.device("meta"):
            model = create_model(name, image_size)
    except BackboneError:  # some versions of timm compute numbers while they build
        model = create_model(name, image_size, drawn=False).to("meta")
    with torch.device("meta"), torch.no_grad():
        return count_flops(lambda: model.eval()(torch.empty(1, 3, image_size, image_size)))


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

    def summary(self, manifest: RunManifest, backbone: FeatureExtractor) -> dict[str, float]:
        """Return the columns of the table, after the last task."""
        learner, image_size = self.learner, self.config.image_size
        parameters = manifest.tasks[-1].parameters
        modules = learner.tasks if learner.module_state(0) is not None else 1
        image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        feature = backbone(image)
        forward = count_flops(lambda: backbone(image)) / 1e9
        whole = self._whole_forward(backbone.name, forward)
        answering = count_flops(lambda: learner.answer(feature)) / 1e9
        forward_ms = milliseconds(lambda: backbone(image), backbone.device)
        answer_ms = milliseconds(lambda: learner.answer(feature), backbone.device)
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

    def _whole_forward(self, name: str, own: float) -> float:
        """GFLOPs of the whole backbone; those of this run's own forward where the model cannot be built by its name."""
        try:
            return whole_forward_flops(name, self.config.image_size) / 1e9
        except BackboneError:
            return own


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of ``work``, after one time that does not count."""
    times = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) * 1000
