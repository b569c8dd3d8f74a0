"""Answers to images: a frozen backbone and what was learned on it, in any number of threads."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backbone.vit import Backbone
from models.api.predictions import Predictions
from models.base import Learner
from models.evaluation import class_scores
from models.registry import make_learner
from models.selection import ModularLearner
from utils.config.config import Config
from utils.data.given import Images, ImageSource, as_image, checked_top_k, loaded_ahead, numbered, sources_of
from utils.data.images import MAX_PIXELS
from utils.data.transforms import Transforms
from utils.errors import BackboneError, DataError
from utils.hardware import default_batch_size, forward_threads
from utils.runs.manifest import RunManifest
from utils.words import counted

FileAnswers = tuple[list[Path], Predictions | None, list[tuple[Path, DataError]]]


class Predictor:
    """A frozen backbone and what was learned on it, as it answers.

    Attributes:
        config: the run's settings.
        backbone: the frozen ViT.
        learner: what training changes.
        backbone_forwards: images that this object passed through the backbone.
        max_pixels: larger images are refused.

    Any number of threads may predict with one object at a time; moving it needs it alone.
    """

    def __init__(self, config: Config, backbone: Backbone, learner: Learner, manifest: RunManifest) -> None:
        self.config, self.backbone, self.learner = config, backbone, learner
        self.backbone_forwards = 0
        self.max_pixels = config.max_pixels or MAX_PIXELS  # larger images are refused
        self._counting = threading.Lock()
        self._manifest = manifest
        self._learned = manifest.learned()
        self._transforms = Transforms(config.image_size, 0)
        self.batch_size = config.feature_batch_size or default_batch_size(backbone.device, config.image_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        """All classes that it knows, in the order in which it learned them."""
        return self._learned.class_names

    @property
    def domains(self) -> tuple[str, ...]:
        """The domain of each task, of a domain-incremental run; else empty."""
        return self._learned.domains

    @property
    def tasks(self) -> int:
        """Tasks learned so far; with modules, their number."""
        return self.learner.tasks

    @property
    def row_class(self) -> np.ndarray:
        """``(rows,)`` the class of each of the classifier's rows; in domain runs a class has several."""
        return self._learned.row_class

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
        """How ``predict`` chooses the module by default: as the run's config says, if that answers single images."""
        names = (self.config.selection, "sample", *self.selections)
        return next(name for name in names if name in self.selections)

    def __repr__(self) -> str:
        tasks, classes = (
            counted(self.tasks, "domain" if self.domains else "task"),
            counted(len(self.class_names), "class"),
        )
        return (
            f"{type(self).__name__}({self.config.model_name}, {tasks}, {classes}, {self.backbone.name}, selection "
            f"{self.selection}, {self.backbone.device})"
        )

    def to(self, device: str | int | torch.device) -> "Predictor":
        """Move backbone and learner to ``device``; return this object.

        Raises:
            BackboneError: no such device; the model stays where it is.
        """
        try:
            moved = torch.device(device)
            torch.empty(1, device=moved)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise BackboneError(
                f"device {str(device)!r} cannot be used here ({reason}); the model stays on {self.backbone.device}"
            ) from error
        self.backbone.to(moved)
        learner = make_learner(self.config, self.backbone.feature_dim, moved, self._manifest.seed)
        learner.load_state_dict(self.learner.state_dict(), self.module_states())
        self.learner = learner
        self.batch_size = self.config.feature_batch_size or default_batch_size(moved, self.config.image_size)
        return self

    def module_states(self) -> list[dict[str, Tensor]]:
        """The tensors that belong to one task alone, task by task; empty for a method without modules."""
        states = (self.learner.module_state(task) for task in range(self.tasks))
        return [state for state in states if state is not None]

    # -- predicting ------------------------------------------------------------------------------------------------

    def predict(self, images: Images, top_k: int = 5, selection: str | None = None) -> Predictions:
        """Classify images, each by itself, whatever is in the batch.

        Args:
            images: paths, open files, PIL images, ``(3, H, W)`` tensors and ``(H, W[, 3])`` arrays in any mix, or one
                ``(images, 3, H, W)`` tensor or ``(images, H, W[, 3])`` array. Tensors and arrays are uint8, or
                floating point in [0, 1], in RGB. All sizes pass the test transform.
            top_k: how many classes to name for each; at most as many as there are.
            selection: how the module that answers is chosen, one of ``selections``; by default ``self.selection``.

        Raises:
            DataError: an image that cannot be read, or a tensor or array of another form.
            ConfigError: a selection that the method lacks, or one such as ``batch`` that looks at several images.
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

        Yields one batch after another: the files that could be read, their answers (None if there are none), and
        the files that could not be read, each with its error.
        """
        selection = self._checked(selection)
        threads = forward_threads(self.backbone.device)
        running: deque[tuple[list[Path], Future[Predictions] | None, list[tuple[Path, DataError]]]] = deque()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for good, pixels, errors in self._batches(paths):
                future = pool.submit(self._answer, pixels, top_k, selection) if good else None
                running.append((good, future, errors))
                if len(running) > threads:
                    yield _result(*running.popleft())
            while running:
                yield _result(*running.popleft())

    def _batches(
        self, paths: Iterable[Path]
    ) -> Iterator[tuple[list[Path], list[Tensor], list[tuple[Path, DataError]]]]:
        """The files of one batch that could be read, their pixels, and the errors of the others."""
        good: list[Path] = []
        pixels: list[Tensor] = []
        errors: list[tuple[Path, DataError]] = []
        for path, loaded in loaded_ahead(paths, self._pixels, ahead=2 * self.batch_size):
            if isinstance(loaded, DataError):
                errors.append((path, loaded))
            else:
                good.append(path)
                pixels.append(loaded)
            if len(good) + len(errors) == self.batch_size:
                yield good, pixels, errors
                good, pixels, errors = [], [], []
        if good or errors:
            yield good, pixels, errors

    def extract_features(self, pixels: Tensor) -> Tensor:
        """``(images, 3, S, S)`` uint8, S being ``config.image_size`` -> ``(images, dim)`` on the backbone's device."""
        return self.backbone(pixels).clone()  # the backbone's own is an inference tensor, useless for autograd

    @torch.no_grad()
    def classify_features(self, features: Tensor, top_k: int = 5, selection: str | None = None) -> Predictions:
        """What ``predict`` does after the backbone: ``(images, dim)`` features to answers."""
        selection, top_k = self._checked(selection), checked_top_k(top_k)
        answer = self.learner.answer(features, selection)
        probabilities = class_scores(answer.scores, self._learned.row_class).softmax(dim=1)
        best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
        about_modules = {
            name: None if value is None else value.cpu()
            for name in ("module", "entropy", "entropies", "task_scores")
            for value in [getattr(answer, name)]
        }
        classes, shares, domains = best.indices.cpu(), best.values.cpu(), self._learned.domains
        return Predictions(
            self.class_names, classes, shares, features.cpu(), selection, self.tasks, **about_modules, domains=domains
        )

    def _checked(self, selection: str | None) -> str:
        if selection is None:
            return self.selection
        self.learner.check_selection(selection)
        return selection

    def _answer(self, pixels: list[Tensor], top_k: int, selection: str) -> Predictions:
        with self._counting:
            self.backbone_forwards += len(pixels)
        return self.classify_features(self.extract_features(torch.stack(pixels)), top_k, selection)

    def _pixels(self, source: ImageSource) -> Tensor:
        pixels: Tensor = self._transforms.test(as_image(source, self.max_pixels))
        return pixels


def _result(good: list[Path], answer: Future[Predictions] | None, errors: list[tuple[Path, DataError]]) -> FileAnswers:
    return good, answer.result() if answer is not None else None, errors
