"""For other projects: torch.hub.load(<this folder, or owner/repository>, "tosca", checkpoint=<a run's folder>)."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from models import ContinualClassifier

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "tqdm"]

_HERE = Path(__file__).resolve().parent
_OWN = ("trainer", "models", "backbone", "utils")  # top-level names that the caller's project may have as well
_LATER = [  # imported late, yet within the window below
    *(
        "models.api.classifier",
        "models.api.predictions",
        "models.api.hub",
        "models.api.export",
    ),
    *("utils.data.transforms", "utils.data.folders", "utils.data.images", "utils.data.loader"),
    "utils.features.extraction",
]


def tosca(checkpoint: str, backbone_weights: str | None = None, device: str | None = None) -> "ContinualClassifier":
    """A saved run as a classifier that goes on learning.

    Args:
        checkpoint: the run's ``checkpoint_dir``.
        backbone_weights: where the backbone's file is now; by default as the run's config says.
        device: ``"cpu"`` or the number of an accelerator; by default as the run's config says.

    Returns:
        a ``models.ContinualClassifier``: ``predict``, ``learn``, ``save``.
    """
    load = _models().ContinualClassifier.load
    return cast("ContinualClassifier", load(checkpoint, backbone_weights=backbone_weights, device=device))


def _models() -> ModuleType:
    """Our package ``models``, loaded beside whatever the caller's project calls ``utils``, ``models`` and so on.

    For the import alone our modules stand under their names; then the caller's take their places back, and ours live
    on through what they import from each other. Those that are imported later are asked for within, once.
    """
    kept = f"tosca_hub:{_HERE}"  # a second load answers with the same classes
    if kept in sys.modules:
        return sys.modules[kept]
    if _is_ours(sys.modules.get("models")):  # the caller works in this folder
        return sys.modules["models"]
    theirs = _taken_out()
    sys.path.insert(0, str(_HERE))
    try:
        sys.modules[kept] = importlib.import_module("models")
        methods = [f"models.{path.stem}" for path in (_HERE / "models").glob("[!_]*.py")]
        for name in (*_LATER, *methods):
            importlib.import_module("utils").module(name)
    finally:
        sys.path.remove(str(_HERE))
        _taken_out()
        sys.modules.update(theirs)
    return sys.modules[kept]


def _is_ours(module: ModuleType | None) -> bool:
    return module is not None and Path(getattr(module, "__file__", None) or "").parent.parent == _HERE


def _taken_out() -> dict[str, ModuleType]:
    """Remove from the loaded modules all that stand under our names, and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in _OWN}
