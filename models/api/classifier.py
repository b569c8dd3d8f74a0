"""A saved run as a classifier that goes on learning: load, predict, learn, save.

    from models import ContinualClassifier

    model = ContinualClassifier.load("tosca")
    model.predict(["a.jpg", "b.jpg"]).classes            # ["owl", "fox"]
    model.learn(new_paths, ["okapi"] * len(new_paths))   # one call is one task; nothing old is needed
    model.save("tosca-with-okapi")

The commands use the same code: ``predict.py`` predicts through it, and its ``learn`` trains as ``main.py`` does.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbone.vit import Backbone, load_backbone, resolve_device
from models.api import hub
from models.api.pickling import maker
from models.api.predictions import Predictions
from models.api.predictor import Predictor
from models.registry import load_learner, make_learner, training_features
from models.selection import ModularLearner
from models.task_data import BankTask
from utils.config.config import Config, make_config
from utils.data.given import GivenImages, Images, checked_labels, sources_of
from utils.data.names import normal_name, spelled_as
from utils.data.splits import Dataset, Split
from utils.data.tasks import TaskStream, next_task
from utils.errors import BackboneError, ConfigError, DataError
from utils.features.arrays import TEST_VIEW
from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.files import FolderLock, expanded
from utils.logs import epoch_bar
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.continuing import read_run
from utils.runs.manifest import RunManifest, TaskRecord
from utils.seeds import float32_by_default
from utils.words import task_place

__all__ = ["ContinualClassifier", "Predictions"]


class ContinualClassifier(Predictor):
    """A saved run that answers and goes on learning, task after task. Make one with ``load``.

    Any number of threads may predict with one object at a time; learning needs it alone.
    """

    @classmethod
    @float32_by_default()
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
        checkpoint = CheckpointFolder(expanded(folder))
        manifest = read_run(checkpoint)
        changed: dict[str, Any] = {"precision": manifest.backbone["precision"]}
        if backbone_weights is not None:
            changed["backbone_weights"] = str(backbone_weights)
        if device is not None:
            changed["device"] = [device]
        config = make_config({**manifest.config, **changed}, str(checkpoint.manifest_path))
        backbone = _load_same_backbone(config, manifest, resolve_device(config))
        learner = load_learner(config, backbone, manifest.seed, checkpoint, manifest)
        return cls(config, backbone, learner, manifest)

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
        if not sources:
            raise DataError("there is no image to learn from")
        labels = checked_labels(labels, len(sources))
        if not self.config.method.continual:
            raise ConfigError(f"{self.config.model_name} needs the data of all tasks; it cannot learn a task alone")
        if self._learned.domains and domain is None:
            raise DataError("the run is domain-incremental: name the new images' domain, learn(..., domain=<name>)")
        labels = [normal_name(label) for label in labels]  # one form for names that look the same
        if domain is not None:
            known = spelled_as(sorted(set(labels)), self.class_names, "class", "the labels")
            labels = [known[label] for label in labels]
        names = sorted(set(labels))
        learned = self._learned.with_task(names, domain)
        task = next_task(self._learned, np.asarray([names.index(label) for label in labels]), len(names))
        split = GivenImages(sources, labels, self.max_pixels)
        bank = self._bank(split)
        bank.fill(training_features(self.config))
        self.backbone_forwards += bank.forwards
        stream = TaskStream((task,), learned.class_names, learned.row_class)
        title = f"Task {task_place(task.index, task.index + 1, learned.domains)}"
        with epoch_bar(title, self.config.epochs, shown=self.config.method.augmented) as advance:
            self.learner.learn(
                BankTask(bank, stream, task, self.config.views, self.backbone.device),
                lambda _, stats: advance(stats.loss, stats.accuracy),
            )
        content = hashlib.sha256(bank.read("train", TEST_VIEW, task.train).tobytes()).hexdigest()
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
            batch_size=self.batch_size,
            num_workers=0,
        )

    @property
    def manifest(self) -> RunManifest:
        """The record of the run: its config, data, results and files."""
        return self._manifest

    def save(self, folder: str | Path) -> Path | None:
        """Write a checkpoint folder that ``load``, ``predict.py`` and ``continue_from`` read.

        What another run has there is moved aside, never overwritten.

        Returns:
            where that went, or None.

        Raises:
            UserError: the folder cannot be written, or a run is at work in it.
        """
        checkpoint = CheckpointFolder(expanded(folder))
        with FolderLock(checkpoint.folder / ".lock", f"checkpoint folder {str(folder)!r}"):
            aside = checkpoint.move_aside()
            modules = [self.learner.module_state(task) for task in range(self.tasks)]  # None for each without modules
            self._manifest = checkpoint.commit_all(self._manifest, self.learner.state_dict(), modules)
        return aside

    # -- other processes -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain values and tensors from which ``from_state`` makes the same object; the backbone is named, not held."""
        return {
            "config": self.config.as_dict(),
            "manifest": self._manifest.to_json(),
            "device": str(self.backbone.device),
            "max_pixels": self.max_pixels,
            "learner": {name: tensor.cpu() for name, tensor in self.learner.state_dict().items()},
            "modules": [{name: t.cpu() for name, t in state.items()} for state in self.module_states()],
        }

    @classmethod
    @float32_by_default()
    def from_state(cls, state: dict[str, Any]) -> "ContinualClassifier":
        """The object whose ``state`` this is; the backbone's weights are read again, and must be the same.

        Raises:
            BackboneError: the weights cannot be had, or are not those of the run.
        """
        manifest = RunManifest.from_json(state["manifest"])
        config = make_config(state["config"], "the state of a model")
        backbone = _load_same_backbone(config, manifest, torch.device(state["device"]))
        learner = make_learner(config, backbone.feature_dim, backbone.device, manifest.seed)
        learner.load_state_dict(state["learner"], state["modules"])
        model = cls(config, backbone, learner, manifest)
        model.max_pixels = state["max_pixels"]
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        return maker(ContinualClassifier.from_state, "from_state"), (self.state(),)

    # -- taking it elsewhere (export.py, hub.py) ---------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write what the Hugging Face hub stores: the checkpoint, the backbone's file if it is local, a model card."""
        return hub.save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | None = None) -> "ContinualClassifier":
        """Load a folder of ``save_pretrained``, or ``user/repo`` from the Hugging Face hub."""
        folder = hub.find_pretrained(name)
        return cls.load(folder, backbone_weights=hub.shipped_weights(folder), device=device)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the model as ``user/repo``; return its address. Log in first (``hf auth login``)."""
        return hub.push_to_hub(self, repo_id, private=private)


# -- reading a run ----------------------------------------------------------------------------------------------------


def _load_same_backbone(config: Config, manifest: RunManifest, device: torch.device) -> Backbone:
    try:
        cache_dir = resolve_cache_dir(config.cache_dir)  # of the run's machine, which may be another one
        backbone = load_backbone(config, device, cache_dir if cache_dir and cache_dir.is_dir() else None)
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
