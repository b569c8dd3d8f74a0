"""Name -> learner: the file of the method that a run uses is imported, no other."""

import inspect

import torch

from models.base import Learner
from utils import module
from utils.config.config import Config
from utils.config.methods import METHODS
from utils.errors import DamagedRunError
from utils.features.arrays import TEST_VIEW, View
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.manifest import RunManifest
from utils.runs.tensors import first_line


def learner_class(name: str) -> type[Learner]:
    """The one learner that the file of the method ``name`` defines.

    Raises:
        ValueError: it defines none, or more than one.
    """
    file = module(METHODS[name].module)
    found = [
        kind
        for kind in vars(file).values()
        if inspect.isclass(kind)
        and issubclass(kind, Learner)
        and kind.__module__ == file.__name__
        and not inspect.isabstract(kind)
    ]
    if len(found) != 1:
        raise ValueError(f"{file.__file__} declares a METHOD, so it must define one learner; it defines {len(found)}")
    return found[0]


def make_learner(config: Config, dim: int, device: torch.device, seed: int) -> Learner:
    """The learner that ``config.model_name`` names, before its first task."""
    return learner_class(config.model_name)(config, dim, device, seed)


def training_features(config: Config) -> list[View]:
    """The (split, view) that training reads: only a learner that trains on augmented views pays for them."""
    views = config.views if config.method.augmented else 0
    return [("train", TEST_VIEW), *(("train", view) for view in range(views))]


def load_learner(
    config: Config, dim: int, device: torch.device, checkpoint: CheckpointFolder, manifest: RunManifest
) -> Learner:
    """The learner of a run as its last commit left it; before its first task a new one."""
    learner = make_learner(config, dim, device, manifest.seed)
    if not manifest.tasks:
        return learner
    tensors = checkpoint.load(manifest)
    try:
        learner.load_state_dict(*tensors)
        with torch.no_grad():  # through all that answers: tensors of other shapes show here, not in the first answer
            feature = torch.zeros(1, dim, device=device)
            widths = {learner.answer(feature, selection).scores.shape[1] for selection in learner.selections}
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise DamagedRunError(
            f"the files in {checkpoint.folder} do not fit the config of their run ({first_line(error)})"
        ) from error
    if widths != {manifest.learned().rows} or learner.tasks != len(manifest.tasks):
        raise DamagedRunError(f"the files in {checkpoint.folder} do not fit the tasks of their run")
    return learner
