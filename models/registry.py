"""Name -> learner: the files of this folder that declare a ``METHOD``, each with the one learner it defines."""

import inspect
from importlib import import_module
from pathlib import Path

import torch

from models.base import Learner
from utils.config.config import Config
from utils.config.methods import METHODS, read_method
from utils.errors import DamagedRunError, is_lack_of_memory
from utils.features.arrays import TEST_VIEW, View
from utils.features.extraction import FeatureExtractor
from utils.runs.checkpoint import CheckpointFolder, first_line
from utils.runs.manifest import RunManifest
from utils.words import counted


def find_learners(folder: Path) -> dict[str, type[Learner]]:
    """Import each file of the package ``models`` in ``folder`` that declares a method; return its learner by name.

    Raises:
        ValueError: such a file defines no learner, or more than one.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        if (method := read_method(path)) is not None:
            found[method.name] = _learner_of(path)
    return {name: found[name] for name in METHODS}


def _learner_of(path: Path) -> type[Learner]:
    module = import_module(f"models.{path.stem}")
    learners = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Learner)
        and kind.__module__ == module.__name__
        and not inspect.isabstract(kind)
    ]
    if len(learners) != 1:
        raise ValueError(f"{path} declares a METHOD, so it must define one learner; it defines {len(learners)}")
    return learners[0]


LEARNERS = find_learners(Path(__file__).parent)


def training_features(config: Config) -> list[View]:
    """The (split, view) that training reads: only a learner that trains on augmented views pays for them."""
    views = config.views if config.method.augmented else 0
    return [("train", TEST_VIEW), *(("train", view) for view in range(views))]


def make_learner(config: Config, dim: int, device: torch.device, seed: int) -> Learner:
    """The learner that ``config.model_name`` names, before its first task."""
    return LEARNERS[config.model_name](config, dim, device, seed)


def load_learner(
    config: Config, backbone: FeatureExtractor, seed: int, checkpoint: CheckpointFolder, manifest: RunManifest
) -> Learner:
    """The learner of a run as its last commit left it; before its first task a new one.

    Raises:
        CheckpointError: a file is damaged, or holds tensors that do not fit the run's own config.
    """
    learner = make_learner(config, backbone.feature_dim, backbone.device, seed)
    if not manifest.tasks:
        return learner
    tensors, rows = checkpoint.load(manifest), manifest.learned().rows
    if len(tensors[1]) != (len(manifest.tasks) if config.method.modular else 0):
        raise DamagedRunError(
            f"{checkpoint.manifest_path} names {counted(len(tensors[1]), 'module')}, which do not fit its "
            f"{counted(len(manifest.tasks), 'task')}"
        )
    try:
        learner.load_state_dict(*tensors)
        feature = torch.zeros(1, backbone.feature_dim, device=backbone.device)
        with torch.no_grad():  # through all that answers: tensors of other shapes show here, not in the first answer
            widths = {learner.answer(feature, selection).scores.shape[1] for selection in learner.selections}
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        if is_lack_of_memory(error):
            raise
        raise DamagedRunError(
            f"the files in {checkpoint.folder} do not fit the config of their run ({first_line(error)})"
        ) from error
    if widths != {rows} or learner.tasks != len(manifest.tasks):
        raise DamagedRunError(f"the files in {checkpoint.folder} do not fit the tasks of their run")
    return learner
