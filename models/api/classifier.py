"""A classifier that learns task after task on a frozen backbone: started from nothing, or a saved run.

    from models import ContinualClassifier

    model = ContinualClassifier.start(backbone_type="vit_base_patch16_224")   # any key of a config
    model.learn(images, labels)                                               # one call is one task
    model.evaluate(test_images, test_labels)["sample"]["top1"]
    model.predict(["a.jpg", "b.jpg"]).classes                                 # ["owl", "fox"]
    model.save("tosca")

``trainer.py`` learns, answers and saves through the same object, and ``predict.py`` predicts through it.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbone.vit import Backbone, load_backbone, resolve_device
from models.api.predictor import Known, Predictor
from models.base import TaskData, make_learner, training_features, twin
from models.evaluation import BankTask, evaluate
from models.modular import ModularLearner
from utils import module
from utils.config.config import Config, make_config
from utils.data.given import GivenImages, Images, checked_labels, sources_of
from utils.data.splits import Dataset, Split, normal_name
from utils.data.tasks import Task, TaskStream, next_task
from utils.errors import BackboneError, ConfigError, DataError
from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.features.rows import TEST_VIEW
from utils.files import FolderLock, expanded
from utils.logs import epoch_bar
from utils.runs.checkpoint import CheckpointFolder, read_run
from utils.runs.manifest import EpochStats, RunManifest, TaskRecord, first_manifest
from utils.seeds import modes_of_a_run
from utils.words import task_place


class ContinualClassifier(Predictor):
    """A frozen backbone and what was learned on it, which answers and goes on learning: ``start`` or ``load`` one."""

    # -- making one ------------------------------------------------------------------------------------------------

    @classmethod
    @modes_of_a_run()
    def start(cls, **keys: Any) -> "ContinualClassifier":
        """Begin with nothing learned.

        Args:
            keys: of a config (docs/config.md); ``backbone_type`` is the one that is needed, those of data are not.
        """
        config = make_config({"dataset": "imagefolder", "init_cls": 1, "increment": 1, **keys}, "start")
        if len(config.seed) > 1:
            raise ConfigError(f"start: seed {list(config.seed)}: a model has one seed")
        device = resolve_device(config)
        backbone = load_same_backbone(config, device, None)
        manifest = first_manifest(config, config.seed[0], backbone)
        learner = make_learner(config, backbone.feature_dim, device, manifest.seed)
        return cls(config, backbone, Known.after(learner, manifest))

    @classmethod
    @modes_of_a_run()
    def load(
        cls, folder: str | Path, *, backbone_weights: str | Path | None = None, device: str | None = None
    ) -> "ContinualClassifier":
        """Read a checkpoint folder; every file is checked against its SHA-256, the backbone too.

        Args:
            folder: a run's ``checkpoint_dir`` (of several seeds, one ``seed<seed>/`` in it).
            backbone_weights: where the backbone's file is now; by default as the run's config says.
            device: ``"cpu"`` or the number of an accelerator; by default as the run's config says.
        """
        checkpoint = CheckpointFolder(expanded(folder))
        manifest = read_run(checkpoint)
        changed: dict[str, Any] = {"precision": manifest.backbone["precision"]}
        changed |= {} if backbone_weights is None else {"backbone_weights": str(backbone_weights)}
        changed |= {} if device is None else {"device": [device]}
        config = make_config({**manifest.config, **changed}, str(checkpoint.manifest_path))
        backbone = load_same_backbone(config, resolve_device(config), manifest.backbone["weights_sha256"])
        return cls(config, backbone, Known.read(config, backbone.feature_dim, backbone.device, checkpoint, manifest))

    # -- learning --------------------------------------------------------------------------------------------------

    @modes_of_a_run()
    def learn(self, images: Images, labels: Iterable[str], *, domain: str | None = None) -> None:
        """Learn the next task from its images alone, by the model's settings (epochs, views, rate …).

        Earlier modules stay as they are, bit for bit; whatever stops this call leaves the model as it was. The classes
        are learned in the order in which their first images come. Features are kept in memory for the length of the
        call: 4 bytes x ``dim`` x (views + 1) for each image; for large data use ``main.py`` with ``continue_from``.

        Args:
            images: as for ``predict``.
            labels: the class name of each image; all of them new.
            domain: makes the images a new domain of this name: known class names may come again.
        """
        sources = sources_of(images)
        if not sources:
            raise DataError("there is no image to learn from")
        labels = checked_labels(labels, len(sources))
        if not self.config.method.continual:
            raise ConfigError(f"{self.config.model_name} needs the data of all tasks; it cannot learn a task alone")
        if self.domains and domain is None:
            raise DataError("the run is domain-incremental: name the new images' domain, learn(..., domain=<name>)")
        named = [normal_name(label) for label in labels]  # one form for names that look the same
        names = list(dict.fromkeys(named))
        before = self._known.learned
        learned = before.with_task(names, domain)
        task = next_task(before, np.asarray([names.index(label) for label in named]), len(names))
        bank = self._bank(GivenImages(sources, named, self.max_pixels))
        bank.fill(training_features(self.config))
        self.backbone_forwards += bank.forwards
        content = hashlib.sha256(bank.read("train", TEST_VIEW, task.train).tobytes()).hexdigest()
        stream = TaskStream((task,), learned.class_names, learned.row_class)
        manifest = self.manifest.with_images(learned, len(sources), content)
        self.learn_task(BankTask(bank, stream, task, self.config.views, self.backbone.device), manifest)

    def learn_task(
        self,
        task: TaskData,
        manifest: RunManifest,
        on_epoch: Callable[[int, EpochStats], None] = lambda epoch, stats: None,
    ) -> None:
        """Learn the next of the tasks that ``manifest`` lays out; this is where every task is learned.

        Args:
            on_epoch: is called after each epoch of training with its number from 0.
        """
        learner, epochs = twin(self.learner), list[EpochStats]()
        title = f"Task {task_place(task.index, len(manifest.task_sizes), manifest.domains)}"
        with epoch_bar(title, self.config.epochs, shown=self.config.method.augmented) as advance:

            def after_epoch(epoch: int, stats: EpochStats) -> None:
                epochs.append(stats)
                on_epoch(epoch, stats)
                advance(stats.loss, stats.accuracy)

            learner.learn(task, after_epoch)
        record = TaskRecord(
            sparsity=learner.sparsity(task.index) if isinstance(learner, ModularLearner) else None,
            parameters={"backbone": self.backbone.parameters, **learner.parameter_counts()},
            epochs=tuple(epochs),
        )
        self._known = Known.after(learner, manifest.with_task(record))

    def note(self, manifest: RunManifest) -> None:
        """Take over a manifest that tells more of the same tasks, such as their results."""
        self._known = self._known._replace(manifest=manifest)

    @modes_of_a_run()
    def evaluate(
        self, images: Images, labels: Iterable[str], *, domain: str | None = None
    ) -> dict[str, dict[str, Any]]:
        """Test on images of learned classes, in class order as ``main.py`` does.

        Args:
            domain: where the images are from, in a domain-incremental run.

        Returns:
            For every selection ``top1``, ``top5``, ``per_task`` (None for a task without images) and, with modules,
            ``selection_accuracy``, all in percent. ``batch`` looks at 48 images at a time (docs/selection.md).
        """
        self.check_learned()
        sources, learned = sources_of(images), self._known.learned
        given = [normal_name(label) for label in checked_labels(labels, len(sources))]
        if not sources:
            raise DataError("there is no image to test on")
        if unknown := [name for name in given if name not in self.class_names]:
            raise DataError(f"class {unknown[0]!r} is not learned, so it cannot be tested")
        if bool(self.domains) != (domain is not None) or (domain is not None and domain not in self.domains):
            raise DataError(f"domain {domain!r}: give one of {', '.join(self.domains) or 'none: there are no domains'}")
        classes = np.array([self.class_names.index(label) for label in given])
        nothing, tasks = np.empty(0, dtype=np.int64), []
        for index, rows in enumerate(learned.task_rows):
            mine = np.isin(classes, learned.row_class[rows]) & (domain is None or self.domains[index] == domain)
            found = np.flatnonzero(mine)[np.argsort(classes[mine], kind="stable")]
            tasks.append(Task(index, rows, nothing, nothing, found, classes[found]))
        stream = TaskStream(tuple(tasks), learned.class_names, learned.row_class, learned.domains)
        bank = self._bank(GivenImages(sources, given, self.max_pixels))
        bank.fill([("test", TEST_VIEW)])
        self.backbone_forwards += bank.forwards
        tested = evaluate(self.learner, bank, stream, self.tasks - 1, self.manifest.seed).record.results
        return {name: {k: v for k, v in of.items() if k != "groups"} for name, of in tested.items()}

    def _bank(self, split: Split) -> FeatureBank:
        bank = FeatureBank(
            Dataset("images", split, split, ()),
            self.backbone,
            image_size=self.config.image_size,
            augment_seed=self.config.view_seed(self.manifest.seed),
            fingerprints={},
            cache_dir=None,
            batch_size=self.batch_size,
            num_workers=0,
        )
        return bank

    # -- keeping it, other processes, other places -----------------------------------------------------------------

    def save(self, folder: str | Path) -> Path | None:
        """Write a checkpoint folder that ``load``, ``predict.py`` and ``continue_from`` read.

        What another run has there is moved aside, never overwritten; where it went, is returned.
        """
        self.check_learned()
        checkpoint = CheckpointFolder(expanded(folder))
        with FolderLock(checkpoint.folder / ".lock", f"checkpoint folder {str(folder)!r}"):
            aside = checkpoint.move_aside()
            modules = [self.learner.module_state(task) for task in range(self.tasks)]  # None for each without modules
            self.note(checkpoint.commit(self.manifest, self.learner.state_dict(), dict(enumerate(modules))))
        return aside

    def __reduce__(self) -> tuple[Any, ...]:
        """Plain values and tensors, of which ``from_state`` makes the same object; the backbone is named, not held."""
        state = {
            "config": self.config.as_dict(),
            "manifest": self.manifest.to_json(),
            "device": str(self.backbone.device),
            "max_pixels": self.max_pixels,
            "learner": {name: tensor.cpu() for name, tensor in self.learner.state_dict().items()},
            "modules": [{name: t.cpu() for name, t in of_task.items()} for of_task in self.module_states()],
        }
        return ContinualClassifier.from_state, (state,)

    @classmethod
    @modes_of_a_run()
    def from_state(cls, state: dict[str, Any]) -> "ContinualClassifier":
        """The object that was pickled; the backbone's weights are read again, and must be the same."""
        manifest = RunManifest.from_json(state["manifest"])
        config = make_config(state["config"], "the state of a model")
        backbone = load_same_backbone(config, torch.device(state["device"]), manifest.backbone["weights_sha256"])
        learner = make_learner(config, backbone.feature_dim, backbone.device, manifest.seed)
        if manifest.tasks:
            learner.load_state_dict(state["learner"], state["modules"])
        model = cls(config, backbone, Known.after(learner, manifest))
        model.max_pixels = state["max_pixels"]
        return model

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write what the Hugging Face hub stores: the checkpoint, the backbone's file if it is local, a model card."""
        path: Path = module("models.api.hub").save_pretrained(self, folder)
        return path

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | None = None) -> "ContinualClassifier":
        """Load a folder of ``save_pretrained``, or ``user/repo`` from the Hugging Face hub."""
        hub = module("models.api.hub")
        folder = hub.find_pretrained(name)
        return cls.load(folder, backbone_weights=hub.shipped_weights(folder), device=device)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the model as ``user/repo``; return its address. Log in first (``hf auth login``)."""
        return str(module("models.api.hub").push_to_hub(self, repo_id, private=private))


def load_same_backbone(config: Config, device: torch.device, sha256: str | None) -> Backbone:
    """The backbone that ``config`` names; its weights must have that hash, if one is given."""
    try:
        cache_dir = resolve_cache_dir(config.cache_dir)  # of the run's machine, which may be another one
        backbone = load_backbone(config, device, cache_dir if cache_dir and cache_dir.is_dir() else None)
    except BackboneError as error:
        if sha256 and config.backbone_weights and not Path(config.backbone_weights).is_file():
            raise BackboneError(f"{error}; say where it is now with --backbone-weights=<file>") from None
        raise
    if sha256 not in (None, backbone.weights_sha256):
        raise BackboneError(
            f"the weights of {backbone.name} are not those of the run: their SHA-256 is "
            f"{backbone.weights_sha256[:12]}…, the run's {str(sha256)[:12]}…; modules fit the weights that they were "
            "trained on alone: give that file with --backbone-weights"
        )
    return backbone
