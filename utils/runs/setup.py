"""What all seeds of a run share: config, data and backbone, checked against each other; where each one's files go."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.config import Config
from utils.data.splits import Dataset
from utils.data.tasks import TaskStream, make_stream
from utils.errors import UserError
from utils.features.bank import FeatureBank, resolve_cache_dir
from utils.files import free_name
from utils.ranks import Ranks
from utils.runs.checkpoint import CheckpointFolder
from utils.runs.manifest import run_identity

if TYPE_CHECKING:
    from utils.runs.continuing import SavedRun


@dataclass(frozen=True)
class Setup:
    """Config, data and backbone, checked against each other."""

    config: Config
    data: Dataset
    backbone: Any  # a ``backbone.vit.Backbone``
    fingerprints: dict[str, str]  # of each split's images
    ranks: Ranks
    base: "SavedRun | None" = None  # the saved run that this one continues

    def stream(self, seed: int) -> TaskStream:
        return make_stream(self.data, self.config, seed, self.base.learned if self.base else None)

    def bank(self, seed: int, backbone: Any = None) -> FeatureBank:
        """The features of ``backbone``, by default the plain one."""
        c = self.config
        return FeatureBank(
            self.data,
            backbone or self.backbone,
            image_size=c.image_size,
            augment_seed=c.view_seed(seed),
            fingerprints=self.fingerprints,
            cache_dir=resolve_cache_dir(c.cache_dir),
            batch_size=c.feature_batch_size,
            num_workers=c.num_workers,
            ranks=self.ranks,
        )

    def identity(self, seed: int) -> dict[str, Any]:
        identity = run_identity(self.config, seed, self.backbone, self.fingerprints)
        return identity if self.base is None else {**identity, "base": self.base.sha256}

    def checkpoint(self, seed: int) -> CheckpointFolder:
        return checkpoint_of(self.config, seed)


def checkpoint_of(config: Config, seed: int) -> CheckpointFolder:
    """``tosca/``, or with several seeds ``tosca/seed<seed>/``."""
    folder = Path(config.checkpoint_dir).expanduser()
    return CheckpointFolder(folder / f"seed{seed}" if len(config.seed) > 1 else folder)


WRITTEN_WHOLE = (".json", ".png", ".npz")  # by a temporary file, which a kill may leave
SUFFIXES = (".log", *WRITTEN_WHOLE, ".tensorboard", ".wandb")


@dataclass(frozen=True)
class RunPaths:
    """Where one seed's log, JSON and pictures go: files that share a stem, in PILOT's folders."""

    folder: Path
    stem: str

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}{suffix}"

    def move_aside(self) -> list[Path]:
        """Rename another run's files at this stem; return their new names."""
        stamp, moved = time.strftime("%Y%m%d-%H%M%S"), []
        for suffix in SUFFIXES:
            path = self.file(suffix)
            if path.exists():
                new = free_name(path.with_name(f"{self.stem}.{stamp}{suffix}"))
                try:
                    path.rename(new)
                except OSError as error:
                    raise UserError(f"{path} cannot be moved aside ({error.strerror})") from error
                moved.append(new)
        return moved


def run_paths(config: Config, seed: int) -> RunPaths:
    """``logs/<model>/<dataset>/<init_cls>/<increment>/[<prefix>_]<seed>_<backbone>``; equal steps: 0.

    Domain-incremental runs have ``domain/1``: a task is one domain. What some system refuses in a file's name, such as
    the colon of ``hf-hub:user/repo``, becomes ``_``.
    """
    first, step = str(0 if config.init_cls == config.increment else config.init_cls), str(config.increment)
    if config.scenario == "domain":
        first, step = "domain", "1"
    folder = Path(config.log_dir).expanduser() / config.model_name / config.dataset / first / step
    stem = f"{config.prefix}_{seed}_{config.backbone_type}" if config.prefix else f"{seed}_{config.backbone_type}"
    return RunPaths(folder, re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", stem))
