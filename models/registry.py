"""Name -> learner: the files of this folder that declare a ``METHOD``, each with the one learner it defines."""

import inspect
from importlib import import_module
from pathlib import Path

import torch

from models.base import Learner
from utils.config import Config
from utils.features.arrays import View
from utils.features.batches import TEST_VIEW
from utils.methods import METHODS, read_method


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
