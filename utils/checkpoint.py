"""A run's folder of modules: verified when read, committed in one step after each task, never overwritten.

``task<i>.pth`` is a LuCA alone, under the release's keys. ``classifier<t>.pth`` is what else prediction and further
learning need after task t. ``run.json`` names both with their SHA-256, the run's identity, and its results so far;
replacing it is the commit. A process that dies between two commits leaves the last one whole.
"""

import io
import json
import logging
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.config import Config
from utils.errors import CheckpointError
from utils.files import atomic_write, sha256_of_file, write_json

log = logging.getLogger(__name__)

MANIFEST = "run.json"
FORMAT = 1
MODULE_PREFIX = "backbone.tosca."  # in front of LuCA's parameters in the release's files
# keys that change where a run happens or what it prints, but not what it computes
_NOT_IDENTITY = (
    "prefix", "device", "seed", "selection", "data_path", "backbone_weights", "pretrained", "cache_dir", "precision",
    "feature_batch_size", "num_workers", "check_images", "checkpoint_dir", "log_dir", "tracker", "augment_seed",
    "train_views", "continue_from", "backbone_type",
)  # fmt: skip


def run_identity(
    config: Config, seed: int, *, weights_sha256: str, precision: str, images_sha256: dict[str, str]
) -> dict[str, Any]:
    """What makes two runs the same run: the config that matters, the data, the weights, the seed."""
    settings = {k: v for k, v in config.as_dict().items() if k not in _NOT_IDENTITY}
    augment_seed = None if not config.views else seed if config.augment_seed is None else config.augment_seed
    return {
        **settings,
        "views": config.views,
        "augment_seed": augment_seed,
        "precision": precision,
        "seed": seed,
        "weights_sha256": weights_sha256,
        "images_sha256": images_sha256,
    }


class CheckpointFolder:
    """The files of one run.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST

    def read_manifest(self) -> dict[str, Any] | None:
        """``run.json``, or None if there is none.

        Raises:
            CheckpointError: it is damaged or of a newer format.
        """
        try:
            manifest = json.loads(self.manifest_path.read_bytes())
            if not isinstance(manifest, dict) or not {"identity", "files", "tasks"} <= manifest.keys():
                raise ValueError("not a run's manifest")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self.manifest_path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise CheckpointError(f"{self.manifest_path} is damaged ({error}); {_WAY_OUT}") from error
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.manifest_path} has format {manifest.get('format')!r}, this code reads {FORMAT}"
            )
        return manifest

    def run_files(self) -> list[Path]:
        """The files here that belong to some run, ours or the release's."""
        if not self.folder.is_dir():
            return []
        found = [*self.folder.glob("task*.pth"), *self.folder.glob("classifier*.pth"), self.manifest_path]
        return sorted(path for path in found if path.is_file())

    def move_aside(self) -> Path | None:
        """Move a run's files to a new folder beside this one and return it; None if there are none."""
        files = self.run_files()
        if not files:
            return None
        aside = free_name(self.folder.with_name(f"{self.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        try:
            aside.mkdir(parents=True)
            for path in files:
                os.replace(path, aside / path.name)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be moved aside ({error.strerror})") from error
        return aside

    def commit(
        self, manifest: dict[str, Any], state: dict[str, Tensor], module: dict[str, Tensor] | None, task: int
    ) -> dict[str, Any]:
        """Save what task ``task`` changed, then the manifest that names it; return that manifest."""
        files = {name: sha for name, sha in manifest["files"].items() if not name.startswith("classifier")}
        if module is not None:
            keys = {MODULE_PREFIX + name: tensor for name, tensor in module.items()}
            files[f"task{task}.pth"] = self._save(f"task{task}.pth", keys)
        files[f"classifier{task}.pth"] = self._save(f"classifier{task}.pth", state)
        manifest = {**manifest, "files": files}
        write_json(self.manifest_path, manifest)
        for old in self.folder.glob("classifier*.pth"):
            if old.name not in files:
                old.unlink(missing_ok=True)
        return manifest

    def _save(self, name: str, state: dict[str, Tensor]) -> str:
        buffer = io.BytesIO()
        torch.save({key: tensor.detach().cpu().clone() for key, tensor in state.items()}, buffer)
        atomic_write(self.folder / name, lambda file: file.write(buffer.getbuffer()))
        return sha256_of_file(self.folder / name)

    def load(self, manifest: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The last ``classifier<t>.pth`` and every ``task<i>.pth``, each checked against its SHA-256."""
        modules = []
        state: dict[str, Tensor] = {}
        for name, expected in manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing though {MANIFEST} names it; {_WAY_OUT}")
            if (found := sha256_of_file(path)) != expected:
                raise CheckpointError(
                    f"{path} is damaged or from another run: its SHA-256 is {found[:12]}…, "
                    f"{MANIFEST} says {expected[:12]}…; {_WAY_OUT}"
                )
            if name.startswith("task"):
                modules.append((int(name[4:-4]), module_from_file(path)))
            else:
                state = load_tensors(path)
        return state, [module for _, module in sorted(modules, key=lambda numbered: numbered[0])]


_WAY_OUT = "restore it from a copy, or start over with --fresh (which moves this folder's files aside)"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A plain state dict. No code in the file is ever run.

    Raises:
        CheckpointError: truncated, empty, not a state dict, or a pickle that wants to run code.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged and cannot be read ({_first_line(error)}); {_WAY_OUT}") from error
    except Exception as error:  # pickle.UnpicklingError and what a hostile file may provoke
        raise CheckpointError(f"{path} is not a plain state dict and was not loaded ({_first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} is not a plain state dict of tensors")
    return state


def module_from_file(path: Path) -> dict[str, Tensor]:
    """LuCA's parameters from a ``task<i>.pth``, the release's or ours."""
    return {name.removeprefix(MODULE_PREFIX): tensor for name, tensor in load_tensors(path).items()}


def free_name(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3`` … that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
