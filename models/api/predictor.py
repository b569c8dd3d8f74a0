"""Answers to images: a frozen backbone and what was learned on it, in any number of threads."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from backbone.vit import Backbone
from models.api.predictions import Predictions
from models.base import Learner, make_learner
from models.evaluation import class_scores
from models.modular import ModularLearner
from utils.config.config import Config
from utils.data.given import Images, ImageSource, as_image, checked_top_k, loaded_ahead, numbered, sources_of
from utils.data.loader import load_ahead
from utils.data.splits import MAX_PIXELS
from utils.data.tasks import LearnedClasses
from utils.data.transforms import Transforms
from utils.errors import BackboneError, CheckpointError, DamagedRunError, DataError, is_lack_of_memory
from utils.hardware import default_batch_size, forward_threads
from utils.runs.checkpoint import CheckpointFolder, first_line
from utils.runs.manifest import RunManifest
from utils.seeds import modes_of_a_run
from utils.words import counted

FileAnswers = tuple[list[Path], Predictions | None, dict[int, DataError]]
FileBatch = tuple[list[Path], list[Tensor], dict[int, DataError]]


class Known(NamedTuple):
    """What has been learned so far. It is replaced as a whole: whatever stops a task leaves it as it was."""

    learner: Learner
    manifest: RunManifest
    learned: LearnedClasses

    @classmethod
    def read(
        cls, config: Config, dim: int, device: torch.device, checkpoint: CheckpointFolder, manifest: RunManifest
    ) -> "Known":
        """What a run has learned as its last commit left it; before its first task nothing."""
        learner = make_learner(config, dim, device, manifest.seed)
        if not manifest.tasks:
            return cls.after(learner, manifest)
        tensors = checkpoint.load(manifest)
        try:
            learner.load_state_dict(*tensors)
            with torch.no_grad():  # through all that answers: wrong shapes show here, not later
                feature = torch.zeros(1, dim, device=device)
                widths = {learner.answer(feature, selection).scores.shape[1] for selection in learner.selections}
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            if is_lack_of_memory(error):
                raise
            raise DamagedRunError(
                f"the files in {checkpoint.folder} do not fit the config of their run ({first_line(error)})"
            ) from error
        if widths != {manifest.learned().rows} or learner.tasks != len(manifest.tasks):
            raise DamagedRunError(f"the files in {checkpoint.folder} do not fit the tasks of their run")
        return cls.after(learner, manifest)

    @classmethod
    def after(cls, learner: Learner, manifest: RunManifest) -> "Known":
        return cls(learner, manifest, manifest.learned())


class Predictor:
    """A frozen backbone and what was learned on it, which answers and goes on learning.

    Any number of threads may predict with one object at a time; learning and moving need it alone.

    Attributes:
        config: the settings.
        backbone: the frozen ViT.
        backbone_forwards: images that this object passed through the backbone.
        max_pixels: larger images are refused.
    """

    def __init__(self, config: Config, backbone: Backbone, known: Known) -> None:
        self.config, self.backbone, self._known = config, backbone, known
        self.backbone_forwards = 0
        self.max_pixels = config.max_pixels or MAX_PIXELS
        self.batch_size = config.feature_batch_size or default_batch_size(backbone.device, config.image_size)
        self._counting, self._transforms = threading.Lock(), Transforms(config.image_size, 0)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def learner(self) -> Learner:
        """What training changes."""
        return self._known.learner

    @property
    def manifest(self) -> RunManifest:
        """The record of the run: its config, data, results and files."""
        return self._known.manifest

    @property
    def class_names(self) -> tuple[str, ...]:
        """All classes that it knows, in the order in which it learned them."""
        return self._known.learned.class_names

    @property
    def domains(self) -> tuple[str, ...]:
        """The domain of each task, of a domain-incremental run; else empty."""
        return self._known.learned.domains

    @property
    def tasks(self) -> int:
        """Tasks learned so far; with modules, their number."""
        return self.learner.tasks

    @property
    def row_class(self) -> np.ndarray:
        """``(rows,)`` the class of each of the classifier's rows; in domain runs a class has several."""
        return self._known.learned.row_class

    @property
    def has_modules(self) -> bool:
        """Whether a module of its own answers for each task, as in TOSCA and in no baseline."""
        return isinstance(self.learner, ModularLearner)

    @property
    def selections(self) -> tuple[str, ...]:
        """The names that ``predict(..., selection=NAME)`` takes."""
        return self.learner.selections

    @property
    def selection(self) -> str:
        """How ``predict`` chooses the module by default: as the config says, if that answers single images."""
        names = (self.config.selection, "sample", *self.selections)
        return next(name for name in names if name in self.selections)

    def __repr__(self) -> str:
        tasks = counted(self.tasks, "domain" if self.domains else "task")
        return (
            f"{type(self).__name__}({self.config.model_name}, {tasks}, {counted(len(self.class_names), 'class')}, "
            f"{self.backbone.name}, selection {self.selection}, {self.backbone.device})"
        )

    @modes_of_a_run()
    def to(self, device: str | int | torch.device) -> "Predictor":
        """Move backbone and learner to ``device``; return this object. Where there is none, the model stays."""
        try:
            moved = torch.device(device)
            torch.empty(1, device=moved)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise BackboneError(
                f"device {str(device)!r} cannot be used here ({reason}); the model stays on {self.backbone.device}"
            ) from error
        learner = make_learner(self.config, self.backbone.feature_dim, moved, self.manifest.seed)
        learner.load_state_dict(self.learner.state_dict(), self.module_states())
        self.backbone.to(moved)
        self._known = self._known._replace(learner=learner)
        self.batch_size = self.config.feature_batch_size or default_batch_size(moved, self.config.image_size)
        return self

    def module_states(self) -> list[dict[str, Tensor]]:
        """The tensors that belong to one task alone, task by task; empty for a method without modules."""
        states = (self.learner.module_state(task) for task in range(self.tasks))
        return [state for state in states if state is not None]

    # -- predicting ------------------------------------------------------------------------------------------------

    @modes_of_a_run()
    def predict(self, images: Images, top_k: int = 5, selection: str | None = None) -> Predictions:
        """Classify images, each by itself, whatever is in the batch.

        Args:
            images: paths, open files, PIL images, ``(3, H, W)`` tensors and ``(H, W[, 3])`` arrays in any mix, or one
                ``(images, 3, H, W)`` tensor or ``(images, H, W[, 3])`` array. Tensors and arrays are uint8, or
                floating point in [0, 1], in RGB. All sizes pass the test transform.
            top_k: how many classes to name for each; at most as many as there are.
            selection: how the module that answers is chosen, one of ``selections``; by default ``self.selection``.
        """
        selection, top_k = self._checked(selection), checked_top_k(top_k)
        sources, size = sources_of(images), self.batch_size
        starts = range(0, len(sources), size)
        batches = (numbered(sources[start : start + size], self._pixels, start) for start in starts)
        parts = [self._answer(pixels, top_k, selection) for pixels in batches]
        empty = torch.empty(0, self.backbone.feature_dim, device=self.backbone.device)
        return Predictions.joined(parts) if parts else self.classify_features(empty, top_k, selection)

    def predict_files(
        self, paths: Iterable[Path], top_k: int = 5, selection: str | None = None
    ) -> Iterator[FileAnswers]:
        """Classify any number of files in constant memory; threads read ahead, and on a CPU others compute.

        Yields one batch after another: its files, the answers to those that could be read (None if there are none),
        and the errors of the others, by their place among the files.
        """
        selection, top_k = self._checked(selection), checked_top_k(top_k)
        threads = forward_threads(self.backbone.device)

        def answer(batch: FileBatch) -> Predictions | None:
            torch.set_num_threads(1)  # of this thread: as many passes as threads are at work, each on one
            return self._answer(batch[1], top_k, selection) if batch[1] else None

        for (files, _, errors), found in load_ahead(answer, self._batches(paths), workers=threads, ahead=threads + 1):
            yield files, found, errors

    def _batches(self, paths: Iterable[Path]) -> Iterator[FileBatch]:
        """The files of one batch, the pixels of those that could be read, and the errors of the others."""
        files, pixels, errors = list[Path](), list[Tensor](), dict[int, DataError]()
        for path, loaded in loaded_ahead(paths, self._pixels, ahead=2 * self.batch_size):
            if isinstance(loaded, DataError):
                errors[len(files)] = loaded
            else:
                pixels.append(loaded)
            files.append(path)
            if len(files) == self.batch_size:
                yield files, pixels, errors
                files, pixels, errors = [], [], {}
        if files:
            yield files, pixels, errors

    def extract_features(self, pixels: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8, S being ``config.image_size`` -> ``(images, dim)`` on the backbone's device."""
        return self.backbone(pixels).clone()  # the backbone's own is an inference tensor, useless for autograd

    @modes_of_a_run()
    @torch.no_grad()
    def classify_features(self, features: Tensor, top_k: int = 5, selection: str | None = None) -> Predictions:
        """What ``predict`` does after the backbone: ``(images, dim)`` features to answers."""
        selection, top_k, known = self._checked(selection), checked_top_k(top_k), self._known
        answer = known.learner.answer(features, selection)
        probabilities = class_scores(answer.scores, known.learned.row_class).softmax(dim=1)
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        about_modules = {
            name: None if value is None else value.cpu()
            for name in ("module", "entropy", "entropies", "task_scores")
            for value in [getattr(answer, name)]
        }
        return Predictions(
            known.learned.class_names,
            best.indices.cpu(),
            best.values.cpu(),
            features.cpu(),
            selection,
            known.learner.tasks,
            **about_modules,
            domains=known.learned.domains,
        )

    def check_learned(self) -> None:
        if not self.tasks:
            raise CheckpointError("nothing is learned yet: call learn(images, labels) first")

    def _checked(self, selection: str | None) -> str:
        self.check_learned()
        if selection is not None:
            self.learner.check_selection(selection)
        return selection or self.selection

    def _answer(self, pixels: list[Tensor], top_k: int, selection: str) -> Predictions:
        with self._counting:
            self.backbone_forwards += len(pixels)
        return self.classify_features(self.extract_features(torch.stack(pixels)), top_k, selection)

    def _pixels(self, source: ImageSource) -> Tensor:
        pixels: Tensor = self._transforms.test(as_image(source, self.max_pixels))
        return pixels
