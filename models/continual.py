"""A saved run as a classifier that goes on learning: load, predict, learn, save.

    from models import ContinualClassifier

    model = ContinualClassifier.load("tosca")
    model.predict(["a.jpg", "b.jpg"]).classes            # ["owl", "fox"]
    model.learn(new_paths, ["okapi"] * len(new_paths))   # one call is one task; nothing old is needed
    model.save("tosca-with-okapi")

The commands use the same code: ``predict.py`` predicts through it, and its ``learn`` trains as ``main.py`` does.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbone.vit import Backbone, load_backbone, resolve_device
from models.base import Learner
from models.evaluation import class_scores
from models.modular import ModularLearner
from models.registry import make_learner, training_features
from models.task_data import BankTask
from utils.config import Config, make_config
from utils.data.given import GivenImages, Images, ImageSource, as_image, loaded_ahead, sources_of
from utils.data.splits import Dataset, Split
from utils.data.tasks import TaskStream, next_task
from utils.data.transforms import Transforms
from utils.errors import BackboneError, ConfigError, DataError
from utils.features.bank import FeatureBank
from utils.features.batches import TEST_VIEW
from utils.files import FolderLock
from utils.hardware import default_batch_size, forward_threads
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import read_run
from utils.runs.manifest import RunManifest, TaskRecord


@dataclass(frozen=True)
class Predictions:
    """The answers to some images, in their order. All tensors are on the CPU.

    Attributes:
        class_names: what the numbers in ``top`` stand for.
        top: ``(images, k)`` int64, the best classes, best first.
        probabilities: ``(images, k)`` of them: a softmax over all classes' scores.
        features: ``(images, dim)`` what the frozen backbone gave.
        module: ``(images,)`` the module that answered, or None for a method without modules.
        entropies: ``(images, modules)`` of every module's prediction, in nats, or None. They are taken over
            classifier rows: in domain-incremental runs a class has a row for each of its domains.
    """

    class_names: tuple[str, ...]
    top: Tensor
    probabilities: Tensor
    features: Tensor
    module: Tensor | None = None
    entropies: Tensor | None = None

    def __len__(self) -> int:
        return len(self.top)

    @property
    def classes(self) -> list[str]:
        """The name of each image's best class."""
        return [self.class_names[number] for number in self.top[:, 0].tolist()]

    @property
    def entropy(self) -> Tensor | None:
        """``(images,)`` of the module that answered."""
        return None if self.entropies is None else self.entropies.amin(dim=1)

    @property
    def margin(self) -> Tensor | None:
        """``(images,)`` how much higher the next module's entropy is; NaN where there is only one module."""
        if self.entropies is None:
            return None
        if self.entropies.shape[1] < 2:
            return torch.full((len(self),), torch.nan)
        lowest, next_one = self.entropies.topk(2, dim=1, largest=False).values.unbind(dim=1)
        return next_one - lowest

    @staticmethod
    def joined(parts: Sequence["Predictions"]) -> "Predictions":
        """Several as one."""
        tensors = ("top", "probabilities", "features", "module", "entropies")
        columns = {name: [getattr(part, name) for part in parts] for name in tensors}
        return Predictions(
            parts[0].class_names, **{n: None if c[0] is None else torch.cat(c) for n, c in columns.items()}
        )


class ContinualClassifier:
    """A frozen backbone and what was learned on it, task after task. Make one with ``load``.

    Attributes:
        config: the run's settings; ``learn`` trains by them.
        backbone: the frozen ViT.
        learner: what training changes.
        backbone_forwards: images that this object passed through the backbone.
    """

    def __init__(self, config: Config, backbone: Backbone, learner: Learner, manifest: RunManifest) -> None:
        self.config, self.backbone, self.learner = config, backbone, learner
        self.backbone_forwards = 0
        self._manifest = manifest
        self._learned = manifest.learned()
        self._transforms = Transforms(config.image_size, 0)
        self._batch_size = config.feature_batch_size or default_batch_size(backbone.device, config.image_size)

    @classmethod
    def load(
        cls, folder: str | Path, *, backbone_weights: str | Path | None = None, device: str | None = None
    ) -> "ContinualClassifier":
        """Read a checkpoint folder; every file is checked against its SHA-256, the backbone too.

        Args:
            folder: a run's ``checkpoint_dir`` (of several seeds, one ``seed<seed>/`` in it).
            backbone_weights: where the backbone's file is now; by default as the run's config says.
            device: ``"cpu"`` or the number of an accelerator; by default as the run's config says.

        Raises:
            CheckpointError: no run there, a damaged one, or one that has not finished its first task.
            BackboneError: the weights cannot be had, or are not those of the run.
        """
        checkpoint = CheckpointFolder(Path(folder).expanduser())
        manifest = read_run(checkpoint)
        changed: dict[str, Any] = {"precision": manifest.backbone["precision"]}
        if backbone_weights is not None:
            changed["backbone_weights"] = str(backbone_weights)
        if device is not None:
            changed["device"] = [device]
        config = make_config({**manifest.config, **changed}, str(checkpoint.manifest_path))
        backbone = _load_same_backbone(config, manifest)
        learner = make_learner(config, backbone.feature_dim, backbone.device, manifest.seed)
        learner.load_state_dict(*checkpoint.load(manifest))
        return cls(config, backbone, learner, manifest)

    @property
    def class_names(self) -> tuple[str, ...]:
        """All classes that it knows, in the order in which it learned them."""
        return self._learned.class_names

    @property
    def tasks(self) -> int:
        """Tasks learned so far; with modules, their number."""
        return self.learner.tasks

    @property
    def has_modules(self) -> bool:
        """Whether a module of its own answers for each task, as in TOSCA and in no baseline."""
        return isinstance(self.learner, ModularLearner)

    # -- predicting ------------------------------------------------------------------------------------------------

    def predict(self, images: Images, top_k: int = 5) -> Predictions:
        """Classify images under ``sample`` selection: each by itself, whatever is in the batch.

        Args:
            images: paths, PIL images and ``(3, H, W)`` tensors in any mix, or one ``(images, 3, H, W)`` tensor.
                Tensors are uint8, or floating point in [0, 1], in RGB. All sizes pass the test transform.
            top_k: how many classes to name for each; at most as many as there are.

        Raises:
            DataError: an image that cannot be read, or a tensor of another form.
        """
        sources = sources_of(images)
        self.backbone_forwards += len(sources)
        starts = range(0, len(sources), self._batch_size)
        batches = ([self._pixels(source) for source in sources[start : start + self._batch_size]] for start in starts)
        parts = [self._answer(pixels, top_k) for pixels in batches]
        empty = torch.empty(0, self.backbone.feature_dim, device=self.backbone.device)
        return Predictions.joined(parts) if parts else self.classify_features(empty, top_k)

    def predict_files(
        self, paths: Iterable[Path], top_k: int = 5
    ) -> Iterator[tuple[list[Path], Predictions | None, list[tuple[Path, DataError]]]]:
        """Classify any number of files in constant memory; threads read ahead, and on a CPU others compute.

        Yields one batch after another: the files that could be read, their answers (None if there are none), and
        the files that could not be read, each with its error.
        """
        threads = forward_threads(self.backbone.device)
        running: deque[tuple[list[Path], Future, list[tuple[Path, DataError]]]] = deque()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for good, pixels, errors in self._batches(paths):
                running.append((good, pool.submit(self._answer, pixels, top_k), errors))
                self.backbone_forwards += len(good)
                if len(running) > threads:
                    good, future, errors = running.popleft()
                    yield good, future.result(), errors
            for good, future, errors in running:
                yield good, future.result(), errors

    def _batches(
        self, paths: Iterable[Path]
    ) -> Iterator[tuple[list[Path], list[Tensor], list[tuple[Path, DataError]]]]:
        """The files of one batch that could be read, their pixels, and the errors of the others."""
        good, pixels, errors = [], [], []
        for path, loaded in loaded_ahead(paths, self._pixels, ahead=2 * self._batch_size):
            if isinstance(loaded, DataError):
                errors.append((path, loaded))
            else:
                good.append(path)
                pixels.append(loaded)
            if len(good) + len(errors) == self._batch_size:
                yield good, pixels, errors
                good, pixels, errors = [], [], []
        if good or errors:
            yield good, pixels, errors

    def extract_features(self, pixels: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8, S being ``config.image_size`` -> ``(images, dim)`` on the backbone's device."""
        return self.backbone(pixels).clone()  # the backbone's own is an inference tensor, useless for autograd

    @torch.no_grad()
    def classify_features(self, features: Tensor, top_k: int = 5) -> Predictions:
        """What ``predict`` does after the backbone: ``(images, dim)`` features to answers."""
        answer = self.learner.answer(features)
        row_class = torch.from_numpy(self._learned.row_class).to(features.device)
        probabilities = class_scores(answer.scores, row_class).softmax(dim=1)
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        module, entropies = (None if t is None else t.cpu() for t in (answer.module, answer.entropies))
        return Predictions(self.class_names, best.indices.cpu(), best.values.cpu(), features.cpu(), module, entropies)

    def _answer(self, pixels: list[Tensor], top_k: int) -> Predictions | None:
        return self.classify_features(self.extract_features(torch.stack(pixels)), top_k) if pixels else None

    def _pixels(self, source: ImageSource) -> Tensor:
        return self._transforms.test(as_image(source))

    # -- learning --------------------------------------------------------------------------------------------------

    def learn(self, images: Images, labels: Sequence[str], *, domain: str | None = None) -> None:
        """Learn the next task from its images alone, by the run's own settings (epochs, views, rate …).

        Earlier modules stay as they are, bit for bit. Features are kept in memory for the length of the call:
        4 bytes x ``dim`` x (views + 1) for each image; for large data use ``main.py`` with ``continue_from``.

        Args:
            images: as for ``predict``.
            labels: the class name of each image; all of them new.
            domain: makes the images a new domain of this name (scenario ``domain``): known class names may come again.

        Raises:
            DataError: no image, numbers that differ, a name that is learned already, an unreadable image.
            ConfigError: a method that needs the data of earlier tasks.
            NumericError: training diverged; what was learned before is unchanged.
        """
        sources = sources_of(images)
        if len(sources) != len(labels):
            raise DataError(f"{len(sources)} images but {len(labels)} labels")
        if not sources:
            raise DataError("there is no image to learn from")
        if bad := [label for label in labels if not isinstance(label, str) or not label]:
            raise DataError(f"labels are class names, got {bad[0]!r}")
        if not self.config.method.continual:
            raise ConfigError(f"{self.config.model_name} needs the data of all tasks; it cannot learn a task alone")
        if self._learned.domains and domain is None:
            raise DataError("the run is domain-incremental: name the new images' domain, learn(..., domain=<name>)")
        names = sorted(set(labels))
        learned = self._learned.with_task(names, domain)
        task = next_task(self._learned, np.asarray([names.index(label) for label in labels]), len(names))
        split = GivenImages(sources, labels)
        bank = self._bank(split)
        bank.fill(training_features(self.config))
        self.backbone_forwards += bank.forwards
        stream = TaskStream((task,), learned.class_names, learned.row_class)
        self.learner.learn(BankTask(bank, stream, task, self.config.views, self.backbone.device))
        content = hashlib.sha256(bank.read("train", TEST_VIEW, task.train)).hexdigest()
        self._learned = learned
        self._manifest = _grown_manifest(self, len(split), content)

    def _bank(self, split: Split) -> FeatureBank:
        return FeatureBank(
            Dataset("images", split, split, ()),
            self.backbone,
            image_size=self.config.image_size,
            augment_seed=self.config.view_seed(self._manifest.seed),
            fingerprints={},
            cache_dir=None,
            batch_size=self._batch_size,
            num_workers=0,
        )

    def save(self, folder: str | Path) -> Path | None:
        """Write a checkpoint folder that ``load``, ``predict.py`` and ``continue_from`` read.

        What another run has there is moved aside, never overwritten.

        Returns:
            where that went, or None.

        Raises:
            UserError: the folder cannot be written, or a run is at work in it.
        """
        checkpoint = CheckpointFolder(Path(folder).expanduser())
        with FolderLock(checkpoint.folder / ".lock", f"checkpoint folder {str(folder)!r}"):
            aside = checkpoint.move_aside()
            modules = [self.learner.module_state(task) for task in range(self.tasks)]
            self._manifest = checkpoint.commit_all(self._manifest, self.learner.state_dict(), modules)
        return aside


# -- reading a run ----------------------------------------------------------------------------------------------------


def _load_same_backbone(config: Config, manifest: RunManifest) -> Backbone:
    try:
        backbone = load_backbone(config, resolve_device(config))
    except BackboneError as error:
        if config.backbone_weights and not Path(config.backbone_weights).is_file():
            raise BackboneError(f"{error}; say where it is now with --backbone-weights=<file>") from None
        raise
    expected = manifest.backbone["weights_sha256"]
    if backbone.weights_sha256 != expected:
        raise BackboneError(
            f"the weights of {backbone.name} are not those of the run: their SHA-256 is "
            f"{backbone.weights_sha256[:12]}…, the run's {expected[:12]}…; modules fit the weights that they were "
            "trained on alone: give that file with --backbone-weights"
        )
    return backbone


def _grown_manifest(model: ContinualClassifier, images: int, content: str) -> RunManifest:
    """The manifest after ``learn``: of a run of its own, which no config describes, with a task not tested."""
    old, learned = model._manifest, model._learned
    record = TaskRecord(
        sparsity=model.learner.sparsity(model.tasks - 1) if isinstance(model.learner, ModularLearner) else None,
        parameters={"backbone": model.backbone.parameters, **model.learner.parameter_counts()},
    )
    data = {**old.data, "classes": len(learned.class_names), "train_images": old.data["train_images"] + images}
    return replace(
        old.with_learned(learned),
        status="finished",
        identity={**old.identity, "learned_by_hand": [*old.identity.get("learned_by_hand", []), content]},
        data=data,
        tasks=(*old.tasks[: len(learned.task_sizes) - 1], record),
    )
